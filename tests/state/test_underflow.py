"""`underflow_report` against what rounding to nearest does."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
from runs import slow

import lpmm_optax as lpmm

SHAPE = (64, 256)
DENSE = {'w': jax.random.normal(jax.random.key(0), SHAPE), 'b': jnp.ones(3)}


def updates(scale):
  u = scale * jax.random.normal(jax.random.key(1), SHAPE)
  return {'w': jnp.where(jax.random.uniform(jax.random.key(2), SHAPE) < 0.8, u, 0.0), 'b': jnp.ones(3)}


FORMATS = [lpmm.Format(bits=8, rounding='nearest'), lpmm.Format(bits=4, rounding='nearest'), lpmm.BFLOAT16]


@pytest.mark.parametrize('format', FORMATS[:2], ids=str)
@pytest.mark.parametrize('scale', [0.1, *slow(1e-3, 0.01)])
def test_what_is_below_half_a_step_is_what_rounding_to_nearest_loses(format, scale):
  params, wanted = lpmm.quantize(DENSE, format), updates(scale)
  report = lpmm.underflow_report(params, wanted)
  assert list(report) == ['w']
  # A step of plain SGD. Blocks whose largest element grows or shrinks take a new scale, so all their codes change.
  tx = lpmm.sgdm(1.0, None)
  new, _ = lpmm.step(tx, jax.tree.map(jnp.negative, wanted), params, tx.init(params))
  same_grid = np.repeat(np.asarray(new['w'].scales == params['w'].scales), SHAPE[1] // new['w'].scales.shape[1], axis=1)
  assert np.mean(same_grid) > 0.1
  u = np.asarray(wanted['w'])
  lost = np.asarray(new['w'].codes == params['w'].codes)[same_grid & (u != 0)]
  u = np.abs(u)[same_grid & (u != 0)]
  # Of all blocks here, and there of those on the same grid.
  assert float(report['w'].below_half) == pytest.approx(np.mean(lost), abs=0.02)
  assert float(report['w'].lost) == pytest.approx(np.sum(u[lost]) / np.sum(u), abs=0.02)


@pytest.mark.parametrize('format', FORMATS, ids=str)
def test_figures_are_those_of_the_grid_step_of_every_element(format):
  params, wanted = lpmm.quantize(DENSE, format), updates(0.01)
  report = jax.jit(lpmm.underflow_report)(params, wanted)['w']
  values, u = np.asarray(lpmm.dequantize(params)['w'], np.float64), np.abs(np.asarray(wanted['w'], np.float64))
  if format == lpmm.BFLOAT16:
    step = 2.0 ** (np.floor(np.log2(np.abs(values))) - 7)
  else:
    # The largest code of a block stands for its largest value.
    blocks = np.abs(values).reshape(64, 4, 64).max(-1)
    codes = np.abs(np.asarray(params['w'].codes, int)).reshape(64, 4, 64).max(-1)
    step = np.repeat(blocks / codes, 64, axis=1)
  lost = (u > 0) & (u < step / 2)
  expected = (lost.sum() / (u > 0).sum(), np.sqrt(np.mean((u / step) ** 2)), u[lost].sum() / u.sum())
  np.testing.assert_allclose(report, expected, rtol=1e-5)


def test_an_update_of_zero_loses_nothing():
  report = lpmm.underflow_report(lpmm.quantize(DENSE, lpmm.INT8), jax.tree.map(jnp.zeros_like, DENSE))
  assert tuple(map(float, report['w'])) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_sharded_parameters_give_the_same_figures(axis_type):
  params, wanted = lpmm.quantize(DENSE, lpmm.INT8), updates(0.01)
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  place = lambda tree: {'w': jax.device_put(tree['w'], NamedSharding(mesh, P('x', 'y')))}
  report = jax.jit(lpmm.underflow_report)(place(params), place(wanted))
  np.testing.assert_allclose(report['w'], lpmm.underflow_report(params, wanted)['w'], rtol=1e-5)


def test_it_takes_little_memory_of_its_own():
  shape = (4096, 4096)
  params = jax.eval_shape(lambda: lpmm.quantize({'w': jnp.ones(shape)}, lpmm.INT8))
  compiled = jax.jit(lpmm.underflow_report).lower(params, {'w': jax.ShapeDtypeStruct(shape, jnp.float32)}).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * 4 * shape[0] * shape[1]


@pytest.mark.parametrize(
  ('wanted', 'error', 'message'),
  [
    ({'w': DENSE['w']}, ValueError, 'a tree like the parameters'),
    (
      DENSE | {'w': jnp.ones((64, 128))},
      ValueError,
      r'^w: the parameter has shape \(64, 256\), its update \(64, 128\)',
    ),
    (lpmm.quantize(DENSE, lpmm.INT8), TypeError, '^w: .* before rounding'),
  ],
  ids=['another tree', 'another shape', 'quantized'],
)
def test_what_does_not_fit_is_named(wanted, error, message):
  with pytest.raises(error, match=message):
    lpmm.underflow_report(lpmm.quantize(DENSE, lpmm.INT8), wanted)
