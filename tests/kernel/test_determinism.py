"""The same bits whatever the route, the tile size, the mesh, and the number of devices."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from runs import assert_same_bits
from runs import slow
from runs import step_by

import lpmm_optax as lpmm
from lpmm_optax.trace import _program

SHAPE = (256, 1024)


def start(format=lpmm.INT8, shape=SHAPE):
  return lpmm.quantize({'w': jax.random.normal(jax.random.key(0), shape), 'b': jnp.ones(8)}, format)


def gradient(i, shape=SHAPE):
  key = jax.random.fold_in(jax.random.key(1), i)
  return {'w': jax.random.normal(key, shape) * 0.3, 'b': jnp.full(8, 0.1)}


def run(tx, params, steps=4, route='step', place=lambda x: x, shape=SHAPE):
  state = jax.jit(tx.init)(params)

  one = jax.jit(step_by(tx, route))

  for i in range(steps):
    params, state = one(place(gradient(i, shape)), params, state)
  return params, state


OPTIMIZERS = {
  'sgdm': functools.partial(lpmm.sgdm, 0.1, weight_decay=0.01),
  'sgdm without feedback': functools.partial(lpmm.sgdm, 0.1, weight_decay=0.01, error_feedback=False),
  'adamw': functools.partial(lpmm.adamw, 0.01),
  'adamw, int4': functools.partial(lpmm.adamw, 0.01, formats=lpmm.INT4),
  'lion': functools.partial(lpmm.lion, 0.01),
}


@pytest.mark.parametrize(
  ('name', 'format'),
  [
    ('adamw', lpmm.INT8),
    *slow(('sgdm', lpmm.INT8)),
    *slow(*(('sgdm', format) for format in (lpmm.INT4, lpmm.INT16, lpmm.BFLOAT16))),
    *slow(('sgdm without feedback', lpmm.INT8), ('lion', lpmm.INT8), ('adamw, int4', lpmm.INT8)),
  ],
  ids=str,
)
def test_step_equals_update_and_apply_updates(name, format):
  tx = OPTIMIZERS[name](tile_size=2**14)
  assert_same_bits(run(tx, start(format), route='step'), run(tx, start(format), route='update'))


SHAPES = [SHAPE, (131072,), (8, 127, 192), (320, 100), (509, 64), (64, 509)]


@pytest.mark.parametrize(
  ('name', 'shape'),
  [('adamw', SHAPE), *slow(('adamw, int4', SHAPE), *(('sgdm', shape) for shape in (*SHAPES, (3, 3, 64, 96))))],
  ids=str,
)
def test_no_result_depends_on_the_tile_size(name, shape):
  make = OPTIMIZERS[name]
  whole = run(make(tile_size=2**30), start(shape=shape), shape=shape)
  for tile_size in (1, 10000):
    assert_same_bits(run(make(tile_size=tile_size), start(shape=shape), shape=shape), whole)


MESHES = {'8x1': (8, 1), '4x2': (4, 2), '1x2': (1, 2), '2x2': (2, 2), '4x1': (4, 1)}
SPECS = [P('x', None), P(None, 'x'), P(('x', 'y'), None), P(None, ('x', 'y')), P()]


@functools.cache
def on_one_device(name):
  return run(OPTIMIZERS[name](tile_size=2**14), start())


CASES = [('sgdm', '4x2', P('x', 'y'))]
CASES += slow(*(('sgdm', '4x2', spec) for spec in SPECS))
CASES += slow(('sgdm', '1x2', P(None, 'y')), ('sgdm', '2x2', P('x', 'y')), ('sgdm', '8x1', P('x', None)))
CASES += slow(('adamw', '4x2', P('x', 'y')), ('adamw', '4x1', P('x', None)), ('adamw, int4', '4x2', P('x', 'y')))


@pytest.mark.parametrize(('name', 'mesh', 'spec'), CASES, ids=str)
@pytest.mark.parametrize('axis_type', [AxisType.Auto, *slow(AxisType.Explicit)], ids=lambda t: t.name)
def test_every_sharding_gives_the_same_bits_without_communication(name, mesh, spec, axis_type):
  sizes = MESHES[mesh]
  devices = jax.devices()[: sizes[0] * sizes[1]]
  mesh = jax.make_mesh(sizes, ('x', 'y'), axis_types=(axis_type,) * 2, devices=devices)
  replicated = NamedSharding(mesh, P())
  place = lambda tree: {
    'w': jax.device_put(tree['w'], NamedSharding(mesh, spec)),
    'b': jax.device_put(tree['b'], replicated),
  }
  tx = OPTIMIZERS[name](tile_size=2**14)
  with jax.set_mesh(mesh):
    params = place(start())
    fresh = jax.jit(tx.init)(params)
    new, state = run(tx, params, place=place)
    compiled = jax.jit(functools.partial(lpmm.step, tx)).lower(place(gradient(0)), params, state).compile().as_text()
  assert_same_bits((new, state), on_one_device(name))
  assert not re.search(r'all-gather|all-to-all|all-reduce|collective-permute', compiled)
  assert re.search(r'while\(', compiled)
  field = 'trace' if name == 'sgdm' else 'mu'
  codes = {'params': new['w'].codes} | {
    name: optax.tree.get(x, field)['w'].codes for name, x in (('state', state), ('first state', fresh))
  }
  shard = NamedSharding(mesh, spec).shard_shape(SHAPE)
  assert {name: x.addressable_shards[0].data.shape for name, x in codes.items()} == dict.fromkeys(codes, shard)


REDUCING = {
  'clipped adamw': lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01)),
  'lamb': lambda: optax.lamb(0.01),
  'muon': lambda: optax.contrib.muon(0.01),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'axis_type'),
  [
    ('clipped adamw', AxisType.Auto),
    ('clipped adamw', AxisType.Explicit),
    ('lamb', AxisType.Auto),
    ('muon', AxisType.Explicit),
  ],
  ids=lambda x: getattr(x, 'name', x),
)
def test_updates_that_reduce_over_shards_agree_with_one_device(name, axis_type):
  shape = (64, 512)
  tx = lpmm.low_precision(REDUCING[name](), tile_size=2**12)
  with jax.numpy_dtype_promotion('standard'):
    expected, _ = run(tx, start(shape=shape), steps=2, shape=shape)
    mesh = jax.make_mesh((8,), ('x',), axis_types=(axis_type,))
    for spec in (P('x', None), P(None, 'x')):
      shardings = {'w': NamedSharding(mesh, spec), 'b': NamedSharding(mesh, P())}
      place = lambda tree, shardings=shardings: {name: jax.device_put(x, shardings[name]) for name, x in tree.items()}
      with jax.set_mesh(mesh):
        new, _ = run(tx, place(start(shape=shape)), steps=2, place=place, shape=shape)
      assert new['w'].codes.sharding.shard_shape(shape) == shardings['w'].shard_shape(shape)
      # A sum over shards is rounded in another order, which now and then turns a stochastic rounding.
      assert np.mean(np.asarray(new['w'].codes) != np.asarray(expected['w'].codes)) < 1e-3


def test_quantize_follows_the_sharding_of_an_explicit_mesh():
  mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Explicit,))
  x = jax.random.normal(jax.random.key(0), SHAPE)
  sharded = jax.device_put(x, NamedSharding(mesh, P('x', None)))
  key = jax.random.key(1)
  q = lpmm.quantize(sharded, lpmm.INT8, key=key)
  assert q.sharding.spec == q.scales.sharding.spec == P('x', None)
  assert_same_bits(q, lpmm.quantize(x, lpmm.INT8, key=key))
  np.testing.assert_array_equal(
    np.asarray(lpmm.dequantize(q)), np.asarray(lpmm.dequantize(lpmm.quantize(x, lpmm.INT8, key=key)))
  )


@pytest.mark.parametrize('product', [lambda a, b: a * b, lambda a, _: jnp.square(a), lambda a, _: a**2])
def test_uncontracted_products_are_rounded_and_others_are_not(product):
  a, b, c = (jax.random.normal(jax.random.key(i), (4096,)) for i in range(3))
  fused = lambda a, b, c: product(a, b) + c
  guarded = lambda count, *args: _program.uncontracted(fused, _program.runtime_zero(_program.hidden(count)))(*args)
  rounded_twice = np.asarray(product(a, b)) + np.asarray(c)
  np.testing.assert_array_equal(jax.jit(guarded)(jnp.int32(3), a, b, c), rounded_twice)
  # The reason for the guard: without it this compiler contracts.
  assert np.any(jax.jit(fused)(a, b, c) != rounded_twice)


def test_a_run_can_be_cut_anywhere():
  tx = lpmm.sgdm(0.1)
  whole = run(tx, start(), steps=4)
  params, state = run(tx, start(), steps=2)
  params, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, state))
  for i in (2, 3):
    params, state = lpmm.step(tx, gradient(i), params, state)
  assert_same_bits((params, state), whole)


def test_different_keys_give_different_runs_of_the_same_quality():
  a, _ = run(lpmm.sgdm(0.1, key=jax.random.key(1)), start())
  b, _ = run(lpmm.sgdm(0.1, key=jax.random.key(2)), start())
  assert np.mean(np.asarray(a['w'].codes != b['w'].codes)) > 0.1
  difference = lpmm.dequantize(a)['w'] - lpmm.dequantize(b)['w']
  assert float(jnp.max(jnp.abs(difference))) < 0.2


@pytest.mark.parametrize('route', ['step', *slow('update')])
def test_the_step_exports_for_every_platform_with_the_same_bits(route):
  tx = lpmm.sgdm(lambda count: 0.1 / (1 + count.astype(jnp.float32)), weight_decay=1e-4, tile_size=2**16)
  params = start(shape=(512, 512))
  leaves, treedef = jax.tree.flatten((params, tx.init(params)))

  # Leaves, since export knows dicts, lists and tuples alone.
  @jax.jit
  def train_step(leaves, x):
    params, state = jax.tree.unflatten(treedef, leaves)
    loss = lambda dense: jnp.mean((x @ dense['w']) ** 2) + jnp.sum(dense['b'] ** 2)
    grads = jax.grad(loss)(lpmm.dequantize(params))
    if route == 'step':
      return jax.tree.leaves(lpmm.step(tx, grads, params, state))
    updates, state = tx.update(grads, state, params)
    return jax.tree.leaves((optax.apply_updates(params, updates), state))

  x = jax.random.normal(jax.random.key(5), (16, 512))
  exported = jax.export.export(train_step, platforms=['cpu', 'cuda', 'rocm', 'tpu'])(leaves, x)
  assert exported.platforms == ('cpu', 'cuda', 'rocm', 'tpu')
  loaded = jax.jit(jax.export.deserialize(exported.serialize()).call)
  for _ in range(2):
    expected = train_step(leaves, x)
    jax.tree.map(np.testing.assert_array_equal, loaded(leaves, x), expected)
    leaves = expected
