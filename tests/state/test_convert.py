"""`convert`: between formats, to Optax's own states and back."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_bits
from runs import slow

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('compile_fast')

DENSE = {'w': 0.05 * jax.random.normal(jax.random.key(0), (64, 256)), 'b': jnp.zeros(3)}
RATE, MOMENTUM = 0.05, 0.9


@pytest.fixture(autouse=True)
def promotion():
  with jax.numpy_dtype_promotion('standard'):  # Optax's own optimizers need it.
    yield


def gradient(params, i):
  """Of a quadratic, with noise."""
  return jax.tree.map(lambda x: x - 1.0 + 0.1 * jax.random.normal(jax.random.key(i), x.shape), lpmm.dequantize(params))


def run(tx, params, state, first=0, count=10):
  step = jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state))
  for i in range(first, first + count):
    params, state = step(params, state, gradient(params, i))
  return params, state


# Optax's optimizer, ours, and what convert must be told.
PAIRS = {
  'sgdm': (optax.sgd(RATE, MOMENTUM), lpmm.sgdm(RATE, MOMENTUM), {'learning_rate': RATE}),
  'sgdm, scheduled': (
    optax.sgd(lambda count: RATE, MOMENTUM),
    lpmm.sgdm(lambda count: RATE, MOMENTUM),
    {'learning_rate': RATE},
  ),
  'sgdm, decayed weights': (
    optax.chain(optax.add_decayed_weights(0.01), optax.sgd(RATE, MOMENTUM)),
    lpmm.sgdm(RATE, MOMENTUM, weight_decay=0.01),
    {'learning_rate': RATE},
  ),
  'sgdm without feedback': (optax.sgd(RATE, MOMENTUM), lpmm.sgdm(RATE, MOMENTUM, error_feedback=False), {}),
  'adamw': (optax.adamw(RATE), lpmm.adamw(RATE), {}),
  'adamw, int4': (optax.adamw(RATE), lpmm.adamw(RATE, formats=lpmm.INT4), {}),
  'lion': (optax.lion(RATE), lpmm.lion(RATE), {}),
  'rmsprop': (optax.rmsprop(RATE, momentum=0.5), lpmm.low_precision(optax.rmsprop(RATE, momentum=0.5)), {}),
  'clipped adamw': (
    optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)),
    lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(RATE)),
    {},
  ),
  'microbatches': (
    optax.MultiSteps(optax.adamw(RATE), 2).gradient_transformation(),
    lpmm.MultiSteps(lpmm.adamw(RATE), 2),
    {},
  ),
  'into momentum': (
    optax.MultiSteps(optax.sgd(RATE, MOMENTUM), 2).gradient_transformation(),
    lpmm.MultiSteps(lpmm.sgdm(RATE, MOMENTUM), 2, accumulator=lpmm.INTO_MOMENTUM),
    {'learning_rate': RATE, 'momentum': MOMENTUM},
  ),
}


def distance(a, b, start):
  """Of two trees, relative to how far the second is from the start."""
  flat = lambda tree: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(lpmm.dequantize(tree))])
  a, b, start = map(flat, (a, b, start))
  return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b - start))


QUICK = ('sgdm', 'adamw', 'into momentum')
# Half of a grid step over a block's maximum, 1/254 and not much more for squares, and of 4 bits 1/14; how far apart ten
# steps from there end, and ten in float32 from where those have ended.
TOLERANCES = dict.fromkeys(PAIRS, (0.0045, 0.1, 0.2)) | {'adamw, int4': (0.072, 0.1, 0.3)}


@pytest.mark.parametrize('name', [*QUICK, *slow(*(name for name in PAIRS if name not in QUICK))])
def test_a_run_in_float32_goes_on_in_low_precision_and_back(name):
  reference, tx, factors = PAIRS[name]
  half_step, apart, apart_again = TOLERANCES[name]
  params, state = run(reference, DENSE, reference.init(DENSE))
  like = lpmm.quantize(DENSE, lpmm.INT8)
  ours = lpmm.convert(params, like), lpmm.convert(state, tx.init(like), **factors)
  assert jax.tree.structure(ours) == jax.tree.structure((like, tx.init(like)))
  # All has come along, to within half of a grid step.
  back = lpmm.convert(ours, (params, state), **factors)
  assert jax.tree.structure(back) == jax.tree.structure((params, state))
  for x, y in zip(jax.tree.leaves(back), jax.tree.leaves((params, state)), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-6, atol=half_step * float(jnp.max(jnp.abs(y))))
  start = params
  params, state = run(reference, params, state, 10)
  ours = run(tx, *ours, 10)
  assert distance(ours[0], params, start) < apart
  back = lpmm.convert(ours, (params, state), **factors)
  start = params
  params, state = run(reference, params, state, 20)
  back, _ = run(reference, *back, 20)
  # From where low precision had left it, which is a little beside.
  assert distance(back, params, start) < apart_again


@pytest.mark.parametrize('name', ['into momentum', *slow(*(name for name in PAIRS if name != 'into momentum'))])
def test_export_and_import_change_nothing(name):
  reference, tx, factors = PAIRS[name]
  like = lpmm.quantize(DENSE, lpmm.INT8)
  ours = run(tx, like, tx.init(like))
  dense = lpmm.convert(ours, (DENSE, reference.init(DENSE)), **factors)
  again = lpmm.convert(dense, ours, **factors)
  # Steps are counted by ours alone, if Optax's optimizer does not count.
  stored = lambda tree: [x for x in jax.tree.leaves(tree, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)]
  assert len(stored(ours)) >= 2
  assert_same_bits(stored(again), stored(ours))


def test_counts_and_keys_are_carried_over():
  reference = PAIRS['adamw'][0]
  _, state = run(reference, DENSE, reference.init(DENSE))
  like = lpmm.quantize(DENSE, lpmm.INT8)
  ours = lpmm.convert(state, lpmm.adamw(RATE, key=jax.random.key(7)).init(like))
  assert int(ours.step) == int(optax.tree.get(ours, 'count')) == 10
  np.testing.assert_array_equal(ours.key, lpmm.adamw(RATE, key=jax.random.key(7)).init(like).key)
  other = lpmm.convert(ours, lpmm.adamw(RATE, formats=lpmm.BFLOAT16).init(like))
  assert int(other.step) == 10
  np.testing.assert_array_equal(other.key, ours.key)


def test_what_does_not_change_keeps_its_bits():
  params = lpmm.quantize(DENSE, lpmm.INT8)
  tx = lpmm.adamw(RATE)
  params, state = run(tx, params, tx.init(params), count=3)
  like = lpmm.quantize(DENSE, lpmm.INT16), lpmm.adamw(RATE, formats={'mu': lpmm.BFLOAT16}).init(params)
  new_params, new_state = lpmm.convert((params, state), like)
  nu = lambda state: optax.tree.get(state, 'nu')['w']
  assert nu(new_state) is nu(state)
  assert optax.tree.get(new_state, 'mu')['w'].format.storage == ('bfloat16', 'no_scales')
  # 16 bits hold what 8 bits do to within a half of their finer grid.
  w, new = lpmm.dequantize(params)['w'], lpmm.dequantize(new_params)['w']
  assert float(jnp.max(jnp.abs(w - new))) <= float(jnp.max(jnp.abs(w))) / 32000
  assert lpmm.convert((params, state), (params, state))[0]['w'] is params['w']


def test_a_key_rounds_without_bias():
  format = lpmm.INT4
  like = jax.eval_shape(lambda: lpmm.quantize(DENSE, format))
  rounded = [lpmm.dequantize(lpmm.convert(DENSE, like, key=jax.random.key(i)))['w'] for i in range(200)]
  nearest = lpmm.dequantize(lpmm.convert(DENSE, like))['w']
  step = 0.05 * 3 / 7
  error = np.abs(np.mean(rounded, axis=0) - DENSE['w'])
  assert np.mean(error) < 0.1 * step
  assert np.mean(np.abs(nearest - DENSE['w'])) > 0.15 * step


def like_sgdm(params=DENSE, **kwargs):
  return lpmm.sgdm(RATE, **kwargs).init(lpmm.quantize(params, lpmm.INT8))


MICROBATCHES = {
  accumulator: lpmm.MultiSteps(lpmm.sgdm(RATE), 3, accumulator=accumulator)
  for accumulator in (lpmm.INT8, None, lpmm.INTO_MOMENTUM)
}
PROBLEMS = {
  'another optimizer': (lambda: optax.adamw(RATE).init(DENSE), like_sgdm, {}, r'0/mu/w.*1/trace/w'),
  'no rate': (lambda: optax.sgd(RATE, MOMENTUM).init(DENSE), like_sgdm, {}, '1: .*needs learning_rate'),
  'a rate of zero': (like_sgdm, lambda: optax.sgd(RATE, MOMENTUM).init(DENSE), {'learning_rate': 0.0}, 'not be zero'),
  'a leaf less': (like_sgdm, lambda: like_sgdm({'w': DENSE['w']}), {}, '1/trace/b'),
  'another shape': (like_sgdm, lambda: like_sgdm(DENSE | {'b': jnp.zeros(4)}), {}, r'trace/b: it has shape \(3,\)'),
  'another dtype': (lambda: {'n': jnp.ones(3)}, lambda: {'n': jnp.ones(3, jnp.int32)}, {}, '^n: it is float32'),
  'one array': (lambda: DENSE['w'], lambda: lpmm.quantize(DENSE, lpmm.INT8), {}, 'not of one optimizer'),
  'MultiSteps on one side': (
    like_sgdm,
    lambda: MICROBATCHES[lpmm.INT8].init(lpmm.quantize(DENSE, lpmm.INT8)),
    {},
    'only one of the two',
  ),
  'no key': (
    lambda: optax.adamw(RATE).init(DENSE),
    lambda: jax.eval_shape(lpmm.adamw(RATE).init, lpmm.quantize(DENSE, lpmm.INT8)),
    {},
    'concrete state',
  ),
}


@pytest.mark.parametrize('name', PROBLEMS)
def test_what_cannot_be_converted_is_named(name):
  make, make_like, factors, message = PROBLEMS[name]
  with pytest.raises(ValueError, match=message):
    lpmm.convert(make(), make_like(), **factors)


@functools.cache
def within_an_accumulation(accumulator):
  tx = MICROBATCHES[accumulator]
  params = lpmm.quantize(DENSE, lpmm.INT8)
  with jax.numpy_dtype_promotion('standard'):
    return run(tx, params, tx.init(params), count=4)


@pytest.mark.parametrize('accumulator', MICROBATCHES, ids=str)
@pytest.mark.parametrize('other', MICROBATCHES, ids=str)
def test_an_accumulation_is_not_lost(accumulator, other):
  params, state = within_an_accumulation(accumulator)
  assert int(state.mini_step) == 1
  like = MICROBATCHES[other].init(params)
  if accumulator == other:
    jax.tree.map(np.testing.assert_array_equal, lpmm.convert(state, like), state)
  else:
    with pytest.raises(ValueError, match='1 microbatches have been accumulated'):
      lpmm.convert(state, like, learning_rate=RATE, momentum=MOMENTUM)
    # After the optimizer's step there is nothing to lose.
    _, state = run(MICROBATCHES[accumulator], params, state, 4, 2)
    converted = lpmm.convert(state, like, learning_rate=RATE, momentum=MOMENTUM)
    assert int(converted.gradient_step) == 2
    assert jax.tree.structure(converted) == jax.tree.structure(like)
    assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(lpmm.dequantize(converted.acc_grads)))


def test_a_parameter_may_be_called_count():
  dense = {'count': jnp.ones((64, 64)), 'w': jnp.ones(8)}
  source = optax.adamw(1e-3).init(dense)
  tx = lpmm.adamw(1e-3)
  params = lpmm.quantize(dense, lpmm.INT8)
  state = lpmm.convert(source, tx.init(params))
  assert (state.step.shape, state.step.dtype) == ((), jnp.int32)
  lpmm.step(tx, dense, params, state)


def test_what_is_converted_shares_no_key_with_its_template():
  tx, params = lpmm.MultiSteps(lpmm.adamw(1e-3), 2), lpmm.quantize(DENSE, lpmm.INT8)
  like = tx.init(params)
  first, second = (lpmm.convert(optax.MultiSteps(optax.adamw(1e-3), 2).init(DENSE), like) for _ in range(2))
  assert_same_bits(jax.jit(lambda state: state, donate_argnums=0)(first), second)
