"""`step` and `chain`: the path that updates parameters in place, without a tree of deltas."""

from typing import Any

import optax

from lpmm_optax import _transform


def step(
  tx: optax.GradientTransformation, grads: Any, params: Any, opt_state: Any, **extra_args: Any
) -> tuple[Any, Any]:
  """Updates parameters and state; under jit with both donated, in place.

  The result equals that of ``tx.update`` followed by `optax.apply_updates` bit for bit. A transformation that has no
  in-place step (one of Optax's, or `optax.chain` around one of ours) takes exactly that route.

  Args:
    tx: an optimizer of this package, a `chain` that ends in one, or any Optax transformation.
    grads: dense gradients, a tree like params.
    params: the parameters, quantized or not.
    opt_state: the state. Keep the order (params, opt_state) in the arguments and results of a jitted step that donates
      them: XLA reuses donated buffers in order, and parameter and momentum codes have the same shapes.
    **extra_args: passed on.

  Returns:
    (params, opt_state).

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params, tx = {'w': jnp.ones(3)}, lpmm.sgdm(0.5)
  >>> params, state = lpmm.step(tx, {'w': jnp.ones(3)}, params, tx.init(params))
  >>> params['w'].tolist()
  [0.5, 0.5, 0.5]
  """
  if isinstance(tx, _transform.InPlaceTransformation):
    return tx.step(grads, params, opt_state, **extra_args)
  updates, opt_state = optax.with_extra_args_support(tx).update(grads, opt_state, params, **extra_args)
  return optax.apply_updates(params, updates), opt_state


def chain(*txs: optax.GradientTransformation) -> _transform.InPlaceTransformation:
  """`optax.chain`, ending in one of our optimizers, that keeps its in-place step.

  Args:
    *txs: transformations of the dense gradients (clipping, say), then an optimizer of this package.

  Returns:
    A transformation with the same state and updates as `optax.chain(*txs)`, and an in-place step.

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
  if not txs or not isinstance(txs[-1], _transform.InPlaceTransformation):
    raise TypeError('the last transformation of lpmm.chain must be an lpmm_optax optimizer')
  if any(isinstance(tx, _transform.InPlaceTransformation) for tx in txs[:-1]):
    raise ValueError('an lpmm_optax optimizer must come last in lpmm.chain: nothing may transform its integer deltas')
  chained = optax.chain(*txs)
  preceding = [optax.with_extra_args_support(tx) for tx in txs[:-1]]

  def chained_step(gradients, params, state, **extra_args):
    if len(state) != len(txs):
      raise ValueError(f'a chain of {len(txs)} transformations got a state of {len(state)}')
    new_states = []
    for tx, tx_state in zip(preceding, state[:-1], strict=True):
      gradients, tx_state = tx.update(gradients, tx_state, params, **extra_args)
      new_states.append(tx_state)
    params, last_state = txs[-1].step(gradients, params, state[-1], **extra_args)
    return params, (*new_states, last_state)

  return _transform.InPlaceTransformation(chained.init, optax.with_extra_args_support(chained).update, chained_step)
