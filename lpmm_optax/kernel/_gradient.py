"""The gradient of a leaf as an update takes it: dense, accumulated in low precision, or the sum of both, unevaluated.

What is accumulated is decoded where it is used, tile by tile, so that a sum never exists as a dense tree.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _view
from lpmm_optax.trace import _plan

_OF_DENSE = 'gradients are those of lpmm_optax.dequantize(params), or taken by lpmm_optax.value_and_step'


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=('accumulated', 'recent', 'weight'), meta_fields=('is_mean',)
)
@dataclasses.dataclass(frozen=True)
class Gradient:
  """accumulated + weight * recent, or for a running mean accumulated + weight * (recent - accumulated).

  An absent array counts as zero, an absent weight as one; where either array is absent, there is no mean to run.

  Attributes:
    accumulated: QuantizedArray or dense array, or None.
    recent: the last dense gradient, or None.
    weight: float32[], or None.
    is_mean: static.
  """

  accumulated: Any = None
  recent: jax.Array | None = None
  weight: jax.Array | None = None
  is_mean: bool = False

  def change(self, accumulated: jax.Array | None, recent: jax.Array, dtype: Any) -> jax.Array:
    """What the recent gradient, or a tile of it, adds to the accumulated one."""
    change = recent.astype(dtype)
    if self.is_mean and accumulated is not None:
      change = change - accumulated.astype(dtype)
    return change if self.weight is None else self.weight.astype(dtype) * change

  def combine(self, accumulated: jax.Array | None, recent: jax.Array | None, dtype: Any) -> jax.Array:
    """The sum, of dense values of both arrays or of tiles of them; a scalar zero if there are none."""
    if recent is None:
      return jnp.zeros((), dtype) if accumulated is None else accumulated.astype(dtype)
    change = self.change(accumulated, recent, dtype)
    return change if accumulated is None else accumulated.astype(dtype) + change

  def stored(self) -> tuple[Any, Any]:
    """The arrays, for a tile loop to read."""
    return None if self.accumulated is None else _array.stored(self.accumulated), self.recent

  def tile(self, reads: tuple[Any, Any], view: _view.View, dtype: Any) -> jax.Array:
    """The sum in view, of one tile of what `stored` gave; a scalar zero if there is nothing."""
    accumulated, recent = reads
    if accumulated is not None:
      accumulated = _array.codec_of(self.accumulated, view).decode(accumulated)
    return self.combine(accumulated, None if recent is None else view.split(recent), dtype)

  def template(self, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Of the dense gradient: `like`, and the manual axes along which it varies."""
    arrays = [x for x in jax.tree.leaves(self.stored()) if x.shape == like.shape]
    varying = max(arrays, key=lambda x: len(_mesh.varying_axes(x)), default=like)
    return _mesh.template(varying, like.dtype)

  def dense(self, template: Any) -> jax.Array:
    """The whole gradient, of the shape and dtype of `template`."""
    accumulated = None if self.accumulated is None else _array.dequantize(self.accumulated)
    dtype = _codec.compute_dtype(template.dtype)
    return jnp.broadcast_to(self.combine(accumulated, self.recent, dtype), template.shape).astype(template.dtype)


def is_gradient(x: Any) -> bool:
  """Whether x is a `Gradient`."""
  return isinstance(x, Gradient)


def dense(gradients: Any, params: Any) -> Any:
  """The tree with every `Gradient` evaluated, for transformations that take arrays.

  Each is of the dtype of the last one that came, or of its parameter.
  """
  if not any(map(is_gradient, jax.tree.leaves(gradients, is_leaf=is_gradient))):
    return gradients
  structure, leaves = _plan.flatten(params)

  def one(i, gradient):
    dtype = leaves[i].dtype if gradient.recent is None else gradient.recent.dtype
    return gradient.dense(jax.ShapeDtypeStruct(leaves[i].shape, dtype))

  return structure.tree({i: one(i, gradient) for i, gradient in flatten(structure, gradients).items()})


def flatten(params: _plan.Params, gradients: Any) -> dict[int, Gradient]:
  """The gradients of the active leaves.

  Raises:
    ValueError, TypeError: for a tree of another structure, or a gradient of another shape or kind, naming the path.
  """
  try:
    flat = params.treedef.flatten_up_to(gradients)
  except (ValueError, TypeError, KeyError):
    is_leaf = lambda x: _array.is_quantized(x) or isinstance(x, optax.MaskedNode)
    found = [_array.path_str(path) for path, _ in jax.tree_util.tree_flatten_with_path(gradients, is_leaf=is_leaf)[0]]
    missing = [f'{path} is missing' for path in params.paths if path not in found]
    surplus = [f'{path} is not a parameter' for path in found if path not in params.paths]
    detail = '; '.join(missing[:1] + surplus[:1]) or jax.tree.structure(gradients)
    raise ValueError(f'gradients and parameters differ in structure: {detail}') from None
  out = {}
  for i in params.active:
    path, gradient, shape = params.paths[i], flat[i], params.templates[i].shape
    if is_gradient(gradient):
      out[i] = gradient
      continue
    if not hasattr(gradient, 'dtype'):
      raise TypeError(f'{path}: the gradient must be a dense array, got {gradient!r}; {_OF_DENSE}')
    if _array.is_quantized(gradient) or not jnp.issubdtype(gradient.dtype, jnp.floating):
      raise TypeError(f'{path}: the gradient must be a dense floating-point array, got {gradient!r}; {_OF_DENSE}')
    if gradient.shape != shape:
      raise ValueError(
        f'{path}: the gradient has shape {gradient.shape}, the parameter {shape}; {_OF_DENSE}. Of each example, they '
        'go through optax.chain(differentially_private_aggregate, ...); optax.flatten goes inside of '
        'lpmm_optax.low_precision'
      )
    out[i] = Gradient(recent=jnp.asarray(gradient))
  return out
