"""Where users put it: stock Optax, Flax, and JAX's transformations; each against `lpmm.step`, bit for bit."""

import copy
import functools

import chex
from flax import nnx
from flax import serialization
import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_bits
from runs import slow
from runs import step_by

import lpmm_optax as lpmm


class Mlp(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(1)(nn.relu(nn.Dense(256)(x)))


X = jax.random.normal(jax.random.key(10), (32, 64))
Y = jnp.sin(X[:, :1])
MODEL = Mlp()
DENSE = MODEL.init(jax.random.key(0), X)['params']


def loss_of(weights):
  return jnp.mean((MODEL.apply({'params': weights}, X) - Y) ** 2)


def optimizer(**kwargs):
  return lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.05, **kwargs))


def trained_in_place(format, steps=5, tx=None):
  """Losses, parameters and state of the plain loop that everything here is compared with."""
  tx = tx or optimizer()
  params = lpmm.quantize(DENSE, format)

  @jax.jit
  def one(params, state):
    loss, grads = jax.value_and_grad(loss_of)(lpmm.dequantize(params))
    return loss, *lpmm.step(tx, grads, params, state)

  state, losses = tx.init(params), []
  for _ in range(steps):
    loss, params, state = one(params, state)
    losses.append(float(loss))
  return losses, params, state


@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT4)], ids=str)
def test_stock_optax_chain_and_apply_updates(format):
  # Clipping by norm would differ in the last bit: lpmm.chain multiplies by a reciprocal.
  txs = optax.clip(0.01), lpmm.sgdm(0.05)
  tx = optax.chain(*txs)
  params = lpmm.quantize(DENSE, format)
  state = tx.init(params)

  @jax.jit
  def one(params, state):
    grads = jax.grad(loss_of)(lpmm.dequantize(params))
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for _ in range(5):
    params, state = one(params, state)
  losses, expected, expected_state = trained_in_place(format, tx=lpmm.chain(*txs))
  assert_same_bits((params, state), (expected, expected_state))
  assert losses[-1] < losses[0]


@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT4)], ids=str)
def test_linen_train_state_apply_gradients(format):
  state = train_state.TrainState.create(apply_fn=MODEL.apply, params=lpmm.quantize(DENSE, format), tx=optimizer())

  @jax.jit
  def one(state):
    return state.apply_gradients(grads=jax.grad(loss_of)(lpmm.dequantize(state.params)))

  for _ in range(5):
    state = one(state)
  _, expected, expected_state = trained_in_place(format)
  assert_same_bits((state.params, state.opt_state), (expected, expected_state))


class NnxMlp(nnx.Module):
  def __init__(self):
    self.hidden = nnx.Linear(64, 256, rngs=nnx.Rngs(0))
    self.out = nnx.Linear(256, 1, rngs=nnx.Rngs(1))

  def __call__(self, x):
    return self.out(nnx.relu(self.hidden(x)))


@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT4)], ids=str)
def test_nnx_optimizer_update(format):
  model = NnxMlp()
  graph = nnx.graphdef(model)
  params = lpmm.quantize(nnx.as_pure(nnx.state(model, nnx.Param)), format)
  nnx.update(model, params)
  optimizer_ = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)

  def gradients(params):
    loss_of = lambda weights: jnp.mean((nnx.merge(graph, weights)(X) - Y) ** 2)
    return jax.value_and_grad(loss_of)(lpmm.dequantize(params))

  @nnx.jit
  def one(model, optimizer_):
    loss, grads = gradients(nnx.state(model, nnx.Param))
    optimizer_.update(model, grads)
    return loss

  tx = optimizer()

  @jax.jit
  def expected(params, state):
    loss, grads = gradients(params)
    return loss, *lpmm.step(tx, grads, params, state)

  state, losses = tx.init(params), []
  for _ in range(5):
    losses.append(float(one(model, optimizer_)))
    loss, params, state = expected(params, state)
    assert float(loss) == losses[-1]
  assert losses[-1] < losses[0]
  assert lpmm.is_quantized(model.hidden.kernel.get_value())
  assert_same_bits(nnx.as_pure(nnx.state(model, nnx.Param)), params)
  assert_same_bits(nnx.as_pure(optimizer_.opt_state), state)


def test_flax_serialization_round_trip_continues_with_the_same_bits():
  _, params, state = trained_in_place(lpmm.INT8, steps=2)
  data = serialization.to_bytes((params, state))
  fresh = lpmm.quantize(jax.tree.map(jnp.zeros_like, DENSE), lpmm.INT8)
  restored = serialization.from_bytes((fresh, optimizer().init(fresh)), data)
  assert_same_bits(restored, (params, state))
  other = lpmm.quantize(DENSE, lpmm.BFLOAT16)
  with pytest.raises(ValueError, match=r'saved as int8, scales_of_64, .* to be restored as bfloat16'):
    serialization.from_bytes((other, state), data)


def test_scan_cond_and_fori_loop():
  tx = optimizer()
  start = lpmm.quantize(DENSE, lpmm.INT8)

  def one(carry):
    params, state = carry
    return lpmm.step(tx, jax.grad(loss_of)(lpmm.dequantize(params)), params, state)

  expected = trained_in_place(lpmm.INT8)[1:]
  carry = (start, tx.init(start))
  scanned = jax.jit(lambda c: jax.lax.scan(lambda c, _: (one(c), None), c, length=5)[0])(carry)
  assert_same_bits(scanned, expected)
  every_other = lambda i, c: jax.lax.cond(i % 2 == 0, one, lambda c: c, c)
  looped = jax.jit(lambda c: jax.lax.fori_loop(0, 10, every_other, c))(carry)
  assert_same_bits(looped, expected)


@pytest.mark.slow
def test_vmap_over_seeds_equals_separate_runs():
  seeds = 3
  grads = jax.random.normal(jax.random.key(1), (seeds, 64, 256))

  def run(key, grad):
    tx = lpmm.sgdm(0.05, key=key, tile_size=2**13)
    params = lpmm.quantize({'w': jnp.ones((64, 256))}, lpmm.INT8)
    one = lambda carry, _: (lpmm.step(tx, {'w': grad}, *carry), None)
    return jax.lax.scan(one, (params, tx.init(params)), length=4)[0]

  keys = jax.random.split(jax.random.key(2), seeds)
  together = jax.jit(jax.vmap(run))(keys, grads)
  for i in range(seeds):
    alone = jax.jit(run)(keys[i], grads[i])
    assert_same_bits(jax.tree.map(lambda x, i=i: x[i], together), alone)


def test_init_and_update_work_on_shapes_alone():
  tx = optimizer()
  params = lpmm.quantize(DENSE, lpmm.INT8)
  state = tx.init(params)
  abstract = jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), DENSE)
  shape_of = lambda x: (x.shape, x.dtype)
  for made in (tx.init(abstract), jax.eval_shape(tx.init, abstract)):
    assert jax.tree.map(shape_of, made) == jax.tree.map(shape_of, state)
  new_params, new_state = jax.eval_shape(functools.partial(lpmm.step, tx), DENSE, abstract, made)
  assert jax.tree.map(shape_of, new_params) == jax.tree.map(shape_of, params)
  assert jax.tree.map(shape_of, new_state) == jax.tree.map(shape_of, state)


def test_a_jitted_step_compiles_once():
  tx = optimizer()
  params = lpmm.quantize(DENSE, lpmm.INT8)
  step = jax.jit(chex.assert_max_traces(lambda *args: lpmm.step(tx, *args), n=1))
  state = tx.init(params)
  for _ in range(3):
    params, state = step(DENSE, params, state)


OURS = {'sgdm': functools.partial(lpmm.sgdm, 0.1), 'adamw': functools.partial(lpmm.adamw, 0.1)}
PAIR = {'a': jnp.ones((64, 128)), 'b': jnp.ones((64, 128))}
PAIR_GRADS = {'a': jnp.full((64, 128), 0.5), 'b': jnp.full((64, 128), 0.25)}


@pytest.mark.parametrize('wrapper', ['inject_hyperparams', *slow('masked', 'partition', 'chain', 'named_chain')])
@pytest.mark.parametrize('make', [OURS['sgdm'], *slow(OURS['adamw'])], ids=OURS)
def test_optax_wrappers(wrapper, make):
  params = lpmm.quantize(PAIR, lpmm.INT8)
  inner = make()
  expected, _ = lpmm.step(inner, PAIR_GRADS, params, inner.init(params))
  tx = {
    'masked': lambda: optax.chain(
      optax.masked(inner, {'a': True, 'b': False}), optax.masked(inner, {'a': False, 'b': True})
    ),
    'partition': lambda: optax.partition({'x': inner, 'y': make()}, {'a': 'x', 'b': 'y'}),
    'inject_hyperparams': lambda: optax.inject_hyperparams(make.func, hyperparam_dtype=jnp.float32)(learning_rate=0.1),
    'chain': lambda: optax.chain(optax.clip(1.0), inner),
    'named_chain': lambda: optax.named_chain(('clip', optax.clip(1.0)), ('opt', inner)),
  }[wrapper]()
  with jax.numpy_dtype_promotion('standard'):  # inject_hyperparams looks for a common dtype of codes and scales.
    updated, state = jax.jit(step_by(tx, 'update'))(PAIR_GRADS, params, tx.init(params))
  if wrapper == 'inject_hyperparams':
    # Its products of scalars are computed in float32, those of constants by Python.
    with_hyper = lambda hyper: lpmm.step(make.func(**hyper), PAIR_GRADS, params, inner.init(params))
    expected, _ = jax.jit(with_hyper)(state.hyperparams)
  assert_same_bits(updated, expected)


@pytest.mark.parametrize('make', OURS.values(), ids=OURS)
def test_frozen_parameters_keep_their_bits_and_take_no_state(make):
  params = lpmm.quantize(PAIR, lpmm.INT8)
  tx = optax.partition({'train': make(), 'freeze': lpmm.set_to_zero()}, {'a': 'freeze', 'b': 'train'})
  updated, state = jax.jit(step_by(tx, 'update'))(PAIR_GRADS, params, tx.init(params))
  assert_same_bits(updated['a'], params['a'])
  assert (np.asarray(updated['b'].codes) != np.asarray(params['b'].codes)).any()
  alone = make().init({'b': params['b']})
  assert lpmm.memory_report(params, state).bytes == lpmm.memory_report(params, alone).bytes


def test_averages_of_quantized_arrays_are_refused():
  params = lpmm.quantize(PAIR, lpmm.INT8)
  with jax.numpy_dtype_promotion('standard'):
    average = optax.incremental_update(params, params, 0.1)
  with pytest.raises(TypeError, match=r'a: the codes .* int8 have become float32'):
    lpmm.dequantize(average)
  tx = lpmm.sgdm(0.1)
  with pytest.raises(TypeError, match='a: the codes'):
    lpmm.step(tx, PAIR_GRADS, average, tx.init(params))
  average = optax.incremental_update(lpmm.dequantize(params), lpmm.dequantize(params), 0.1)
  np.testing.assert_allclose(average['a'], PAIR['a'], rtol=1e-2)


@pytest.mark.parametrize('make', [optax.contrib.dog, *slow(optax.contrib.prodigy)])
def test_states_that_start_as_the_parameters_can_be_donated(make):
  params = {'w': jnp.ones((16, 16)), 'q': lpmm.quantize(jnp.ones((64, 64)), lpmm.INT8)}
  tx = lpmm.low_precision(make(0.1))
  step = jax.jit(functools.partial(lpmm.step, tx), donate_argnums=(1, 2))
  with jax.numpy_dtype_promotion('standard'):
    params, _ = step(jax.tree.map(jnp.ones_like, lpmm.dequantize(params)), params, tx.init(params))
  assert np.isfinite(params['w']).all()


def test_transformations_are_copied_with_their_train_states():
  for tx in (lpmm.adamw(0.1), lpmm.MultiSteps(lpmm.sgdm(0.1), 2, accumulator=lpmm.INTO_MOMENTUM)):
    assert copy.deepcopy({'tx': tx})['tx'].step is tx.step


def test_memory_report_counts_keys_and_passes_over_numbers():
  params = lpmm.quantize(PAIR, lpmm.INT8)
  state = (lpmm.sgdm(0.1).init(params), jax.random.key(0), 7)
  plain = lpmm.memory_report(params, state[0])
  assert lpmm.memory_report(params, state).bytes == plain.bytes + 8
  assert lpmm.memory_report(jnp.ones(3), (jnp.ones(3), 7)).bytes == 24


def test_injected_hyperparameters_can_be_scheduled_read_and_set():
  params = lpmm.quantize(PAIR, lpmm.INT8)
  make = optax.inject_hyperparams(lpmm.adamw, hyperparam_dtype=jnp.float32)
  with jax.numpy_dtype_promotion('standard'):
    tx = make(learning_rate=lambda count: 0.1 * (count + 1), b2=0.99)
    state = tx.init(params)
    _, state = tx.update(PAIR_GRADS, state, params)
    assert float(state.hyperparams['learning_rate']) == pytest.approx(0.1)
    _, state = tx.update(PAIR_GRADS, state, params)
    assert float(state.hyperparams['learning_rate']) == pytest.approx(0.2)
    assert float(state.hyperparams['b2']) == pytest.approx(0.99)
    tx = make(learning_rate=0.1, weight_decay=0.0)
    updates, _ = tx.update(PAIR_GRADS, optax.tree.set(tx.init(params), learning_rate=jnp.float32(0.0)), params)
  assert_same_bits(optax.apply_updates(params, updates), params)


def test_optax_tree_functions_find_and_map_state():
  params = lpmm.quantize(PAIR, lpmm.INT8)
  tx = optax.chain(optax.clip(1.0), lpmm.adamw(0.1))
  _, state = tx.update(PAIR_GRADS, tx.init(params), params)
  assert int(optax.tree.get(state, 'count')) == int(optax.tree.get(state, 'step')) == 1
  assert lpmm.is_quantized(optax.tree.get(state, 'nu')['a'])
  emptied = optax.tree.map_params(tx, jnp.zeros_like, state)
  assert_same_bits(optax.tree.get(emptied, 'mu'), optax.tree.get(tx.init(params), 'mu'))
  assert int(optax.tree.get(emptied, 'count')) == 1
  replaced = optax.tree.set(state, nu=optax.tree.get(emptied, 'nu'))
  assert_same_bits(optax.tree.get(replaced, 'nu'), optax.tree.get(tx.init(params), 'nu'))


AROUND = {
  'apply_if_finite': lambda tx: optax.apply_if_finite(tx, 3),
  'MultiSteps': lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
  'schedule_free': lambda tx: optax.contrib.schedule_free(tx, 0.1),
}


@pytest.mark.parametrize('wrapper', slow('schedule_free', 'apply_if_finite', 'MultiSteps'))
def test_wrappers_that_compute_with_updates_work_on_dense_parameters_or_inside(wrapper):
  wrap = AROUND[wrapper]
  with jax.numpy_dtype_promotion('standard'):
    # Around ours, deltas of quantized parameters would be taken for numbers. That is an error, not a wrong result.
    quantized = lpmm.quantize(PAIR, lpmm.INT8)
    tx = wrap(lpmm.adamw(0.1, b1=0.0))
    with pytest.raises((TypeError, ValueError)):
      tx.update(PAIR_GRADS, tx.init(quantized), quantized)
    # With dense parameters, they are numbers.
    expected, _ = lpmm.step(reference := wrap(optax.adamw(0.1, b1=0.0)), PAIR_GRADS, PAIR, reference.init(PAIR))
    actual, _ = lpmm.step(tx, PAIR_GRADS, PAIR, tx.init(PAIR))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), actual, expected)
    # And low_precision takes the wrapper in.
    tx = lpmm.low_precision(wrap(optax.adamw(0.1, b1=0.0)))
    stored, _ = lpmm.step(tx, PAIR_GRADS, quantized, tx.init(quantized))
  step = 1 / 127
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1.01 * step), lpmm.dequantize(stored), expected)


def test_hyperparameters_injected_in_the_dtype_of_codes_are_refused():
  params = lpmm.quantize({'a': jnp.ones((64, 128))}, lpmm.BFLOAT16)
  tx = optax.inject_hyperparams(lpmm.sgdm)(learning_rate=0.1)
  with jax.numpy_dtype_promotion('standard'), pytest.raises(TypeError, match=r'learning_rate.*hyperparam_dtype'):
    tx.update({'a': jnp.ones((64, 128))}, tx.init(params), params)


@pytest.mark.parametrize('route', ['step', 'update'])
@pytest.mark.parametrize('format', [lpmm.INT8, None], ids=str)
def test_apply_if_finite_skips_bad_steps_bit_for_bit_and_then_gives_up(route, format):
  params = {'a': jnp.ones((64, 128)), 'b': jnp.ones((64, 128)), 'bias': jnp.ones(3)}
  params = lpmm.quantize(params, format) if format else params
  good = jax.tree.map(lambda p: jnp.full(p.shape, 0.5), params, is_leaf=lpmm.is_quantized)
  bad = good | {'b': good['b'].at[3, 5].set(jnp.nan)}
  inner = lpmm.sgdm(0.1)
  tx = lpmm.chain(optax.clip(1.0), lpmm.apply_if_finite(inner, 2))

  one = jax.jit(step_by(tx, route))

  params, state = one(good, params, tx.init(params))
  for count in (1, 2):
    skipped, after = one(bad, params, state)
    assert_same_bits(skipped, params)
    assert_same_bits(after[1].inner_state, state[1].inner_state)
    assert int(after[1].notfinite_count) == int(after[1].total_notfinite) == count
    state = after
  applied, after = one(good, params, state)
  assert_same_bits((applied, after[1].inner_state), lpmm.step(inner, good, params, state[1].inner_state))
  assert int(after[1].notfinite_count) == 0
  poisoned, _ = one(bad, params, state)
  assert not np.isfinite(lpmm.dequantize(poisoned)['b'][3, 5])


def test_nothing_may_transform_integer_deltas():
  with pytest.raises(TypeError, match='last'):
    lpmm.chain(lpmm.sgdm(0.1), optax.scale(2.0))
  with pytest.raises(ValueError, match='last'):
    lpmm.chain(lpmm.sgdm(0.1), lpmm.sgdm(0.1))


def test_an_optimizer_can_be_used_again_after_its_state_was_donated():
  tx = optimizer()
  step = jax.jit(lambda params, state: lpmm.step(tx, DENSE, params, state), donate_argnums=(0, 1))
  for _ in range(2):
    params = lpmm.quantize(jax.tree.map(jnp.copy, DENSE), lpmm.INT8)
    _, state = step(params, tx.init(params))
  assert int(optax.tree.get(state, 'step')) == 1


def test_step_takes_any_optax_transformation():
  tx = optax.sgd(0.1, momentum=0.9)
  params, state = lpmm.step(tx, DENSE, DENSE, tx.init(DENSE))
  updates, expected = tx.update(DENSE, tx.init(DENSE), DENSE)
  assert_same_bits((params, state), (optax.apply_updates(DENSE, updates), expected))


def compile_step(step, *args):
  """Memory of a jitted step that donates its first two arguments, (params, state)."""
  return jax.jit(step, donate_argnums=(0, 1)).lower(*args).compile().memory_analysis()


def large_model(tx, format):
  """Shapes of eight leaves of 4M elements, of their state and of their gradients."""
  grads = [jax.ShapeDtypeStruct((2048, 2048), jnp.float32)] * 8
  params = jax.eval_shape(lambda x: lpmm.quantize(x, format), grads) if format else grads
  return params, jax.eval_shape(tx.init, params), grads


def decaying(count):
  return 0.1 / (1 + count.astype(jnp.float32))


IN_PLACE = {
  'sgdm': lambda formats: lpmm.sgdm(decaying, weight_decay=1e-4, formats=formats),
  'adamw': lambda formats: lpmm.adamw(decaying, formats=formats),
  'lion': lambda formats: lpmm.lion(decaying, formats=formats),
  'low_precision': lambda formats: lpmm.low_precision(
    optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(decaying, momentum=0.9)), formats=formats
  ),
}


# Dense leaves are left to XLA, which copies those of lion and rmsprop, Optax's own no less.
IN_PLACE_CASES = [(name, False, lpmm.INT8) for name in IN_PLACE]
IN_PLACE_CASES += slow(*((name, False, lpmm.BFLOAT16) for name in IN_PLACE))
IN_PLACE_CASES += slow(('sgdm', False, None), ('adamw', False, None))
IN_PLACE_CASES += slow(('sgdm', True, lpmm.INT8), ('adamw', True, lpmm.INT8))


@pytest.mark.parametrize(('name', 'wrapped', 'format'), IN_PLACE_CASES, ids=str)
def test_the_update_is_in_place(name, wrapped, format):
  tx = IN_PLACE[name]('default' if format else None)
  tx = lpmm.chain(lpmm.apply_if_finite(tx, 3)) if wrapped else tx
  params, state, grads = large_model(tx, format)
  memory = compile_step(lambda params, state, grads: lpmm.step(tx, grads, params, state), params, state, grads)
  total = lpmm.memory_report(params, state).bytes
  # All but one flag of `apply_if_finite`, which it writes and never reads.
  assert memory.alias_size_in_bytes == total - wrapped
  # What is not aliased is a table of pointers to the results.
  assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 1024
  assert memory.temp_size_in_bytes < 0.08 * total


def test_a_chain_of_one_is_its_optimizer():
  params = lpmm.quantize(DENSE, lpmm.INT8)
  alone, chained = lpmm.sgdm(0.05), lpmm.chain(lpmm.sgdm(0.05))
  grads = jax.tree.map(jnp.ones_like, DENSE)
  expected_params, expected_state = lpmm.step(alone, grads, params, alone.init(params))
  new_params, (new_state,) = lpmm.step(chained, grads, params, chained.init(params))
  assert_same_bits((new_params, new_state), (expected_params, expected_state))


@pytest.mark.slow
def test_clipping_in_a_chain_costs_no_memory():
  plain = lpmm.sgdm(decaying)
  clipped = lpmm.chain(optax.clip_by_global_norm(1.0), plain)
  temporaries = {}
  for name, tx in {'plain': plain, 'clipped': clipped}.items():

    def one(params, state, x, tx=tx):
      loss = lambda weights: sum(jnp.sum(jnp.tanh(x @ w)) for w in weights)
      return lpmm.step(tx, jax.grad(loss)(lpmm.dequantize(params)), params, state)

    params, state, _ = large_model(tx, lpmm.INT8)
    memory = compile_step(one, params, state, jax.ShapeDtypeStruct((16, 2048), jnp.float32))
    temporaries[name] = memory.temp_size_in_bytes
  total = lpmm.memory_report(params, state).bytes
  assert temporaries['clipped'] < temporaries['plain'] + 0.01 * total


@pytest.mark.slow
def test_temporaries_of_small_leaves_do_not_add_up():
  tx = lpmm.sgdm(decaying)
  grads = [jax.ShapeDtypeStruct((256, 256), jnp.float32)] * 48
  params = jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), grads)
  state = jax.eval_shape(tx.init, params)
  memory = compile_step(lambda params, state, grads: lpmm.step(tx, grads, params, state), params, state, grads)
  # One leaf's dense values, 9 bytes per element, at a time; those of all 48 would be four times the state.
  assert memory.temp_size_in_bytes < 0.08 * lpmm.memory_report(params, state).bytes + 10 * 256 * 256


@pytest.mark.parametrize(
  'make', [lpmm.adamw, lambda rate: lpmm.MultiSteps(lpmm.sgdm(rate), 2)], ids=['adamw', 'microbatches']
)
def test_an_optimizer_is_made_anew_of_what_pickle_takes_of_it(make):
  tx = make(0.1)
  restore, args = tx.__reduce__()
  again = restore(*args)
  assert type(again) is type(tx)
  assert again == tx
  assert vars(again) == vars(tx)
