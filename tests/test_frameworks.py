"""Models as Flax linen, Flax nnx and Equinox hold them."""

import functools

import equinox as eqx
from flax import nnx
import flax.linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lpmm_optax as lpmm


class Net(nnx.Module):
  """With statistics and a random stream, and one layer in two places."""

  def __init__(self, rngs):
    self.first = nnx.Linear(64, 64, rngs=rngs)
    self.norm = nnx.BatchNorm(64, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.again = self.first

  def __call__(self, x):
    return self.again(self.dropout(self.norm(self.first(x))))


def test_a_dequantized_module_shares_what_is_no_parameter(standard_promotion):
  net = lpmm.quantize(Net(nnx.Rngs(0)), lpmm.INT8)
  dense = lpmm.dequantize(net, jnp.bfloat16)
  assert dense.first.kernel.dtype == dense.first.bias.dtype == jnp.bfloat16
  assert dense.norm.mean.dtype == jnp.float32
  before = nnx.as_pure(nnx.state(net, nnx.Param))
  dense(jnp.arange(128, dtype=jnp.float32).reshape(2, 64))
  assert int(net.dropout.rngs.count[...]) == 1
  assert float(jnp.abs(net.norm.mean[...]).max()) > 0
  jax.tree.map(np.testing.assert_array_equal, before, nnx.as_pure(nnx.state(net, nnx.Param)))
  # A snapshot does not follow the parameters.
  dense.first.bias[...] += 1
  assert not net.first.bias[...].any()


def test_a_parameter_in_two_places_of_a_module_stays_one():
  net = lpmm.quantize(Net(nnx.Rngs(0)), lpmm.INT8, key=jax.random.key(0))
  assert net.first.kernel is net.again.kernel
  dense = lpmm.dequantize(net)
  assert dense.first.kernel is dense.again.kernel
  assert set(nnx.state(dense)) == set(nnx.state(net)) == {'again', 'dropout', 'norm'}


def test_a_linen_model_that_dequantizes_is_the_same_model():
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.BatchNorm(use_running_average=False)(nn.Dense(128)(x))
      return nn.Dense(64)(nn.Dropout(0.5, deterministic=False)(x))

  model, decoding = Model(), nn.map_variables(Model, 'params', lpmm.dequantize, mutable=True)()
  x, key = jax.random.normal(jax.random.key(0), (8, 64)), jax.random.key(1)
  variables = model.init({'params': key, 'dropout': key}, x)
  jax.tree.map(np.testing.assert_array_equal, decoding.init({'params': key, 'dropout': key}, x), variables)
  params = lpmm.quantize(variables['params'], lpmm.INT8)

  def run(model, params):
    given = variables | {'params': params}
    return model.apply(given, x, rngs={'dropout': key}, mutable='batch_stats')

  expected = run(model, lpmm.dequantize(params))
  for given in (params, lpmm.dequantize(params)):
    jax.tree.map(np.testing.assert_array_equal, run(decoding, given), expected)


@pytest.mark.slow
def test_value_and_step_with_nnx_scan_and_remat():
  class Layer(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(64, 64, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
      return x + self.dropout(self.linear(x))

  @nnx.split_rngs(splits=3)
  @nnx.vmap
  def make(rngs):
    return Layer(rngs)

  @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
  @nnx.remat
  def run(layer, x):
    return lpmm.dequantize(layer)(x)

  layers = lpmm.quantize(make(nnx.Rngs(0)), lpmm.INT8)
  graph, params, rest = nnx.split(layers, nnx.Param, ...)
  params, rest = nnx.as_pure((params, rest))

  def loss_fn(params, rest, x):
    model = nnx.merge(graph, params, rest)
    return jnp.mean((run(model, x) - 0.5) ** 2), nnx.as_pure(nnx.state(model, nnx.Not(nnx.Param)))

  x, tx = jnp.ones((4, 64)), lpmm.MultiSteps(lpmm.sgdm(1.0), 1, accumulator=lpmm.INTO_MOMENTUM)
  state = tx.init(params)
  (value, after), new, _ = jax.jit(lpmm.value_and_step(loss_fn, tx, has_aux=True))(params, state, rest, x)
  (expected, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(lpmm.dequantize(params), rest, x)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert after['dropout']['rngs']['count'].tolist() == [1, 1, 1]
  stepped, _ = jax.jit(functools.partial(lpmm.step, tx))(grads, params, tx.init(params))
  moved = lpmm.dequantize((new, stepped, params))
  for a, b, old in zip(*map(jax.tree.leaves, moved), strict=True):
    # One more rounding of the gradient, of up to a 127th of its block's largest.
    np.testing.assert_allclose(a - old, b - old, atol=0.05 * float(jnp.abs(b - old).max()))


@pytest.mark.parametrize('quantized', [False, True])
def test_shardings_from_the_boxes_of_linen(quantized):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, 'data'))
  # 512 columns are four blocks of state: scales cannot be split eight ways.
  model, tx = nn.Sequential([nn.Dense(512, kernel_init=boxed), nn.Dense(3)]), lpmm.adamw(1e-3)

  def init(key):
    params = model.init(key, jnp.ones((1, 64)))['params']
    params = lpmm.quantize(params, lpmm.INT8) if quantized else params
    return TrainState.create(apply_fn=model.apply, params=params, tx=tx)

  abstract = jax.eval_shape(init, jax.random.key(0))
  by_spec = lpmm.shardings(abstract, abstract.params, nn.get_partition_spec(abstract.params), mesh)
  by_sharding = lpmm.shardings(abstract, abstract.params, nn.get_sharding(abstract.params, mesh), mesh)
  assert jax.tree.leaves(by_spec) == jax.tree.leaves(by_sharding)
  state = jax.jit(init, out_shardings=by_spec)(jax.random.key(0))
  kernels = lpmm.dequantize(nn.unbox((state.params, state.opt_state.inner_state[0].mu)))
  assert all(tree['layers_0']['kernel'].sharding.spec[1] == 'data' for tree in kernels)
  other = jax.make_mesh((4, 2), ('data', 'model'), axis_types=(jax.sharding.AxisType.Auto,) * 2)
  with pytest.raises(ValueError, match=r'layers_0/bias.*another mesh'):
    lpmm.shardings(abstract, abstract.params, nn.get_sharding(abstract.params, mesh), other)


class Equinox(eqx.Module):
  """With arrays, functions and numbers among its leaves."""

  mlp: eqx.nn.MLP
  norm: eqx.nn.BatchNorm
  table: jax.Array
  scale: float

  def __call__(self, x, state):
    x, state = self.norm(self.mlp(x), state)
    return self.scale * x, state


@pytest.fixture
def equinox_model():
  def make():
    mlp = eqx.nn.MLP(64, 64, 64, 1, key=jax.random.key(0))
    return Equinox(mlp, eqx.nn.BatchNorm(64, 'batch', mode='batch'), jnp.arange(3), 2.0)

  model, state = eqx.nn.make_with_state(make)()
  return lpmm.quantize(model, lpmm.INT8), state


def test_equinox_routes_agree_bit_for_bit(equinox_model):
  model, state = equinox_model
  tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.lion(1e-2))
  params, static = eqx.partition(model, eqx.is_array)
  opt_state = tx.init(params)

  @eqx.filter_value_and_grad(has_aux=True)
  def loss_fn(model, state, x):
    out, state = jax.vmap(model, (0, None), (0, None), axis_name='batch')(x, state)
    return jnp.mean((out - 1) ** 2), state

  # The optimizer as an argument, which Equinox takes apart as a pytree.
  @eqx.filter_jit
  def train_step(model, state, opt_state, tx, x):
    (loss, state), grads = loss_fn(lpmm.dequantize(model), state, x)
    params, static = eqx.partition(model, eqx.is_array)
    updates, _ = tx.update(grads, opt_state, params)
    stepped, opt_state = lpmm.step(tx, grads, params, opt_state)
    return eqx.apply_updates(model, updates), eqx.combine(stepped, static), state, opt_state, loss

  x = jax.random.normal(jax.random.key(1), (4, 64))
  losses = []
  for _ in range(3):
    added, model, state, opt_state, loss = train_step(model, state, opt_state, tx, x)
    losses.append(float(loss))
    jax.tree.map(np.testing.assert_array_equal, eqx.filter(added, eqx.is_array), eqx.filter(model, eqx.is_array))
  assert losses[2] < losses[0]
  assert model.table.tolist() == [0, 1, 2]
  assert (static.scale, static.mlp.activation) == (model.scale, model.mlp.activation)


def test_a_filter_that_drops_codes_is_an_error_that_names_the_leaf(equinox_model):
  filtered = eqx.filter(equinox_model[0], eqx.is_inexact_array)
  with pytest.raises(TypeError, match=r'mlp/layers/0/weight.*equinox\.is_array'):
    lpmm.adamw(1e-3).init(filtered)
  with pytest.raises(TypeError, match=r'mlp/layers/0/weight.*equinox\.is_array'):
    lpmm.dequantize(filtered)
