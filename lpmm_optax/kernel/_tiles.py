"""The tile loop: updates large arrays in place, so that dense values exist for one tile at a time."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _view
from lpmm_optax.trace import _program


def check_size(tile_size: int | None) -> None:
  """Raises a ValueError unless it can be the number of elements of a tile, or None."""
  if tile_size is not None and tile_size < 1:
    raise ValueError(f'tile_size must be at least 1, or None, got {tile_size}')


def default_tile_size(total: int, slots: int) -> int:
  """Elements per tile for a tree of `total` elements with `slots` arrays each, the parameter and its state fields.

  On CPU a tile's dense values, 5 to 6 bytes per element and slot, should stay in the cache and small beside the state,
  but each of a dozen kernels per tile costs microseconds to start on every core: at 16M elements of two slots, tiles of
  2^16, 2^17, 2^18, 2^19, 2^20 and 2^21 took 2.7, 2.4, 2.0, 1.9, 1.9 and 2.0 times as long as Optax in float32; at three
  slots, 2^17 to 2^20 took 2.5, 2.3, 2.2 and 2.4 times. A thirty-second of the whole per slot, within such bounds, keeps
  the temporaries under 5 MiB or 8 % of a byte per element and slot. Elsewhere a tile is a row of kernel launches.
  """
  if jax.default_backend() == 'cpu':
    return min(max(2**20, total // 32), 2**21) // slots
  return 2**24


@dataclasses.dataclass(frozen=True)
class Tiling:
  """Tiles of one shape, of which one or two lots make up an array.

  One axis is cut: each of its groups, from `start` on, into runs; a tile is one run of every group. An axis sharded
  over up to `groups` devices is cut within each shard, so no device needs another's data.

  Attributes:
    shape: of the whole array.
    axis: which is cut.
    groups: runs per tile.
    start: where in a group the first run begins.
    run: its length.
    steps: tiles.
  """

  shape: tuple[int, ...]
  axis: int
  groups: int
  start: int
  run: int
  steps: int

  @property
  def tile_shape(self) -> tuple[int, ...]:
    return tuple(self.groups * self.run if d == self.axis else n for d, n in enumerate(self.shape))

  @property
  def is_whole(self) -> bool:
    """Whether the array is one tile."""
    return self.tile_shape == self.shape

  @property
  def group(self) -> int:
    """The length of a group."""
    return self.shape[self.axis] // self.groups

  def _by_group(self, x: jax.Array, step: jax.Array) -> tuple[jax.Array, int, jax.Array]:
    """An array with its cut axis split, and in that axis, counted in elements or in blocks, run and start of a tile."""
    group = x.shape[self.axis] // self.groups
    run, first = self.run * group // self.group, self.start * group // self.group
    # Unsigned, for an axis may have more than 2^31 elements.
    start = jnp.uint32(first) + step.astype(jnp.uint32) * jnp.uint32(run)
    return x.reshape(*x.shape[: self.axis], self.groups, group, *x.shape[self.axis + 1 :]), run, start

  def take(self, x: jax.Array, step: jax.Array) -> jax.Array:
    """Tile number `step` of an array."""
    if self.is_whole:
      return x
    by_group, run, start = self._by_group(x, step)
    tile = lax.dynamic_slice_in_dim(by_group, start, run, self.axis + 1)
    return tile.reshape(*x.shape[: self.axis], -1, *x.shape[self.axis + 1 :])

  def put(self, x: jax.Array, tile: jax.Array, step: jax.Array) -> jax.Array:
    """The array with tile number `step` replaced; the tile may come in any shape that lists its elements in order."""
    if self.is_whole:
      return tile.reshape(x.shape)
    by_group, run, start = self._by_group(x, step)
    tile = tile.reshape(*x.shape[: self.axis], self.groups, run, *x.shape[self.axis + 1 :])
    return lax.dynamic_update_slice_in_dim(by_group, tile, start, self.axis + 1).reshape(x.shape)

  def coordinates(self, step: jax.Array) -> list[jax.Array]:
    """Per axis, the tile's global coordinates: uint32 vectors."""
    out = [lax.iota(jnp.uint32, n) for n in self.tile_shape]
    if not self.is_whole:
      offset = out[self.axis]
      if self.groups > 1:
        group, offset = jnp.divmod(offset, jnp.uint32(self.run))
        offset = group * jnp.uint32(self.group) + offset
      out[self.axis] = jnp.uint32(self.start) + step.astype(jnp.uint32) * jnp.uint32(self.run) + offset
    return out


def choose_tilings(shape: tuple[int, ...], blocks: Sequence[tuple[int, int]], tile_size: int) -> list[Tiling]:
  """Cuts an array into tiles of at most `tile_size` elements where its shape allows.

  Args:
    shape: of the array.
    blocks: (axis, block size) of everything stored in its shape; no tile cuts a block.
    tile_size: in elements.

  Returns:
    The lots of tiles, along the first axis long enough, else along the one that gives the smallest. Equal tiles, unless
    they would be under half of what was asked for (a vocabulary of 50257 is a prime number): then there is one more
    lot, of one tile with the rest, which costs the compilation of another loop. A sharded axis is split over at most
    all devices, so their number, as far as it divides the axis, gives the groups.
  """
  needed = -(-math.prod(shape) // tile_size)
  best = [Tiling(shape, 0, 1, 0, shape[0] if shape else 1, 1)]
  for axis, n in enumerate(shape):
    unit = math.lcm(*(size for a, size in blocks if a == axis))
    groups = math.gcd(n // unit, jax.device_count())
    units = n // unit // groups
    if best[0].steps >= needed or units <= best[0].steps:
      continue
    longest = max(units // needed, 1)
    run = next((d for d in range(longest, (longest - 1) // 2, -1) if units % d == 0), longest)
    steps, rest = divmod(units, run)
    best = [Tiling(shape, axis, groups, 0, run * unit, steps)]
    if rest:
      best.append(Tiling(shape, axis, groups, steps * run * unit, rest * unit, 1))
  return best


def slice_of(x: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
  """The slice of an array at an index along each of its first axes."""
  for index in start:
    x = lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
  return x


def with_slice(x: jax.Array, new: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
  """The array with that slice replaced."""
  indices = [*start, *[jnp.int32(0)] * new.ndim]
  return lax.dynamic_update_slice(x, new.reshape((1,) * len(start) + new.shape), indices)


def apart(zero: jax.Array, fn: Callable, *args: Any) -> Any:
  """`fn(*args)`, computed on its own rather than fused into what consumes it.

  XLA on CPU fuses a tile's arithmetic into each write of its results. It then runs once per result, and on one thread,
  and, since the second write would read what the first has overwritten, XLA copies the whole buffers first. A branch
  that no compiler can see through is the only boundary that survives its pipeline (an optimization barrier does not).
  """
  # Traced once, not for its shapes, for the branch and for the other platforms anew.
  fn = jax.jit(fn, inline=True)

  def branch(*args):
    shapes = jax.eval_shape(fn, *args)
    # Zeros made from runtime data would be fused too; plain ones cost nothing, for they are never computed.
    axes = _mesh.varying_axes(args)
    skipped = lambda *_: _mesh.vary(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), axes)
    return lax.cond(zero == 0, lambda *args: _mesh.vary(fn(*args), axes), skipped, *args)

  return lax.platform_dependent(*args, cpu=branch, default=fn)


def _within(zero: jax.Array, fn: Callable, *args: Any) -> Any:
  """The same within a stage, whose products are those of `_program.uncontracted`, and which tells it by the barrier."""
  return apart(zero, lambda *args: lax.optimization_barrier(_program.uncontracted(fn, zero)(*args)), *args)


class Stages(NamedTuple):
  """An update of one tile, in three functions of tiles.

  Attributes:
    first: `(coordinates, reads, writes) -> carried`; coordinates: per axis of the tile, uint32 in any shape.
    second: `(coordinates, carried, writes) -> result`.
    last: `(carried, result, reads) -> new writes`, cheap, for it is fused into each write; its tiles may have any shape
      that lists the elements in order.
  """

  first: Callable
  second: Callable
  last: Callable

  def moved(self, move: Callable[[Sequence[jax.Array]], Sequence[jax.Array]]) -> 'Stages':
    """The stages where the elements at some coordinates have the coordinates `move` makes of them."""
    at = lambda stage: lambda coordinates, *args: stage(move(coordinates), *args)
    return self._replace(first=at(self.first), second=at(self.second))


# Of a view of a tile, of small arrays that all tiles share, and of uint32[], zero at run time, or None for a compiler
# that contracts no products; it closes over no arrays.
MakeStages = Callable[[_view.View, Any, jax.Array | None], Stages]


class Task(NamedTuple):
  """A staged update of all tiles of a leaf, or of one device's shard of it.

  Attributes:
    stages: of the update.
    shape: of the leaf.
    blocks: (axis, block size) of everything stored in its shape.
    values: small arrays that all tiles share.
    zero: uint32[], zero at run time, or None for a compiler that contracts no products.
    reads: arrays that are only read.
    writes: arrays that are replaced; donated ones are overwritten in place.
    origin: per axis, uint32[], the coordinate of the first element, where the leaf is a shard; None is zero.
  """

  stages: MakeStages
  shape: tuple[int, ...]
  blocks: Sequence[tuple[int, int]]
  values: Any
  zero: Any
  reads: Any
  writes: Any
  origin: Sequence[jax.Array] | None = None


def update_in_place(task: Task, tilings: list[Tiling], fused: bool) -> Any:
  """The new `task.writes`, tile by tile.

  Args:
    task: what is updated.
    tilings: of the leaf.
    fused: whether XLA may fuse the stages as it likes, without a loop; for a leaf in one tile.
  """
  origin = task.origin
  move = lambda own: own if origin is None else [x + at for x, at in zip(own, origin, strict=True)]
  writes = _mesh.vary(task.writes, _mesh.varying_axes(task.reads, task.writes))
  for tiling in tilings:
    view = _view.cells(tiling.tile_shape, task.blocks, _view.inline if fused else functools.partial(_within, task.zero))
    stages = task.stages(view, task.values, task.zero)
    writes = _update_lot(stages.moved(move), tiling, task.zero, task.reads, writes, fused)
  return writes


def fold(body: Callable[[Tiling, jax.Array, Any], Any], tilings: list[Tiling], total: Any) -> Any:
  """`total` after `total = body(tiling, step, total)` for every tile."""
  for tiling in tilings:
    total = loop(tiling.steps, functools.partial(body, tiling), total)
  return total


def loop(steps: Any, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
  """`lax.fori_loop(0, steps, body, init)`, whose body runs on all cores of a CPU.

  The XLA of jaxlib 0.12 compiles a loop, of whatever size, into one function of one thread unless it has to call its
  runtime in it, as for a sort: 8 leaves of 2048 x 2048 took two cores twice as long.
  """

  def through_a_call(step):
    return lax.sort(jnp.stack([jnp.int32(-1), step]))[1]

  def run(step, carry):
    return body(lax.platform_dependent(step, cpu=through_a_call, default=lambda step: step), carry)

  return lax.fori_loop(0, steps, run, init)


def _update_lot(stages: Stages, tiling: Tiling, zero: jax.Array, reads: Any, writes: Any, fused: bool) -> Any:
  first, second, last = stages
  run = (lambda fn, *args: fn(*args)) if fused else functools.partial(apart, zero)

  def take(arrays, step):
    return jax.tree.map(lambda x: tiling.take(x, step), arrays)

  def one(step, reads, writes):
    return first(tiling.coordinates(step), take(reads, step), take(writes, step))

  def two(step, carried, writes):
    return second(tiling.coordinates(step), carried, take(writes, step))

  def body(step, writes):
    carried = run(one, step, reads, writes)
    result = run(two, step, carried, writes)
    tiles = last(carried, result, take(reads, step))
    return jax.tree.map(lambda x, tile: tiling.put(x, tile, step), writes, tiles)

  if fused:
    return body(jnp.int32(0), writes)
  # XLA inlines a loop that it knows to run once. Then the tiles of all small leaves would be alive together: on CPU it
  # schedules leaves breadth first, and on a GPU 8 leaves of 2048 x 2048 took 5 bytes of temporaries per parameter for
  # sgdm and 11 for adamw, in place of .5 and 1.5.
  steps = tiling.steps if tiling.steps > 1 else 1 + zero.astype(jnp.int32)
  return loop(steps, body, writes)
