"""Counts what a compiled program does from its text: kernels, bytes moved, loops, estimated cycles.

It reads the scheduled HLO that `jax.stages.Compiled.as_text()` gives. An operation of the entry, or of what the entry
calls, is a kernel; a loop counts its body as often as it turns, once if nobody knows how often that is; of the branches
of a conditional the one that moves most counts. A kernel moves bytes by these rules:

* It reads each operand once and writes each result once, whatever it does with them. A custom call, such as a Triton
  kernel, whose results overwrite its operands reads and writes each of these arrays once, too.
* What is sliced or gathered is read as far as the slice goes, and what is updated in place by a slice is read and
  written as far as that goes, within a fusion, too, where nothing else in it reads the whole array. (Counting such
  arrays whole overstates what a loop over tiles moves by its number of turns.)
* The scratch memory that a matrix product of cuBLAS or a convolution of cuDNN returns is not counted.
* What lies on the chip (a memory space in the layout) is not moved. Layouts in tiles count with their padding.
"""

from collections.abc import Iterator
import dataclasses
import math
import re
from typing import NamedTuple

BITS = {'pred': 8, 'bf16': 16, 's4': 4, 'u4': 4}
COLLECTIVES = ('all-gather', 'all-reduce', 'all-to-all', 'collective-permute', 'reduce-scatter')
FREE = {
  'after-all',
  'bitcast',
  'constant',
  'get-tuple-element',
  'opt-barrier',
  'parameter',
  'partition-id',
  'tuple',
}
SLICES = {'slice', 'dynamic-slice', 'gather'}
UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # The operand that holds what is put in.
# A kernel whose arrays are all smaller handles scalars.
SMALL = 4096


class Op(NamedTuple):
  """One line of a program.

  Attributes:
    name: of the operation.
    type: of its result.
    opcode: such as 'fusion'.
    operands: by name.
    rest: its attributes.
    is_root: whether it is what its computation returns.
    in_background: whether it only begins here.
  """

  name: str
  type: str
  opcode: str
  operands: list[str]
  rest: str
  is_root: bool
  in_background: bool

  @property
  def is_free(self) -> bool:
    """Whether it runs nothing."""
    # The end of what began in the background was counted at its start; a TPU takes arrays side by side for one.
    is_view = 'custom_call_target="ConcatBitcast"' in self.rest
    return self.opcode in FREE or self.opcode.endswith(('-done', '-update')) or is_view

  def called(self, attribute: str) -> list[str]:
    """Names of the computations in an attribute."""
    found = re.search(rf'\b{attribute}=(?:{{([^}}]*)}}|%?([\w.\-]+))', self.rest)
    return re.findall(r'[\w.\-]+', found[1] or found[2]) if found else []


Computation = dict[str, Op]

OP = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(([^)]*)\)?(.*)')
ARRAY = re.compile(r'([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?')


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """All computations by name, and the name of the entry."""
  computations: dict[str, Computation] = {}
  current, entry = None, ''
  for line in text.splitlines():
    if head := re.match(r'^(ENTRY )?%?([\w.\-]+) .*\{$', line):
      current = computations[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif current is not None and (found := OP.match(line)):
      root, name, type, opcode, operands, rest = found.groups()
      # A parameter's "operand" is its number.
      names = re.findall(r'%?([\w.\-]+)', re.sub(r'/\*.*?\*/', '', operands))
      if opcode.endswith('-start') and opcode not in ('async-start', 'copy-start'):
        # In the background: the type is of operands, result and what identifies it.
        current[name] = Op(name, elements(type)[1], opcode.removesuffix('-start'), names, rest, root is not None, True)
      else:
        current[name] = Op(name, type, opcode, names, rest, root is not None, opcode == 'copy-start')
  return computations, entry


def elements(type: str) -> list[str]:
  """The types in that of a tuple."""
  out, depth = [''], 0
  for character in re.sub(r'/\*.*?\*/', '', type)[1:-1]:
    depth += (character in '([{') - (character in ')]}')
    if character == ',' and depth == 0:
      out.append('')
    else:
      out[-1] += character
  return [element.strip() for element in out]


def array_sizes(type: str, on_chip: bool = False) -> list[float]:
  """Bytes of each array of a type, of those on the chip, zero unless they are asked for."""
  sizes = []
  for dtype, dims, layout in ARRAY.findall(type):
    found = re.search(r'\d+', dtype)
    bits = BITS.get(dtype) or (int(found[0]) if found else 0)
    lengths = [int(n) for n in dims.split(',') if n]
    order, _, tiling = layout.partition(':')
    if tile := re.match(r'T\(([\d,]+)\)', tiling):
      lengths = [lengths[int(axis)] for axis in reversed(order.split(',')) if axis]
      for i, n in enumerate(reversed([int(n) for n in tile[1].split(',')])):
        if i < len(lengths):
          lengths[-1 - i] = -(-lengths[-1 - i] // n) * n
    is_on_chip = re.search(r'S\([1-9]', tiling) is not None
    sizes.append(0.0 if is_on_chip and not on_chip else math.prod(lengths) * bits / 8)
  return sizes


@dataclasses.dataclass
class Counts:
  """What a program does.

  Attributes:
    kernels: operations that run.
    large_kernels: those that touch an array of more than 4 KiB.
    bytes: read and written.
    copied_bytes: those of plain copies from device memory to device memory.
    loops: that are in the program.
    unknown_loops: whose number of turns is not known, so that the host must wait before each.
    conditionals: for which it must wait as well.
    collectives: operations between devices.
    collective_bytes: that each device gets from them.
    cycles: that the compiler estimates, where it does.
  """

  kernels: int = 0
  large_kernels: int = 0
  bytes: float = 0.0
  copied_bytes: float = 0.0
  loops: int = 0
  unknown_loops: int = 0
  conditionals: int = 0
  collectives: int = 0
  collective_bytes: float = 0.0
  cycles: int = 0

  def add(self, other: 'Counts', times: int = 1) -> None:
    """Adds what happens so many times; loops and conditionals are counted as they stand in the program."""
    for field in dataclasses.fields(self):
      once = field.name in ('loops', 'unknown_loops', 'conditionals')
      value = getattr(other, field.name) * (1 if once else times)
      setattr(self, field.name, getattr(self, field.name) + value)


class Program:
  """A parsed program.

  Attributes:
    computations: by name.
    entry: the name of the first to run.
  """

  def __init__(self, text: str):
    self.computations, self.entry = parse(text)

  def count(self) -> Counts:
    """What the whole program does."""
    return self._count(self.entry)

  def _count(self, name: str) -> Counts:
    total, computation = Counts(), self.computations[name]
    for op in computation.values():
      if op.opcode == 'while':
        turns = re.search(r'known_trip_count\W+n\W+(\d+)', op.rest)
        total.loops += 1
        total.unknown_loops += turns is None
        total.add(self._count(*op.called('body')), int(turns[1]) if turns else 1)
      elif op.opcode == 'conditional':
        total.conditionals += 1
        names = op.called('branch_computations') or op.called('true_computation') + op.called('false_computation')
        total.add(max(map(self._count, names), key=lambda counts: counts.bytes))
      elif op.opcode in ('call', 'async-start'):
        total.add(self._count(*(op.called('to_apply') or op.called('calls'))))
      elif not op.is_free:
        total.add(self._count_kernel(computation, op))
    return total

  def _count_kernel(self, computation: Computation, op: Op) -> Counts:
    moved, touched = (self._pieces(computation, op, on_chip) for on_chip in (False, True))
    cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
    # An engine of its own moves what is copied in the background.
    is_kernel = not op.in_background or op.opcode in ('fusion', 'custom-call')
    is_collective = op.opcode in COLLECTIVES
    return Counts(
      kernels=int(is_kernel),
      large_kernels=int(is_kernel and max(touched, default=0) > SMALL),
      bytes=sum(moved),
      collectives=int(is_collective),
      collective_bytes=sum(array_sizes(op.type, on_chip=True)) if is_collective else 0.0,
      copied_bytes=sum(moved) if self._is_copy(op) and moved == touched else 0.0,
      cycles=int(cycles[1]) if cycles else 0,
    )

  def _is_copy(self, op: Op) -> bool:
    """Whether it does nothing else, in a fusion too."""
    if op.opcode != 'fusion':
      return op.opcode in ('copy', 'copy-start')
    inner = self.computations[op.called('calls')[0]].values()
    return {other.opcode for other in inner} <= {'parameter', 'copy', 'bitcast', 'tuple'}

  def _pieces(self, computation: Computation, op: Op, on_chip: bool) -> list[float]:
    """Bytes of each operand that an operation reads, and of each result that it writes."""
    sizes = array_sizes(op.type, on_chip)
    if op.opcode == 'copy-start':
      return sizes[:2]  # What it writes, what it reads, and a flag.
    reads = [self._read(computation, op, i, on_chip) for i in range(len(op.operands))]
    if op.opcode == 'custom-call' and re.search(r'custom_call_target="__cu(blas|dnn)', op.rest) and len(sizes) > 1:
      return reads + sizes[:-1]
    if op.opcode == 'fusion':
      return reads + self._written(self.computations[op.called('calls')[0]], on_chip, op.type)
    return [*reads, self._size_put(computation, op, on_chip)]

  def _size_put(self, computation: Computation, op: Op, on_chip: bool) -> float:
    """Bytes that an operation writes if what it updates is in place."""
    if op.opcode in UPDATES:
      return sum(array_sizes(computation[op.operands[UPDATES[op.opcode]]].type, on_chip))
    return sum(array_sizes(op.type, on_chip))

  def _written(self, inner: Computation, on_chip: bool, type: str) -> list[float]:
    """Bytes of each result that a fusion writes; memory spaces are those of its own type."""
    spaces = array_sizes(type, on_chip)
    outputs = list(self._outputs(inner))
    if len(outputs) == 1 < len(spaces):  # One operation with several results, such as a reduction of pairs.
      return spaces
    return [min(whole, self._size_put(inner, op, True)) for whole, op in zip(spaces, outputs, strict=True)]

  def _outputs(self, inner: Computation) -> Iterator[Op]:
    """What a fusion returns, one by one, with bitcasts looked through."""
    (root,) = (op for op in inner.values() if op.is_root)
    for op in [inner[name] for name in root.operands] if root.opcode == 'tuple' else [root]:
      while op.opcode == 'bitcast':
        op = inner[op.operands[0]]
      yield op

  def _read(self, computation: Computation, op: Op, i: int, on_chip: bool) -> float:
    """Bytes that an operation reads of its operand number i."""
    whole = sum(array_sizes(computation[op.operands[i]].type, on_chip))
    if op.opcode == 'fusion':
      return min(whole, self._read_inside(self.computations[op.called('calls')[0]], i))
    return min(whole, self._read_by(computation, op, i))

  def _read_by(self, computation: Computation, op: Op, i: int) -> float:
    """The same for what is not a fusion, memory spaces aside."""
    if op.opcode in SLICES and i == 0:
      return sum(array_sizes(op.type, True))
    if op.opcode in UPDATES and i == 0:
      # A scatter adds to what it finds.
      return self._size_put(computation, op, True) if op.opcode == 'scatter' else 0.0
    return math.inf

  def _read_inside(self, inner: Computation, number: int) -> float:
    """Bytes that a fusion reads of its parameter of that number: all uses together."""
    in_place = {op.name for op in self._outputs(inner)}
    names = {op.name for op in inner.values() if op.opcode == 'parameter' and op.operands == [str(number)]}
    total = 0.0
    for op in inner.values():  # Operands come before what uses them.
      for i, name in enumerate(op.operands):
        if name not in names or op.opcode == 'parameter':
          continue
        if op.opcode == 'bitcast':
          names.add(op.name)
        elif op.opcode == 'fusion':
          total += self._read_inside(self.computations[op.called('calls')[0]], i)
        elif op.opcode in UPDATES and op.name not in in_place:
          total = math.inf
        else:
          total += self._read_by(inner, op, i)
    return total


def count(text: str) -> Counts:
  """What the program of this text does."""
  return Program(text).count()
