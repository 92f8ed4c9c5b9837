"""Parameters, gradients, grids and the loop that tests share, and cases that are slow."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpmm_optax as lpmm
from lpmm_optax.storage import _codec


def tree(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'kernel': jax.random.normal(keys[0], (64, 96)),
    'bias': jax.random.normal(keys[1], (96,)),
    'scale': jax.random.normal(keys[2], ()),
  }


def grid_steps(x):
  """The grid step at each element, of x's shape."""
  return np.repeat(np.asarray(_codec.from_bfloat16_bits(x.scales)), x.blocks.size, axis=x.blocks.axis)


def gradients(steps):
  return jax.tree.map(lambda *xs: jnp.stack(xs), *(tree(i + 1) for i in range(steps)))


def train(tx, params, grads, use_step=False):
  """Parameters and state after a scan over stacked gradients."""

  def body(carry, grads):
    params, state = carry
    if use_step:
      return lpmm.step(tx, grads, params, state), None
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  with jax.numpy_dtype_promotion('standard'):  # Optax's own optimizers, which we are compared with, need it.
    return jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), grads)[0])(params)


def descent(tx, format, steps, seeds):
  """Losses of noisy descent on a quadratic from near its minimum, of shape [seeds, steps]."""
  target = 0.1 * jax.random.normal(jax.random.key(0), (128, 128))

  def run(seed):
    key = jax.random.key(seed)
    params = target + 0.01 * jax.random.normal(key, target.shape)
    params = lpmm.quantize(params, format) if format else params

    def body(carry, i):
      weights = lpmm.dequantize(carry[0])
      noise = 0.1 * jax.random.normal(jax.random.fold_in(key, i), target.shape)
      return lpmm.step(tx, weights - target + noise, *carry), jnp.mean((weights - target) ** 2)

    return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[1]

  with jax.numpy_dtype_promotion('standard'):
    return np.array([jax.jit(run)(seed) for seed in range(seeds)])


def excess(tx, format, steps=1500, seeds=3):
  """Mean loss over the last tenth, seed by seed."""
  return descent(tx, format, steps, seeds)[:, -steps // 10 :].mean(axis=1)


def step_by(tx, route):
  """(gradients, params, state) -> (params, state): `lpmm.step`, or the update that is added."""

  def step(grads, params, state):
    if route == 'step':
      return lpmm.step(tx, grads, params, state)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return step


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def slow(*cases):
  """Cases of a test, each its argument or the tuple of them, that the README's command leaves to .ci/run."""
  return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]
