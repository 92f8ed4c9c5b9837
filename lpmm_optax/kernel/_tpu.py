"""The tile loop as kernels for TPUs, through Pallas: a grid of blocks in fast memory, and in each a loop over tiles.

XLA on a TPU pads every array to vectors of 8 rows and 128 lanes, so that the loop's cell view, of rows of 32, costs
four times the memory and the time, and goes through memory besides. One kernel moves each array once, and computes in
the lane view, in tiles of a few vectors. While it computes one block, Pallas fetches the next and writes the last one.

Blocks and tiles of an array with block scales are as long as whole scales are. Vectors of scales would be cut at any
lane or row, which only a static slice can do: so a block's scales are laid out by tile first, and gathered last.
"""

from collections.abc import Callable
from collections.abc import Sequence
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
_LANES = 128

# Elements in a tile, and lanes in one of few rows: fewer leave lanes of the scales empty, more leave the registers.
_TILE = 2**15
_TILE_COLUMNS = 1024
# Elements in a block, and lanes in one: half a dozen arrays of them, twice, are a few MiB.
_BLOCK = 2**18
_BLOCK_COLUMNS = 2**14
# Above, what the compiler makes of a tile has too many instructions.
_MOST_IN_TILE = 2**17
_SPARE_BYTES = 2**24

_DTYPES = frozenset({'int8', 'uint8', 'int16', 'uint16', 'float32', 'bfloat16'})


class Plan(NamedTuple):
  """How an array is cut.

  Attributes:
    block: the shape of what is in fast memory at a time; the last one along an axis may reach beyond the array.
    tile: the shape of what is computed at a time; blocks are made of whole tiles.
  """

  block: tuple[int, ...]
  tile: tuple[int, ...]


def why_not(leaves: Sequence[Any], shape: tuple[int, ...] | None = None) -> str | None:
  """Why a leaf's arrays are updated by the loop, also on a TPU; None if the kernel can.

  Args:
    leaves: all that is read and written, QuantizedArrays and dense arrays of one shape.
    shape: of a shard of them; None is their own.
  """
  shape = leaves[0].shape if shape is None else shape
  blocks = _body.blocks_of(leaves)
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


def _largest_part(n: int, unit: int, at_most: int) -> int:
  """The largest multiple of a unit that divides n and is not above `at_most`, or else n."""
  return next((d for d in range(max(at_most // unit, 1) * unit, 0, -unit) if n % d == 0), n)


def choose_plan(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]) -> Plan:
  """How an array is cut, of two axes or more, so that no tile cuts a block.

  Args:
    shape: of the array.
    blocks: (axis, block size) of everything stored in its shape, along the last two axes.
  """
  *leading, rows, columns = shape
  unit_of = lambda axis: math.lcm(*(size for a, size in blocks if a == axis))
  row_unit, column_unit = unit_of(len(shape) - 2), unit_of(len(shape) - 1)

  # A tile has whole vectors of elements; a block, unless it is as long as the array, has whole vectors of scales too.
  step, aligned = math.lcm(_ROWS, row_unit), math.lcm(_ROWS, _SUBLANES * row_unit if row_unit > 1 else 1)
  if rows <= aligned:
    block_rows, tile_rows = rows, step if rows % step == 0 else rows
  else:
    block_rows, tile_rows = aligned, step

  step, aligned = math.lcm(_LANES, column_unit), _LANES * column_unit
  most = max(min(_TILE_COLUMNS, _TILE // _round_up(tile_rows, _SUBLANES)), step)
  if columns <= (_BLOCK_COLUMNS if column_unit > 1 else most):
    block_columns = columns
  else:
    block_columns = _round_up(most if column_unit == 1 else 1, aligned)
  tile_columns = _largest_part(block_columns, step, most)

  # Several times as many rows, as evenly as may be, or several of the matrices.
  count, most = -(-rows // block_rows), max(_BLOCK // _padded_size((block_rows, block_columns)), 1)
  if count > 1:
    block_rows *= -(-count // -(-count // most))
  block, tile = [1] * len(leading), [1] * len(leading)
  if leading and count == 1:
    fitting = max(_TILE // _padded_size((tile_rows, tile_columns)), 1)
    tile[-1] = 1 << (min(fitting, leading[-1]).bit_length() - 1)
    block[-1] = tile[-1] * max(min(most, leading[-1]) // tile[-1], 1)
  return Plan((*block, block_rows, block_columns), (*tile, tile_rows, tile_columns))


def update_in_place(
  stages: _tiles.MakeStages,
  shape: tuple[int, ...],
  blocks: Sequence[tuple[int, int]],
  interpret: bool,
  values: Any,
  reads: Any,
  writes: Any,
  origin: Sequence[jax.Array],
) -> Any:
  """Runs a staged update over all tiles of a leaf, as `_tiles.update_in_place` does.

  Args:
    stages: of the update.
    shape: of the leaf.
    blocks: (axis, block size) of everything stored in its shape; `why_not` has accepted them.
    interpret: whether JAX runs the kernel, on any platform and slowly, rather than a TPU.
    values: small arrays that all tiles share.
    reads: arrays that are only read.
    writes: arrays that are replaced; donated ones are overwritten in place.
    origin: per axis, uint32[], the coordinate of the leaf's first element.

  Returns:
    The new `writes`.
  """
  # Imported where they are needed, for they take a while.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import tpu as plt

  plan = choose_plan(shape, blocks)
  body = _body.trace(stages, _view.lanes(plan.tile, blocks), shape, values, origin, reads, writes)
  part_of = lambda part, x: tuple(p * m // n for p, n, m in zip(part, shape, x.shape, strict=True))
  block_of = {value: part_of(plan.block, x) for value, x in body.arrays.items()}
  tile_of = {value: part_of(plan.tile, x) for value, x in body.arrays.items()}
  counts = [b // t for b, t in zip(plan.block, plan.tile, strict=True)]
  used = [*body.read, *(value for value in body.written if value not in body.read)]
  by_tile = {value: axis for value in used if (axis := _scale_axis(body.arrays[value], shape)) and counts[axis] > 1}
  rules = {} if interpret else _rules()

  def kernel(words, *refs):
    begins = [pl.program_id(axis) * jnp.int32(n) for axis, n in enumerate(plan.block)]
    read = dict(zip(body.read, refs, strict=False))
    written = dict(zip(body.written, refs[len(read) :], strict=False))
    laid_out = dict(zip(by_tile, refs[len(read) + len(written) :], strict=True))

    def part(value, number):
      """The index of a tile's scales in a block."""
      axis, n = by_tile[value], tile_of[value][by_tile[value]]
      return tuple(pl.ds(number * n, n) if d == axis else slice(None) for d in range(len(shape)))

    def index(value, numbers):
      """The index of a tile, whose number along each axis is given, in what holds it."""
      axis = by_tile.get(value)
      own = [
        slice(None) if d == axis or count == 1 else pl.ds(pl.multiple_of(number * n, n), n)
        for d, (number, n, count) in enumerate(zip(numbers, tile_of[value], counts, strict=True))
      ]
      return tuple(own) if axis is None else (numbers[axis], *own)

    def one(*numbers):
      offsets = [
        (begin + number * jnp.int32(n)).astype(jnp.uint32)
        for begin, number, n in zip(begins, numbers, plan.tile, strict=True)
      ]
      tile = lambda value: laid_out.get(value, read[value])[index(value, numbers)]
      for value, new in body.evaluate(words, offsets, tile, rules).items():
        laid_out.get(value, written[value])[index(value, numbers)] = jnp.broadcast_to(new, tile_of[value])

    for value, ref in laid_out.items():
      for number in range(counts[by_tile[value]] if value in read else 0):
        ref[number] = read[value][part(value, number)]
    _for_each(_counts_inside(shape, plan, begins), one)
    for value, ref in laid_out.items():
      for number in range(counts[by_tile[value]] if value in written else 0):
        written[value][part(value, number)] = ref[number]

  def layout(value):
    axis = by_tile[value]
    n = tile_of[value][axis]
    return (counts[axis], *(n if d == axis else b for d, b in enumerate(block_of[value])))

  size = lambda value: _padded_size(block_of[value]) * body.arrays[value].dtype.itemsize
  params = plt.CompilerParams(
    dimension_semantics=(plt.PARALLEL,) * len(shape),
    vmem_limit_bytes=2 * sum(map(size, [*body.read, *body.written])) + _SPARE_BYTES,
  )
  spec = lambda value: pl.BlockSpec(block_of[value], lambda *steps: steps)
  new = pl.pallas_call(
    kernel,
    grid=tuple(-(-n // b) for n, b in zip(shape, plan.block, strict=True)),
    in_specs=[pl.BlockSpec(memory_space=plt.SMEM), *map(spec, body.read)],
    out_specs=list(map(spec, body.written)),
    out_shape=[_body.as_result(body.arrays[value]) for value in body.written],
    scratch_shapes=[plt.VMEM(layout(value), body.arrays[value].dtype) for value in by_tile],
    input_output_aliases={1 + body.read.index(value): i for i, value in enumerate(body.written) if value in body.read},
    interpret=interpret,
    compiler_params=None if interpret else params,
    name='lpmm_update',
  )(body.words, *(body.arrays[value] for value in body.read))
  return jax.tree.unflatten(jax.tree.structure(writes), new)


def _scale_axis(x: jax.Array, shape: tuple[int, ...]) -> int | None:
  """Along which axis an array has one element per block of an array of `shape`; None if they are equally long."""
  return next((axis for axis, (n, m) in enumerate(zip(shape, x.shape, strict=True)) if n != m), None)


def _counts_inside(shape: tuple[int, ...], plan: Plan, begins: Sequence[jax.Array]) -> list[Any]:
  """Per axis, how many tiles of a block begin within the array; begins: int32[] per axis, where the block does."""

  def count(n, block, tile, begin):
    if n % block == 0:
      return block // tile
    return jnp.minimum(jnp.int32(n + tile - 1) - begin, jnp.int32(block)) // jnp.int32(tile)

  return [count(*args) for args in zip(shape, *plan, begins, strict=True)]


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


def _rules() -> dict[str, Callable]:
  """What Mosaic, the compiler of Pallas for TPUs, does not know."""
  return {}
