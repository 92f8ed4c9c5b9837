"""Any Optax transformation in low precision: what runs in tiles, how it is stored, that it is the same optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.fixture
def standard_promotion():
  # Optax's own optimizers, which ours are compared with, need it.
  with jax.numpy_dtype_promotion('standard'):
    yield


def tree(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'a': jax.random.normal(keys[0], (64, 128)),
    'c': {'kernel': 0.1 * jax.random.normal(keys[1], (96, 192))},
    'b': jax.random.normal(keys[2], (7,)),
  }


def only_matrices(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


def schedule(count):
  return 0.01 / (1 + 0.1 * jnp.asarray(count, jnp.float32))


# An inner transformation, and the formats of its state fields by default.
TILED = {
  'sgd': (lambda: optax.sgd(0.01, 0.9), {'trace': 'int8'}),
  'sgd nesterov': (lambda: optax.sgd(schedule, 0.9, nesterov=True), {'trace': 'int8'}),
  'adam': (lambda: optax.adam(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'adamw schedule': (lambda: optax.adamw(schedule, weight_decay=0.1), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'adamw mask': (lambda: optax.adamw(0.01, mask=only_matrices), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'nadamw': (lambda: optax.nadamw(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'amsgrad': (lambda: optax.amsgrad(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt', 'nu_max': 'uint8_sqrt'}),
  'adamax': (lambda: optax.adamax(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'radam': (lambda: optax.radam(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'yogi': (lambda: optax.yogi(0.01), {'mu': 'int8', 'nu': 'bfloat16'}),
  # The mean enters the denominator, as (g - mu)^2.
  'adabelief': (lambda: optax.adabelief(0.01), {'mu': 'bfloat16', 'nu': 'uint8_sqrt'}),
  'ademamix': (lambda: contrib.ademamix(0.01), {'m1': 'int8', 'm2': 'int8', 'nu': 'uint8_sqrt'}),
  'lion': (lambda: optax.lion(0.001), {'mu': 'int8'}),
  'rmsprop': (lambda: optax.rmsprop(0.01, momentum=0.9), {'nu': 'uint8_sqrt', 'trace': 'int8'}),
  'adagrad': (lambda: optax.adagrad(0.1), {'sum_of_squares': 'uint8_sqrt'}),
  'novograd': (lambda: optax.novograd(0.01), {'mu': 'int8'}),
  'schedule_free': (lambda: contrib.schedule_free(optax.sgd(0.01), 0.01), {'z': 'int8'}),
  'schedule_free_adamw': (lambda: contrib.schedule_free_adamw(0.01), {'nu': 'uint8_sqrt', 'z': 'int8'}),
  'clipped adamw': (
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'centralized adam': (
    lambda: optax.chain(optax.centralize(), optax.adam(0.01)),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'partition': (
    lambda: optax.partition(
      {'adam': optax.adam(0.01), 'sgd': optax.sgd(0.01, 0.9)},
      lambda params: jax.tree.map(lambda p: 'adam' if p.ndim > 1 else 'sgd', params),
    ),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'masked decay': (
    lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), only_matrices), optax.sgd(0.01, 0.9)),
    {'trace': 'int8'},
  ),
  'inject_hyperparams': (
    lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'apply_if_finite': (lambda: optax.apply_if_finite(optax.adam(0.01), 3), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'MultiSteps': (
    lambda: optax.MultiSteps(optax.sgd(0.01, 0.9), 3).gradient_transformation(),
    {'trace': 'int8', 'acc_grads': 'int8'},
  ),
  'average of updates': (
    lambda: optax.chain(optax.adam(0.01), optax.ema(0.9)),
    {'mu': 'int8', 'nu': 'uint8_sqrt', 'ema': 'int8'},
  ),
}

# The operation that is not elementwise.
WHOLE = {
  'lamb': (lambda: optax.lamb(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}, 'reduce_sum'),
  'lars': (lambda: optax.lars(0.01), {'trace': 'int8'}, 'reduce_sum'),
  'adafactor': (
    lambda: optax.adafactor(0.01, min_dim_size_to_factor=32, multiply_by_parameter_scale=True), {}, 'reduce_sum'
  ),
  'muon': (lambda: contrib.muon(0.01), {'mu': 'int8'}, 'reshape'),
}  # fmt: skip

ALL = {name: case[0] for name, case in (TILED | WHOLE).items()}


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


def field_formats(state):
  """The formats of a state by field, without those of exempt leaves."""
  out = {}
  for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=lpmm.is_quantized)[0]:
    if lpmm.is_quantized(x):
      names = [key.name for key in path if hasattr(key, 'name')]
      out.setdefault(names[-1], set()).add(str(x.format))
  return out


@pytest.mark.parametrize('name', TILED)
def test_elementwise_updates_run_in_tiles_with_formats_by_use(name):
  make, expected = TILED[name]
  tx = lpmm.low_precision(make())
  params = lpmm.quantize(tree(), lpmm.INT8)
  assert tx.obstacles(params) == {}
  assert field_formats(tx.init(params)) == {field: {format} for field, format in expected.items()}


@pytest.mark.parametrize('name', WHOLE)
def test_other_updates_are_whole_and_the_report_says_so(name):
  make, expected, operation = WHOLE[name]
  tx = lpmm.low_precision(make())
  params = lpmm.quantize(tree(), lpmm.INT8)
  state = tx.init(params)
  assert field_formats(state) == {field: {format} for field, format in expected.items()}
  report = lpmm.memory_report(params, state, tx=tx)
  assert f'  a: updated whole, for {operation}, 8192 elements' in str(report)
  assert tx.obstacles(params)['c/kernel'] == operation


@pytest.mark.parametrize('name', ALL)
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


@pytest.mark.parametrize(
  'name',
  ['nadamw', 'clipped adamw', 'partition', 'schedule_free_adamw', 'apply_if_finite', 'lamb', 'muon', 'adafactor'],
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
  assert field_formats(tx.init(params)) == {'exp_avg': {'bfloat16'}}
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


def test_formats_by_field_and_by_path():
  params = lpmm.quantize(tree(), lpmm.INT8)

  def formats(**kwargs):
    state = lpmm.adamw(0.1, **kwargs).init(params)
    return [
      str(lpmm.is_quantized(x) and x.format) for x in jax.tree.leaves(state, is_leaf=lpmm.is_quantized) if x.ndim > 1
    ]

  # mu/a, mu/c/kernel, nu/a, nu/c/kernel.
  assert formats() == ['int8', 'int8', 'uint8_sqrt', 'uint8_sqrt']
  assert formats(formats=None) == ['False'] * 4
  assert formats(formats=lpmm.INT8) == ['int8', 'int8', 'uint8_sqrt', 'uint8_sqrt']
  assert formats(formats=lpmm.INT4) == ['int4', 'int4', 'uint8_sqrt', 'uint8_sqrt']
  assert formats(formats=lpmm.INT16) == ['int16', 'int16', 'bfloat16', 'bfloat16']
  assert formats(formats=lpmm.BFLOAT16) == ['bfloat16'] * 4
  assert formats(formats={'nu': None}) == ['int8', 'int8', 'False', 'False']
  by_path = {'mu': [('kernel', lpmm.BFLOAT16)], 'nu': lambda path, leaf: None if path == 'a' else lpmm.BFLOAT16}
  state = lpmm.adamw(0.1, formats=by_path | {'nu': lambda path, leaf: None if leaf.ndim < 2 else lpmm.UINT8_SQRT}).init(
    params
  )
  assert [str(x.format) for x in jax.tree.leaves(state, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)] == [
    'int8',
    'bfloat16',
    'uint8_sqrt',
    'uint8_sqrt',
  ]


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
    (lambda: lpmm.low_precision(quantized_mask()), 'wrap with optax.masked or optax.partition outside'),
    (lambda: lpmm.low_precision(optax.adam(0.1), formats={'momentum': lpmm.INT8}), r"\['momentum'\].*\['mu', 'nu'\]"),
    (lambda: lpmm.adam(0.1, formats={'momentum': lpmm.INT8}), r"\['momentum'\].*\['mu', 'nu'\]"),
    (lambda: lpmm.adam(0.1, formats={'mu': 8}), r"formats\['mu'\]"),
    (lambda: lpmm.adam(0.1, formats=8), 'formats must be'),
    (lambda: lpmm.adam(0.1, formats=lpmm.UINT8_SQRT), 'mu/a: uint8_sqrt.*negative'),
    (lambda: lpmm.adam(0.1, formats={'nu': lpmm.INT8}), 'nu/a: the update divides by this field'),
    (lambda: lpmm.adam(0.1, formats={'nu': [('a', lpmm.INT16)]}), 'nu/a: the update divides by this field'),
  ],
)
def test_what_cannot_work_is_refused_with_advice(make, message):
  import re

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
