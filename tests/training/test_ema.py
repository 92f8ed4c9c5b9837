"""The average of quantized parameters, in low precision: its noise is that of the formula, its memory its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import slow

import lpmm_optax as lpmm

W = jax.random.normal(jax.random.key(0), (64, 128))


def moving(i):
  return lpmm.quantize(
    {'w': W + 0.1 * jax.random.normal(jax.random.key(1 + i), W.shape), 'b': jnp.ones(3) * i}, lpmm.INT8
  )


@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT16)], ids=str)
@pytest.mark.parametrize('decay', [0.95, lambda count: jnp.minimum(0.95, (1.0 + count) / (10.0 + count))])
def test_it_follows_the_average_in_float32_within_the_bound_on_its_noise(format, decay):
  average, params = lpmm.ema(decay, format), moving(0)
  update = jax.jit(average.update, donate_argnums=1)
  state, expected, distances = average.init(params), lpmm.dequantize(params), []
  for i in range(1, 100):
    params = moving(i)
    state, dense = update(params, state), lpmm.dequantize(params)
    d = decay(jnp.float32(i - 1)) if callable(decay) else decay
    distances.append(float(jnp.mean(jnp.abs(dense['w'] - expected['w']))))
    expected = jax.tree.map(lambda a, w, d=d: d * a + (1 - d) * w, expected, dense)
  error = lpmm.dequantize(state.average)['w'] - expected['w']
  # A block of 64 of these reaches 2.4 standard deviations; 8192 elements tell the variance to a few per cent.
  grid_step = 2.4 / (2 ** (format.bits - 1) - 1)
  variance = min(grid_step * np.mean(distances[-20:]) / 2, grid_step**2 / (4 * (1 - float(d) ** 2)))
  assert 0.5 * variance < float(jnp.mean(error**2)) < 1.1 * variance
  assert abs(float(jnp.mean(error))) < 5 * np.sqrt(variance / error.size)
  np.testing.assert_allclose(state.average['b'], expected['b'], rtol=1e-5)


def test_neither_parameters_nor_average_exist_dense():
  shapes = [jax.ShapeDtypeStruct((1024, 2048), jnp.float32)] * 4
  params = jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), shapes)
  average = lpmm.ema(0.999)
  state = jax.eval_shape(average.init, params)
  memory = jax.jit(average.update, donate_argnums=1).lower(params, state).compile().memory_analysis()
  assert memory.alias_size_in_bytes == memory.output_size_in_bytes - 8 * len(jax.tree.leaves(state))
  assert memory.temp_size_in_bytes < 4 * 1024 * 2048


def test_what_is_not_averaged_is_the_latest_and_bad_input_is_named():
  params = {'w': lpmm.quantize(W, lpmm.INT8), 'count': jnp.int32(1)}
  average = lpmm.ema(0.9)
  state = average.update(params | {'count': jnp.int32(2)}, average.init(params))
  assert int(state.average['count']) == 2
  with pytest.raises(ValueError, match='w: it is in the average, and no parameter'):
    average.update({'count': jnp.int32(1)}, state)
  with pytest.raises(ValueError, match='v: the average has no such parameter'):
    average.update(params | {'v': W}, state)
  for turned in (W.T, lpmm.quantize(W.T, lpmm.INT8)):
    with pytest.raises(ValueError, match=r'w: the parameter has shape \(128, 64\), its average \(64, 128\)'):
      average.update(params | {'w': turned}, state)
  with pytest.raises(TypeError, match='format must be a Format'):
    lpmm.ema(0.9, 16)
  with pytest.raises(ValueError, match='nonnegative'):
    lpmm.ema(0.9, lpmm.UINT8_SQRT)


def test_the_average_of_a_dense_leaf_in_half_precision_does_not_stop_moving():
  params, average = {'b': jnp.ones(64, jnp.bfloat16)}, lpmm.ema(0.999)

  @jax.jit
  def run(state):
    return jax.lax.fori_loop(0, 6000, lambda _, state: average.update(params, state), state)

  state = run(average.init({'b': jnp.zeros(64, jnp.bfloat16)}))
  np.testing.assert_allclose(state.average['b'], 1 - 0.999**6000, rtol=1e-4)


@pytest.mark.parametrize('decay', [0.5, *slow(0.9)])
def test_the_average_of_parameters_that_drift_lags_behind_as_in_float32(decay):
  tx, average = lpmm.low_precision(optax.sgd(1.0)), lpmm.ema(decay, lpmm.INT8)
  start = lpmm.quantize({'w': W.at[:, ::64].set(127 / 64)}, lpmm.INT8)  # Grid steps of a 64th in every block.
  drift = {'w': jnp.full_like(W, -0.3 / 64).at[:, ::64].set(0.0)}

  def body(_, carry):
    params, opt_state, state, exact = carry
    params, opt_state = lpmm.step(tx, drift, params, opt_state)
    exact = decay * exact + (1 - decay) * lpmm.dequantize(params)['w']
    return params, opt_state, average.update(params, state), exact

  carry = start, tx.init(start), average.init(start), lpmm.dequantize(start)['w']
  _, _, state, exact = jax.jit(lambda: jax.lax.fori_loop(0, 60, body, carry))()
  error = 64 * (lpmm.dequantize(state.average)['w'] - exact)
  assert abs(float(jnp.mean(error))) < 5 * float(jnp.std(error)) / np.sqrt(error.size)
