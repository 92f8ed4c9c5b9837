"""How elementwise code sees a tile: the shape in which elements meet the values that their blocks share.

A driver chooses the view that its platform computes well in; the arithmetic is the same in each.
"""

import abc
from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lpmm_optax.storage import _format

_LONGEST_CELL = 32
_SHORTEST_PART = 8

# Of a TPU's vector.
LANES = 128
_MOST_PRODUCTS = 4096


def inline(fn: Callable, *args: Any) -> Any:
  """`fn(*args)`."""
  return fn(*args)


@dataclasses.dataclass(frozen=True)
class View(abc.ABC):
  """A view of tiles, and of values per block that belong to them.

  Attributes:
    shape: of a tile.
  """

  shape: tuple[int, ...]

  @abc.abstractmethod
  def split(self, x: jax.Array) -> jax.Array:
    """Tile to view."""

  def merge(self, x: jax.Array) -> jax.Array:
    """View to tile."""
    return x.reshape(self.shape)

  @abc.abstractmethod
  def split_coordinate(self, coordinate: jax.Array, axis: int) -> jax.Array:
    """One element per coordinate along an axis of the tile, in any shape, to an array that broadcasts in the view."""

  @abc.abstractmethod
  def spread(self, per_block: jax.Array, axis: int, size: int) -> jax.Array:
    """One value per block of `size` elements along `axis`, to an array that broadcasts against the view."""

  @abc.abstractmethod
  def absmax(self, x: jax.Array, axis: int, size: int) -> jax.Array:
    """float32 in view, without NaN, to the largest magnitude in each block of `size` elements along `axis`."""

  def with_absmax(self, fn: Callable, x: jax.Array, axis: int, size: int, *per_block: jax.Array) -> Any:
    """`fn(absmax, *per_block)`, of one value per block each; the absmax of a block of x with NaN is not finite."""
    return fn(self.absmax(jnp.where(x == x, x, np.float32(np.inf)), axis, size), *per_block)


@dataclasses.dataclass(frozen=True)
class Cells(View):
  """*Cell view*: each blocked axis is split into (cells, cell), where a cell is a run that no block boundary crosses.

  XLA vectorizes elementwise work with scales in that view, and does not without it.

  Attributes:
    sizes: cell size per axis; 1 where the axis stays whole.
    apart: gives `fn(*args)` of a function and its arguments; XLA on CPU would otherwise compute what is one number for
      a block once for each cell, which takes as long as all that is done to its elements.
  """

  sizes: tuple[int, ...]
  apart: Callable = inline

  def _view_shape(self, shape: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """`shape` with every axis split by `sizes` where this view splits it."""
    split = ((n // size, size) if cell > 1 else (n,) for n, size, cell in zip(shape, sizes, self.sizes, strict=True))
    return tuple(n for axis in split for n in axis)

  def _with_axis(self, axis: int, *counts: int) -> tuple[int, ...]:
    return self.shape[:axis] + counts + self.shape[axis + 1 :]

  def split(self, x: jax.Array) -> jax.Array:
    return x.reshape(self._view_shape(self.shape, self.sizes))

  def split_coordinate(self, coordinate: jax.Array, axis: int) -> jax.Array:
    ones = [coordinate.size if d == axis else 1 for d in range(len(self.shape))]
    sizes = [size if d == axis else 1 for d, size in enumerate(self.sizes)]
    return coordinate.reshape(self._view_shape(ones, sizes))

  def spread(self, per_block: jax.Array, axis: int, size: int) -> jax.Array:
    cell, n = self.sizes[axis], self.shape[axis]
    counts = self._with_axis(axis, n // size, size // cell)
    repeated = jnp.broadcast_to(jnp.expand_dims(per_block, axis + 1), counts)
    # The tile with its blocked axis counted in cells; there, a cell is one element.
    per_cell = self._with_axis(axis, n // cell)
    sizes = tuple(1 if d == axis else c for d, c in enumerate(self.sizes))
    return repeated.reshape(self._view_shape(per_cell, sizes))

  def absmax(self, x: jax.Array, axis: int, size: int) -> jax.Array:
    """The same, and NaN where a block holds one."""
    return self._magnitude(self._largest(x, axis, size))

  def with_absmax(self, fn: Callable, x: jax.Array, axis: int, size: int, *per_block: jax.Array) -> Any:
    of_largest = lambda largest, *per_block: fn(self._magnitude(largest), *per_block)
    return self.apart(of_largest, self._largest(x, axis, size), *per_block)

  def _largest(self, x: jax.Array, axis: int, size: int) -> jax.Array:
    """The largest magnitude in each block, as an integer without the sign bit, which `_magnitude` takes.

    Magnitudes are compared as integers, among which NaN is the largest: a maximum of floats on CPU may pass over it,
    and is a library call there that nothing can be fused into.
    """
    cell, n = self.sizes[axis], self.shape[axis]
    bits = lax.bitcast_convert_type(x, jnp.uint32) << 1
    if cell > 1:
      view_axis = axis + sum(c > 1 for c in self.sizes[:axis]) + 1
      bits = jnp.max(bits, axis=view_axis)
    bits = bits.reshape(self._with_axis(axis, n // size, size // cell))
    return jnp.max(bits, axis=axis + 1)

  def _magnitude(self, bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits >> 1, jnp.float32)


def cells(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]], apart: Callable = inline) -> Cells:
  """The cell view of a tile for arrays blocked along (axis, block size).

  A long cell is cut in equal parts where that leaves them long enough to vectorize: XLA on CPU fuses what it reduces
  into the reduction, rather than store it first, only up to `_LONGEST_CELL` elements.
  """
  sizes = [0] * len(shape)
  for axis, size in blocks:
    sizes[axis] = math.gcd(sizes[axis], size)
  parts = [_format.largest_divisor(size, _LONGEST_CELL) if size else 1 for size in sizes]
  sizes = [part if part >= _SHORTEST_PART else max(size, 1) for part, size in zip(parts, sizes, strict=True)]
  return Cells(shape, tuple(sizes), apart)


@dataclasses.dataclass(frozen=True)
class Run(Cells):
  """Cell view of a run of consecutive elements of an array of any rank, whose coordinates all vary along it."""

  def split_coordinate(self, coordinate: jax.Array, axis: int) -> jax.Array:
    if coordinate.size == 1:
      return coordinate.reshape((1,) * len(self._view_shape(self.shape, self.sizes)))
    return super().split_coordinate(coordinate, 0)


def run(size: int, blocks: Sequence[tuple[int, int]]) -> Run:
  """The cell view of `size` consecutive elements, for flattened arrays blocked along (0, block size)."""
  of_axis = cells((size,), blocks)
  return Run(of_axis.shape, of_axis.sizes)


@dataclasses.dataclass(frozen=True)
class Lanes(View):
  """*Lane view*: tiles as they are, in vectors of 8 rows and 128 lanes, as a TPU has them.

  To split the last axis would move every element to another lane. So blocks along it are runs of lanes, told apart by
  masks, 128 at a time, and a tile has at most 128 of them in a row; those along another axis are whole rows.
  """

  def split(self, x: jax.Array) -> jax.Array:
    return x

  def split_coordinate(self, coordinate: jax.Array, axis: int) -> jax.Array:
    return coordinate.reshape([coordinate.size if d == axis else 1 for d in range(len(self.shape))])

  def spread(self, per_block: jax.Array, axis: int, size: int) -> jax.Array:
    if per_block.dtype == bool:  # A mask has no lanes to be spread over.
      return self.spread(jnp.where(per_block, np.float32(1), np.float32(0)), axis, size) != 0
    if axis < self._last:
      rows = jnp.broadcast_to(jnp.expand_dims(per_block, axis + 1), self._rows(axis, size))
      return rows.reshape(self.shape)
    # All lanes of a vector are taken from another in one operation.
    to_lanes = [(0, 0, 0)] * self._last + [(0, LANES - per_block.shape[axis], 0)]
    per_block = lax.pad(per_block, jnp.zeros((), per_block.dtype), to_lanes)
    pieces = []
    for start, stop in self._pieces():
      lane, (first, *others) = self._iota(LANES), range(start // size, -(-stop // size))
      index = jnp.full(lane.shape, first)
      for block in others:
        index = index + (lane >= block * size - start).astype(jnp.int32)
      pieces.append(lax.slice_in_dim(self._take_lanes(per_block, index), 0, stop - start, axis=axis))
    return jnp.concatenate(pieces, axis=axis)

  def absmax(self, x: jax.Array, axis: int, size: int) -> jax.Array:
    x = jnp.abs(x)
    if axis < self._last:
      return jnp.max(x.reshape(self._rows(axis, size)), axis=axis + 1)
    number = self._iota(self.shape[axis] // size)
    out = jnp.zeros(number.shape, x.dtype)
    for start, stop in self._pieces():
      piece, lane = lax.slice_in_dim(x, start, stop, axis=axis), self._iota(stop - start)
      for block in range(start // size, -(-stop // size)):
        inside, begin, end = piece, block * size - start, (block + 1) * size - start
        if begin > 0:
          inside = jnp.where(lane >= begin, inside, np.float32(0))
        if end < stop - start:
          inside = jnp.where(lane < end, inside, np.float32(0))
        largest = jnp.max(inside, axis=axis, keepdims=True)
        out = jnp.where(number == block, jnp.maximum(out, largest) if begin < 0 else largest, out)
    return out

  def _take_lanes(self, x: jax.Array, index: jax.Array) -> jax.Array:
    """`jnp.take_along_axis` of the last axis, in the one form of it that Pallas knows for TPUs."""
    others = tuple(range(self._last))
    numbers = lax.GatherDimensionNumbers(
      offset_dims=(),
      collapsed_slice_dims=(self._last,),
      start_index_map=(self._last,),
      operand_batching_dims=others,
      start_indices_batching_dims=others,
    )
    ones = (1,) * len(self.shape)
    return lax.gather(x, index[..., None], numbers, ones, mode='promise_in_bounds')

  @property
  def _last(self) -> int:
    return len(self.shape) - 1

  def _rows(self, axis: int, size: int) -> tuple[int, ...]:
    return (*self.shape[:axis], self.shape[axis] // size, size, *self.shape[axis + 1 :])

  def _pieces(self) -> list[tuple[int, int]]:
    """(start, stop) along the last axis of what a vector holds."""
    return [(start, min(start + LANES, self.shape[-1])) for start in range(0, self.shape[-1], LANES)]

  def _iota(self, count: int) -> jax.Array:
    """The number of each lane, int32, in the rows of a tile with so many."""
    return lax.broadcasted_iota(jnp.int32, (*self.shape[:-1], count), self._last)


@dataclasses.dataclass(frozen=True)
class Products(Lanes):
  """*Product view*: lanes, for XLA on a TPU to decode whole arrays in.

  There XLA writes what is spread along the last axis to memory, and turns it. A product with zeros and ones, for which
  a TPU has a unit of its own, is fused with the decoding. Compiled for a v5e, codes in blocks of 64 take, of 16032 x
  2048, 3.03 bytes and .017 estimated cycles per element and no memory, and in the cell view 19, .076 and 8 bytes; of
  2048 x 128256, 3.03 bytes and .040 cycles, and 9, .060 and 3 bytes.
  """

  def spread(self, per_block: jax.Array, axis: int, size: int) -> jax.Array:
    """The same, of scales: bfloat16 values, as float32, not negative, or NaN."""
    if axis < self._last:
      return super().spread(per_block, axis, size)
    shape = (self.shape[axis] // size, self.shape[axis])
    block, column = (lax.broadcasted_iota(jnp.int32, shape, d) for d in (0, 1))
    is_inside = (block == column // size).astype(jnp.bfloat16)
    # NaN times zero would poison other blocks.
    numbers = jnp.where(jnp.isnan(per_block), np.float32(-1), per_block).astype(jnp.bfloat16)
    spread = jnp.matmul(numbers, is_inside, preferred_element_type=jnp.float32)
    return jnp.where(spread < 0, np.float32(np.nan), spread)


def suits_products(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]]) -> bool:
  """Whether the product view is good for an array: it takes as many products per element as a row has blocks."""
  return all(shape[axis] // size <= _MOST_PRODUCTS for axis, size in blocks if axis == len(shape) - 1)
