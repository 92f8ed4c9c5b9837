"""Steps inside of `jax.shard_map`, where every device has its own shard, or the same as all others."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from runs import slow

import lpmm_optax as lpmm

MAKE = {
  'sgdm': lambda **kw: lpmm.sgdm(0.1, **kw),
  'adamw': lambda **kw: lpmm.adamw(0.01, **kw),
  'accumulated': lambda **kw: lpmm.MultiSteps(lpmm.adamw(0.01, **kw), 2, **kw),
}


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.fixture
def mesh():
  return jax.make_mesh((4,), ('x',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


def by_rows(tree):
  return jax.tree.map(lambda x: P('x') if x.ndim == 2 else P(), tree)


def everywhere(tree):
  return jax.tree.map(lambda x: P(), tree)


def mapped(tx, mesh, params, state, spec, gradient_spec, reduce=False, **kwargs):
  def step(g, p, s):
    return lpmm.step(tx, jax.lax.pmean(g, 'x') if reduce else g, p, s)

  specs = spec(params), spec(state)
  return jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(gradient_spec, *specs), out_specs=specs, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'sgdm', 'accumulated'])
@pytest.mark.parametrize('is_quantized', [True, False])
def test_replicated_parameters_stay_replicated_with_the_bits_of_one_device(mesh, name, is_quantized):
  tx = MAKE[name]()
  w = normal(0, 64, 128)
  params = lpmm.quantize(w, lpmm.INT8) if is_quantized else w
  state = tx.init(params)
  g = normal(1, 64, 128)
  expected, _ = jax.jit(functools.partial(lpmm.step, tx))(g, params, state)
  new, _ = mapped(tx, mesh, params, state, everywhere, P(), reduce=False)(g, params, state)
  jax.tree.map(np.testing.assert_array_equal, new, expected)


def test_gradients_of_shards_are_reduced_in_the_map(mesh):
  tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(0.01))
  params = lpmm.quantize(normal(0, 64, 128), lpmm.INT8)
  state = tx.init(params)
  g = normal(1, 4 * 64, 128)
  new, _ = mapped(tx, mesh, params, state, everywhere, P('x'), reduce=True)(g, params, state)
  mean = g.reshape(4, 64, 128).mean(0)
  expected, _ = jax.jit(functools.partial(lpmm.step, tx))(mean, params, state)
  assert np.mean(np.asarray(new.codes != expected.codes)) < 1e-2  # Means over devices are rounded in another order.


@pytest.mark.parametrize('name', ['adamw', *slow('sgdm', 'accumulated')])
@pytest.mark.parametrize('is_quantized', [True, *slow(False)])
def test_shards_step_under_check_vma(mesh, name, is_quantized):
  tx = MAKE[name]()
  w = normal(0, 4 * 64, 128)
  params = lpmm.quantize(w, lpmm.INT8) if is_quantized else w
  state = tx.init(params)
  step = mapped(tx, mesh, params, state, by_rows, P('x'))
  new = params
  for i in range(2):
    new, state = step(normal(i, *w.shape), new, state)
  moved = np.asarray(lpmm.dequantize(new) - lpmm.dequantize(params))
  assert np.all(np.isfinite(moved))
  assert np.mean(moved != 0) > 0.5


@pytest.mark.parametrize(('checked', 'shard_axes'), [(True, ()), (False, 'x')])
def test_shards_round_independently(mesh, checked, shard_axes):
  tx = lpmm.adamw(1e-3, error_feedback=False, shard_axes=shard_axes)
  params = lpmm.quantize(jnp.tile(normal(0, 64, 128), (4, 1)), lpmm.INT8)
  state = tx.init(params)
  step = mapped(tx, mesh, params, state, by_rows, P('x'), check_vma=checked)
  new, _ = step(jnp.tile(normal(1, 64, 128), (4, 1)), params, state)
  shards = np.asarray(new.codes, np.int32).reshape(4, -1) - np.asarray(params.codes, np.int32).reshape(4, -1)
  assert np.std(shards) > 0.1
  correlation = np.corrcoef(shards)
  # What is wanted is the same everywhere, and so correlates; rounding a tenth of a step at random hides most of it.
  assert np.max(np.abs(correlation - np.eye(4))) < 0.5
  for i in range(1, 4):
    assert np.mean(shards[0] != shards[i]) > 0.05
