"""What a loss gets in place of a quantized parameter: it can be dequantized, and its gradient has somewhere to go.

Dequantizing a `TrackedArray` is a function with a rule of its own for differentiation: the cotangent that arrives is a
layer's gradient, and goes into the layer's `Sink` there and then. What is differentiated are zeros beside the codes,
the *anchor*, on which such a function depends; so where the loss stops the gradient of a parameter, nothing arrives.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex
from jax.interpreters import batching
from jax.interpreters import mlir
import jax.numpy as jnp

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program

# Marks where a parameter is dequantized; it is the identity on its `rows`. Parameters: sink.
READ = jex.Primitive('read_parameter')
READ.def_impl(lambda rows, *, sink: rows)
READ.def_abstract_eval(lambda rows, *, sink: rows)
mlir.register_lowering(READ, lambda context, rows, *, sink: [rows])


def _under_vmap(path: str) -> TypeError:
  return TypeError(
    f'{path}: in a loss for value_and_step, jax.vmap maps over this quantized parameter, or over a function that '
    'dequantizes it; dequantize it outside of that function'
  )


def _refuse_batches(arguments, axes, *, sink):
  raise _under_vmap(sink.path)


batching.primitive_batchers[READ] = _refuse_batches


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('step', 'slots', 'weight', 'uses', 'scalars', 'totals'), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class Place:
  """Arrays where a gradient goes, and what has to be known there. A differentiation rule may not close over them.

  Attributes:
    step: of the leaf that moves, with the `run` and `of_use` of a `LeafStep`.
    slots: that leaf and its fields, with a `jax.Ref` in place of each array.
    weight: of a gradient, float32[]; None is one.
    uses: Ref to int32, the uses so far of every row of the leaf; None for one that is used once.
    scalars: of the programs of reductions of the whole gradient, by the reduction's number.
    totals: Refs to their results so far.
  """

  step: Any
  slots: list[Any]
  weight: jax.Array | None = None
  uses: Any = None
  scalars: dict[int, list[jax.Array]] = dataclasses.field(default_factory=dict)
  totals: dict[int, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Sink:
  """Where the gradient of one parameter goes; compared by identity, so that it may be a pytree's static part.

  Attributes:
    path: of the parameter.
    shape: of the whole parameter.
    place: None if the loss is only looked at.
    is_source: whether what moves is the parameter itself, which is then read there.
    reductions: of the whole gradient, by number.
    most_axes: along how many leading axes a gradient may be a slice; None is all.
    was_reached: whether a gradient has come, once the loss has been differentiated.
  """

  path: str
  shape: tuple[int, ...]
  place: Place | None = None
  is_source: bool = False
  reductions: Mapping[int, _plan.Reduction] = dataclasses.field(default_factory=dict)
  most_axes: int | None = None
  was_reached: list[bool] = dataclasses.field(default_factory=list)

  def check(self, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless an array of this shape can be a slice that leading axes index."""
    axes = len(self.shape) - len(shape)
    if axes < 0 or self.shape[axes:] != shape:
      raise ValueError(
        f'{self.path}: a parameter of shape {self.shape} is used in a slice of shape {shape}, but value_and_step takes '
        'slices along leading axes only (jax.tree.map(lambda x: x[i], p), or lax.scan over them); dequantize it first, '
        'and slice the result'
      )
    if self.most_axes is not None and axes > self.most_axes:
      raise ValueError(
        f'{self.path}: a parameter of shape {self.shape} is used in slices of shape {shape}, but lpmm_optax.layerwise '
        f'needs the gradient of all of {self.shape[self.most_axes :]} at once. Name a parameter in its `stacked` for '
        'slices along the first axis, and no other, to be leaves of their own; or accumulate gradients first, '
        'lpmm_optax.MultiSteps(tx, 1)'
      )
    for slot in jax.tree.leaves(self.place.slots if self.place else (), is_leaf=_array.is_quantized):
      if any(axis < axes for axis, _ in _array.blocks_of(slot)):
        raise ValueError(
          f'{self.path}: blocks of what is kept for it run along one of the first axes of {self.shape}, which a slice '
          f'of shape {shape} cuts; give that a Format with block_size={self.shape[-1]}, for blocks along the last axis'
        )

  def _start(self, rows: jax.Array, axes: int) -> list[jax.Array]:
    """Per leading axis that a slice lacks, its index there, from the numbers of the slice's rows."""
    number = rows.reshape(-1)[0] // rows.size
    start: list[jax.Array] = []
    for n in reversed(self.shape[:axes]):
      start.insert(0, number % n)
      number = number // n
    return start

  # A `jax.Ref` could be indexed itself, but not on an explicit mesh. Compiled, it is the same: a Ref is an array again
  # by then, and updated in place.
  def read(self, place: Place, rows: jax.Array) -> _array.QuantizedArray:
    """The slice of the parameter that has these rows, as it is now."""
    start = self._start(rows, len(self.shape) - rows.ndim - 1)
    return jax.tree.map(lambda ref: _tiles.slice_of(ref[...], start), place.slots[0])

  def add(self, place: Place, rows: jax.Array, gradient: jax.Array) -> None:
    """Takes the gradient of the slice that has these rows."""
    self.was_reached.append(True)
    axes = len(self.shape) - gradient.ndim
    start = self._start(rows, axes)
    step, weight = place.step, place.weight
    writes: list[Any] = []
    if place.uses is not None:
      # A slice along another axis may have the shape of one along a leading axis, but not its rows.
      first = rows.reshape(-1)[0]
      is_slice = jnp.all(rows.reshape(-1) == first + lax.iota(jnp.int32, rows.size)) & (first % rows.size == 0)
      weight = jnp.where(is_slice, jnp.ones(()) if weight is None else weight, jnp.nan)
      # Every use is rounded by itself: with the same bits, errors of many uses would add up.
      uses = place.uses[...]
      use = jnp.max(_tiles.slice_of(uses, start))
      step = step.of_use(use)
      writes.append((place.uses, _tiles.with_slice(uses, jnp.full(self.shape[axes:-1], use + 1), start)))
    for number, reduction in self.reductions.items():
      reduce, combine = _program.REDUCTIONS[reduction.name][:2]
      (value,) = reduction.program(gradient.astype(jnp.float32), *place.scalars[number])
      total = place.totals[number]
      writes.append((total, combine(total[...], reduce(jnp.broadcast_to(value, gradient.shape)))))
    whole = jax.tree.map(lambda ref: ref[...], place.slots)
    target, *fields = jax.tree.map(lambda x: _tiles.slice_of(x, start), whole)
    new_target, new_fields = step.run(_gradient.Gradient(recent=gradient, weight=weight), target, fields, start)
    jax.tree.map(
      lambda ref, x, new: writes.append((ref, _tiles.with_slice(x, new, start))),
      place.slots,
      whole,
      [new_target, *new_fields],
    )
    try:
      for ref, x in writes:
        ref[...] = x
    except Exception as error:
      raise _under_vmap(self.path) from error


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TrackedArray(_array.QuantizedArray):
  """A parameter, or a slice of one, whose gradient goes into a `Sink`.

  Attributes:
    rows: int32, of the array's shape without its last axis: the numbers of its rows in the whole parameter.
    anchor: float32, of the same shape.
    sink: static.
  """

  rows: jax.Array
  anchor: jax.Array
  sink: Sink

  def tree_flatten(self) -> tuple[Any, Any]:
    children, static = super().tree_flatten()
    return (*children, self.rows, self.anchor), (*static, self.sink)

  def tree_flatten_with_keys(self) -> tuple[Any, Any]:
    children, static = super().tree_flatten_with_keys()
    own = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ('rows', 'anchor')]
    return (*children, *own), (*static, self.sink)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> 'TrackedArray':
    (codes, scales, rows, anchor), (format, dtype, blocks, sink) = children, static
    return cls(codes, scales, format, dtype, blocks, rows, anchor, sink)

  def dense(self, dtype: Any = None, path: str = '') -> jax.Array:
    """The values; their cotangent goes into the sink, which knows the path of the parameter."""
    del path
    sink = self.sink
    _array.check(sink.path, self)
    sink.check(self.shape)
    # What moves is read where it moves: of codes that are read elsewhere after some were written, XLA makes a copy.
    codes = None
    if not sink.is_source:
      codes = _array.QuantizedArray(self.codes, self.scales, self.format, self.dtype, self.blocks)

    def decode(place, codes, rows):
      return (sink.read(place, rows) if codes is None else codes).dense(dtype)

    @jax.custom_vjp
    def read(anchor, place, codes, rows):
      return decode(place, codes, READ.bind(rows, sink=sink))

    def forward(anchor, place, codes, rows):
      return decode(place, codes, rows), (anchor, place, rows)

    def backward(saved, cotangent):
      anchor, place, rows = saved
      sink.add(place, rows, cotangent)
      return jnp.zeros_like(anchor), None, None, None

    read.defvjp(forward, backward)
    return read(self.anchor, sink.place, codes, self.rows)


def track(leaf: _array.QuantizedArray, sink: Sink) -> TrackedArray:
  """A whole parameter, with its gradient's sink."""
  outer = leaf.shape[:-1]
  rows = lax.iota(jnp.int32, math.prod(outer)).reshape(outer)
  anchor = jnp.zeros(outer, jnp.float32)
  return TrackedArray(leaf.codes, leaf.scales, leaf.format, leaf.dtype, leaf.blocks, rows, anchor, sink)
