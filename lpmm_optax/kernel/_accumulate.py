"""Adds a gradient to one leaf's accumulator, or to its momentum, tile by tile and in place."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax

from lpmm_optax.kernel import _barrier
from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec


@dataclasses.dataclass(frozen=True)
class Accumulation:
  """What is static about an accumulation; equal ones share one compiled program.

  Attributes:
    shape: of the leaf, of which the accumulator may be a slice: `shape[len(start):]` at index `start`.
    tile_size: in elements.
  """

  shape: tuple[int, ...]
  tile_size: int


@functools.partial(jax.jit, static_argnums=0)
def accumulate_leaf(
  static: Accumulation,
  gradient: _gradient.Gradient,
  start: Sequence[jax.Array],
  word: jax.Array,
  zero: jax.Array,
) -> Any:
  """The accumulator after one more gradient, `keep * accumulated + weight * recent`, rounded to its grid.

  A low-precision accumulator must have `keep` None: then elements whose gradient is zero keep their codes, for as long
  as their block keeps its scale.

  Args:
    static: see `Accumulation`.
    gradient: with both arrays.
    start: int32[] per leading axis of the leaf that the accumulator lacks, its index there.
    word: uint32[2], the random word of the leaf.
    zero: uint32[], zero at run time.

  Returns:
    The new `gradient.accumulated`.
  """
  target: Any = gradient.accumulated
  blocks = _array.blocks_of(target)
  quantized = _array.is_quantized(target)
  tilings = _tiles.choose_tilings(target.shape, blocks, static.tile_size if quantized else target.size)
  dtype = _codec.compute_dtype(target.dtype)

  def stages(tile_shape):
    cells = _codec.make_cells(tile_shape, blocks)
    codec = _array.codec_of(target, tile_shape, cells)

    def bits(coordinates):
      return _array.random_bits(target, word, cells, static.shape, coordinates, start)

    def first(coordinates, reads, writes):
      recent = cells.split(reads)
      if not quantized:
        total = gradient.combine(codec.decode(writes), recent, dtype)
        return codec.encode(total, None)
      delta = dataclasses.replace(gradient, accumulated=None).combine(None, recent, dtype)
      return codec.encode(codec.decode(writes) + delta, bits(coordinates), _codec.Change(writes, delta))

    def second(coordinates, payload):
      return codec.finish(payload)[0]

    def last(payload, result, reads):
      return result

    return _tiles.Stages(*(_barrier.uncontracted(stage, zero) for stage in (first, second, last)))

  arrays = _tiles.update_in_place(stages, tilings, zero, gradient.recent, _array.stored(target), fused=not quantized)
  return _array.with_stored(target, arrays)
