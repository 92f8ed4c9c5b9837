import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest
from runs import assert_same_bits
from runs import slow

import lpmm_optax as lpmm

LAYERS, WIDTH, K = 4, 64, 2
X = jax.random.normal(jax.random.key(1), (16, WIDTH))


def layer(x, weights):
  """A dense layer; its gain stays dense by exemption, also where it is stacked."""
  w = lpmm.dequantize(weights)
  return x + jnp.tanh(x @ w['kernel']) * w['gain'][None], None


def scanned(params, x):
  x, _ = lax.scan(jax.checkpoint(layer), x, params)
  return jnp.mean((x - 1) ** 2)


def scanned_without_checkpoint(params, x):
  x, _ = lax.scan(layer, x, params)
  return jnp.mean((x - 1) ** 2)


def indexed(params, x):
  for i in range(LAYERS):
    x, _ = jax.checkpoint(layer)(x, jax.tree.map(lambda a, i=i: a[i], params))
  return jnp.mean((x - 1) ** 2)


def unrolled(params, x):
  for i in range(LAYERS):
    x, _ = layer(x, params[f'layer_{i}'])
  return jnp.mean((x - 1) ** 2)


def scanned_twice_over(params, x):
  """A scan over groups of layers, in each a scan over layers."""
  outer = lambda x, group: lax.scan(jax.checkpoint(layer), x, group)
  x, _ = lax.scan(outer, x, params)
  return jnp.mean((x - 1) ** 2)


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    return x + jnp.tanh(nn.Dense(WIDTH, use_bias=False)(x)), None


class Stack(nn.Module):
  @nn.compact
  def __call__(self, x):
    decoded = nn.map_variables(Dense, 'params', lpmm.dequantize, init=self.is_initializing())
    stack = nn.scan(nn.remat(decoded), variable_axes={'params': 0}, split_rngs={'params': True}, length=LAYERS)
    return stack(name='layers')(x, None)[0]


def flax_scanned(params, x):
  return jnp.mean((Stack().apply({'params': params}, x) - 1) ** 2)


def stacked():
  keys = jax.random.split(jax.random.key(0), 2)
  return {
    'kernel': jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / 8,
    'gain': jnp.ones((LAYERS, WIDTH)),
  }


def make_params(name):
  params = stacked()
  if name == 'unrolled':
    return {f'layer_{i}': jax.tree.map(lambda a, i=i: a[i], params) for i in range(LAYERS)}
  if name == 'scan of scans':
    return jax.tree.map(lambda a: a.reshape(2, LAYERS // 2, *a.shape[1:]), params)
  if name == 'flax':
    return Stack().init(jax.random.key(0), X)['params']
  return params


LOSSES = {
  'scan': scanned,
  'scan without checkpoint': scanned_without_checkpoint,
  'indexed': indexed,
  'unrolled': unrolled,
  'scan of scans': scanned_twice_over,
  'flax': flax_scanned,
}
TXS = {
  'sgdm': lambda k=K: lpmm.MultiSteps(lpmm.sgdm(0.1), k),
  'into momentum': lambda k=K: lpmm.MultiSteps(lpmm.sgdm(0.1), k, accumulator=lpmm.INTO_MOMENTUM),
  'clipped adamw': lambda k=K: lpmm.MultiSteps(lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(0.01)), k),
}


def ordinary(loss, tx):
  def step(params, state, *args):
    value, grads = jax.value_and_grad(loss)(lpmm.dequantize(params), *args)
    return value, *lpmm.step(tx, grads, params, state)

  return jax.jit(step)


def lean(loss, tx):
  return jax.jit(lpmm.value_and_step(loss, tx))


def quantized(params):
  return lpmm.quantize(params, lpmm.INT8)


def codes(tree):
  return [x.codes for x in jax.tree.leaves(tree, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)]


# ---------------------------------------------------------------------------------------------------------------------
# The same as the ordinary path
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['scan', *slow(*(name for name in LOSSES if name != 'scan'))])
def test_a_microbatch_leaves_the_bits_of_the_ordinary_path(name):
  # As far as the gradients' are the same, which are computed by other programs: all but a few codes.
  params, tx = quantized(make_params(name)), TXS['sgdm'](3)
  assert codes(params)
  state = tx.init(params)
  usual, in_backward = ordinary(LOSSES[name], tx), lean(LOSSES[name], tx)
  for _ in range(2):
    wanted, wanted_params, wanted_state = usual(params, state, X)
    value, new_params, state = in_backward(params, state, X)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    assert_same_bits(new_params, params)
    assert_same_bits(new_params, wanted_params)
    for found, expected in zip(codes(state.acc_grads), codes(wanted_state.acc_grads), strict=True):
      assert np.mean(found != expected) < 1e-3
      assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1
    assert int(state.mini_step) == int(wanted_state.mini_step)
    state = wanted_state


@pytest.mark.parametrize('tx', slow('into momentum', 'sgdm', 'clipped adamw'))
def test_training_follows_the_ordinary_path_within_the_noise_of_rounding(tx):
  params, tx = quantized(stacked()), TXS[tx]()
  runs = {}
  for path in (ordinary, lean):
    step, now, state, losses = path(scanned, tx), params, tx.init(params), []
    for _ in range(20):
      value, now, state = step(now, state, X)
      losses.append(float(value))
    runs[path] = losses
    assert int(state.gradient_step) == 10
  # The two differ by one rounding of the accumulator per step; the loss falls by much more.
  np.testing.assert_allclose(runs[lean], runs[ordinary], rtol=0.03)
  assert runs[lean][-1] < 0.8 * runs[lean][0]


@pytest.mark.slow
def test_a_parameter_used_twice_accumulates_both_gradients():
  table = jax.random.normal(jax.random.key(0), (128, WIDTH)) / 8
  tokens = jax.random.randint(jax.random.key(2), (32,), 0, 128)

  def loss(params, tokens):
    x = lpmm.dequantize(params)[tokens]
    logits = x @ lpmm.dequantize(params).T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1)))

  params = quantized(table)
  tx = lpmm.MultiSteps(lpmm.sgdm(1.0), 2, use_grad_mean=False)
  _, _, state = lean(loss, tx)(params, tx.init(params), tokens)
  gradient = jax.grad(loss)(lpmm.dequantize(params), tokens)
  error = lpmm.dequantize(state.acc_grads) - gradient
  # Two roundings, each by less than a grid step.
  step = lax.bitcast_convert_type(state.acc_grads.scales, jnp.bfloat16).astype(jnp.float32)
  assert jnp.all(jnp.abs(error) < 2.02 * step)
  assert jnp.abs(gradient).max() > 50 * step.max()


@pytest.mark.slow
def test_dense_leaves_dense_accumulators_and_aux_are_as_usual():
  params = lpmm.quantize(stacked(), lpmm.INT8)
  loss = lambda params, x, scale: (scale * scanned(params, x), {'x': x})
  for tx in (
    lpmm.MultiSteps(lpmm.sgdm(0.1), K, accumulator=None),
    lpmm.MultiSteps(lpmm.sgdm(0.1, formats=None), K, accumulator=lpmm.INTO_MOMENTUM),
  ):
    step = jax.jit(lpmm.value_and_step(loss, tx, has_aux=True))
    state, now = tx.init(params), params
    for _ in range(K):
      (value, aux), now, state = step(now, state, X, scale=2.0)
    np.testing.assert_array_equal(aux['x'], X)
    wanted = ordinary(functools.partial(lambda params, x: loss(params, x, 2.0)[0]), tx)
    expected, expected_state = params, tx.init(params)
    for _ in range(K):
      expected_value, expected, expected_state = wanted(expected, expected_state, X)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    for found, other in zip(codes(now), codes(expected), strict=True):
      assert np.mean(found != other) < 1e-2
    dense = lpmm.MultiSteps(lpmm.sgdm(0.1, formats=None), K, accumulator=None)
    plain = jax.tree.map(jnp.asarray, stacked())
    value, _, _ = lean(scanned, dense)(plain, dense.init(plain), X)
    np.testing.assert_allclose(value, scanned(plain, X), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('spec', [(None, 'x', None), (None, None, 'x')], ids=str)
def test_sharded_parameters_stay_sharded_and_give_the_same_but_for_sums(kind, spec):
  mesh = jax.make_mesh((4,), ('x',), axis_types=(getattr(jax.sharding.AxisType, kind),), devices=jax.devices()[:4])
  sharding = NamedSharding(mesh, PartitionSpec(*spec))

  def loss(params, x):
    def one(x, w):
      dense = lpmm.dequantize(w)
      if kind == 'Explicit':  # Which asks of users to say how products of sharded matrices are sharded.
        dense = jax.sharding.reshard(dense, PartitionSpec(None, None))
      return jnp.tanh(x @ dense), None

    return jnp.mean((lax.scan(jax.checkpoint(one), x, params)[0] - 1) ** 2)

  tx = TXS['sgdm']()
  kernel = jax.random.normal(jax.random.key(0), (LAYERS, 256, 256)) / 16
  params, x = quantized(kernel), jax.random.normal(jax.random.key(1), (16, 256))
  unsharded = lean(loss if kind == 'Auto' else plain_loss, tx)
  expected_value, expected, expected_state = unsharded(params, tx.init(params), x)
  placed = jax.tree.map(lambda a: jax.device_put(a, sharding), params)
  with jax.set_mesh(mesh):
    state = jax.jit(tx.init)(placed)
    value, new, state = lean(loss, tx)(placed, state, x)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  assert_same_bits(jax.tree.map(np.asarray, new), jax.tree.map(np.asarray, expected))
  found, wanted = np.asarray(state.acc_grads.codes), np.asarray(expected_state.acc_grads.codes)
  assert np.mean(found != wanted) < 0.01
  assert state.acc_grads.codes.sharding.is_equivalent_to(sharding, 3)
  assert new.codes.sharding.is_equivalent_to(sharding, 3)


def plain_loss(params, x):
  one = lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None)
  return jnp.mean((lax.scan(jax.checkpoint(one), x, params)[0] - 1) ** 2)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def transformer_shapes(layers, width):
  array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  return {
    'qkv': array(layers, width, 3 * width),
    'out': array(layers, width, width),
    'up': array(layers, width, 4 * width),
    'down': array(layers, 4 * width, width),
  }


def transformer(params, x):
  """The products of a Transformer's layers; what attention and norms add is theirs whoever trains them."""

  def one(x, w):
    w = {name: functools.partial(lpmm.dequantize, leaf) for name, leaf in w.items()}
    q, k, v = jnp.split(x @ w['qkv'](), 3, axis=-1)
    x = x + (q * k * v) @ w['out']()
    return x + jnp.tanh(x @ w['up']()) @ w['down'](), None

  return jnp.mean(lax.scan(jax.checkpoint(one), x, params)[0] ** 2)


@pytest.mark.parametrize(('tx', 'limit'), [('into momentum', 2.5), *slow(('sgdm', 3.5), ('clipped adamw', 4.5))])
def test_neither_gradients_nor_weights_exist_as_a_tree(tx, limit):
  # 50M parameters in 64 layers, 128 positions: activations are 0.2 bytes per parameter, one layer's weights 0.06.
  tx = TXS[tx](4)
  shapes = transformer_shapes(64, 256)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  params = jax.eval_shape(quantized, shapes)
  x = jax.ShapeDtypeStruct((128, 256), jnp.float32)
  step = jax.jit(lpmm.value_and_step(transformer, tx), donate_argnums=(0, 1))
  memory = step.lower(params, jax.eval_shape(tx.init, params), x).compile().memory_analysis()
  assert memory.alias_size_in_bytes > 0.999 * (memory.argument_size_in_bytes - 4 * x.size)
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert (peak + memory.temp_size_in_bytes) / count < limit


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_it_takes_multi_steps_without_a_skip_function():
  with pytest.raises(ValueError, match='cannot skip a microbatch'):
    lpmm.value_and_step(scanned, lpmm.MultiSteps(lpmm.sgdm(0.1), 2, should_skip_update_fn=optax.skip_not_finite))


def test_a_slice_that_cannot_be_added_to_is_refused():
  params, tx = {'w': quantized(jnp.ones((8, 64, 128)))}, TXS['sgdm']()

  def narrow(params, x):
    half = jax.tree.map(lambda a: a[:, :32], params['w'])
    return jnp.sum(lpmm.dequantize(half)) + jnp.sum(x)

  with pytest.raises(ValueError, match=r'w: a parameter of shape \(8, 64, 128\) is used in a slice of shape \(8, 32'):
    lean(narrow, tx)(params, tx.init(params), X)


@pytest.mark.slow
def test_blocks_that_a_slice_would_cut_are_refused_and_smaller_ones_taken():
  params = lpmm.quantize(jnp.ones((512, 4, 4)), lpmm.Format(block_size=4), where=lambda *_: lpmm.Format(block_size=4))
  loss = lambda params, x: jnp.sum(lpmm.dequantize(jax.tree.map(lambda a: a[3], params))) + jnp.sum(x)
  tx = TXS['sgdm']()
  with pytest.raises(ValueError, match=r'blocks of what is kept .* \(512, 4, 4\), which .* Format with block_size=4'):
    lean(loss, tx)(params, tx.init(params), X)
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 2, accumulator=lpmm.Format(block_size=4))
  _, _, state = lean(loss, tx)(params, tx.init(params), X)
  # To within a grid step.
  np.testing.assert_allclose(lpmm.dequantize(state.acc_grads)[3], jnp.full((4, 4), 0.5), atol=0.5 / 126)


@pytest.mark.slow
def test_a_slice_of_another_axis_that_looks_like_one_of_the_first_is_poisoned():
  params, tx = {'w': quantized(jnp.ones((64, 64, 128)))}, TXS['sgdm']()
  first = lambda params, x: jnp.sum(lpmm.dequantize(jax.tree.map(lambda a: a[3], params['w']))) + jnp.sum(x)
  second = lambda params, x: jnp.sum(lpmm.dequantize(jax.tree.map(lambda a: a[:, 3], params['w']))) + jnp.sum(x)
  _, _, state = lean(first, tx)(params, tx.init(params), X)
  found = lpmm.dequantize(state.acc_grads['w'])
  np.testing.assert_array_equal(found != 0, jnp.broadcast_to((jnp.arange(64) == 3)[:, None, None], found.shape))
  _, _, state = lean(second, tx)(params, tx.init(params), X)
  assert np.isnan(lpmm.dequantize(state.acc_grads['w'])).any()


def test_a_nan_gradient_stays_visible():
  params, tx = quantized(stacked()), TXS['into momentum']()
  _, _, state = lean(scanned, tx)(params, tx.init(params), X.at[0, 0].set(jnp.nan))
  assert np.isnan(lpmm.dequantize(optax.tree.get(state, 'trace')['kernel'])).any()


@pytest.mark.parametrize('how', slow('scanned', 'unrolled', 'sliced'))
def test_the_noise_of_a_parameter_used_often_grows_as_a_root(how):
  """Every use is rounded by itself: of T uses with the same bits, errors would add up to T of one."""
  shape = (4, 64, 128)
  params = quantized(jnp.ones(shape) / 16)
  tx = lpmm.MultiSteps(lpmm.adamw(0.0), 2)
  largest = jnp.zeros(shape).at[..., 0].set(127.0)
  cotangent = jnp.full(shape, 0.3).at[..., 0].set(0.0)

  def loss(params, cotangents):
    use = lambda params, g: jnp.sum(lpmm.dequantize(params) * g)
    if how == 'scanned':
      return jax.lax.scan(lambda total, g: (total + use(params, g), None), 0.0, cotangents)[0]
    if how == 'sliced':
      layers = lambda g: sum(use(jax.tree.map(lambda x, i=i: x[i], params), g[i]) for i in range(shape[0]))
      return sum(layers(g) for g in cotangents)
    return sum(use(params, g) for g in cotangents)

  def deviation(uses):
    cotangents = jnp.concatenate([jnp.broadcast_to(cotangent, (uses, *shape)), largest[None]])
    _, _, state = jax.jit(lpmm.value_and_step(loss, tx))(params, tx.init(params), cotangents)
    return float(jnp.std(lpmm.dequantize(state.acc_grads)[..., 1:]))

  once, often = deviation(1), deviation(9)
  assert 2.7 < often / once < 3.3


@pytest.mark.slow
def test_a_stopped_gradient_moves_nothing():
  layers = jax.random.normal(jax.random.key(0), (2, 64, 64)) / 8
  params = lpmm.quantize({'first': layers[0], 'layers': layers, 'both': layers[1]}, lpmm.INT8)
  tx = lpmm.MultiSteps(lpmm.sgdm(0.5, error_feedback=False), 1)
  x = jnp.ones((8, 64))

  def loss(params):
    stopped = jax.lax.stop_gradient(params)
    h = jnp.tanh(x @ lpmm.dequantize(stopped['first']))
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ lpmm.dequantize(w)), None), h, stopped['layers'])
    return jnp.mean((h @ lpmm.dequantize(params['both']) @ lpmm.dequantize(stopped['both']) - 1) ** 2)

  _, new, _ = jax.jit(lpmm.value_and_step(loss, tx))(params, tx.init(params))
  for name in ('first', 'layers'):
    jax.tree.map(np.testing.assert_array_equal, new[name], params[name])
  dense = lpmm.dequantize(params)
  gradient = jax.grad(lambda both: loss(dense | {'both': both}))(dense['both'])
  moved = lpmm.dequantize(new)['both'] - dense['both']
  # Half of what both uses together would give; rounding is a few per cent of it.
  assert float(jnp.vdot(moved, -0.5 * gradient) / jnp.vdot(0.5 * gradient, 0.5 * gradient)) == pytest.approx(
    1, abs=0.05
  )
