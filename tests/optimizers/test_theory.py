"""The recurrences and bounds of docs/theory.md, on a quadratic of curvature 1 with noisy gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import grid_steps

import lpmm_optax as lpmm

SHAPE = (64, 128)
SIZE = SHAPE[0] * SHAPE[1]
B = 0.9
# Their largest is 3.5, so that a grid step is 0.03.
OPTIMUM = jax.random.normal(jax.random.key(0), SHAPE)


def weights_and_momentum(params, state):
  (momentum,) = (x for _, x in optax.tree.get_all_with_path(state, 'trace'))
  return lpmm.dequantize(params), lpmm.dequantize(momentum)


def noisy_gradient(w, s, i):
  return w - OPTIMUM + s * jax.random.normal(jax.random.fold_in(jax.random.key(1), i), SHAPE)


def errors_of_step(tx, lr, feedback, params, state, g):
  """Parameters and state after a step; and the errors of weights and momentum, wanted by theory.md."""
  w, m = weights_and_momentum(params, state)
  new_params, new_state = lpmm.step(tx, g, params, state)
  new_w, new_m = weights_and_momentum(new_params, new_state)
  unrounded = B * m + (lr * g if feedback else g)
  of_weights = new_w - (w - unrounded if feedback else w - lr * unrounded)
  # Feedback adds (1 - 1 / b) e for an error of -e.
  of_momentum = new_m - unrounded + ((1 - 1 / B) * of_weights if feedback else 0.0)
  return new_params, new_state, of_weights, of_momentum


@pytest.mark.parametrize('feedback', [False, True])
def test_rounding_enters_where_the_recurrences_say(feedback):
  lr = 0.02
  tx = lpmm.sgdm(lr, B, error_feedback=feedback)
  params = lpmm.quantize(OPTIMUM + 0.3, lpmm.INT8)
  state = tx.init(params)
  step = jax.jit(functools.partial(errors_of_step, tx, lr, feedback))
  for i in range(20):
    g = noisy_gradient(lpmm.dequantize(params), 1.0, i)
    params, state, of_weights, of_momentum = map(jax.device_get, step(params, state, g))
    for error, array in ((of_weights, params), (of_momentum, optax.tree.get(state, 'trace'))):
      error, size = np.asarray(error, np.float64), grid_steps(array)
      # Less than a step, and no more than the float32 sum of numbers of some hundred steps is off by.
      assert np.all(np.abs(error) < (1 + 1e-4) * size)
      assert np.sqrt(np.mean((error / size) ** 2)) > 0.05
      assert abs(np.mean(error / size)) < 5 * np.std(error / size) / np.sqrt(SIZE)


def measured(lr, s, feedback, formats, steps, burn_in=0):
  """Means over steps and elements of the squares of gradient, momentum, and the errors of weights and of momentum."""
  tx = lpmm.sgdm(lr, B, error_feedback=feedback, formats=formats)
  params = lpmm.quantize(OPTIMUM + 0.1, lpmm.INT8)

  def body(carry, i):
    w, _ = weights_and_momentum(*carry)
    *carry, of_weights, of_momentum = errors_of_step(tx, lr, feedback, *carry, noisy_gradient(w, s, i))
    squares = [jnp.mean(x**2) for x in (w - OPTIMUM, weights_and_momentum(*carry)[1], of_weights, of_momentum)]
    return tuple(carry), jnp.stack(squares)

  run = jax.jit(lambda: jax.lax.scan(body, (params, tx.init(params)), jnp.arange(steps))[1])
  return np.asarray(run(), np.float64)[burn_in:].mean(axis=0)


@pytest.mark.parametrize('s', [0.02, 1.0])
@pytest.mark.parametrize('feedback', [False, True])
def test_the_bound_holds_on_a_quadratic(feedback, s):
  lr, steps = 0.002, 2000
  eta = lr / (1 - B)
  assert eta <= (1 - B) / 4
  gradient, _, r, q = measured(lr, s, feedback, 'default', steps)
  # Everything per coordinate.
  start = 8 * (0.5 * 0.1**2) / (eta * steps)
  if feedback:
    bound = start + 4 * eta * (s**2 + (B / lr) ** 2 * q)
    bound += 8 * ((B * eta * s) ** 2 + r + (B / (1 - B)) ** 2 * q) / (1 - B**2)
  else:
    bound = start + 4 * eta * (s**2 + B**2 * q) + 4 / eta * r + 8 * (B * eta) ** 2 * (s**2 + q) / (1 - B**2)
  assert gradient < bound
  # It is of the right size.
  assert bound < 30 * gradient


def test_weights_stray_from_virtual_ones_by_what_feedback_has_not_returned():
  lr, s = 3e-4, 1.0
  _, velocity, e, _ = measured(lr, s, True, None, steps=1500, burn_in=500)
  eta = lr / (1 - B)
  stray = (B / (1 - B)) ** 2 * velocity
  assert stray == pytest.approx(((B * eta * s) ** 2 + e) / (1 - B**2), rel=0.03)
  # Most of it is the errors of rounding.
  assert e > 2 * (B * eta * s) ** 2
