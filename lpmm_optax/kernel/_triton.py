"""The tile loop as Triton kernels for NVIDIA GPUs, through Pallas: their grid is the loop, and their body its stages.

XLA on GPU does not fuse a block's maximum with what uses it, so there the loop takes a dozen kernels per tile and moves
dense float32 values through memory between them. One kernel moves each array once. It is made of the very stages that
the loop runs, traced for a small tile: what is one number for all tiles is computed outside of it, and everything else
inside, operation by operation. So the results are the loop's, bit for bit.

Triton's arrays have powers of two as sizes. An array is cut into a lot of equal tiles, and a second lot of lower ones
where the rows are no multiple of a tile's (a vocabulary of 50257); `why_not` tells which arrays cannot be cut so.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.trace import _program

# Per tile. On an H100, one leaf of 2^27 elements, in ps per parameter at 1, 2 and 4 warps: sgdm 5.5, 4.2, 4.5; adamw
# 9.9, 8.7, 8.3 (`benchmarks/results/gpu_h100.jsonl`). Larger tiles were no faster.
ELEMENTS = 1024
WARPS = 2

# Elements of a row in a tile, for a warp to read whole sectors of 32 bytes of codes.
_LEAST_COLUMNS = 32
# Registers hold a tile, and a tile holds whole blocks.
_MOST_ELEMENTS = 8192
# Pallas counts elements in 32 bits, signed, where an array has at most 2^32 bytes.
_MOST_IN_ARRAY = 2**31
TOO_LARGE = f'more than {_MOST_IN_ARRAY} elements on a device'
_DTYPES = frozenset({'int8', 'uint8', 'int16', 'uint16', 'float32', 'bfloat16', 'float16'})


def why_not(leaves: Sequence[Any], shape: tuple[int, ...] | None = None) -> str | None:
  """Why a leaf's arrays are updated by the loop, also on a GPU; None if the kernel can.

  Args:
    leaves: all that is read and written, QuantizedArrays and dense arrays of one shape.
    shape: of a shard of them; None is their own.
  """
  shape = leaves[0].shape if shape is None else shape
  arrays = [x for leaf in leaves for x in jax.tree.leaves(_array.stored(leaf))]
  blocks = [block for leaf in leaves for block in _array.blocks_of(leaf)]
  unknown = {jnp.dtype(x.dtype).name for x in arrays} - _DTYPES
  if unknown:
    return f'arrays of {min(unknown)}'
  odd = [size for _, size in blocks if not _is_power_of_two(size)]
  if odd:
    return f'blocks of {odd[0]}, no power of two'
  columns = _power_of_two_in(shape[-1])
  if columns < _LEAST_COLUMNS:
    return f'the last axis, of {shape[-1]}, is no multiple of {_LEAST_COLUMNS}'
  if any(n % unit for n, unit in zip(shape, _units(shape, blocks), strict=True)):
    return 'a shard cuts blocks'
  if math.prod(_units(shape, blocks)) > _MOST_ELEMENTS:
    return f'blocks of more than {_MOST_ELEMENTS} elements'
  return TOO_LARGE if math.prod(shape) > _MOST_IN_ARRAY else None


def _is_power_of_two(n: int) -> bool:
  return n & (n - 1) == 0


def _power_of_two_in(n: int) -> int:
  """The largest power of two that divides n."""
  return n & -n


def _power_of_two_below(n: int) -> int:
  """The largest power of two that is not above n."""
  return 1 << (n.bit_length() - 1)


def _units(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]) -> list[int]:
  """Per axis, the elements that blocks keep together."""
  return [max([size for a, size in blocks if a == axis], default=1) for axis in range(len(shape))]


class Lot(NamedTuple):
  """A grid of equal tiles.

  Attributes:
    tile: its shape, of powers of two.
    grid: tiles per axis.
    first: per axis, how many tiles of that shape lie before the grid.
  """

  tile: tuple[int, ...]
  grid: tuple[int, ...]
  first: tuple[int, ...]


def choose_lots(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]], elements: int) -> list[Lot]:
  """Cuts an array into tiles of about as many elements; no tile cuts a block.

  Args:
    shape: of the array.
    blocks: (axis, block size) of everything stored in its shape.
    elements: per tile, a power of two.

  Returns:
    One lot, or one more for the rows that are left.
  """
  units = _units(shape, blocks)
  tile, left = list(units), max(elements // math.prod(units), 1)
  rows = len(shape) - 2
  for axis in reversed(range(len(shape))):
    count = shape[axis] // units[axis]
    most = _power_of_two_below(count) if axis == rows else _power_of_two_in(count)
    times = min(most, left)
    tile[axis] *= times
    left //= times
  grid = [n // t for n, t in zip(shape, tile, strict=True)]
  out = [Lot(tuple(tile), tuple(grid), (0,) * len(shape))]
  rest = shape[rows] % tile[rows] if rows >= 0 else 0
  if rest:
    unit = units[rows]
    at_rows = lambda values, value: tuple(value if d == rows else v for d, v in enumerate(values))
    out.append(
      Lot(at_rows(tile, unit), at_rows(grid, rest // unit), at_rows(out[0].first, (shape[rows] - rest) // unit))
    )
  return out


def update_in_place(
  stages: Callable[[tuple[int, ...], Any], _tiles.Stages],
  shape: tuple[int, ...],
  blocks: Sequence[tuple[int, int]],
  interpret: bool,
  values: Any,
  reads: Any,
  writes: Any,
  origin: Sequence[jax.Array] | None = None,
) -> Any:
  """Runs a staged update over all tiles of a leaf, as `_tiles.update_in_place` does.

  Args:
    stages: of the update, for tiles of a shape and for `values`.
    shape: of the leaf.
    blocks: (axis, block size) of everything stored in its shape; `why_not` has accepted them.
    interpret: whether JAX runs the kernel, on any platform and slowly, rather than Triton.
    values: small arrays that all tiles share.
    reads: arrays that are only read.
    writes: arrays that are replaced; donated ones are overwritten in place.
    origin: per axis, the coordinate of the first element, uint32[], where the leaf is a shard; None is zero.

  Returns:
    The new `writes`.
  """
  origin = [jnp.uint32(0)] * len(shape) if origin is None else list(origin)
  axes = _mesh.varying_axes(values, reads, writes)
  values, reads, writes, origin = _mesh.vary((values, reads, writes, origin), axes)
  lots = choose_lots(shape, blocks, ELEMENTS)
  for lot in lots:
    writes = _update_lot(stages, shape, lot, len(lots) == 1, interpret, values, origin, reads, writes)
  return writes


def _update_lot(
  stages: Callable[[tuple[int, ...], Any], _tiles.Stages],
  shape: tuple[int, ...],
  lot: Lot,
  is_only: bool,
  interpret: bool,
  values: Any,
  origin: Sequence[jax.Array],
  reads: Any,
  writes: Any,
) -> Any:
  # Imported where they are needed, for they take a while, and JAX means to drop Triton.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as plt

  tile_of = lambda x: tuple(t * m // n for t, n, m in zip(lot.tile, shape, x.shape, strict=True))
  # All vary along the same manual axes, or none.
  template = lambda x, shape: _mesh.template(x, x.dtype).update(shape=shape)

  def one_tile(values, starts, reads, writes):
    """The new tiles of `writes`; starts: uint32[] per axis, the tile's first coordinate."""
    first, second, last = stages(lot.tile, values)
    coordinates = [lax.iota(jnp.uint32, n) + x if n > 1 else x[None] for n, x in zip(lot.tile, starts, strict=True)]
    carried = first(coordinates, reads, writes)
    new = last(carried, second(coordinates, carried, writes), reads)
    return jax.tree.map(lambda x, tile: tile.reshape(x.shape), writes, new)

  tiles = jax.tree.map(lambda x: template(x, tile_of(x)), (reads, writes))
  shared = jax.tree.map(lambda x: template(x, x.shape), (values, origin))
  graph, _ = _program.trace(one_tile, *shared, *tiles)

  count, rank = len(jax.tree.leaves(values)), len(shape)
  given = dict(zip(graph.inputs[:count], jax.tree.leaves(values), strict=True))
  start_of = {value: axis for axis, value in enumerate(graph.inputs[count : count + rank])}
  array_of = dict(zip(graph.inputs[count + rank :], jax.tree.leaves((reads, writes)), strict=True))

  hoisted, needed = _hoist(graph, given, [*start_of, *array_of])
  scalars = graph.evaluate(hoisted, given.__getitem__)
  # One array, since each operand that is not there yet is a kernel launch.
  words = jnp.stack([_to_word(x) for x in (*origin, *scalars.values())])
  word_of = {value: i for i, value in enumerate([*start_of, *hoisted])}

  # Of the arrays, those that a tile is computed from, or that keep what this lot does not write.
  written = list(array_of)[len(array_of) - len(jax.tree.leaves(writes)) :]
  passed = [value for value in array_of if value in needed or (value in written and not is_only)]

  # A kernel knows nothing of the mesh.
  rules = {'pcast': lambda x, **_: x, 'pvary': lambda x, **_: x} | ({} if interpret else _rules(plt))

  def kernel(words_ref, *refs):
    ref_of = dict(zip(passed, refs[: len(passed)], strict=True))

    def argument(value):
      if value in ref_of:
        return ref_of[value][...]
      x = _from_word(words_ref[word_of[value]], graph.avals[value].dtype)
      if value in start_of:
        axis = start_of[value]
        step = pl.program_id(axis).astype(jnp.uint32) + jnp.uint32(lot.first[axis])
        x = x + step * jnp.uint32(lot.tile[axis])
      return x

    new = graph.evaluate(graph.outputs, argument, given=hoisted, rules=rules)
    for ref, value in zip(refs[len(passed) :], graph.outputs, strict=True):
      ref[...] = jnp.broadcast_to(new[value], ref.shape)

  index = lambda *steps: tuple(step + first for step, first in zip(steps, lot.first, strict=True))
  tile_spec = lambda value: pl.BlockSpec(tile_of(array_of[value]), index)
  new = pl.pallas_call(
    kernel,
    grid=lot.grid,
    in_specs=[pl.BlockSpec(words.shape, lambda *steps: (0,)), *map(tile_spec, passed)],
    out_specs=list(map(tile_spec, written)),
    out_shape=[_as_result(array_of[value]) for value in written],
    input_output_aliases={1 + passed.index(value): i for i, value in enumerate(written) if value in passed},
    interpret=interpret,
    compiler_params=None if interpret else plt.CompilerParams(num_warps=WARPS, num_stages=1),
    name='lpmm_update',
  )(words, *(array_of[value] for value in passed))
  return jax.tree.unflatten(jax.tree.structure(writes), new)


def _hoist(graph: _program.Graph, shared: Iterable[int], own: Iterable[int]) -> tuple[list[int], set[int]]:
  """What of a graph is the same for all tiles, and can be computed outside of a kernel as far as it is one number.

  Args:
    graph: of one tile's function.
    shared: the inputs that all tiles share.
    own: the inputs that every tile has of its own.

  Returns:
    The values computed outside, and all that the rest of the graph reads.
  """
  outer = graph.dependents(shared) - graph.dependents(own)
  is_hoisted = lambda value: value in outer and graph.uniform[value] and graph.avals[value].dtype.itemsize <= 4
  read = dict.fromkeys(value for op in graph.slice(graph.outputs, stop=is_hoisted) for value in op.inputs)
  return [value for value in dict.fromkeys([*read, *graph.outputs]) if is_hoisted(value)], set(read)


def _as_result(x: jax.Array) -> jax.ShapeDtypeStruct:
  """The type of x; in `jax.shard_map` with check_vma, Pallas wants to hear that a result varies along no axis too."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _to_word(x: jax.Array) -> jax.Array:
  """A scalar of at most 32 bits to uint32[]."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(())
  return x.astype(jnp.uint32).reshape(())


def _from_word(word: jax.Array, dtype: Any) -> jax.Array:
  """The reverse."""
  if jnp.issubdtype(dtype, jnp.floating):
    return lax.bitcast_convert_type(word, jnp.float32).astype(dtype)
  return word.astype(dtype)


def _rules(plt: Any) -> dict[str, Callable]:
  """What Pallas' Triton does not know; `plt` is its module."""

  def round_to_even(x, *, rounding_method):
    assert rounding_method == lax.RoundingMethod.TO_NEAREST_EVEN
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = 'cvt.rni.f32.f32 $0, $1;'
    return plt.elementwise_inline_asm(asm, args=[x], constraints='=r,r', pack=1, result_shape_dtypes=[shape])[0]

  return {'round': round_to_even}
