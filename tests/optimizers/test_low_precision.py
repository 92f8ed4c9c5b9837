"""Any Optax transformation in low precision: that it is the same optimizer, by every route."""

import functools
import itertools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest
from runs import slow
from transformations import ALL
from transformations import field_formats
from transformations import tree

import lpmm_optax as lpmm
from lpmm_optax.optimizers import _transformation

pytestmark = pytest.mark.usefixtures('standard_promotion')


def train(tx, params, steps, route='step'):
  def body(carry, i):
    params, state = carry
    grads = jax.tree.map(
      lambda p: p + 0.3 * jax.random.normal(jax.random.fold_in(jax.random.key(5), i), p.shape), lpmm.dequantize(params)
    )
    if route == 'step':
      return lpmm.step(tx, grads, params, state), None
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  return jax.jit(lambda p: jax.lax.scan(body, (p, tx.init(p)), jnp.arange(steps))[0])(params)


QUICK = ('adamw schedule',)


@pytest.mark.parametrize('name', [*QUICK, *slow(*(name for name in ALL if name not in QUICK))])
def test_it_is_the_same_optimizer_to_float_rounding_and_in_low_precision(name):
  steps = 20
  exact, exact_state = train(ALL[name](), tree(), steps)
  dense, dense_state = train(lpmm.low_precision(ALL[name](), formats=None), tree(), steps)
  # Twenty steps of float32 roundings of values of about one, and ten times as many in orthogonalized ones.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=5e-5)
  jax.tree.map(close, dense, exact)
  jax.tree.map(close, dense_state.inner_state, exact_state)
  # Dense parameters, which show every step, and not the noise of their own rounding.
  params, state = train(lpmm.low_precision(ALL[name]()), tree(), steps)
  for leaf in ('a', 'b'):
    ours, theirs = (np.asarray(x[leaf] - tree()[leaf]).ravel() for x in (params, exact))
    # Each step has rounding errors of moments, of some per cent, which are as good as independent. A second set of
    # weights (z) has those of weights: up to a grid step of 0.02 at a time, where all have moved by 0.1.
    least = 0.95 if 'schedule_free' in name else 0.97
    assert ours @ theirs / np.sqrt((ours @ ours) * (theirs @ theirs)) > least
    assert abs(np.linalg.norm(ours) / np.linalg.norm(theirs) - 1) < 0.1
  for x in jax.tree.leaves(lpmm.dequantize(state)):
    if jnp.issubdtype(x.dtype, jnp.floating):
      assert np.isfinite(x).all()


@pytest.mark.slow
def test_a_line_search_gets_its_function():
  curvature = jnp.exp(jax.random.normal(jax.random.key(0), (64, 128)))
  loss = lambda x: jnp.sum(curvature * jnp.square(x - 1)) + jnp.sum(jnp.square(x - 1) ** 2)

  def descended(tx, steps):
    def body(carry, _):
      x, state = carry
      value, gradient = jax.value_and_grad(loss)(x)
      return lpmm.step(tx, gradient, x, state, value=value, grad=gradient, value_fn=loss), value

    start = jnp.zeros((64, 128))
    return jax.jit(lambda: jax.lax.scan(body, (start, tx.init(start)), length=steps))()

  tx = lpmm.low_precision(optax.lbfgs())
  _, losses = descended(optax.lbfgs(), 20)
  (x, ours), low_precision = descended(tx, 20)
  assert losses[-1] < 1e-3 * losses[0]
  assert low_precision[-1] < 1e-3 * losses[0]
  # With its last parameters and gradient in 8 bits it stood still.
  dense = {row.group for row in lpmm.memory_report(x, ours, tx=tx).rows if row.format == 'float32'}
  assert {'params', 'updates'} <= dense


@pytest.mark.parametrize(
  'name',
  [
    *slow(
      'clipped adamw', 'lamb', 'nadamw', 'partition', 'schedule_free_adamw', 'apply_if_finite', 'muon', 'adafactor'
    ),
  ],
)
def test_step_equals_update_and_apply_updates_and_no_tile_size_shows(name):
  start = lpmm.quantize({'a': tree()['a'], 'b': tree()['b']}, lpmm.INT8)
  results = []
  for route, tile_size in (('step', 2**30), ('update', 2**30), ('step', 2**11)):
    results.append(train(lpmm.low_precision(ALL[name](), tile_size=tile_size), start, 3, route))
  for actual in results[1:]:
    assert jax.tree.structure(actual) == jax.tree.structure(results[0])
    jax.tree.map(np.testing.assert_array_equal, actual, results[0])


def test_extra_arguments_reach_the_inner_transformation():
  params, grads = tree(), tree(1)
  for make in (lambda: optax.polyak_sgd(), lambda: contrib.momo(0.1)):
    tx, inner = lpmm.low_precision(make(), formats=None), make()
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, value=jnp.float32(2.0))
    expected, _ = inner.update(grads, inner.init(params), params, value=jnp.float32(2.0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), updates, expected)
  # What cannot be looked at before the first update takes the safe format.
  tx = lpmm.low_precision(contrib.momo(0.1))
  assert field_formats(tx.init(params)) == {'exp_avg': {'int8'}}
  assert 'updated in tiles' in str(lpmm.memory_report(params, tx.init(params), tx=tx, value=jnp.float32(2.0)))


def test_state_made_of_the_parameters_starts_as_they_are():
  params = lpmm.quantize(tree(), lpmm.INT8)
  state = lpmm.low_precision(contrib.schedule_free_adamw(0.01)).init(params)
  z, dense = (lpmm.dequantize(x)['a'] for x in (state.inner_state.z, params))
  assert float(jnp.max(jnp.abs(z - dense))) < 0.5 * float(jnp.max(jnp.abs(dense))) / 126
  filled = lpmm.low_precision(optax.adagrad(0.1, initial_accumulator_value=0.25)).init(params)
  np.testing.assert_allclose(lpmm.dequantize(optax.tree.get(filled, 'sum_of_squares'))['a'], 0.25, rtol=0.01)
  abstract = jax.eval_shape(lambda: params)
  shapes = lpmm.low_precision(contrib.schedule_free_adamw(0.01)).init(abstract)
  assert jax.tree.structure(shapes) == jax.tree.structure(state)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, state)


def not_an_array():
  return optax.GradientTransformation(lambda params: {'name': 'sgd'}, lambda g, s, p=None: (g, s))


def loses_state():
  return optax.GradientTransformation(lambda params: {'count': jnp.zeros(())}, lambda g, s, p=None: (g, {}))


def quantized_mask():
  # Made without is_leaf, so that it has an entry for codes and one for scales.
  return optax.adamw(0.1, mask=jax.tree.map(lambda x: x.ndim > 1, lpmm.quantize(tree(), lpmm.INT8)))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lpmm.low_precision(not_an_array()), 'state must be arrays'),
    (lambda: lpmm.low_precision(loses_state()), 'returned a state of structure'),
    (lambda: lpmm.adam(0.1, mu_dtype=jnp.complex64), 'mu/a: complex state is not supported'),
    (lambda: lpmm.low_precision(quantized_mask()), 'go around with lpmm_optax.masked or partition'),
  ],
)
def test_what_cannot_work_is_refused_with_advice(make, message):
  def use():
    tx, params = make(), lpmm.quantize(tree(), lpmm.INT8)
    tx.update(tree(1), tx.init(params), params)

  with pytest.raises((TypeError, ValueError)) as info:
    use()
  assert re.search(message, '\n'.join([str(info.value), *getattr(info.value, '__notes__', [])]))


def test_float64_is_computed_in_float64_when_dense_and_refused_otherwise():
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), tree())
    expected, _ = train(optax.adamw(0.01), params, 20)
    actual, _ = train(lpmm.adamw(0.01, formats=None), params, 20)
    # 20 roundings of float64 at 2^-53 each, of values up to ten.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), actual, expected)
    with pytest.raises(TypeError, match=r'mu/a.*float64'):
      lpmm.adamw(0.01).init(params)


def test_a_loop_of_eager_steps_is_warned_of_once(monkeypatch):
  monkeypatch.setattr(_transformation, '_eager_steps', itertools.count(1))
  tx, params = lpmm.sgdm(0.1), {'w': jnp.ones(3)}
  state = tx.init(params)
  jax.jit(functools.partial(lpmm.step, tx))(params, params, state)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    for _ in range(2 * _transformation._MOST_EAGER_STEPS):
      params, state = lpmm.step(tx, {'w': jnp.ones(3)}, params, state)
  (warning,) = [w for w in caught if w.category is lpmm.EagerStepWarning]
  assert 'jax.jit' in str(warning.message)


def test_gradients_of_what_is_stored_say_what_to_take_them_of():
  params = lpmm.quantize({'w': jnp.ones((64, 64))}, lpmm.INT8)
  tx = lpmm.sgdm(0.1)
  of_codes = jax.grad(lambda params: jnp.sum(lpmm.dequantize(params)['w']), allow_int=True)(params)
  for gradients in (params, of_codes, {'w': None}):
    with pytest.raises(TypeError, match=r'w: the gradient must be a dense .* lpmm_optax\.dequantize\(params\)'):
      lpmm.step(tx, gradients, params, tx.init(params))
