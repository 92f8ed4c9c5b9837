"""The update of one leaf, tile by tile and in place, and reductions of its gradient."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpmm_optax.kernel import _barrier
from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.optimizers import _feedback
from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.trace import _program

_LARGEST_SQUARED = 2.0**63


@dataclasses.dataclass(frozen=True)
class LeafUpdate:
  """What is static about a leaf's update; equal ones share one compiled program.

  Attributes:
    program: (gradient, parameter, *fields, *reads, *scalars) -> (delta, *fields).
    fields: names of the state fields, each once.
    feedback: for the rounding error of the parameter.
    in_place: whether to return the new parameter or the delta that leads there.
    tile_size: in elements.
  """

  program: _program.Program
  fields: tuple[str, ...]
  feedback: _feedback.Feedback | None
  in_place: bool
  tile_size: int


# Traced and, outside jit, compiled once for all leaves of one kind.
@functools.partial(jax.jit, static_argnums=0)
def update_leaf(
  static: LeafUpdate,
  gradient: _gradient.Gradient,
  param: Any,
  fields: list[Any],
  reads: list[jax.Array],
  scalars: list[jax.Array],
  hyperparams: dict[str, jax.Array],
  words: jax.Array,
  zero: jax.Array,
) -> tuple[Any, list[Any]]:
  """One leaf's update.

  Args:
    static: see `LeafUpdate`.
    gradient: in the parameter's shape.
    param: QuantizedArray or dense array.
    fields: QuantizedArrays or dense arrays in the parameter's shape, in the order of `static.fields`.
    reads: dense arrays of that shape.
    scalars: of the program.
    hyperparams: scalars of the feedback.
    words: uint32[1 + len(fields) or more, 2], the random words of the parameter and of each field.
    zero: uint32[], zero at run time.

  Returns:
    (new parameter or delta, new fields).
  """
  slots = [param, *fields]
  blocks = [block for leaf in (*slots, gradient.accumulated) for block in _array.blocks_of(leaf)]
  is_dense = not any(_array.is_quantized(leaf) for leaf in slots)
  tilings = _tiles.choose_tilings(param.shape, blocks, param.size if is_dense else static.tile_size)
  dtype = _codec.compute_dtype(param.dtype)
  hyperparams = {name: jnp.asarray(value).astype(dtype) for name, value in hyperparams.items()}
  # Finite gradients keep the state finite, which the square of a larger one would not be.
  squared = any(_array.is_quantized(field) and field.format.grid == 'sqrt' for field in fields)

  def stages(tile_shape):
    cells = _codec.make_cells(tile_shape, blocks)
    param_codec, *codecs = (_array.codec_of(leaf, tile_shape, cells) for leaf in slots)

    def bits(slot, coordinates):
      return _array.random_bits(slots[slot], words[slot], cells, param.shape, coordinates)

    def first(coordinates, reads, writes):
      old = (reads | writes)['param']
      value = param_codec.decode(old)
      g = gradient.tile(reads['gradient'], cells, dtype)
      if squared:
        g = jnp.where(jnp.isfinite(g), jnp.clip(g, -_LARGEST_SQUARED, _LARGEST_SQUARED), g)
      delta, *new = (
        jnp.broadcast_to(x.astype(dtype), value.shape)
        for x in static.program(
          g,
          value,
          *(c.decode(tile).astype(x.dtype) for c, tile, x in zip(codecs, writes['fields'], fields, strict=True)),
          *(cells.split(x) for x in reads['reads']),
          *scalars,
        )
      )
      payload = param_codec.encode(value + delta, bits(0, coordinates), _codec.Change(old, delta))
      return payload, new

    def second(coordinates, carried):
      payload, values = carried
      if static.feedback is not None and not isinstance(param_codec, _codec.DenseCodec):
        new, error = param_codec.finish(payload)
        named = dict(zip(static.fields, values, strict=True))
        named = static.feedback.apply(named, error, param_codec.step(new), hyperparams)
        values = [named[name] for name in static.fields]
      return [
        codec.finish(codec.encode(value, bits(1 + k, coordinates)))[0]
        for k, (codec, value) in enumerate(zip(codecs, values, strict=True))
      ]

    def last(carried, result, reads):
      payload, _ = carried
      new, _ = param_codec.finish(payload)
      if static.in_place:
        return {'param': new, 'fields': result}
      if _array.is_quantized(param):
        old = reads['param']._replace(codes=cells.split(reads['param'].codes))
        return {'delta': _codec.subtract(new, old), 'fields': result}
      return {'delta': _codec.Stored(payload.extra), 'fields': result}

    return _tiles.Stages(*(_barrier.uncontracted(stage, zero) for stage in (first, second, last)))

  only_read: dict[str, Any] = {'gradient': gradient.stored(), 'reads': reads}
  writes: dict[str, Any] = {'fields': [_array.stored(leaf) for leaf in fields]}
  if static.in_place:
    writes['param'] = _array.stored(param)
  else:
    only_read['param'] = _array.stored(param)
    writes['delta'] = jax.tree.map(jnp.zeros_like, only_read['param'])
  # XLA by itself updates arrays in place that are read and written in one dtype.
  writes = _tiles.update_in_place(stages, tilings, zero, only_read, writes, fused=is_dense)
  new = _array.with_stored(param, writes['param' if static.in_place else 'delta'])
  return new, [_array.with_stored(leaf, arrays) for leaf, arrays in zip(fields, writes['fields'], strict=True)]


REDUCERS: dict[str, tuple[Callable, Callable, float]] = {
  'reduce_max': (jnp.max, jnp.maximum, -np.inf),
  'reduce_sum': (jnp.sum, jnp.add, 0.0),
}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def reduce_leaf(
  name: str, program: _program.Program, tile_size: int, gradient: _gradient.Gradient, scalars: list[jax.Array]
) -> jax.Array:
  """A reduction of all of `program(gradient, *scalars)` to a scalar, tile by tile: the square of its norm, say."""
  template: Any = gradient.accumulated
  blocks = _array.blocks_of(template)
  reduce, combine, start = REDUCERS[name]

  def body(tiling, step, total):
    cells = _codec.make_cells(tiling.tile_shape, blocks)
    reads = jax.tree.map(lambda x: tiling.take(x, step), gradient.stored())
    (value,) = program(gradient.tile(reads, cells, jnp.float32), *scalars)
    return combine(total, reduce(value))

  return _tiles.fold(body, _tiles.choose_tilings(template.shape, blocks, tile_size), jnp.float32(start))
