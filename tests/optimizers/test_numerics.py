"""State in its default formats does what dense state does, where one field's rounding meets another's use.

Parameters are dense, so that nothing but the state is rounded.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest
from runs import slow

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('standard_promotion')
SHAPE = (32, 128)


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def run(tx, gradient, steps, params):
  """(parameters, state) after so many steps of gradient(params, step)."""
  body = lambda i, carry: lpmm.step(tx, gradient(carry[0], i), *carry)
  return jax.lax.fori_loop(0, steps, body, (params, tx.init(params)))


def both(inner, gradient, steps, params):
  """The same with the default formats, and with none."""
  return (run(lpmm.low_precision(inner, **kwargs), gradient, steps, params) for kwargs in ({}, {'formats': None}))


def wide(params, i):
  """Of a noisy quadratic in whose blocks one coordinate has 10^4 times the gradients of the others."""
  scale = jnp.ones(SHAPE).at[:, ::128].set(1e4)
  return scale * (params - normal(1, *SHAPE) + 0.3 * jax.random.normal(jax.random.key(i), SHAPE))


INNER = {
  'centered rmsprop': optax.rmsprop(1e-3, decay=0.9, centered=True),
  'centered rmsprop with momentum': optax.rmsprop(1e-3, decay=0.9, centered=True, momentum=0.9),
  'yogi': optax.yogi(1e-3),
  'amsgrad': optax.amsgrad(1e-3),
  'simplified_ademamix': contrib.simplified_ademamix(1e-5),
  'rprop': optax.rprop(1e-3),
}


@pytest.mark.parametrize('name', ['centered rmsprop', *slow(*list(INNER)[1:])])
def test_small_gradients_beside_large_ones_train_as_in_float32(name):
  found = both(INNER[name], wide, 1000, jnp.zeros(SHAPE))
  ours, theirs = (np.mean((x - normal(1, *SHAPE))[:, 1:] ** 2) for x, _ in found)
  assert ours < 1.1 * theirs


@pytest.mark.slow
def test_a_second_moment_in_bfloat16_takes_the_first_with_it():
  tx = lambda formats: lpmm.adam(1e-3, formats=formats, error_feedback=False)
  found = [run(tx(formats), wide, 1500, jnp.zeros(SHAPE))[0] for formats in ({'nu': lpmm.BFLOAT16}, {'nu': None}, None)]
  ours, dense, theirs = (np.mean((x - normal(1, *SHAPE))[:, 1:] ** 2) for x in found)
  assert max(ours, dense) < 1.05 * theirs


@pytest.mark.parametrize(
  'make',
  [
    contrib.muon,
    *slow(functools.partial(contrib.muon, ns_coeffs='dion'), functools.partial(contrib.muon, nesterov=False)),
  ],
)
def test_directions_without_gradient_stay_as_they_are(make):
  n = 64
  basis = jnp.linalg.qr(normal(0, n, 4))[0]
  gradient = lambda params, i: basis @ jax.random.normal(jax.random.key(i), (4, n)) + 0 * params
  ours, theirs = (x for x, _ in both(make(0.02), gradient, 100, jnp.zeros((n, n))))
  outside = lambda x: np.linalg.norm(x - basis @ (basis.T @ x))
  # By 0.5 in each step, in all of n - 4 directions, where the momentum has errors of 8 bits.
  assert outside(ours) < 0.05 * np.linalg.norm(theirs)


@pytest.mark.slow
@pytest.mark.parametrize('decay', [0.9995, 0.9999, 0.99999])
def test_slow_averages_are_not_drowned(decay):
  gradient = lambda params, i: 0.1 * normal(1, *SHAPE) + jax.random.normal(jax.random.key(i), SHAPE) + 0 * params
  inner = contrib.ademamix(0.0, b3=decay)
  ours, theirs = (
    lpmm.dequantize(optax.tree.get(state, 'm2')) for _, state in both(inner, gradient, 2000, jnp.zeros(SHAPE))
  )
  assert np.linalg.norm(ours - theirs) < 0.01 * np.linalg.norm(theirs)


@pytest.mark.slow
def test_a_maximum_over_all_steps_does_not_climb_on_rounding_errors():
  spread = jnp.exp(normal(3, *SHAPE))
  gradient = lambda params, i: spread * jax.random.normal(jax.random.key(i), SHAPE) + 0 * params
  ours, theirs = (
    np.sqrt(lpmm.dequantize(optax.tree.get(state, 'nu_max')))
    for _, state in both(optax.amsgrad(0.0), gradient, 3000, jnp.zeros(SHAPE))
  )
  # 8 bits made it 1.2 times as large by then.
  assert np.mean(ours / theirs) < 1.02
