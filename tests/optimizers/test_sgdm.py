"""The optimizer: equality with Optax, error feedback, and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import gradients
from runs import grid_steps
from runs import slow
from runs import train
from runs import tree

import lpmm_optax as lpmm


def SCHEDULE(count):  # noqa: N802
  # Optax's schedules mix the integer count with floats.
  with jax.numpy_dtype_promotion('standard'):
    return optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 100)(count)


def assert_trees_equal(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(('momentum', 'nesterov'), [(None, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize('learning_rate', [0.05, SCHEDULE], ids=['constant', 'schedule'])
@pytest.mark.parametrize('weight_decay', [0.0, 0.01])
@pytest.mark.parametrize('use_step', [False, True])
def test_dense_formats_equal_optax_over_100_steps(momentum, nesterov, learning_rate, weight_decay, use_step):
  reference = optax.chain(
    optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov)
  )
  ours = lpmm.sgdm(learning_rate, momentum, nesterov=nesterov, weight_decay=weight_decay, formats=None)
  grads = gradients(100)
  expected, _ = train(reference, tree(), grads)
  actual, _ = train(ours, tree(), grads, use_step)
  # 100 roundings of float32 at 2^-24 each, of values up to ten times the parameters.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), actual, expected)


def test_float64_is_computed_in_float64_when_dense():
  with jax.enable_x64(True):
    params = jax.tree.map(lambda x: x.astype(jnp.float64), tree())
    grads = jax.tree.map(lambda x: x.astype(jnp.float64), gradients(50))
    expected, _ = train(optax.sgd(0.05, momentum=0.9), params, grads)
    actual, _ = train(lpmm.sgdm(0.05, formats=None), params, grads)
    # 50 roundings of float64 at 2^-53 each, of values up to ten.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13), actual, expected)
    with pytest.raises(TypeError, match=r'kernel.*float64'):
      lpmm.sgdm(0.05).init(params)


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('quantized', [False, True])
def test_half_precision_parameters_and_gradients_keep_their_dtype(dtype, quantized):
  params = jax.tree.map(lambda x: x.astype(dtype), tree())
  params = lpmm.quantize(params, lpmm.INT8) if quantized else params
  grads = jax.tree.map(lambda x: x.astype(dtype), gradients(3))
  new, _ = train(lpmm.sgdm(0.05), params, grads)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, params)
  assert all(x.dtype == dtype for x in jax.tree.leaves(lpmm.dequantize(new)))


def test_weight_decay_enters_the_momentum_as_in_torch():
  params, grad = jnp.array([2.0]), jnp.array([1.0])
  tx = lpmm.sgdm(0.1, 0.9, weight_decay=0.5)
  state = tx.init(params)
  expected, buffer = 2.0, 0.0
  for _ in range(5):
    params, state = lpmm.step(tx, grad, params, state)
    buffer = 0.9 * buffer + (1.0 + 0.5 * expected)
    expected -= 0.1 * buffer
  np.testing.assert_allclose(params, [expected], rtol=1e-6)


@pytest.mark.parametrize('learning_rate', [0.01, SCHEDULE], ids=['constant', 'schedule'])
def test_virtual_weights_follow_exact_sgd_under_feedback(learning_rate):
  b, steps = 0.9, 100
  schedule = learning_rate if callable(learning_rate) else lambda _: learning_rate
  grads = gradients(steps)
  start = lpmm.quantize(tree(), lpmm.INT8)
  # Dense momentum, so that the parameter's rounding is the only one.
  tx = lpmm.sgdm(learning_rate, b, formats=None, error_feedback=True)
  params, state = train(tx, start, grads)
  velocity = optax.tree.get(state, 'trace')['kernel']
  virtual = lpmm.dequantize(params)['kernel'] - b / (1 - b) * velocity
  rates = np.array([schedule(i) for i in range(steps)], np.float64)
  moved = np.einsum('i,ijk->jk', rates, np.asarray(grads['kernel'], np.float64)) / (1 - b)
  exact = np.asarray(lpmm.dequantize(start)['kernel'], np.float64) - moved
  # The residual is carried to 2^-22 of a grid step; what remains is float32 rounding of the velocity.
  np.testing.assert_allclose(virtual, exact, atol=2e-4)
  plain, _ = train(lpmm.sgdm(learning_rate, b, formats=None, error_feedback=False), start, grads)
  dense, _ = train(lpmm.sgdm(learning_rate, b, formats=None), lpmm.dequantize(start), grads)
  error = lambda p: float(jnp.std(lpmm.dequantize(p)['kernel'] - dense['kernel']))
  if not callable(learning_rate):
    assert error(params) < 0.6 * error(plain)


@pytest.mark.parametrize('momentum', [np.float32(0.0), jnp.zeros(()), 'injected'], ids=['numpy', 'jax', 'injected'])
def test_a_momentum_of_zero_is_plain_sgd_however_it_is_given(momentum):
  if isinstance(momentum, str):
    tx = optax.inject_hyperparams(lpmm.sgdm, hyperparam_dtype=jnp.float32)(learning_rate=0.05, momentum=0.0)
  else:
    tx = lpmm.sgdm(0.05, momentum)
  start, grads = lpmm.quantize(tree(), lpmm.INT16), gradients(5)
  params, _ = train(tx, start, grads)
  expected, _ = train(optax.sgd(0.05), lpmm.dequantize(start), grads)
  for a, b in zip(*(jax.tree.leaves(lpmm.dequantize(x)) for x in (params, expected)), strict=True):
    np.testing.assert_allclose(a, b, atol=0.02)  # The velocity has 8 bits.


@pytest.mark.slow
def test_feedback_is_on_where_it_can_be():
  grads = gradients(20)
  start = lpmm.quantize(tree(), lpmm.INT8)
  run = lambda **kwargs: train(lpmm.sgdm(0.05, **kwargs), start, grads)[0]
  default, on, off = run(), run(error_feedback=True), run(error_feedback=False)
  assert_trees_equal(default, on)
  assert not np.array_equal(default['kernel'].codes, off['kernel'].codes)
  assert_trees_equal(run(formats=None), run(formats=None, error_feedback=False))
  nearest = lpmm.Format(rounding='nearest')
  for kwargs in ({'formats': lpmm.INT4}, {'formats': nearest}, {'momentum': None}):
    run(**kwargs)
  nesterov = [run(nesterov=True, error_feedback=feedback) for feedback in (None, True, False)]
  assert_trees_equal(*nesterov[:2])
  assert not np.array_equal(nesterov[0]['kernel'].codes, nesterov[2]['kernel'].codes)


@pytest.mark.parametrize(
  ('kwargs', 'reason'),
  [
    ({'formats': lpmm.Format(rounding='nearest')}, 'oscillates'),
    ({'formats': lpmm.INT4}, '8 bits'),
    ({'formats': {'trace': lpmm.INT4}}, '8 bits'),
    ({'momentum': None}, 'momentum'),
    ({'momentum': 0.0}, 'momentum'),
    ({'momentum': 1.0}, 'momentum'),
  ],
)
def test_feedback_is_refused_where_it_cannot_work(kwargs, reason):
  with pytest.raises(ValueError, match=reason):
    lpmm.sgdm(0.1, error_feedback=True, **kwargs)


@pytest.mark.parametrize('feedback', [True, *slow(False)])
def test_a_learning_rate_of_zero_changes_no_parameter(feedback):
  start = lpmm.quantize(tree(), lpmm.INT8)
  params, state = train(lpmm.sgdm(0.1, error_feedback=feedback), start, gradients(10))
  tx = lpmm.sgdm(0.0, error_feedback=feedback)
  for grads in (tree(5), tree(6)):
    new, state = jax.jit(functools.partial(lpmm.step, tx))(grads, params, state)
    assert_trees_equal(new, params)


@pytest.mark.parametrize('params_format', [lpmm.INT8, lpmm.INT16, lpmm.BFLOAT16, None], ids=str)
@pytest.mark.parametrize('state_format', [lpmm.INT8, lpmm.INT16, lpmm.BFLOAT16, lpmm.INT4, None], ids=str)
def test_every_pair_of_formats_reduces_a_loss(params_format, state_format):
  target = jax.random.normal(jax.random.key(0), (64, 96))
  params = jnp.zeros_like(target)
  params = lpmm.quantize(params, params_format) if params_format else params
  tx = lpmm.sgdm(0.1, 0.8, formats=state_format)

  @jax.jit
  def run(params):
    body = lambda _, carry: lpmm.step(tx, lpmm.dequantize(carry[0]) - target, *carry)
    return jax.lax.fori_loop(0, 60, body, (params, tx.init(params)))[0]

  assert float(jnp.mean((lpmm.dequantize(run(params)) - target) ** 2)) < 0.01


@pytest.mark.parametrize('bad', [np.nan, np.inf])
@pytest.mark.parametrize('feedback', [True, False])
def test_a_bad_gradient_stays_visible_and_poisons_only_its_block(bad, feedback):
  params = lpmm.quantize({'w': jax.random.normal(jax.random.key(0), (64, 256))}, lpmm.INT8)
  tx = lpmm.sgdm(0.1, error_feedback=feedback)
  grads = {'w': jnp.ones((64, 256)).at[2, 70].set(bad)}
  state = tx.init(params)
  for _ in range(2):
    params, state = lpmm.step(tx, grads, params, state)
    grads = {'w': jnp.ones((64, 256))}
  finite = np.isfinite(lpmm.dequantize(params)['w'])
  assert not finite[2, 70]
  momentum_block = slice(0, 128)
  assert not np.isfinite(lpmm.dequantize(optax.tree.get(state, 'trace'))['w'][2, momentum_block]).any()
  finite[2, momentum_block] = True
  assert finite.all()


def test_leaves_that_are_never_updated_pass_through():
  params = {
    'w': lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8),
    'steps': jnp.arange(3),
    'empty': jnp.zeros((0, 4)),
    'scalar': jnp.float32(1),
    'none': None,
    'flag': jnp.array(True),
  }
  grads = dict(params, w=jnp.ones((64, 128)), scalar=jnp.float32(2))
  tx = lpmm.sgdm(0.5)
  state = tx.init(params)
  updates, _ = tx.update(grads, state, params)
  applied = optax.apply_updates(params, updates)
  stepped, _ = lpmm.step(tx, grads, params, state)
  assert_trees_equal(applied, stepped)
  assert stepped['none'] is None
  for name in ('steps', 'empty', 'flag'):
    np.testing.assert_array_equal(stepped[name], params[name])
  assert float(stepped['scalar']) == 0.0


def error_of(change, **kwargs):
  params = {'layer': {'kernel': lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8), 'bias': jnp.ones(4)}}
  grads = {'layer': {'kernel': jnp.ones((64, 128)), 'bias': jnp.ones(4)}}
  tx = lpmm.sgdm(0.1, **kwargs)
  state = tx.init(params)
  grads, state, params = change(grads, state, params)
  with pytest.raises((TypeError, ValueError)) as info:
    tx.update(grads, state, params)
  with pytest.raises(type(info.value)):
    lpmm.step(tx, grads, params, state)
  return str(info.value)


def without_bias(tree):
  return {'layer': {'kernel': tree['layer']['kernel']}}


def with_leaf(tree, name, leaf):
  return {'layer': tree['layer'] | {name: leaf}}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda g, s, p: (without_bias(g), s, p), 'layer/bias is missing'),
    (lambda g, s, p: (with_leaf(g, 'extra', g['layer']['bias']), s, p), 'layer/extra is not a parameter'),
    (lambda g, s, p: (with_leaf(g, 'kernel', jnp.ones((64, 64))), s, p), 'layer/kernel.*shape'),
    (lambda g, s, p: (with_leaf(g, 'kernel', p['layer']['kernel']), s, p), 'layer/kernel.*dense'),
    (lambda g, s, p: (with_leaf(g, 'bias', jnp.ones(4, jnp.int32)), s, p), 'layer/bias.*floating'),
    (lambda g, s, p: (with_leaf(g, 'bias', 1.0), s, p), 'layer/bias.*array'),
    (lambda g, s, p: (g, s, None), 'needs the parameters'),
    (lambda g, s, p: (g, optax.sgd(0.1, momentum=0.9).init(g), p), 'did not create'),
    (lambda g, s, p: (g, lpmm.sgdm(0.1, momentum=None).init(p), p), 'did not create'),
    (lambda g, s, p: (g, s._replace(inner_state=s.inner_state[1:]), p), 'did not create'),
    (lambda g, s, p: (g, lpmm.sgdm(0.1).init(without_bias(p)), p), 'trace/layer/bias is missing'),
    (lambda g, s, p: (g, lpmm.sgdm(0.1).init(with_leaf(p, 'bias', jnp.ones(5))), p), 'trace/layer/bias.*shape'),
    (lambda g, s, p: (g, s, with_leaf(p, 'bias', 1.0)), 'layer/bias.*array'),
    (lambda g, s, p: (g, s, with_leaf(p, 'bias', jnp.ones(4, jnp.complex64))), 'layer/bias.*complex'),
  ],
)
def test_bad_input_is_named(change, message):
  import re

  assert re.search(message, error_of(change))


@pytest.mark.parametrize(
  ('formats', 'message'),
  [({'mu': lpmm.INT8}, 'mu'), ({'trace': 8}, 'trace'), (8, 'formats'), (lpmm.UINT8_SQRT, 'nonnegative')],
)
def test_bad_formats_are_named(formats, message):
  with pytest.raises((TypeError, ValueError), match=message):
    lpmm.sgdm(0.1, formats=formats).init(lpmm.quantize(tree(), lpmm.INT8))


@pytest.mark.parametrize('into_momentum', [False, *slow(True)])
def test_a_jump_of_an_injected_momentum_moves_weights_by_no_more_than_rounding_does(into_momentum):
  """What the velocity holds of rounding errors is meant for the decay of then, and would be brought back 99 times."""
  make = optax.inject_hyperparams(lpmm.sgdm, hyperparam_dtype=jnp.float32)
  if into_momentum:
    make = optax.inject_hyperparams(
      lambda learning_rate, momentum: lpmm.MultiSteps(
        lpmm.sgdm(learning_rate, momentum), 1, accumulator=lpmm.INTO_MOMENTUM
      ),
      hyperparam_dtype=jnp.float32,
    )
  tx = make(learning_rate=1e-5, momentum=0.5)
  params = lpmm.quantize(jax.random.normal(jax.random.key(0), (64, 128)), lpmm.INT8)
  state = tx.init(params)
  gradient = lambda i: jax.random.normal(jax.random.fold_in(jax.random.key(1), i), params.shape)

  @jax.jit
  def run(params, state, start):
    def body(i, carry):
      params, state = carry
      updates, state = tx.update(gradient(i), state, params)
      return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(start, start + 300, body, (params, state))

  params, state = run(params, state, 0)
  state.hyperparams['momentum'] = jnp.float32(0.99)
  new, _ = run(params, state, 300)
  moved = np.abs(np.asarray(lpmm.dequantize(new) - lpmm.dequantize(params))) / grid_steps(params)
  # They were moved by 31 in the root mean square, 97 at most; with 0.99 from the start it is 1.0 and 5.
  assert np.sqrt(np.mean(moved**2)) < 2
  assert np.max(moved) < 6
