"""The tile loop as kernels for TPUs, through Pallas: a grid of blocks in fast memory, and in each a loop over tiles.

XLA on a TPU pads every array to vectors of 8 rows and 128 lanes, so that the loop's cell view, of rows of 32, costs
four times the memory and the time, and goes through memory besides. One kernel moves each array once, and computes in
the lane view, in tiles of a few vectors. While it computes one block, Pallas fetches the next and writes the last one.

A tile's scales begin at any lane or row of a vector, where only a static slice can cut it: so the scales of a block are
laid out by tile first, and gathered last.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _view

# Of a vector: rows of the smallest dtype, which packs four of them into one row of 32 bits, and lanes.
_ROWS = 32
_SUBLANES = 8
_LANES = _view.LANES

# Elements in a tile, and columns in one of few rows. Compiled for a v5e, sgdm takes .051, .043, .039 and .036 cycles a
# parameter in 512, 1024, 2048 and 4096 columns, as scales fill more of their lanes, and longer to compile.
_TILE = 2**16
_TILE_COLUMNS = 2048
# What the scales of a tile take, as so many columns more of elements would.
_SCALES_COLUMNS = 256
# Elements in a block, or up to twice as many: half a dozen arrays of them, each twice, are a few MiB.
_BLOCK = 2**18
# Above, what the compiler makes of a tile has too many instructions.
_MOST_IN_TILE = 2**17
_SPARE_BYTES = 2**24

_DTYPES = frozenset({'int8', 'uint8', 'int16', 'uint16', 'float32', 'bfloat16'})


class Plan(NamedTuple):
  """How an array is cut.

  Attributes:
    block: the shape of what is in fast memory at a time; the last one along an axis may reach beyond the array.
    tile: the shape of what is computed at a time; blocks are made of whole tiles.
    turns: whether scales of blocks along the last axis come and go with their last two axes swapped, as XLA stores an
      array of few columns; it would copy it, padded to 128 columns, otherwise.
  """

  block: tuple[int, ...]
  tile: tuple[int, ...]
  turns: bool

  @property
  def counts(self) -> tuple[int, ...]:
    """Tiles of a block, per axis."""
    return tuple(b // t for b, t in zip(self.block, self.tile, strict=True))


def why_not(leaves: Sequence[Any], shape: tuple[int, ...] | None = None) -> str | None:
  """Why a leaf's arrays are updated by the loop, also on a TPU; None if the kernel can.

  Args:
    leaves: all that is read and written, QuantizedArrays and dense arrays of one shape.
    shape: of a shard of them; None is their own.
  """
  shape = leaves[0].shape if shape is None else shape
  blocks = _body.all_blocks(leaves)
  unknown = _body.unknown_dtype(leaves, _DTYPES)
  if unknown:
    return unknown
  if len(shape) < 2:
    return 'one axis alone'
  if any(axis < len(shape) - 2 for axis, _ in blocks):
    return 'blocks along a leading axis'
  odd = [size for axis, size in blocks if axis == len(shape) - 2 and size % _SUBLANES]
  if odd:
    return f'blocks of {odd[0]} rows, no multiple of {_SUBLANES}'
  if any(shape[axis] % size for axis, size in blocks):
    return 'a shard cuts blocks'
  tile = choose_plan(shape, blocks).tile
  most_columns = min((_LANES * size for axis, size in blocks if axis == len(shape) - 1), default=_MOST_IN_TILE)
  if _padded_size(tile) > _MOST_IN_TILE or tile[-1] > most_columns:
    return f'no small tile of rows of {shape[-1]} has whole blocks and vectors'
  return _body.TOO_LARGE if _body.is_too_large(shape) else None


def _round_up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


def _padded_size(shape: Sequence[int]) -> int:
  """Elements of an array, with its last two axes padded to whole vectors."""
  *leading, rows, columns = shape
  return math.prod(leading) * _round_up(rows, _SUBLANES) * _round_up(columns, _LANES)


def _cut_columns(columns: int, step: int, whole_scales: int, at_most: int, most: int) -> tuple[int, int]:
  """The columns of a block and of a tile.

  Args:
    columns: of the array.
    step: of which those of a tile are a multiple, unless they are all.
    whole_scales: of which those of a block are a multiple, unless they are all.
    at_most: in a block, unless whole scales are longer.
    most: in a tile, about.
  """

  def block_of(tile):
    if columns % tile == 0 and columns <= at_most:
      return columns
    unit = math.lcm(tile, whole_scales)
    return max(min(columns, at_most) // unit, 1) * unit if unit <= columns else None

  tiles = [*range(step, most + 1, step), *([columns] if columns <= 1.5 * most else [])]
  fitting = [tile for tile in tiles if block_of(tile)] or [columns]
  tile = min(fitting, key=lambda tile: -(-columns // tile) * (tile + _SCALES_COLUMNS))
  return block_of(tile) or columns, tile


def choose_plan(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]) -> Plan:
  """How an array is cut, of two axes or more, so that no tile cuts a block.

  Args:
    shape: of the array.
    blocks: (axis, block size) of everything stored in its shape, along the last two axes.
  """
  *leading, rows, columns = shape
  unit_of = lambda axis: math.lcm(*(size for a, size in blocks if a == axis))
  row_unit, column_unit = unit_of(len(shape) - 2), unit_of(len(shape) - 1)
  turns = column_unit > 1 and rows >= _LANES

  # A tile has whole vectors of elements; a block, unless it is as long as the array, has whole vectors of scales too.
  step = math.lcm(_ROWS, row_unit)
  aligned = math.lcm(step, _LANES if turns else 1, _SUBLANES * row_unit if row_unit > 1 else 1)
  block_rows = min(rows, aligned)
  tile_rows = step if block_rows % step == 0 else rows

  whole_scales = (_SUBLANES if turns else _LANES) * column_unit if column_unit > 1 else 1
  most_scales = _LANES * min((size for axis, size in blocks if axis == len(leading) + 1), default=_TILE_COLUMNS)
  most = min(_TILE_COLUMNS, _TILE // _round_up(tile_rows, _SUBLANES), most_scales)
  at_most = 2 * _BLOCK // _round_up(block_rows, _ROWS)
  block_columns, tile_columns = _cut_columns(columns, math.lcm(_LANES, column_unit), whole_scales, at_most, most)

  # Several times as many rows, as evenly as may be, or several of the matrices.
  count, most = -(-rows // block_rows), max(_BLOCK // _padded_size((block_rows, block_columns)), 1)
  if count > 1:
    block_rows *= -(-count // -(-count // most))
  block, tile = [1] * len(leading), [1] * len(leading)
  if leading and count == 1 and not turns:
    fitting = max(_TILE // _padded_size((tile_rows, tile_columns)), 1)
    tile[-1] = 1 << (min(fitting, leading[-1]).bit_length() - 1)
    block[-1] = tile[-1] * max(min(most, leading[-1]) // tile[-1], 1)
  return Plan((*block, block_rows, block_columns), (*tile, tile_rows, tile_columns), turns)


@dataclasses.dataclass(frozen=True)
class _Operand:
  """One array of a kernel, or one with an element per block of others: scales.

  Attributes:
    block: the shape of what is in fast memory at a time.
    tile: the shape of what is computed at a time.
    axis: along which there is an element per block; -1 for other arrays.
    is_turned: whether its last two axes are swapped.
  """

  block: tuple[int, ...]
  tile: tuple[int, ...]
  axis: int
  is_turned: bool

  def turn(self, x: Any) -> Any:
    """An array, or the sequence of what belongs to each axis of one, with the last two axes swapped if they are."""
    if isinstance(x, tuple):
      return (*x[:-2], x[-1], x[-2]) if self.is_turned else x
    return jnp.swapaxes(x, -1, -2) if self.is_turned else x

  @property
  def is_laid_out(self) -> bool:
    """Whether scales must be laid out by tile: an index that is not static cannot cut vectors."""
    return self.axis >= 0 and (self.is_turned or self.tile[self.axis] < self.block[self.axis])

  @property
  def layout(self) -> tuple[int, ...]:
    """The shape of a block by tile: tiles along the axis come first."""
    return (self._count, *self._with_axis(self.block, self.tile[self.axis]))

  def lay_out(self, ref: Any, by_tile: Any) -> None:
    """Stores a block by tile."""
    for number, index in self._parts():
      by_tile[number] = self._turn_words(ref[index])

  def gather(self, by_tile: Any, ref: Any) -> None:
    """The reverse."""
    for number, index in self._parts():
      ref[index] = self._turn_words(by_tile[number])

  def index(self, pl: Any, numbers: Sequence[jax.Array]) -> tuple[Any, ...]:
    """The index of a tile, whose number along each axis is given, in its block, or in that by tile; `pl` is Pallas."""
    within = tuple(
      slice(None) if n == b else pl.ds(pl.multiple_of(number * n, n), n)
      for number, n, b in zip(numbers, self.tile, self.block, strict=True)
    )
    return (numbers[self.axis], *self._with_axis(within, slice(None))) if self.is_laid_out else within

  @property
  def _count(self) -> int:
    return self.block[self.axis] // self.tile[self.axis]

  def _with_axis(self, of_axes: tuple[Any, ...], own: Any) -> tuple[Any, ...]:
    return tuple(own if d == self.axis else x for d, x in enumerate(of_axes))

  def _parts(self) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The number of each tile along the axis, and its index in a block as it comes."""
    n, every = self.tile[self.axis], (slice(None),) * len(self.block)
    for number in range(self._count):
      yield number, self.turn(self._with_axis(every, slice(number * n, (number + 1) * n)))

  def _turn_words(self, x: jax.Array) -> jax.Array:
    """`turn` of a part of a block: only vectors of 32-bit words can be turned."""
    return self.turn(x.astype(jnp.uint32)).astype(x.dtype) if self.is_turned else x


def update_in_place(task: _tiles.Task, interpret: bool) -> Any:
  """The new `task.writes`, where `why_not` has nothing against it.

  Args:
    task: what is updated.
    interpret: whether JAX runs the kernel, on any platform and slowly, rather than a TPU.
  """
  # Imported where they are needed, for they take a while.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as plt

  shape = task.shape
  plan = choose_plan(shape, task.blocks)
  # No TPU, to the seventh generation, contracts a product and a sum of vectors.
  body = _body.trace(task if interpret else task._replace(zero=None), _view.Lanes(plan.tile))
  used = dict.fromkeys([*body.read, *body.written])
  operands = {value: _operand(body.arrays[value], shape, plan) for value in used}
  laid_out = [value for value in used if operands[value].is_laid_out]
  rules = {} if interpret else _RULES

  def kernel(words, *refs):
    begins = [pl.program_id(axis) * jnp.int32(n) for axis, n in enumerate(plan.block)]
    named = zip([*body.read, *body.written, *laid_out], refs, strict=True)
    read, written, by_tile = (dict(itertools.islice(named, len(x))) for x in (body.read, body.written, laid_out))

    def one(*numbers):
      offsets = [
        (begin + number * jnp.int32(n)).astype(jnp.uint32)
        for begin, number, n in zip(begins, numbers, plan.tile, strict=True)
      ]
      index = {value: operand.index(pl, numbers) for value, operand in operands.items()}
      new = body.evaluate(lambda i: words[0, i], offsets, lambda value: (read | by_tile)[value][index[value]], rules)
      for value, tile in new.items():
        (written | by_tile)[value][index[value]] = jnp.broadcast_to(tile, operands[value].tile)

    for value in laid_out:
      if value in read:
        operands[value].lay_out(read[value], by_tile[value])
    _for_each(_counts_inside(shape, plan, begins), one)
    for value in laid_out:
      if value in written:
        operands[value].gather(by_tile[value], written[value])

  def spec(value):
    turn = operands[value].turn
    return pl.BlockSpec(turn(operands[value].block), lambda *steps: turn(steps))

  def result(value):
    x = _body.as_result(body.arrays[value])
    return x.update(shape=operands[value].turn(x.shape))

  size = lambda value: _padded_size(operands[value].block) * body.arrays[value].dtype.itemsize
  params = plt.CompilerParams(
    dimension_semantics=(plt.PARALLEL,) * len(shape),
    vmem_limit_bytes=2 * sum(map(size, [*body.read, *body.written])) + _SPARE_BYTES,
  )
  new = pl.pallas_call(
    kernel,
    grid=tuple(-(-n // b) for n, b in zip(shape, plan.block, strict=True)),
    in_specs=[pl.BlockSpec(memory_space=plt.SMEM), *map(spec, body.read)],
    out_specs=list(map(spec, body.written)),
    out_shape=list(map(result, body.written)),
    scratch_shapes=[plt.VMEM(operands[value].layout, body.arrays[value].dtype) for value in laid_out],
    input_output_aliases={1 + body.read.index(value): i for i, value in enumerate(body.written) if value in body.read},
    interpret=interpret,
    compiler_params=None if interpret else params,
    name='lpmm_update',
  )(body.words[None], *(operands[value].turn(body.arrays[value]) for value in body.read))
  new = [operands[value].turn(x) for value, x in zip(body.written, new, strict=True)]
  return jax.tree.unflatten(jax.tree.structure(task.writes), new)


def _operand(x: jax.Array, shape: tuple[int, ...], plan: Plan) -> _Operand:
  """How an array is cut that is as long as one of `shape`, or has one element per block of it along some axis."""
  block, tile = (tuple(p * m // n for p, n, m in zip(part, shape, x.shape, strict=True)) for part in plan[:2])
  axis = next((axis for axis, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m), -1)
  return _Operand(block, tile, axis, plan.turns and axis == len(shape) - 1)


def _counts_inside(shape: tuple[int, ...], plan: Plan, begins: Sequence[jax.Array]) -> list[Any]:
  """Per axis, how many tiles of a block begin within the array; begins: int32[] per axis, where the block does."""

  def count(n, block, tile, begin):
    if n % block == 0:
      return block // tile
    return lax.div(jnp.minimum(jnp.int32(n + tile - 1) - begin, jnp.int32(block)), jnp.int32(tile))

  return [count(*args) for args in zip(shape, plan.block, plan.tile, begins, strict=True)]


def _for_each(counts: Sequence[Any], body: Callable, *numbers: Any) -> None:
  """Calls `body(*numbers)`, int32[] each, with all numbers below the counts; without a loop where there is but one."""
  if not counts:
    body(*numbers)
    return
  first, *others = counts
  if isinstance(first, int) and first == 1:
    _for_each(others, body, *numbers, jnp.int32(0))
  else:
    lax.fori_loop(0, first, lambda i, _: _for_each(others, body, *numbers, i), None)


def _sign(x: jax.Array) -> jax.Array:
  """As `lax.sign`, for which JAX asks what TPU there is, though it may compile ahead of time."""
  one = jnp.ones((), x.dtype)
  return jnp.where(x > 0, one, jnp.where(x < 0, -one, x))


# By name, what stands in for an operation that Mosaic, the compiler of Pallas for TPUs, does not know everywhere.
_RULES = {'sign': _sign}
