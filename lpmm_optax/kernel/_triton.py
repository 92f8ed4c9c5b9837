"""The tile loop as Triton kernels for NVIDIA GPUs, through Pallas: their grid is the loop, and their body its stages.

XLA on GPU does not fuse a block's maximum with what uses it, so there the loop takes a dozen kernels per tile and moves
dense float32 values through memory between them. One kernel moves each array once.

Triton's arrays have powers of two as sizes. An array is cut into a lot of equal tiles, and a second lot of lower ones
where the rows are no multiple of a tile's (a vocabulary of 50257); `why_not` tells which arrays cannot be cut so.
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

# Per tile. On an H100, one leaf of 2^27 elements, in ps per parameter at 1, 2 and 4 warps: sgdm 5.5, 4.2, 4.5; adamw
# 9.9, 8.7, 8.3 (`benchmarks/results/gpu_h100.jsonl`). Larger tiles were no faster.
ELEMENTS = 1024
WARPS = 2

# Elements of a row in a tile, for a warp to read whole sectors of 32 bytes of codes.
_LEAST_COLUMNS = 32
# Registers hold a tile, and a tile holds whole blocks.
_MOST_ELEMENTS = 8192
_DTYPES = frozenset({'int8', 'uint8', 'int16', 'uint16', 'float32', 'bfloat16', 'float16'})


def why_not(leaves: Sequence[Any], shape: tuple[int, ...] | None = None) -> str | None:
  """Why a leaf's arrays are updated by the loop, also on a GPU; None if the kernel can.

  Args:
    leaves: all that is read and written, QuantizedArrays and dense arrays of one shape.
    shape: of a shard of them; None is their own.
  """
  shape = leaves[0].shape if shape is None else shape
  blocks = _body.blocks_of(leaves)
  unknown = _body.unknown_dtype(leaves, _DTYPES)
  if unknown:
    return unknown
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
  return _body.TOO_LARGE if _body.is_too_large(shape) else None


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
  stages: _tiles.MakeStages,
  shape: tuple[int, ...],
  blocks: Sequence[tuple[int, int]],
  interpret: bool,
  values: Any,
  zero: jax.Array,
  reads: Any,
  writes: Any,
  origin: Sequence[jax.Array],
) -> Any:
  """Runs a staged update over all tiles of a leaf, as `_tiles.update_in_place` does.

  Args:
    stages: of the update.
    shape: of the leaf.
    blocks: (axis, block size) of everything stored in its shape; `why_not` has accepted them.
    interpret: whether JAX runs the kernel, on any platform and slowly, rather than Triton.
    values: small arrays that all tiles share.
    zero: uint32[], zero at run time.
    reads: arrays that are only read.
    writes: arrays that are replaced; donated ones are overwritten in place.
    origin: per axis, uint32[], the coordinate of the leaf's first element.

  Returns:
    The new `writes`.
  """
  lots = choose_lots(shape, blocks, ELEMENTS)
  for lot in lots:
    body = _body.trace(stages, _view.cells(lot.tile, blocks), shape, values, zero, origin, reads, writes)
    new = _update_lot(body, shape, lot, len(lots) == 1, interpret)
    writes = jax.tree.unflatten(jax.tree.structure(writes), new)
  return writes


def _update_lot(body: _body.Body, shape: tuple[int, ...], lot: Lot, is_only: bool, interpret: bool) -> list[jax.Array]:
  # Imported where they are needed, for they take a while, and JAX means to drop Triton.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as plt

  # What this lot does not write is kept in the arrays that it writes.
  passed = body.read if is_only else [*body.read, *(value for value in body.written if value not in body.read)]
  rules = {} if interpret else _rules(plt)

  def kernel(words, *refs):
    ref_of = dict(zip(passed, refs[: len(passed)], strict=True))
    steps = [pl.program_id(axis).astype(jnp.uint32) + jnp.uint32(first) for axis, first in enumerate(lot.first)]
    offsets = [step * jnp.uint32(n) for step, n in zip(steps, lot.tile, strict=True)]
    new = body.evaluate(lambda i: words[i], offsets, lambda value: ref_of[value][...], rules)
    for ref, tile in zip(refs[len(passed) :], new.values(), strict=True):
      ref[...] = jnp.broadcast_to(tile, ref.shape)

  tile_of = lambda x: tuple(t * m // n for t, n, m in zip(lot.tile, shape, x.shape, strict=True))
  index = lambda *steps: tuple(step + first for step, first in zip(steps, lot.first, strict=True))
  tile_spec = lambda value: pl.BlockSpec(tile_of(body.arrays[value]), index)
  return pl.pallas_call(
    kernel,
    grid=lot.grid,
    in_specs=[pl.BlockSpec(body.words.shape, lambda *steps: (0,)), *map(tile_spec, passed)],
    out_specs=list(map(tile_spec, body.written)),
    out_shape=[_body.as_result(body.arrays[value]) for value in body.written],
    input_output_aliases={1 + passed.index(value): i for i, value in enumerate(body.written) if value in passed},
    interpret=interpret,
    compiler_params=None if interpret else plt.CompilerParams(num_warps=WARPS, num_stages=1),
    name='lpmm_update',
  )(body.words, *(body.arrays[value] for value in passed))


def _rules(plt: Any) -> dict[str, Callable]:
  """What Pallas' Triton does not know; `plt` is its module."""

  def round_to_even(x, *, rounding_method):
    assert rounding_method == lax.RoundingMethod.TO_NEAREST_EVEN
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    asm = 'cvt.rni.f32.f32 $0, $1;'
    return plt.elementwise_inline_asm(asm, args=[x], constraints='=r,r', pack=1, result_shape_dtypes=[shape])[0]

  return {'round': round_to_even}
