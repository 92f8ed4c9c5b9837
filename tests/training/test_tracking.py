"""What a loss for `value_and_step` may do with its quantized parameters, and what it may not."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import slow

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('compile_fast')

X = jax.random.normal(jax.random.key(1), (8, 64))


def make_params():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'layers': jax.random.normal(keys[0], (2, 64, 64)) / 8,
    'encoder': {'w': jax.random.normal(keys[1], (64, 64)) / 8},
    'bias': jnp.zeros(64),
  }


def model(params, x):
  x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None), x, params['layers'])
  return jnp.mean((x @ lpmm.dequantize(params['encoder']['w']) + params['bias'][None] - 1) ** 2)


@jax.custom_vjp
def own_rule(w):
  return lpmm.dequantize(w)


own_rule.defvjp(lambda w: (lpmm.dequantize(w), None), lambda saved, g: (None,))


def leafwise(fn):
  return lambda w: jax.tree.map(fn, w)


def decoded(fn):
  return lambda w: jnp.sum(lpmm.dequantize(fn(w)))


REFUSED = {
  'a penalty': (lambda w: sum(jnp.sum(x**2) for x in jax.tree.leaves(w) if x.ndim > 1), 'codes'),
  'a norm': (lambda w: optax.tree.norm(w), 'codes'),
  'a scaled tree': (lambda w: jnp.sum(lpmm.dequantize(jax.tree.map(lambda x: x * 1, w))), 'codes'),
  'a mask': (decoded(leafwise(lambda x: jnp.where(jnp.ones(x.shape, bool), x, jnp.zeros_like(x)))), 'codes'),
  'a transposition': (decoded(leafwise(lambda x: x.T)), 'do not belong together'),
  'lax.cond': (lambda w: lax.cond(jnp.sum(X) > 0, decoded(lambda w: w), lambda w: 0.0, w), 'lax.cond'),
  'jax.vmap': (lambda w: jnp.sum(jax.vmap(lpmm.dequantize)(w)), 'jax.vmap maps over'),
  'jax.custom_vjp': (lambda w: jnp.sum(own_rule(w)), 'jax.custom_vjp'),
  'lax.while_loop': (
    lambda w: lax.while_loop(lambda c: c < 1, lambda c: c + 1 + 0 * decoded(lambda w: w)(w), 0.0),
    'lax.while_loop',
  ),
  'vmap of a function that reads': (
    lambda w: jnp.sum(jax.vmap(lambda x: x @ lpmm.dequantize(w))(X)),
    'jax.vmap maps over',
  ),
  'a carry': (
    lambda w: decoded(lambda w: w)(lax.scan(lambda w, _: (jax.tree.map(jnp.copy, w), None), w, None, 2)[0]),
    'results of lax.scan',
  ),
}
QUICK = ('a penalty', 'a transposition', 'lax.cond', 'jax.vmap')
TXS = {'microbatches': lpmm.MultiSteps(lpmm.sgdm(0.1), 2), 'alone': lpmm.sgdm(0.1)}


@pytest.mark.parametrize(
  ('name', 'tx'),
  [
    *((name, 'alone') for name in QUICK),
    *slow(*((name, 'alone') for name in REFUSED if name not in QUICK), *((name, 'microbatches') for name in REFUSED)),
  ],
)
def test_anything_but_dequantizing_is_refused_by_name(name, tx):
  params, tx = lpmm.quantize(make_params(), lpmm.INT8), TXS[tx]
  term, words = REFUSED[name]
  loss = lambda params, x: model(params, x) + term(params['encoder']['w'])
  with jax.numpy_dtype_promotion('standard'), pytest.raises((TypeError, ValueError)) as error:
    jax.eval_shape(lpmm.value_and_step(loss, tx), params, tx.init(params), X)
  message = str(error.value)
  assert message.startswith('encoder/w: '), message
  assert words in message
  assert 'dequantize' in message


@pytest.mark.parametrize('compared', [lambda w: w == 0, lambda w: w != 0])
def test_a_comparison_of_a_parameter_is_refused(compared):
  params, tx = lpmm.quantize(make_params(), lpmm.INT8), TXS['alone']
  loss = lambda params, x: model(params, x) * compared(params['encoder']['w'])
  with pytest.raises(TypeError, match=r'is none: call lpmm_optax\.dequantize'):
    jax.eval_shape(lpmm.value_and_step(loss, tx), params, tx.init(params), X)


def test_parameters_may_not_be_returned():
  params, tx = lpmm.quantize(make_params(), lpmm.INT8), TXS['alone']
  step = lpmm.value_and_step(lambda params, x: (model(params, x), params), tx, has_aux=True)
  with pytest.raises(TypeError, match='the results of the loss'):
    jax.eval_shape(step, params, tx.init(params), X)


ALLOWED = {
  'penalty of decoded weights': lambda params: 0.1 * optax.tree.norm(lpmm.dequantize(params), squared=True),
  'semi-gradient': lambda params: jnp.sum(
    (lpmm.dequantize(params['encoder']['w']) - lax.stop_gradient(lpmm.dequantize(params['layers'])[0])) ** 2
  ),
  'vmap of what is decoded': lambda params: jnp.sum(
    jax.vmap(jnp.matmul, in_axes=(0, None))(X, lpmm.dequantize(params['encoder']['w'])) ** 2
  ),
  'cast': lambda params: model(jax.tree.map(lambda x: x.astype('bfloat16') if x.dtype == 'float32' else x, params), X),
  'jitted part': lambda params: jax.jit(functools.partial(model, x=X))(params),
}


@pytest.mark.parametrize('name', ['semi-gradient', *slow(*(name for name in ALLOWED if name != 'semi-gradient'))])
def test_what_is_allowed_means_what_it_means_in_jax_grad(name):
  params = lpmm.quantize(make_params(), lpmm.INT8)
  loss = lambda params: model(params, X) + ALLOWED[name](params)
  tx = lpmm.sgdm(1.0, momentum=None)
  with jax.numpy_dtype_promotion('standard'):
    value, new, _ = jax.jit(lpmm.value_and_step(loss, tx))(params, tx.init(params))
    wanted, gradients = jax.value_and_grad(loss)(lpmm.dequantize(params))
  np.testing.assert_allclose(value, wanted, rtol=1e-2 if name == 'cast' else 1e-5)
  before, after = lpmm.dequantize(params), lpmm.dequantize(new)
  for x, y, g in zip(*map(jax.tree.leaves, (before, after, gradients)), strict=True):
    # Rounding is within a grid step; the steps are several of them long.
    np.testing.assert_allclose(y, x - g, atol=0.02 * float(jnp.abs(x - g).max() + 1e-3))


def test_the_optimizer_of_microbatches_gets_the_loss_and_more():
  def scaled_by(factor, value):
    return optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(),
      lambda updates, state, params=None, *, value, factor=1.0, **_: (
        jax.tree.map(lambda g: jnp.ones_like(g) * value * factor, updates),
        state,
      ),
    )

  params = lpmm.quantize(make_params(), lpmm.INT8)
  tx = lpmm.MultiSteps(lpmm.chain(scaled_by(None, None), lpmm.sgdm(1.0, momentum=None)), 1)
  for extra_args, factor in ((None, 1.0), (lambda value, x: {'value': value, 'factor': x[0, 0]}, X[0, 0])):
    step = jax.jit(lpmm.value_and_step(model, tx, extra_args=extra_args))
    value, new, _ = step(params, tx.init(params), X)
    np.testing.assert_allclose(new['bias'], -value * factor * jnp.ones(64), rtol=1e-5)
