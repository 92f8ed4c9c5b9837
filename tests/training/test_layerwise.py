"""`value_and_step` without a `MultiSteps`: each layer moves as soon as its gradient is there."""

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
from training.test_backward import LOSSES
from training.test_backward import X
from training.test_backward import lean
from training.test_backward import make_params
from training.test_backward import ordinary
from training.test_backward import quantized
from training.test_backward import scanned
from training.test_backward import stacked
from training.test_backward import transformer
from training.test_backward import transformer_shapes

import lpmm_optax as lpmm

TXS = {
  'sgdm': lambda: lpmm.sgdm(0.1),
  'adamw': lambda: lpmm.chain(optax.clip(0.1), lpmm.adamw(0.01)),
  'lion': lambda: lpmm.lion(0.01, weight_decay=0.1),
  'rmsprop': lambda: lpmm.low_precision(optax.rmsprop(0.01, momentum=0.9)),
  'clipped': lambda: lpmm.chain(lpmm.clip_by_previous_norm(0.1), lpmm.adamw(0.01)),
  'adafactor': lambda: lpmm.layerwise(lpmm.low_precision(optax.adafactor(0.01)), ''),
}


def run(path, loss, tx, params, steps, *args):
  step, state = path(loss, tx), tx.init(params)
  for _ in range(steps):
    value, params, state = step(params, state, *args)
  return value, params, state


@pytest.mark.parametrize(
  ('name', 'tx'),
  [
    ('scan', 'adamw'),
    # Every optimizer with one loss, and every loss with one optimizer.
    *slow(
      *[('scan', tx) for tx in TXS if tx not in ('adamw', 'adafactor')],
      *[(name, 'sgdm') for name in LOSSES if name != 'scan'],
    ),
  ],
)
def test_it_leaves_the_bits_of_the_ordinary_path(name, tx):
  params, tx = quantized(make_params(name)), TXS[tx]()
  value, found, state = run(lean, LOSSES[name], tx, params, 3, X)
  wanted, expected, expected_state = run(ordinary, LOSSES[name], tx, params, 3, X)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  # Gradients come from other programs, and norms from other sums, which may differ in a last bit.
  for x, y in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, expected_state)), strict=True):
    if jnp.issubdtype(x.dtype, jnp.integer):
      assert np.mean(x != y) < 1e-3
    else:
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
  assert any((x != y).any() for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))


@pytest.mark.slow
def test_what_the_loss_does_not_depend_on_moves_as_by_a_gradient_of_zero():
  layers = jax.random.normal(jax.random.key(0), (3, 64, 64)) / 8
  params = lpmm.quantize({'stopped': layers[0], 'unread': layers[1], 'used': layers[2]}, lpmm.INT8)
  tx = lpmm.adamw(0.1, weight_decay=0.5)

  def loss(params, x):
    h = jnp.tanh(x @ lax.stop_gradient(lpmm.dequantize(params['stopped'])))
    return jnp.mean((h @ lpmm.dequantize(params['used']) - 1) ** 2)

  _, found, state = run(lean, loss, tx, params, 2, X)
  _, expected, expected_state = run(ordinary, loss, tx, params, 2, X)
  assert_same_bits((found, state), (expected, expected_state))
  assert (found['unread'].codes != params['unread'].codes).any()


@pytest.mark.parametrize('how', ['tied', *slow('chunked')])
def test_what_is_used_more_than_once_accumulates_first(how):
  table = quantized({'table': jax.random.normal(jax.random.key(0), (128, 64)) / 8})
  tokens = jax.random.randint(jax.random.key(2), (32,), 0, 128)

  def tied(params, tokens):
    x = lpmm.dequantize(params['table'])[tokens]
    logits = x @ lpmm.dequantize(params['table']).T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.roll(tokens, -1)))

  def chunked(params, tokens):
    x = jax.nn.one_hot(tokens, 64)
    chunk = lambda total, rows: (total + jnp.mean((rows @ lpmm.dequantize(params['table']).T - 1) ** 2), None)
    return lax.scan(chunk, jnp.zeros(()), x.reshape(4, 8, 64))[0]

  tx, loss = lpmm.sgdm(1.0), {'tied': tied, 'chunked': chunked}[how]
  _, found, state = run(lean, loss, tx, table, 1, tokens)
  _, expected, expected_state = run(ordinary, loss, tx, table, 1, tokens)
  for x, y in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, expected_state)), strict=True):
    assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01
  # One of two uses alone would be far from it.
  moved = lpmm.dequantize(found)['table'] - lpmm.dequantize(table)['table']
  gradient = jax.grad(loss)(lpmm.dequantize(table), tokens)['table']
  assert float(jnp.vdot(moved, -gradient) / jnp.vdot(gradient, gradient)) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(('tx', 'limit'), slow(('adamw', 3.7), ('sgdm', 2.7), ('lion', 2.7), ('adafactor', 1.8)))
def test_the_step_holds_parameters_and_state_alone(tx, limit):
  # 50M parameters in 64 layers, 128 positions: activations and one layer's weights and gradients are 0.6 of it,
  # and a matrix's update by Adafactor another 0.1.
  tx, shapes = TXS[tx](), transformer_shapes(64, 256)
  count = sum(x.size for x in jax.tree.leaves(shapes))
  params, x = jax.eval_shape(quantized, shapes), jax.ShapeDtypeStruct((128, 256), jnp.float32)
  step = jax.jit(lpmm.value_and_step(transformer, tx), donate_argnums=(0, 1))
  memory = step.lower(params, jax.eval_shape(tx.init, params), x).compile().memory_analysis()
  peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  assert (peak + memory.temp_size_in_bytes) / count < limit


@pytest.mark.slow
@pytest.mark.parametrize('tx', ['adamw', 'adafactor'])
@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('spec', [(None, 'x', None), (None, None, 'x')], ids=str)
def test_sharded_layers_move_as_on_one_device_but_for_sums(kind, spec, tx):
  mesh = jax.make_mesh((4,), ('x',), axis_types=(getattr(jax.sharding.AxisType, kind),), devices=jax.devices()[:4])
  sharding = NamedSharding(mesh, PartitionSpec(*spec))

  def loss(params, x):
    def one(x, w):
      dense = lpmm.dequantize(w)
      if not jax.typeof(dense).sharding.mesh.empty and kind == 'Explicit':
        dense = jax.sharding.reshard(dense, PartitionSpec(None, None))
      return jnp.tanh(x @ dense), None

    return jnp.mean((lax.scan(jax.checkpoint(one), x, params)[0] - 1) ** 2)

  tx = TXS[tx]()
  params = quantized(jax.random.normal(jax.random.key(0), (4, 256, 256)) / 16)
  x = jax.random.normal(jax.random.key(1), (16, 256))
  value, expected, expected_state = lean(loss, tx)(params, tx.init(params), x)
  placed = jax.tree.map(lambda a: jax.device_put(a, sharding), params)
  with jax.set_mesh(mesh):
    found_value, found, state = lean(loss, tx)(placed, jax.jit(tx.init)(placed), x)
  np.testing.assert_allclose(found_value, value, rtol=1e-5)
  for x, y in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, expected_state)), strict=True):
    if jnp.issubdtype(x.dtype, jnp.integer):
      assert np.mean(np.asarray(x) != np.asarray(y)) < 0.01
    else:
      np.testing.assert_allclose(x, y, rtol=1e-4)
  for leaf in (x for x in jax.tree.leaves((found, state)) if x.shape == params.shape):
    assert leaf.sharding.is_equivalent_to(sharding, 3)


@pytest.mark.parametrize(
  ('tx', 'words'),
  [
    (lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(0.01)), r'kernel: .* gradient of .*gain.*clip_by_previous'),
    (lpmm.low_precision(optax.lamb(0.01)), r'kernel: its update is not elementwise .*MultiSteps\(tx, 1\)'),
  ],
  ids=['global norm', 'lamb'],
)
def test_an_update_that_needs_more_than_a_layer_is_refused(tx, words):
  params = quantized(stacked())
  with pytest.raises(ValueError, match=words):
    lean(scanned, tx)(params, tx.init(params), X)


def test_it_takes_an_optimizer_of_ours_without_extra_arguments():
  into = lpmm.MultiSteps(lpmm.sgdm(0.1), 2, accumulator=lpmm.INTO_MOMENTUM)
  for tx in (
    optax.sgd(0.1),
    optax.chain(optax.clip(1.0), lpmm.sgdm(0.1)),
    lpmm.chain(optax.clip(1.0), into),
    lpmm.apply_if_finite(lpmm.sgdm(0.1), 2),
  ):
    with pytest.raises(TypeError, match=r'value_and_step takes an optimizer of lpmm_optax.* MultiSteps\(tx, 1\)'):
      lpmm.value_and_step(scanned, tx)
  with pytest.raises(ValueError, match='gets no extra arguments'):
    lpmm.value_and_step(scanned, lpmm.sgdm(0.1), extra_args=lambda value: {'value': value})


def test_a_stack_whose_blocks_cross_its_slices_is_named_with_what_to_do():
  tx = lpmm.layerwise(lpmm.low_precision(optax.adafactor(0.01)), stacked='w')
  for shape, advice in (((128, 16), 'quantize it with block_size=16'), ((2**17,), 'keep it dense, by where')):
    with pytest.raises(ValueError, match=f'^w: its blocks run along the first axis.*{advice}'):
      tx.init(lpmm.quantize({'w': jnp.ones(shape)}, lpmm.INT8, where=[('w', lpmm.INT8)]))
