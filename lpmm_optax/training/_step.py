"""`step`, and what keeps it in place: `chain`, `apply_if_finite`."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.optimizers import _first_state
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.trace import _plan


def step(
  tx: optax.GradientTransformation, grads: Any, params: Any, opt_state: Any, **extra_args: Any
) -> tuple[Any, Any]:
  """Updates parameters and state; under jit with both donated, in place.

  The result equals that of ``tx.update`` followed by `optax.apply_updates` bit for bit. A transformation that has no
  in-place step (one of Optax's, or `optax.chain` around one of ours) takes exactly that route.

  Args:
    tx: an optimizer of this package, a `chain` that ends in one, or any Optax transformation.
    grads: dense gradients, a tree like params, of its shapes and floating-point dtypes; those of leaves that are never
      updated (integers, 0-size) are ignored.
    params: the parameters, quantized or not.
    opt_state: the state. Keep the order (params, opt_state) in the arguments and results of a jitted step that donates
      them: XLA reuses donated buffers in order, and parameter and momentum codes have the same shapes.
    **extra_args: passed on.

  Returns:
    (params, opt_state).

  Raises:
    TypeError, ValueError: for gradients, parameters or a state that do not fit each other, naming the leaf.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params, tx = {'w': jnp.ones(3)}, lpmm.sgdm(0.5)
  >>> params, state = lpmm.step(tx, {'w': jnp.ones(3)}, params, tx.init(params))
  >>> params['w'].tolist()
  [0.5, 0.5, 0.5]
  """
  if isinstance(tx, _transformation.InPlaceTransformation):
    return tx.step(grads, params, opt_state, **extra_args)
  grads = _gradient.dense(grads, params)
  updates, opt_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extra_args)
  return optax.apply_updates(params, updates), opt_state


def chain(*txs: optax.GradientTransformation) -> _transformation.InPlaceTransformation:
  """`optax.chain`, ending in one of our optimizers, that keeps its in-place step.

  Args:
    *txs: transformations of the dense gradients (clipping, say), then an optimizer of this package.

  Returns:
    A transformation with the updates of `optax.chain(*txs)` and an in-place step. Its state is a tuple, one state per
    transformation. What the gradients become on the way is computed along with the update, not stored, unless the last
    is a wrapper (`apply_if_finite`, `MultiSteps`), which must see it.

  Raises:
    TypeError: if the last is not an optimizer of this package.
    ValueError: if another one is. What it returns are integer deltas, which nothing may transform.

  >>> import optax, lpmm_optax as lpmm
  >>> tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1))
  >>> lpmm.chain(lpmm.sgdm(0.1), optax.scale(2.0))
  Traceback (most recent call last):
    ...
  TypeError: the last transformation of lpmm.chain must be an lpmm_optax optimizer
  """
  if not txs or not isinstance(txs[-1], _transformation.InPlaceTransformation):
    raise TypeError('the last transformation of lpmm.chain must be an lpmm_optax optimizer')
  if any(isinstance(tx, _transformation.InPlaceTransformation) for tx in txs[:-1]):
    raise ValueError('an lpmm_optax optimizer must come last in lpmm.chain: nothing may transform its integer deltas')
  optimizer = _transformation.whole_optimizer_of(txs[-1])
  if optimizer is not None:
    return optimizer.preceded_by(txs[:-1])
  wrapper = txs[-1]
  preceding = optax.with_extra_args_support(optax.chain(*txs[:-1]) if txs[1:] else optax.identity())

  def init(params):
    structure, leaves = _plan.flatten(_array.unwrap(params))
    return (*_first_state.make(None, preceding, structure, leaves), wrapper.init(params))

  def transformed(gradients, params, state, extra_args):
    """What the gradients of the leaves that are updated become, and the states of what precedes."""
    _transformation.check_chain(state, len(txs))
    structure, leaves = _plan.flatten(params)
    given = _gradient.flatten(structure, _gradient.dense(gradients, params))
    recent = structure.tree({i: gradient.recent for i, gradient in given.items()})
    dense = structure.tree({i: _array.dequantize(leaves[i]) for i in structure.active})
    return preceding.update(recent, tuple(state[:-1]), dense, **extra_args)

  def update(gradients, state, params=None, **extra_args):
    gradients, before = transformed(gradients, params, state, extra_args)
    deltas, last = wrapper.update(gradients, state[-1], params, **extra_args)
    return _array.unseal(deltas), (*before, last)

  def in_place(gradients, params, state, **extra_args):
    gradients, before = transformed(gradients, params, state, extra_args)
    params, last = wrapper.step(gradients, params, state[-1], **extra_args)
    return params, (*before, last)

  explain = _transformation.explain(wrapper)
  return _transformation.InPlaceTransformation('chain', init, update, in_place, explain=explain)


def where(when: jax.Array, fn: Callable[[Any], Any], x: Any) -> Any:
  """`fn(x)` where `when`, bool[], and else x; a pytree of arrays, which is overwritten in place.

  It is a loop of one turn or none: of a `lax.cond`, XLA on a GPU copies what it may change. A loop has no reverse-mode
  derivative, so without anything quantized, which has none either, it is a `lax.cond`.
  """
  if not any(map(_array.is_quantized, jax.tree.leaves(x, is_leaf=_array.is_quantized))):
    return lax.cond(when, fn, lambda x: x, x)
  return _tiles.loop(when.astype(jnp.int32), lambda _, x: fn(x), _mesh.vary_as_results(fn, x))


def no_change(params: Any, update: Callable[..., tuple[Any, Any]], *args: Any) -> Any:
  """Deltas of zero, as those that `update(*args)` gives with a state."""
  deltas, _ = jax.eval_shape(update, *args)
  return jax.tree.map(lambda p, s: jnp.zeros_like(p, dtype=s.dtype), params, deltas)


def _all_finite(x: jax.Array) -> jax.Array:
  """Whether an array is free of NaN and Inf, of which x - x makes NaN; XLA on CPU would store the mask of isfinite."""
  return jnp.sum(x - x) == 0


def apply_if_finite(
  inner: _transformation.InPlaceTransformation, max_consecutive_errors: int
) -> _transformation.InPlaceTransformation:
  """`optax.apply_if_finite` for an optimizer of this package: a step whose gradients are not all finite is skipped.

  Optax's own rejects a step with an update made of the gradients, zeroed, which is of another structure than deltas of
  quantized parameters; this one rejects it with zero deltas. A skipped step leaves parameters and inner state, its step
  count included, as they were, bit for bit.

  Args:
    inner: an optimizer of this package, or a `chain`.
    max_consecutive_errors: how many steps in a row to skip; the next is applied whatever its gradients.

  Returns:
    A transformation with the state of Optax's (`optax.ApplyIfFiniteState`), and an in-place step.

  Raises:
    TypeError: if inner is not an optimizer of this package.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params, tx = {'w': jnp.ones(2)}, lpmm.apply_if_finite(lpmm.sgdm(0.5), 3)
  >>> params, state = lpmm.step(tx, {'w': jnp.array([1.0, jnp.nan])}, params, tx.init(params))
  >>> params['w'].tolist(), int(state.total_notfinite)
  ([1.0, 1.0], 1)
  """
  if not isinstance(inner, _transformation.InPlaceTransformation):
    raise TypeError('lpmm.apply_if_finite wraps an lpmm_optax optimizer; for others there is optax.apply_if_finite')

  def guard(gradients, params, state, advance, start):
    arrays = jax.tree.leaves(_gradient.dense(gradients, params))
    each = [_all_finite(g) for g in arrays if jnp.issubdtype(g.dtype, jnp.floating)]
    finite = jnp.all(jnp.array(each, bool))
    consecutive = jnp.where(finite, 0, optax.safe_increment(state.notfinite_count))
    accepted = finite | (consecutive > max_consecutive_errors)
    new, inner_state = where(accepted, lambda old: advance(*old), (start, state.inner_state))
    total = jnp.where(finite, state.total_notfinite, optax.safe_increment(state.total_notfinite))
    return new, optax.ApplyIfFiniteState(consecutive, finite, total, inner_state)

  def update(gradients, state, params=None, **extra_args):
    def advance(_, inner_state):
      deltas, inner_state = inner.update(gradients, inner_state, params, **extra_args)
      return _array.unseal(deltas), inner_state

    return guard(gradients, params, state, advance, no_change(params, advance, None, state.inner_state))

  def in_place(gradients, params, state, **extra_args):
    advance = lambda params, inner_state: inner.step(gradients, params, inner_state, **extra_args)
    return guard(gradients, params, state, advance, params)

  init, explain = optax.apply_if_finite(inner, max_consecutive_errors).init, _transformation.explain(inner)
  return _transformation.InPlaceTransformation('apply_if_finite', init, update, in_place, explain=explain)
