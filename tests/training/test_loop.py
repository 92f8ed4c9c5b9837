"""What else in a loop sees the parameters: a test for each row of docs/guides/loop.md, on quantized parameters."""

import copy
import io
from pathlib import Path
import pickle
import re
import threading

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import assert_same_bits
from runs import slow

import lpmm_optax as lpmm

DENSE = {'w': jax.random.normal(jax.random.key(0), (64, 128)), 'v': jnp.full((64, 128), 0.5), 'b': jnp.ones(3)}
PARAMS = lpmm.quantize(DENSE, lpmm.INT8)
SIZE = 2 * 64 * 128 + 3
TX = lpmm.adamw(0.01)
STEP = jax.jit(lambda g, p, s: lpmm.step(TX, g, p, s))


def large():
  """Shapes of eight leaves of a million elements."""
  return jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 8)


def temporaries(fn, *args):
  return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def test_every_row_names_its_test():
  rows = [
    line for line in (Path(__file__).parents[2] / 'docs/guides/loop.md').read_text().splitlines() if 'test_' in line
  ]
  named = {name for line in rows for name in re.findall(r'`(test_\w+)`', line)}
  here = {name for name in globals() if name.startswith('test_')} - {'test_every_row_names_its_test'}
  assert named == here


def test_evaluation_dequantizes():
  x = jnp.ones((2, 64))
  with pytest.raises(TypeError, match=r'dequantize\(params\) before the model uses them, in evaluation too'):
    x @ PARAMS['w']
  np.testing.assert_allclose(x @ lpmm.dequantize(PARAMS)['w'], x @ DENSE['w'], atol=64 * 0.02)


def test_counting_parameters_takes_quantized_arrays_for_leaves():
  count = lambda params: sum(x.size for x in jax.tree.leaves(params, is_leaf=lpmm.is_quantized))
  assert count(PARAMS) == count(DENSE) == SIZE
  assert lpmm.memory_report(PARAMS, ()).parameters == SIZE


def test_a_norm_of_parameters_is_of_the_dequantized_and_costs_no_memory():
  norm = lambda params: optax.tree.norm(lpmm.dequantize(params))
  np.testing.assert_allclose(norm(PARAMS), optax.tree.norm(DENSE), rtol=1e-3)
  # A leaf in float32 has 4 MiB, all of them 32.
  assert temporaries(norm, large()) < 2**22


def test_a_histogram_is_taken_leaf_by_leaf():
  histogram = jax.jit(lambda leaf: jnp.histogram(lpmm.dequantize(leaf), bins=10)[0])
  assert int(jnp.sum(histogram(PARAMS['w']))) == 64 * 128


@pytest.mark.slow
def test_the_norm_of_an_update_is_of_a_difference_and_costs_no_memory():
  def norm(old, new):
    return optax.tree.norm(jax.tree.map(jnp.subtract, lpmm.dequantize(new), lpmm.dequantize(old)))

  state = TX.init(PARAMS)
  new, _ = STEP(DENSE, PARAMS, state)

  def norm_of_updates(params, state):
    updates, state = TX.update(DENSE, state, params)
    return optax.tree.norm(lpmm.dequantize(updates)), optax.apply_updates(params, updates)

  found, applied = jax.jit(norm_of_updates)(PARAMS, state)
  assert_same_bits(applied, new)
  np.testing.assert_allclose(found, norm(PARAMS, new), rtol=1e-6)
  # Adam's first step is the rate for every element with a gradient, up to rounding.
  np.testing.assert_allclose(norm(PARAMS, new), 0.01 * np.sqrt(SIZE), rtol=0.5)
  assert temporaries(norm, large(), large()) < 2**23
  updates, _ = TX.update(DENSE, state, PARAMS)
  with pytest.raises(TypeError, match=r'lpmm_optax\.step'):
    optax.tree.norm(updates)


def test_finite_is_what_a_norm_says():
  finite = lambda params: jnp.isfinite(optax.tree.norm(lpmm.dequantize(params)))
  assert bool(finite(PARAMS))
  assert not bool(finite(lpmm.quantize(DENSE | {'w': DENSE['w'].at[3, 5].set(jnp.nan)}, lpmm.INT8)))


@pytest.mark.parametrize('use_grad_mean', [True, *slow(False)])
def test_a_mean_of_gradients_is_that_of_the_microbatches_so_far(use_grad_mean):
  tx = lpmm.MultiSteps(lpmm.sgdm(0.1), 3, use_grad_mean)
  params, state = PARAMS, tx.init(PARAMS)
  for i in range(3):
    mean = tx.mean_gradients(state)
    # The mean of 0.5, 1.5 ... i - 0.5 times DENSE, within the grid step of a block that reaches three times four.
    jax.tree.map(lambda m, x, i=i: np.testing.assert_allclose(m, 0.5 * i * x, atol=3 * 4 / 126 * 3), mean, DENSE)
    params, state = lpmm.step(tx, jax.tree.map(lambda x, i=i: (i + 0.5) * x, DENSE), params, state)
  assert_same_bits(tx.mean_gradients(state), jax.tree.map(jnp.zeros_like, DENSE))
  into = lpmm.MultiSteps(lpmm.sgdm(0.1), 3, accumulator=lpmm.INTO_MOMENTUM)
  state = into.init(PARAMS)
  with pytest.raises(ValueError, match=r'no accumulator.*lpmm_optax\.chain\(optax\.snapshot'):
    into.mean_gradients(state)


@pytest.mark.parametrize('microbatches', [None, 2])
def test_a_snapshot_keeps_the_norm_of_what_the_optimizer_takes(microbatches):
  loss = lambda params, x: jnp.sum(x * lpmm.dequantize(params)['w']) / 8
  tx = lpmm.chain(optax.snapshot('norm', optax.tree.norm), lpmm.sgdm(0.01))
  tx = lpmm.MultiSteps(tx, microbatches) if microbatches else tx
  params = {'w': PARAMS['w']}
  state = tx.init(params)
  step = jax.jit(lpmm.value_and_step(loss, tx))
  for scale in (1.0, 1.5)[: microbatches or 1]:
    _, params, state = step(params, state, scale * DENSE['w'])
  norm = (1.25 if microbatches == 2 else 1.0) * optax.tree.norm(DENSE['w']) / 8
  np.testing.assert_allclose(optax.tree.get(state, 'norm'), norm, rtol=1e-2)


def test_a_penalty_is_of_what_the_loss_dequantizes():
  loss = lambda weights: 0.05 * sum(jnp.sum(w**2) for w in jax.tree.leaves(weights))
  value, grads = jax.value_and_grad(loss)(lpmm.dequantize(PARAMS))
  np.testing.assert_allclose(value, loss(DENSE), rtol=1e-3)
  np.testing.assert_allclose(grads['v'], 0.1 * DENSE['v'], rtol=1e-2)


def test_clamped_parameters_are_dequantized_and_quantized_anew():
  clamp = lambda params: lpmm.quantize(
    jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), lpmm.dequantize(params)), lpmm.INT8
  )
  assert float(jnp.max(jnp.abs(lpmm.dequantize(jax.jit(clamp)(PARAMS))['w']))) <= 0.51
  with jax.numpy_dtype_promotion('standard'), pytest.raises(TypeError, match=r': the codes .* have become float32'):
    lpmm.dequantize(jax.tree.map(lambda x: jnp.clip(x, -0.5, 0.5), PARAMS))


def test_a_dense_average_is_of_the_dequantized_and_costs_no_memory():
  advance = lambda average, params: optax.incremental_update(lpmm.dequantize(params), average, 0.1)
  np.testing.assert_allclose(advance(DENSE, PARAMS)['w'], DENSE['w'], atol=0.1 * 0.02)
  average = [jax.ShapeDtypeStruct((1024, 1024), jnp.float32)] * 8
  memory = jax.jit(advance, donate_argnums=0).lower(average, large()).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2**20
  with pytest.raises(ValueError, match=r'Averages .* take lpmm_optax\.dequantize\(params\)'):
    optax.incremental_update(PARAMS, DENSE, 0.1)


def test_lookahead_is_an_average_taken_every_few_steps():
  slow = lpmm.ema(0.5, lpmm.INT8)
  params, state, average = PARAMS, TX.init(PARAMS), slow.init(PARAMS)
  for _ in range(2):
    params, state = STEP(DENSE, params, state)
  average = slow.update(params, average)
  between = (lpmm.dequantize(params)['v'] + lpmm.dequantize(PARAMS)['v']) / 2
  # The fast parameters start anew from the slow ones, which are in their format.
  np.testing.assert_allclose(lpmm.dequantize(average.average)['v'], between, atol=0.5 / 126)
  assert jax.tree.structure(average.average) == jax.tree.structure(params)


def test_frozen_parameters_are_masked_out():
  tx = lpmm.masked(TX, {'w': False, 'v': True, 'b': True})
  params, _ = lpmm.step(tx, DENSE, PARAMS, tx.init(PARAMS))
  assert_same_bits(params['w'], PARAMS['w'])


def test_files_of_arrays_hold_codes_and_scales_by_name():
  flat = {
    jax.tree_util.keystr(path, simple=True, separator='/'): x
    for path, x in jax.tree_util.tree_flatten_with_path(PARAMS)[0]
  }
  assert set(flat) == {'w/int8', 'w/scales_of_64', 'v/int8', 'v/scales_of_64', 'b'}
  file = io.BytesIO()
  np.savez(file, **flat)
  file.seek(0)
  stored = np.load(file)
  again = jax.tree.unflatten(jax.tree.structure(PARAMS), [jnp.asarray(stored[name]) for name in flat])
  assert_same_bits(again, PARAMS)


def test_files_for_others_hold_the_dequantized():
  dense = jax.tree.map(np.asarray, lpmm.dequantize(PARAMS, jnp.bfloat16))
  assert {x.dtype for x in jax.tree.leaves(dense)} == {jnp.bfloat16.dtype}


def test_a_serving_function_and_a_step_are_exported():
  def restored(fn, *args):
    return export.deserialize(export.export(jax.jit(fn))(*args).serialize()).call(*args)

  serve = lambda params, x: x @ lpmm.dequantize(params)['w']
  np.testing.assert_array_equal(restored(serve, PARAMS, jnp.ones((2, 64))), jax.jit(serve)(PARAMS, jnp.ones((2, 64))))
  # Optax leaves it to whoever exports to name its states.
  export.register_namedtuple_serialization(optax.EmptyState, serialized_name='optax.EmptyState')
  tx = lpmm.MultiSteps(lpmm.chain(lpmm.clip_by_previous_norm(1.0), lpmm.sgdm(0.1)), 2)
  step = lambda g, p, s: lpmm.step(tx, g, p, s)
  args = DENSE, PARAMS, tx.init(PARAMS)
  assert_same_bits(restored(step, *args), jax.jit(step)(*args))


def test_trees_are_pickled_and_copied():
  state = TX.init(PARAMS)
  for again in (pickle.loads(pickle.dumps((PARAMS, state))), copy.deepcopy((PARAMS, state))):
    assert_same_bits(again, (PARAMS, state))


def test_an_optimizer_with_a_field_replaced_keeps_the_step_that_is_still_its_own():
  other_init = TX._replace(init=jax.jit(TX.init))
  assert_same_bits(
    lpmm.step(other_init, DENSE, PARAMS, other_init.init(PARAMS)), lpmm.step(TX, DENSE, PARAMS, TX.init(PARAMS))
  )
  # What is made of it does not lose the other `init`.
  marked = TX._replace(init=lambda params: TX.init(params)._replace(step=jnp.int32(5)))
  assert int(optax.tree.get(lpmm.chain(optax.clip(1.0), marked).init(PARAMS), 'step')) == 5
  with pytest.raises(ValueError, match='nothing around it'):
    lpmm.MultiSteps(lpmm.sgdm(0.1)._replace(init=lpmm.sgdm(0.1).init), 2, accumulator=lpmm.INTO_MOMENTUM)
  kept = TX._replace(update=lambda updates, state, params=None, **extra: (jax.tree.map(jnp.zeros_like, params), state))
  params, _ = lpmm.step(kept, DENSE, PARAMS, kept.init(PARAMS))
  assert_same_bits(params, PARAMS)


def test_steps_run_in_threads():
  found = [None] * 4

  def train(i):
    tx, params = lpmm.sgdm(0.1), PARAMS
    state = tx.init(params)
    for _ in range(2):
      params, state = lpmm.step(tx, DENSE, params, state)
    found[i] = params, state

  threads = [threading.Thread(target=train, args=(i,)) for i in range(len(found))]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for each in found[1:]:
    assert_same_bits(each, found[0])


def test_a_float32_checkpoint_is_compared_in_grid_steps():
  difference = jax.tree.map(jnp.subtract, lpmm.dequantize(PARAMS), DENSE)
  report = lpmm.underflow_report(PARAMS, difference)
  # Rounded to nearest, no element is more than half a step away.
  assert float(report['w'].below_half) > 0.999
