"""The one interpreter of jaxprs: derivatives, side effects, and traces that fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import slow
from runs import step_by

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('standard_promotion', 'compile_fast')


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def quadratic(w):
  return jnp.mean((w - 0.3) ** 2)


def loss_after(make, rate, steps=3):
  tx, params = make(rate), normal(0, 64, 128)
  state = tx.init(params)
  for _ in range(steps):
    updates, state = tx.update(jax.grad(quadratic)(params), state, params)
    params = optax.apply_updates(params, updates)
  return quadratic(params)


DENSE = {
  'sgdm': (lambda rate: lpmm.sgdm(rate, formats=None), lambda rate: optax.sgd(rate, momentum=0.9)),
  'adamw': (lambda rate: lpmm.adamw(rate, formats=None), optax.adamw),
  'low_precision': (
    lambda rate: lpmm.low_precision(optax.chain(optax.clip_by_global_norm(0.1), optax.rmsprop(rate)), formats=None),
    lambda rate: optax.chain(optax.clip_by_global_norm(0.1), optax.rmsprop(rate)),
  ),
}


@pytest.mark.parametrize('name', slow('sgdm', 'adamw', 'low_precision'))
def test_derivatives_through_dense_steps_are_those_of_optax(name):
  ours, theirs = (jax.value_and_grad(functools.partial(loss_after, make))(0.1) for make in DENSE[name])
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  forward = jax.jvp(functools.partial(loss_after, DENSE[name][0]), (0.1,), (1.0,))[1]
  np.testing.assert_allclose(forward, theirs[1], rtol=1e-4)


@pytest.mark.parametrize('is_quantized', [True, False])
def test_derivatives_through_a_rounded_step_raise(is_quantized):
  def loss(rate):
    w = normal(0, 64, 128)
    tx, params = lpmm.adamw(rate), {'layer': lpmm.quantize(w, lpmm.INT8) if is_quantized else w}
    params, _ = lpmm.step(tx, {'layer': normal(1, 64, 128)}, params, tx.init(params))
    return quadratic(lpmm.dequantize(params)['layer'])

  with pytest.raises(TypeError, match='layer: a step has no derivative'):
    jax.grad(loss)(0.1)


@pytest.mark.parametrize('where', ['preceding', *slow('inner', 'accumulated')])
def test_side_effects_happen_once_a_step(where):
  seen = []

  def log(g, p):
    jax.debug.callback(lambda norm: seen.append(float(norm)), optax.tree.norm(g))
    return g

  log = optax.stateless(log)
  tx = lpmm.low_precision(optax.chain(log, optax.adam(0.1))) if where == 'inner' else lpmm.chain(log, lpmm.adam(0.1))
  tx = lpmm.MultiSteps(tx, 2) if where == 'accumulated' else tx
  params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  state = tx.init(params)
  step = jax.jit(functools.partial(lpmm.step, tx))
  for i in range(4):
    params, state = step(jnp.full((64, 128), float(i + 1)), params, state)
  jax.effects_barrier()
  sizes = [1.5, 3.5] if where == 'accumulated' else [1, 2, 3, 4]
  np.testing.assert_allclose(seen, np.array(sizes) * np.sqrt(64 * 128), rtol=1e-2)


def test_a_trace_that_fails_at_init_says_so():
  inner = optax.chain(optax.stateless(lambda g, p: jax.lax.pmean(g, 'batch')), optax.adam(1e-3))
  params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  with pytest.raises(Exception, match='batch') as found:
    lpmm.low_precision(inner).init(params)
  assert any('init traces one update' in note for note in found.value.__notes__)
  lpmm.low_precision(inner, formats=None).init(params)
  state = lpmm.low_precision(inner, formats={'mu': lpmm.INT8, 'nu': lpmm.BFLOAT16}).init(params)
  assert optax.tree.get(state, 'nu').format == lpmm.BFLOAT16


def test_an_extra_argument_that_is_missing_at_init_is_taken_for_a_number():
  params = lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8)
  tx = lpmm.low_precision(optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()))
  state = tx.init(params)
  assert optax.tree.get(state, 'nu').format.grid == 'sqrt'
  lpmm.step(tx, jnp.ones((64, 128)), params, state, value=jnp.float32(1.0))


@pytest.mark.parametrize(
  'count',
  [
    *slow(
      lambda x: jnp.sum(jnp.abs(x) > 0.5),
      lambda x: jnp.max(jnp.sign(x).astype(jnp.int32)),
      lambda x: jnp.any(x > 0.5).astype(jnp.int32),
      lambda x: jnp.min(jnp.round(10 * jnp.abs(x)).astype(jnp.int32)),
    ),
  ],
)
def test_reductions_of_accumulated_gradients_of_any_kind(count):
  def update(updates, state, params=None):
    return updates, {'n': sum(count(x) for x in jax.tree.leaves(updates))}

  log = optax.GradientTransformation(lambda p: {'n': jnp.zeros((), jnp.int32)}, update)
  tx = lpmm.MultiSteps(lpmm.chain(log, lpmm.adamw(1e-3)), 2)
  params = lpmm.quantize({'a': normal(0, 64, 128), 'b': normal(1, 64, 256)}, lpmm.INT8)
  state = tx.init(params)
  for _ in range(2):
    params, state = lpmm.step(tx, {'a': jnp.ones((64, 128)), 'b': jnp.ones((64, 256))}, params, state)
  assert int(state.inner_opt_state[0]['n']) == sum(int(count(jnp.ones(shape))) for shape in [(64, 128), (64, 256)])


def test_state_kept_below_a_parameter_is_stored_in_formats():
  def init(params):
    return jax.tree.map(lambda p: {'m': jnp.zeros_like(p), 'v': jnp.zeros_like(p)}, params)

  def update(updates, state, params=None):
    is_own = lambda x: isinstance(x, dict) and set(x) == {'m', 'v'}
    state = jax.tree.map(
      lambda g, s: {'m': 0.9 * s['m'] + g, 'v': 0.9 * s['v'] + g**2}, updates, state, is_leaf=lambda x: is_own(x)
    )
    return jax.tree.map(lambda s: -s['m'] / (jnp.sqrt(s['v']) + 1e-8), state, is_leaf=is_own), state

  params = lpmm.quantize({'layer': {'w': normal(0, 64, 128)}}, lpmm.INT8)
  tx = lpmm.low_precision(optax.GradientTransformation(init, update))
  state = tx.init(params)
  formats = jax.tree.map(lambda x: str(x.format), state.inner_state, is_leaf=lpmm.is_quantized)
  assert formats == {'layer': {'w': {'m': 'int8', 'v': 'uint8_sqrt'}}}
  state = lpmm.low_precision(optax.GradientTransformation(init, update), formats={'m': lpmm.INT16}).init(params)
  assert state.inner_state['layer']['w']['m'].format.bits == 16
  params, state = lpmm.step(tx, {'layer': {'w': normal(1, 64, 128)}}, params, tx.init(params))
  assert 'm' in lpmm.memory_report(params, state).groups


@pytest.mark.slow
def test_eager_steps_of_injected_hyperparameters_compile_once_and_leak_nothing():
  compiled = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if 'backend_compile' in name else None
  )
  for make in (lpmm.adamw, lpmm.sgdm):
    tx = optax.inject_hyperparams(make, hyperparam_dtype=jnp.float32)(learning_rate=1e-3)
    params = lpmm.quantize({'w': normal(0, 64, 128)}, lpmm.INT8)
    state = tx.init(params)
    for i in range(4):
      before = len(compiled)
      updates, state = tx.update({'w': normal(i, 64, 128)}, state, params)
      params = optax.apply_updates(params, updates)
    assert len(compiled) == before

    with jax.checking_leaks():
      step = jax.jit(step_by(tx, 'update'))
      step({'w': normal(0, 64, 128)}, params, state)
