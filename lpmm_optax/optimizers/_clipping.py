"""Clipping by a norm that is known before the gradient is."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class ClipByPreviousNormState(NamedTuple):
  """State of `clip_by_previous_norm`.

  Attributes:
    norm: of the last gradient, before it was clipped, float32[]; 0 before the first.
  """

  norm: jax.Array


def clip_by_previous_norm(max_norm: jax.typing.ArrayLike) -> optax.GradientTransformation:
  r"""Scales gradients as `optax.clip_by_global_norm` does, but by the norm that the gradient of the step before had.

  .. math::
    g_t \leftarrow g_t \cdot \min(1, c / \lVert g_{t-1} \rVert)

  So a step of `lpmm_optax.value_and_step` without a `MultiSteps`, which moves one layer before the gradient of the next
  is there, can clip. It follows norms that stay large for some steps. It does not bound a single spike, and the step
  after one is short: where that matters, clip each element too (`optax.clip`), or accumulate gradients first, with
  `MultiSteps(chain(optax.clip_by_global_norm(c), ...), 1)`. The first step is not clipped; nor is the one after a
  gradient whose norm is not finite.

  Args:
    max_norm: c.

  Returns:
    A transformation of gradients, to precede an optimizer in `lpmm_optax.chain`.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> tx = lpmm.clip_by_previous_norm(1.0)
  >>> state = tx.init({'w': jnp.zeros(2)})
  >>> for _ in range(2):
  ...   updates, state = tx.update({'w': jnp.array([3.0, 4.0])}, state)
  ...   print([round(float(x), 2) for x in updates['w']])
  [3.0, 4.0]
  [0.6, 0.8]
  """

  def init(params):
    del params
    return ClipByPreviousNormState(jnp.zeros((), jnp.float32))

  def update(updates, state, params=None):
    del params
    is_large = jnp.isfinite(state.norm) & (state.norm > max_norm)
    scale = jnp.where(is_large, max_norm / state.norm, 1.0)
    norm = optax.tree.norm(updates).astype(jnp.float32)
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), updates), ClipByPreviousNormState(norm)

  return optax.GradientTransformation(init, update)
