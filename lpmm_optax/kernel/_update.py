"""The update of one leaf, tile by tile and in place; accumulation, which is one too; and reductions of a gradient."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _driver
from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.storage import _view
from lpmm_optax.trace import _program

_LARGEST_SQUARED = 2.0**63
# Of a parameter: 4 to 8 units in the last place, within which two that should be equal differ by what was rounded.
_DIFFERENCE_NOISE = 2.0**-21

# What `LeafUpdate` has of functions is compared and hashed, so they are those of a module, or frozen dataclasses.
LeafProgram = Callable[..., list[jax.Array]]
# (fields, error, grid, hyperparams, *more) -> fields, on dense tiles.
Correction = Callable[..., dict[str, jax.Array]]


class Grid(NamedTuple):
  """The grid of a tile of the target, once it is rounded.

  Attributes:
    step: the distance of neighbouring points, which broadcasts against the tile.
    largest: of a tile without NaN, the largest magnitude among the elements that share a step, which broadcasts too.
  """

  step: jax.Array
  largest: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class LeafUpdate:
  """What is static about a leaf's update; equal ones share one compiled program.

  Attributes:
    program: (gradient, target, *fields, *reads, *scalars) -> (delta of the target, *fields, *more), of which more is
      for `correct`; None adds the recent gradient to the target, which is the accumulated one.
    fields: names of the state fields, each once.
    correct: puts the target's rounding error, (target + delta) - (what is stored), into fields; None drops it.
    in_place: whether to return the new target or the delta that leads there.
    is_difference: whether the delta is computed as a difference from the target.
    shape: of the array that elements are numbered in, of which the target may be a slice along leading axes.
    tile_size: in elements.
    shard_axes: manual axes over which the leaf is sharded, besides those along which its arrays are known to vary.
    kernels: what may run it, besides the loop.
    sharding: of the leaf, where types say it.
  """

  program: LeafProgram | None
  shape: tuple[int, ...]
  tile_size: int
  shard_axes: frozenset[str]
  fields: tuple[str, ...] = ()
  correct: Correction | None = None
  in_place: bool = True
  is_difference: bool = False
  kernels: tuple[_driver.Kernel, ...] = dataclasses.field(default_factory=_driver.chosen)
  sharding: jax.sharding.NamedSharding | None = None


class _Values(NamedTuple):
  """The small arrays that all tiles of a leaf share."""

  words: jax.Array
  turn: tuple[jax.Array, jax.Array] | None
  weight: jax.Array | None
  scalars: list[jax.Array]
  hyperparams: dict[str, jax.Array]
  start: list[jax.Array]


# Traced and, outside jit, compiled once for all leaves of one kind.
@functools.partial(jax.jit, static_argnums=0)
def update_leaf(
  static: LeafUpdate,
  gradient: _gradient.Gradient,
  target: Any,
  words: jax.Array,
  zero: jax.Array,
  fields: Sequence[Any] = (),
  reads: Sequence[jax.Array] = (),
  scalars: Sequence[jax.Array] = (),
  hyperparams: dict[str, jax.Array] | None = None,
  start: Sequence[jax.Array] = (),
  turn: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[Any, list[Any]]:
  """One leaf's update.

  Args:
    static: see `LeafUpdate`.
    gradient: in the target's shape.
    target: what moves, a parameter or an accumulator: QuantizedArray or dense array.
    words: uint32[1 + len(fields) or more, 2], the random words of the target and of each field.
    zero: uint32[], zero at run time.
    fields: QuantizedArrays or dense arrays in the target's shape, in the order of `static.fields`.
    reads: dense arrays of that shape.
    scalars: of the program.
    hyperparams: scalars of the correction.
    start: int32[] per leading axis of `static.shape` that the target lacks, its index there.
    turn: what the random bits of the target turn by, or None.

  Returns:
    (new target or delta, new fields).
  """
  slots = [target, *fields]
  blocks = _body.all_blocks([*slots, gradient.accumulated])
  is_dense = not any(_array.is_quantized(leaf) for leaf in slots)
  tilings = _tiles.choose_tilings(target.shape, blocks, target.size if is_dense else static.tile_size)
  dtype = _codec.compute_dtype(target.dtype)
  hyperparams = {name: jnp.asarray(value).astype(dtype) for name, value in (hyperparams or {}).items()}
  # Finite gradients keep the state finite, which the square of a larger one would not be.
  squared = any(_array.is_quantized(field) and not field.format.signed for field in fields)
  arrays = [_array.stored(leaf) for leaf in slots]
  words = _random.of_shard(words, static.shard_axes | _mesh.varying_axes(arrays, gradient.stored()))
  shared = _Values(words, turn, gradient.weight, list(scalars), hyperparams, list(start))

  def stages(view, values, zero):
    target_codec, *codecs = (_array.codec_of(leaf, view) for leaf in slots)

    def bits(slot, coordinates):
      drawn = _array.random_bits(slots[slot], values.words[slot], view, static.shape, coordinates, values.start)
      return drawn if drawn is None or slot or values.turn is None else _random.turned(drawn, values.turn)

    def compute(reads, value, old_fields):
      """The wanted delta, the wanted fields, and more for the correction."""
      weighted = dataclasses.replace(gradient, weight=values.weight)
      if static.program is None:
        return weighted.change(value, view.split(reads['gradient'][1]), dtype), [], []
      g = weighted.tile(reads['gradient'], view, dtype)
      if squared:
        g = jnp.where(jnp.isfinite(g), jnp.clip(g, -_LARGEST_SQUARED, _LARGEST_SQUARED), g)
      decoded = [c.decode(old).astype(x.dtype) for c, old, x in zip(codecs, old_fields, fields, strict=True)]
      results = static.program(g, value, *decoded, *(view.split(x) for x in reads['reads']), *values.scalars)
      results = [x.astype(dtype) for x in results]
      delta, *new = (jnp.broadcast_to(x, value.shape) for x in results[: 1 + len(fields)])
      if static.is_difference and fields and _array.is_quantized(target):
        # Nothing has come: what is left of the difference of two sums is how they were rounded.
        is_still = jnp.abs(delta) <= jnp.abs(value) * _DIFFERENCE_NOISE
        for old, x in zip(decoded, new, strict=True):
          is_still = is_still & (x == old.astype(dtype))
        delta = jnp.where(is_still, jnp.zeros((), dtype), delta)
      return delta, new, results[1 + len(fields) :]

    def first(coordinates, reads, writes):
      old = (reads | writes)['target']
      value = target_codec.decode(old)
      delta, *new = compute(reads, value, writes['fields'])
      return target_codec.advance(old, value + delta, bits(0, coordinates), delta), *new

    def second(coordinates, carried, writes):
      payload, new_values, more = carried
      if static.correct is not None and not isinstance(target_codec, _codec.DenseCodec):
        new, error = target_codec.finish(payload)
        named = dict(zip(static.fields, new_values, strict=True))
        grid = Grid(target_codec.step(new), target_codec.largest)
        named = static.correct(named, error, grid, values.hyperparams, *more)
        new_values = [named[name] for name in static.fields]
      return [
        codec.finish(codec.advance(old, value, bits(1 + k, coordinates)))[0]
        for k, (codec, old, value) in enumerate(zip(codecs, writes['fields'], new_values, strict=True))
      ]

    def last(carried, result, reads):
      payload, *_ = carried
      new, _ = target_codec.finish(payload)
      if static.in_place:
        return {'target': new, 'fields': result}
      if _array.is_quantized(target):
        old = reads['target']._replace(codes=view.split(reads['target'].codes))
        return {'delta': _codec.subtract(new, old), 'fields': result}
      return {'delta': _codec.Stored(payload.delta), 'fields': result}

    return _tiles.Stages(*(_program.uncontracted(stage, zero) for stage in (first, second, last)))

  only_read: dict[str, Any] = {'gradient': gradient.stored(), 'reads': list(reads)}
  writes: dict[str, Any] = {'fields': arrays[1:]}
  if static.in_place:
    writes['target'] = arrays[0]
  else:
    only_read['target'] = arrays[0]
    writes['delta'] = jax.tree.map(jnp.zeros_like, only_read['target'])
  task = _tiles.Task(stages, target.shape, blocks, shared, zero, only_read, writes)
  if is_dense:
    # XLA by itself updates arrays in place that are read and written in one dtype.
    writes = _tiles.update_in_place(task, tilings, fused=True)
  else:
    leaves = [leaf for leaf in (*slots, gradient.accumulated, gradient.recent, *reads) if leaf is not None]
    writes = _driver.update_in_place(static.kernels, static.sharding, leaves, task, tilings)
  new = _array.with_stored(target, writes['target' if static.in_place else 'delta'])
  return new, [_array.with_stored(leaf, arrays) for leaf, arrays in zip(fields, writes['fields'], strict=True)]


def follow(static: LeafUpdate, template: jax.Array, *args: Any) -> tuple[Any, list[Any]]:
  """`update_leaf(static, *args)`, with results that are sharded as a template is."""
  static = dataclasses.replace(static, sharding=_mesh.explicit_sharding(template))
  return _mesh.follow(functools.partial(update_leaf, static), template, *args)


def neutral(name: str, dtype: Any) -> jax.Array:
  """The reduction of nothing."""
  return jnp.asarray(_program.REDUCTIONS[name][2](dtype), dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def reduce_leaf(
  name: str,
  dtype: Any,
  program: _program.Program,
  tile_size: int,
  gradient: _gradient.Gradient,
  scalars: list[jax.Array],
) -> jax.Array:
  """A reduction of all of `program(gradient, *scalars)` to a scalar of `dtype`, tile by tile."""
  template: Any = gradient.accumulated
  blocks = _array.blocks_of(template)
  reduce, combine = _program.REDUCTIONS[name][:2]

  def body(tiling, step, total):
    view = _view.cells(tiling.tile_shape, blocks)
    reads = jax.tree.map(lambda x: tiling.take(x, step), gradient.stored())
    g = gradient.tile(reads, view, jnp.float32)
    (value,) = program(g, *scalars)
    return combine(total, reduce(jnp.broadcast_to(value, g.shape)))

  return _tiles.fold(body, _tiles.choose_tilings(template.shape, blocks, tile_size), neutral(name, dtype))
