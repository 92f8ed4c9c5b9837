import functools

from flax import serialization
from flax.training import train_state
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import runs
from runs import assert_same_bits
from runs import slow

import lpmm_optax as lpmm

SHAPE = (64, 128)
K = 4


def gradients(count, seed=0):
  return [runs.tree(100 * seed + i + 1) for i in range(count)]


def train(tx, params, grads, use_step=False, state=None):
  """Parameters and state after each of a list of gradients."""

  @jax.jit
  def one(params, state, grads):
    if use_step:
      return lpmm.step(tx, grads, params, state)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  # Optax divides floats by counts.
  with jax.numpy_dtype_promotion('standard'):
    state = tx.init(params) if state is None else state
    out = []
    for g in grads:
      params, state = one(params, state, g)
      out.append((params, state))
  return out


def assert_close(a, b, atol=1e-6):
  """To float32 rounding of values of order one, after a few operations."""
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=atol), a, b)


def every_other(step):
  return jnp.where(step % 2 == 0, 2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Optax's MultiSteps
# ---------------------------------------------------------------------------------------------------------------------

INNERS = {
  'sgdm': (lambda: optax.sgd(0.1, 0.9), lambda: lpmm.sgdm(0.1, 0.9, formats=None)),
  'adamw': (lambda: optax.adamw(0.01), lambda: lpmm.adamw(0.01, formats=None)),
  'clipped': (
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
    lambda: lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1, None, formats=None)),
  ),
  "optax's own": (lambda: optax.adam(0.01), lambda: optax.adam(0.01)),
}


@pytest.mark.parametrize(
  ('every_k', 'use_grad_mean', 'use_step'),
  [(1, True, True), (3, True, False), (3, False, True), (every_other, True, True)],
  ids=['1', '3', '3, sum', 'schedule'],
)
@pytest.mark.parametrize('inner', ['sgdm', *slow('adamw', 'clipped', "optax's own")])
def test_dense_accumulation_is_that_of_optax_after_every_microbatch(inner, every_k, use_grad_mean, use_step):
  theirs, ours = (make() for make in INNERS[inner])
  grads = gradients(7)
  expected = train(optax.MultiSteps(theirs, every_k, use_grad_mean), runs.tree(), grads)
  tx = lpmm.MultiSteps(ours, every_k, use_grad_mean, accumulator=None)
  for (params, state), (wanted, wanted_state) in zip(train(tx, runs.tree(), grads, use_step), expected, strict=True):
    assert_close(params, wanted)
    assert_close(state.acc_grads, wanted_state.acc_grads)
    assert int(state.mini_step) == int(wanted_state.mini_step)
    assert int(state.gradient_step) == int(wanted_state.gradient_step)


def test_has_updated_is_true_after_the_last_microbatch_only():
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 3)
  assert not tx.has_updated(tx.init(runs.tree()))
  assert [bool(tx.has_updated(s)) for _, s in train(tx, runs.tree(), gradients(6))] == [False, False, True] * 2


def test_gradient_transformation_goes_into_a_train_state():
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 2).gradient_transformation()
  params = lpmm.quantize(runs.tree(), lpmm.INT8)
  state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
  step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
  grads = gradients(4)
  for g in grads:
    state = step(state, g)
  expected, expected_state = train(tx, params, grads, use_step=True)[-1]
  assert_same_bits((state.params, state.opt_state), (expected, expected_state))


SKIPS = {
  'not finite': optax.skip_not_finite,
  'large': functools.partial(optax.skip_large_updates, max_squared_norm=1e6),
}


@pytest.mark.parametrize('skip', ['not finite', *slow('large')])
@pytest.mark.parametrize('accumulator', [lpmm.INTO_MOMENTUM, *slow(lpmm.INT8, None)], ids=str)
@pytest.mark.parametrize('at', [1, *slow(0, 2)])
def test_a_skipped_microbatch_leaves_everything_as_it_was_bit_for_bit(accumulator, at, skip):
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 3, should_skip_update_fn=SKIPS[skip], accumulator=accumulator)
  params, grads = lpmm.quantize(runs.tree(), lpmm.INT8), gradients(6)
  bad = jax.tree.map(lambda g: g.at[(0,) * g.ndim].set(jnp.inf), grads[0])
  expected = train(tx, params, grads)
  found = train(tx, params, [*grads[:at], bad, *grads[at:]])
  before, after = (found[at - 1] if at else (params, tx.init(params))), found[at]
  assert_same_bits(after[0], before[0])
  assert_same_bits(after[1]._replace(skip_state=()), before[1]._replace(skip_state=()))
  assert bool(after[1].skip_state['should_skip'])
  assert_same_bits(found[-1], expected[-1])


def test_skip_functions_must_return_a_boolean_scalar():
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 2, should_skip_update_fn=lambda g, step, params: (jnp.zeros(2, bool), ()))
  with pytest.raises(ValueError, match=r'boolean scalar, got bool\[2\]'):
    tx.update(runs.tree(), tx.init(runs.tree()), runs.tree())


# ---------------------------------------------------------------------------------------------------------------------
# Low precision
# ---------------------------------------------------------------------------------------------------------------------

TXS = {
  'sgdm': lambda **kw: lpmm.MultiSteps(lpmm.sgdm(0.1, **kw), K, **kw),
  'into momentum': lambda **kw: lpmm.MultiSteps(lpmm.sgdm(0.1, **kw), K, accumulator=lpmm.INTO_MOMENTUM, **kw),
  'clipped adamw': lambda **kw: lpmm.MultiSteps(
    lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(0.01, **kw)), K, **kw
  ),
}


@pytest.mark.parametrize('name', ['into momentum', *slow('sgdm', 'clipped adamw')])
def test_parameters_and_state_stay_bit_for_bit_until_the_last_microbatch(name):
  tx = TXS[name]()
  params = lpmm.quantize(runs.tree(), lpmm.INT8)
  history = train(tx, params, gradients(2 * K))
  for i, (now, state) in enumerate(history):
    if i % K == K - 1:
      assert not np.array_equal(now['kernel'].codes, params['kernel'].codes)
      if name != 'into momentum':
        assert_same_bits(state.acc_grads, jax.tree.map(jnp.zeros_like, state.acc_grads))
      params = now
    else:
      assert_same_bits(now, params)
      if name != 'into momentum' and i:
        before = history[i - 1][1].inner_opt_state
        assert_same_bits(state.inner_opt_state, before)


@pytest.mark.parametrize('name', ['into momentum', *slow('sgdm', 'clipped adamw')])
def test_step_is_update_bit_for_bit_and_tiles_do_not_matter(name):
  params, grads = lpmm.quantize(runs.tree(), lpmm.INT8), gradients(2 * K)
  expected = train(TXS[name](), params, grads)[-1]
  assert_same_bits(train(TXS[name](), params, grads, use_step=True)[-1], expected)
  if name != 'clipped adamw':  # A norm is summed as XLA sees fit.
    assert_same_bits(train(TXS[name](tile_size=512), params, grads, use_step=True)[-1], expected)


@pytest.mark.parametrize('spec', [(None, 'x'), *slow((('x', None),))], ids=str)
@pytest.mark.parametrize('name', slow('into momentum', 'sgdm'))
def test_sharding_does_not_change_a_bit_and_is_kept(name, spec):
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
  tx, params = TXS[name](), lpmm.quantize(jax.random.normal(jax.random.key(0), (64, 1024)), lpmm.INT8)
  grads = [jax.random.normal(jax.random.key(i), params.shape) for i in range(2 * K)]
  expected = train(tx, params, grads, use_step=True)
  found = train(tx, jax.tree.map(place, params), [place(g) for g in grads], use_step=True, state=tx.init(params))
  assert_same_bits(found[-1], expected[-1])
  initial = jax.jit(tx.init)(jax.tree.map(place, params))
  quantized = [x for x in jax.tree.leaves((found, initial), is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)]
  assert len(quantized) > 2 * K
  assert all(x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), 2) for x in quantized)


def test_elements_without_gradient_keep_their_codes():
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 1000)
  first = jax.random.normal(jax.random.key(0), SHAPE)
  some = first * (jnp.arange(SHAPE[0]) % 2)[:, None].astype(jnp.float32)
  (_, before), *_, (_, after) = train(tx, jnp.zeros(SHAPE), [first, *[some] * 5, *[0 * some] * 5])
  np.testing.assert_array_equal(after.acc_grads.codes[::2], before.acc_grads.codes[::2])
  np.testing.assert_array_equal(after.acc_grads.scales[::2], before.acc_grads.scales[::2])
  assert not np.array_equal(after.acc_grads.codes[1::2], before.acc_grads.codes[1::2])


@pytest.mark.parametrize('format', [lpmm.INT4, lpmm.INT16, lpmm.BFLOAT16], ids=str)
def test_other_formats_accumulate_to_within_their_grid(format):
  tx = lpmm.MultiSteps(optax.sgd(1.0), K, accumulator=format)
  grads = gradients(K)
  params, _ = train(tx, jax.tree.map(jnp.zeros_like, runs.tree()), grads)[-1]
  mean = jax.tree.map(lambda *g: sum(g) / K, *grads)
  # Three roundings, each by less than a grid step of a block's largest sum, which stays below 4.
  step = {lpmm.INT4: 4 / 7, lpmm.INT16: 4 / 32767, lpmm.BFLOAT16: 4 / 128}[format]
  assert np.max(np.abs(params['kernel'] + mean['kernel'])) < 3 * step
  assert_close(params['bias'], -mean['bias'])


# ---------------------------------------------------------------------------------------------------------------------
# Bias and variance of what is accumulated
# ---------------------------------------------------------------------------------------------------------------------

SEEDS = 64


@functools.partial(jax.jit, static_argnums=(0, 1))
def accumulate(tx, count, grads, params, state, keys):
  """By key, minus the update of one step of `count` microbatches; and by microbatch but the last, the mean square of
  the grid steps of what they were added to."""

  def one(key):
    def body(state, g):
      _, state = lpmm.step(tx, g, params, state)
      target = state.acc_grads or state.inner_opt_state.inner_state.trace
      scale = jax.lax.bitcast_convert_type(target.scales, jnp.bfloat16).astype(jnp.float32)
      return state, jnp.mean(scale**2)

    last, squares = jax.lax.scan(body, state._replace(key=key), grads[:-1])
    new, _ = lpmm.step(tx, grads[-1], params, last)
    return params - new, squares

  return jax.vmap(one)(keys)


@pytest.mark.parametrize('count', [8, *slow(2, 32)])
@pytest.mark.parametrize('accumulator', [lpmm.INT8, *slow(lpmm.INTO_MOMENTUM)], ids=str)
def test_the_mean_is_unbiased_and_its_added_variance_is_that_of_the_roundings(accumulator, count):
  # A step of rate one moves dense parameters by minus what was accumulated.
  tx = lpmm.MultiSteps(lpmm.sgdm(1.0, 0.9), count, accumulator=accumulator)
  params = jnp.zeros(SHAPE)
  state = tx.init(params)
  decayed = jnp.zeros(SHAPE)
  if accumulator is lpmm.INTO_MOMENTUM:
    # A momentum as it is after many steps of such gradients: 1 / sqrt(1 - b^2) times as wide as their means.
    m = 0.9 * jax.random.normal(jax.random.key(1), SHAPE) / np.sqrt(count * (1 - 0.9**2))
    trace = lpmm.quantize(m, lpmm.Format(block_size=128))
    inner = state.inner_opt_state
    state = state._replace(inner_opt_state=inner._replace(inner_state=inner.inner_state._replace(trace=trace)))
    decayed = lpmm.dequantize(trace)
  grads = jax.random.normal(jax.random.key(0), (count, *SHAPE))
  keys = jax.random.bits(jax.random.key(2), (SEEDS, 2), jnp.uint32)
  found, squares = accumulate(tx, count, grads, params, state, keys)
  error = np.asarray(found, np.float64) - np.asarray(decayed + jnp.mean(grads, axis=0))
  # Stochastic rounding at a fraction f of a grid step d has variance f (1 - f) d^2, of mean d^2 / 6.
  predicted = np.sum(np.mean(squares, axis=0)) / 6
  n = error.size
  # Five standard errors; a variance's own is sqrt(2 / n) of it. Blocks differ in their grid, which the mean over
  # blocks takes into account; that f is uniform holds to a percent.
  assert abs(error.mean()) < 5 * np.sqrt(predicted / n)
  per_element = error.mean(axis=0) / np.sqrt(predicted / SEEDS)
  assert np.abs(per_element).max() < 8
  np.testing.assert_allclose(error.var(), predicted, rtol=0.01 + 5 * np.sqrt(2 / n))


def test_into_momentum_adds_a_third_of_a_percent_to_the_noise_at_a_decay_of_nine_tenths():
  # With noise of variance s^2 in the mean gradient of a step, the momentum has s^2 / (1 - b^2); a block of 128 reaches
  # some 2.9 standard deviations, so each of 8 roundings adds (2.9 / 127)^2 / (6 (1 - b^2)) = 0.046 % of s^2.
  count, b, steps = 8, 0.9, 60
  tx = lpmm.MultiSteps(lpmm.sgdm(1.0, b), count, accumulator=lpmm.INTO_MOMENTUM)
  params = jnp.zeros(SHAPE)

  def step(carry, i):
    params, state, u = carry

    def microbatch(carry, j):
      now, state, m = carry
      g = jax.random.normal(jax.random.fold_in(jax.random.key(3), i * count + j), SHAPE)
      now, state = lpmm.step(tx, g, now, state)
      return (now, state, m + g / count), None

    (now, state, m), _ = jax.lax.scan(microbatch, (params, state, u), jnp.arange(count))
    return (now, state, b * m), jnp.var(params - now - m)

  errors = jax.jit(lambda *carry: jax.lax.scan(step, carry, jnp.arange(steps))[1])(params, tx.init(params), params)
  # Errors of earlier steps are still in the momentum, as earlier gradients are: 1 / (1 - b^2) of both.
  added = jnp.mean(errors[steps // 2 :]) * (1 - b**2) * count
  predicted = count * (2.9 / 127) ** 2 / (6 * (1 - b**2))
  # The largest of 128 varies, and 2.9 is its upper side.
  np.testing.assert_allclose(added, predicted, rtol=0.2)


# ---------------------------------------------------------------------------------------------------------------------
# Into the momentum
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  'kwargs',
  [
    {},
    {'error_feedback': False},
    {'weight_decay': 0.1},
    {'learning_rate': lambda step: jnp.where(step == 1, 0.0, 0.1), 'error_feedback': True},
    {'learning_rate': lambda step: jnp.where(step == 1, 0.0, 0.1), 'error_feedback': False},
  ],
  ids=['feedback', 'plain', 'weight decay', 'schedule with feedback', 'schedule'],
)
@pytest.mark.parametrize('use_grad_mean', [True, *slow(False)], ids=['mean', 'sum'])
def test_into_momentum_is_sgdm_of_the_accumulated_gradient(kwargs, use_grad_mean):
  # Dense parameters, and momentum in float32 by way of `where`: only float32 rounding is left.
  sgdm = functools.partial(lpmm.sgdm, **({'learning_rate': 0.1, 'formats': {'trace': [('', None)]}} | kwargs))
  grads = gradients(4 * K)
  into = train(lpmm.MultiSteps(sgdm(), K, use_grad_mean, accumulator=lpmm.INTO_MOMENTUM), runs.tree(), grads)
  expected = train(lpmm.MultiSteps(sgdm(), K, use_grad_mean, accumulator=None), runs.tree(), grads)
  for (params, _), (wanted, _) in zip(into, expected, strict=True):
    assert_close(params, wanted, atol=5e-6)


@pytest.mark.slow
def test_into_momentum_follows_float32_within_the_noise_of_rounding():
  grads = gradients(8 * K)
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), K, accumulator=lpmm.INTO_MOMENTUM)
  params, state = train(tx, lpmm.quantize(runs.tree(), lpmm.INT8), grads)[-1]
  expected, _ = train(optax.MultiSteps(optax.sgd(0.1, 0.9), K), runs.tree(), grads)[-1]
  error = lpmm.dequantize(params)['kernel'] - expected['kernel']
  # A grid step of these parameters is about 3 / 127; feedback keeps the error at that order.
  assert np.sqrt(np.mean(error**2)) < 2 * 3 / 127
  assert state.acc_grads == ()
  assert lpmm.memory_report(params, state).groups.keys() == {'params', 'trace'}


@pytest.mark.parametrize(
  'tx',
  [
    lpmm.sgdm(0.1, nesterov=True),
    lpmm.sgdm(0.1, momentum=None),
    lpmm.adamw(0.1),
    lpmm.lion(0.1),
    lpmm.low_precision(optax.sgd(0.1, 0.9)),
    lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1)),
    lpmm.apply_if_finite(lpmm.sgdm(0.1), 3),
    optax.sgd(0.1, 0.9),
  ],
  ids=['nesterov', 'no momentum', 'adamw', 'lion', 'low_precision', 'chain', 'apply_if_finite', 'optax'],
)
def test_into_momentum_is_refused_for_all_but_heavy_ball_sgdm(tx):
  with pytest.raises(ValueError, match='INTO_MOMENTUM adds gradients to the momentum, so the optimizer must be linear'):
    lpmm.MultiSteps(tx, 2, accumulator=lpmm.INTO_MOMENTUM)


@pytest.mark.slow
def test_a_chain_around_multi_steps_transforms_the_gradient_of_each_microbatch():
  tx = lpmm.chain(optax.clip(0.1), lpmm.MultiSteps(lpmm.sgdm(0.1), K, accumulator=lpmm.INTO_MOMENTUM))
  clipped = [jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), g) for g in gradients(2 * K)]
  params = lpmm.quantize(runs.tree(), lpmm.INT8)
  found = train(tx, params, gradients(2 * K), use_step=True)[-1][0]
  assert_same_bits(found, train(TXS['into momentum'](), params, clipped, use_step=True)[-1][0])


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints, memory, mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', slow('into momentum', 'sgdm', 'clipped adamw'))
def test_a_checkpoint_between_microbatches_resumes_bit_for_bit(name, tmp_path):
  tx, params, grads = TXS[name](), lpmm.quantize(runs.tree(), lpmm.INT8), gradients(2 * K)
  expected = train(tx, params, grads)[-1]
  stopped = train(tx, params, grads[: K + 2])[-1]
  blank = (params, tx.init(params))
  as_bytes = serialization.from_bytes(blank, serialization.to_bytes(stopped))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'mid', stopped)
    checkpointer.wait_until_finished()
    from_disk = checkpointer.restore(tmp_path / 'mid', blank)
  for restored in (as_bytes, from_disk):
    now, state = jax.tree.map(jnp.asarray, restored)
    assert_same_bits(train(tx, now, grads[K + 2 :], state=state)[-1], expected)


BIG = {f'layer_{i}': jax.ShapeDtypeStruct((2048, 2048), jnp.float32) for i in range(6)}
MEMORY = {
  **TXS,
  # optax.skip_not_finite counts elements in int32 arrays of its own on CPU.
  'skipping': lambda: lpmm.MultiSteps(lpmm.sgdm(0.1), K, should_skip_update_fn=SKIPS['large']),
  'dense accumulator': lambda: lpmm.MultiSteps(lpmm.sgdm(0.1), K, accumulator=None),
}


@pytest.mark.parametrize('name', ['clipped adamw', *slow(*(name for name in MEMORY if name != 'clipped adamw'))])
def test_the_compiled_step_holds_no_second_copy_of_anything(name):
  tx = MEMORY[name]()
  params = jax.eval_shape(lambda p: lpmm.quantize(p, lpmm.INT8), BIG)
  state = jax.eval_shape(tx.init, params)
  compiled = (
    jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state), donate_argnums=(0, 1))
    .lower(params, state, BIG)
    .compile()
  )
  memory = compiled.memory_analysis()
  count = sum(leaf.size for leaf in jax.tree.leaves(BIG))
  held = lpmm.memory_report(params, state).bytes
  assert memory.alias_size_in_bytes >= held - 64
  # Every array has a byte and more per parameter, so none exists twice. There is a tile, and a leaf's codes.
  assert memory.temp_size_in_bytes < count / 4


def test_the_report_counts_the_accumulator():
  params = lpmm.quantize({'w': jnp.ones((1024, 1024))}, lpmm.INT8)
  tx = lpmm.MultiSteps(lpmm.adamw(0.1), K)
  report = lpmm.memory_report(params, tx.init(params), tx=tx)
  assert report.groups['acc_grads'] == 2**20 + 2 * 2**20 // 128
  assert [row.update for row in report.rows if row.group == 'params'] == ['in tiles']
  into = lpmm.MultiSteps(lpmm.sgdm(0.1), K, accumulator=lpmm.INTO_MOMENTUM)
  assert lpmm.memory_report(params, into.init(params)).bytes_per_param < 2.05


def test_init_takes_shapes():
  for make in MEMORY.values():
    params = jax.eval_shape(lambda p: lpmm.quantize(p, lpmm.INT8), BIG)
    assert jax.tree.structure(make().init(params)) == jax.tree.structure(jax.eval_shape(make().init, params))


def test_mistakes_are_named():
  with pytest.raises(TypeError, match=r"accumulator must be a Format, None or INTO_MOMENTUM, got 'int8'"):
    lpmm.MultiSteps(lpmm.sgdm(0.1), 2, accumulator='int8')
  with pytest.raises(ValueError, match='uint8_sqrt stores nonnegative values only'):
    lpmm.MultiSteps(lpmm.sgdm(0.1), 2, accumulator=lpmm.UINT8_SQRT)
  for zero in (0, np.int64(0)):
    with pytest.raises(ValueError, match='every_k_schedule must be at least 1, got 0'):
      lpmm.MultiSteps(lpmm.sgdm(0.1), zero)
  tx, params = lpmm.MultiSteps(lpmm.sgdm(0.1), 2), runs.tree()
  state = tx.init(params)
  with pytest.raises(TypeError, match='MultiSteps got a state of type LowPrecisionState'):
    tx.update(params, lpmm.sgdm(0.1).init(params), params)
  with pytest.raises(ValueError, match='MultiSteps needs the parameters'):
    tx.update(params, state)
  with pytest.raises(ValueError, match=r'kernel: the gradient has shape \(2,\), the parameter \(64, 96\)'):
    tx.update(params | {'kernel': jnp.ones(2)}, state, params)
  other = params | {'kernel': jnp.ones((96, 64))}
  with pytest.raises(ValueError, match=r'kernel: the parameter has shape \(96, 64\), its accumulator is'):
    tx.update(other, state, other)
  with pytest.raises(ValueError, match='an accumulator that it did not create for these parameters'):
    tx.update(params | {'more': jnp.ones(2)}, state, params | {'more': jnp.ones(2)})


def test_a_nan_gradient_stays_visible():
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 2)
  params = lpmm.quantize(jnp.ones(SHAPE), lpmm.INT8)
  bad = jnp.zeros(SHAPE).at[3, 5].set(jnp.nan)
  (_, held), (params, state) = train(tx, params, [bad, jnp.zeros(SHAPE)])
  assert np.isnan(lpmm.dequantize(held.acc_grads)[3]).all()
  assert np.isnan(lpmm.dequantize(params)[3]).any()
  # The next step starts from an accumulator of zeros.
  assert not np.isnan(lpmm.dequantize(state.acc_grads)).any()


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize('accumulator', [lpmm.INT8, None], ids=str)
def test_stock_optimizers_take_half_precision(dtype, accumulator):
  with jax.numpy_dtype_promotion('standard'):
    params = {'w': jnp.ones((64, 128), dtype), 'b': jnp.ones(10, dtype)}
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)
    ours, theirs = lpmm.MultiSteps(optax.adam(0.1), 2, accumulator=accumulator), optax.MultiSteps(optax.adam(0.1), 2)
    a, b = params, params
    state, expected = ours.init(a), theirs.init(b)
    for _ in range(4):
      updates, state = ours.update(grads, state, a)
      a = optax.apply_updates(a, updates)
      updates, expected = theirs.update(grads, expected, b)
      b = optax.apply_updates(b, updates)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
      assert x.dtype == y.dtype == dtype
      np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-2)


@pytest.mark.parametrize('accumulator', [lpmm.INT8, *slow(lpmm.INTO_MOMENTUM, None)], ids=str)
def test_a_step_goes_on_with_the_number_of_microbatches_it_began_with(accumulator):
  params, grads = lpmm.quantize(runs.tree(), lpmm.INT8), gradients(10)
  before, after = (lpmm.MultiSteps(lpmm.sgdm(0.1), k, accumulator=accumulator) for k in (4, 2))
  expected = train(before, params, grads[:4], use_step=True)
  params, state = expected[2]
  if accumulator is not lpmm.INTO_MOMENTUM:
    means = before.mean_gradients(state), after.mean_gradients(state)
    jax.tree.map(np.testing.assert_array_equal, *means)
  # A run that stopped within a step, and goes on with half as many microbatches, in that step not yet.
  resumed = train(after, params, grads[3:10], use_step=True, state=state)
  assert_same_bits(resumed[0], expected[3])
  assert [int(state.mini_step) for _, state in resumed] == [0, 1, 0, 1, 0, 1, 0]


def test_what_skips_sees_no_gradient_of_what_is_never_updated():
  params = {'w': jnp.ones((8, 8)), 'n': jnp.int32(3)}
  grads = {'w': jnp.ones((8, 8)), 'n': np.zeros((), jax.dtypes.float0)}
  for tx in (
    lpmm.MultiSteps(lpmm.sgdm(0.1), 1, should_skip_update_fn=optax.skip_not_finite),
    lpmm.apply_if_finite(lpmm.sgdm(0.1), 3),
  ):
    new, _ = lpmm.step(tx, grads, params, tx.init(params))
    assert int(new['n']) == 3
    np.testing.assert_allclose(new['w'], 0.9, rtol=1e-6)


@pytest.mark.parametrize('every_k', [1, 2])
def test_a_skipped_update_has_deltas_of_the_dtype_of_others(every_k):
  params = {'w': jnp.ones((8, 8), jnp.bfloat16)}
  tx = lpmm.apply_if_finite(lpmm.MultiSteps(optax.sgd(0.5), every_k), 3)
  new, state = train(tx, params, [{'w': jnp.ones((8, 8))}])[0]
  assert (new['w'].dtype, int(state.total_notfinite)) == (jnp.bfloat16, 0)


@pytest.mark.slow
def test_a_second_norm_decodes_no_accumulator_as_a_whole():
  norm = optax.snapshot('norm', optax.tree.norm)
  tx = lpmm.MultiSteps(lpmm.chain(optax.clip_by_global_norm(1.0), norm, lpmm.sgdm(0.1)), K)
  params = jax.eval_shape(lambda p: lpmm.quantize(p, lpmm.INT8), BIG)
  state = jax.eval_shape(tx.init, params)
  step = jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state), donate_argnums=(0, 1))
  memory = step.lower(params, state, BIG).compile().memory_analysis()
  assert memory.temp_size_in_bytes < sum(leaf.size for leaf in jax.tree.leaves(BIG)) / 4


def test_a_second_norm_is_of_what_the_first_has_clipped():
  norm = optax.snapshot('norm', optax.tree.norm)
  tx = lpmm.MultiSteps(lpmm.chain(optax.clip_by_global_norm(0.5), norm, lpmm.sgdm(0.1)), 2)
  params = lpmm.quantize(runs.tree(), lpmm.INT8)
  _, state = train(tx, params, gradients(2), use_step=True)[-1]
  np.testing.assert_allclose(optax.tree.get(state, 'norm'), 0.5, rtol=1e-3)
