"""The gradient of a leaf as an update takes it: dense, accumulated in low precision, or the sum of both, unevaluated.

What is accumulated is decoded where it is used, tile by tile, so that a sum never exists as a dense tree.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.trace import _plan


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gradient:
  """keep * accumulated + weight * recent, where an absent array counts as zero and an absent scalar as one.

  Attributes:
    accumulated: QuantizedArray or dense array, or None.
    recent: the last dense gradient, or None.
    keep: float32[], or None.
    weight: float32[], or None.
  """

  accumulated: Any = None
  recent: jax.Array | None = None
  keep: jax.Array | None = None
  weight: jax.Array | None = None

  def combine(self, accumulated: jax.Array | None, recent: jax.Array | None, dtype: Any) -> jax.Array:
    """The sum, of dense values of both arrays or of tiles of them; a scalar zero if there are none."""
    terms = [
      x.astype(dtype) if scalar is None else scalar.astype(dtype) * x.astype(dtype)
      for x, scalar in ((accumulated, self.keep), (recent, self.weight))
      if x is not None
    ]
    return sum(terms[1:], terms[0]) if terms else jnp.zeros((), dtype)

  def stored(self) -> tuple[Any, Any]:
    """The arrays, for a tile loop to read."""
    return None if self.accumulated is None else _array.stored(self.accumulated), self.recent

  def tile(self, reads: tuple[Any, Any], cells: _codec.Cells, dtype: Any) -> jax.Array:
    """The sum in cell view, of one tile of what `stored` gave; a scalar zero if there is nothing."""
    accumulated, recent = reads
    if accumulated is not None:
      accumulated = _array.codec_of(self.accumulated, cells.shape, cells).decode(accumulated)
    return self.combine(accumulated, None if recent is None else cells.split(recent), dtype)

  def dense(self, template: Any) -> jax.Array:
    """The whole gradient, of the shape and dtype of `template`."""
    accumulated = None if self.accumulated is None else _array.dequantize(self.accumulated)
    return jnp.broadcast_to(self.combine(accumulated, self.recent, template.dtype), template.shape)


def is_gradient(x: Any) -> bool:
  """Whether x is a `Gradient`."""
  return isinstance(x, Gradient)


def dense(gradients: Any, params: Any) -> Any:
  """The tree with every `Gradient` evaluated, for transformations that take arrays."""
  if not any(map(is_gradient, jax.tree.leaves(gradients, is_leaf=is_gradient))):
    return gradients
  structure, _ = _plan.flatten(params)
  found = flatten(structure, gradients)
  return structure.tree({i: gradient.dense(structure.templates[i]) for i, gradient in found.items()})


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
      raise TypeError(f'{path}: the gradient must be a dense array, got {gradient!r}')
    if _array.is_quantized(gradient) or not jnp.issubdtype(gradient.dtype, jnp.floating):
      raise TypeError(f'{path}: the gradient must be a dense floating-point array, got {gradient!r}')
    if gradient.shape != shape:
      raise ValueError(f'{path}: the gradient has shape {gradient.shape}, the parameter {shape}')
    out[i] = Gradient(recent=jnp.asarray(gradient))
  return out
