"""The kernel, interpreted on a CPU, gives the loop's bits wherever it runs; it is lowered for NVIDIA GPUs alone."""

import functools
import re

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest
from runs import slow

import lpmm_optax as lpmm
from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _driver
from lpmm_optax.kernel import _triton

OPTIMIZERS = {
  'sgdm': lambda **formats: lpmm.sgdm(0.1, weight_decay=0.01, **formats),
  'sgdm without feedback': lambda **formats: lpmm.sgdm(0.1, error_feedback=False, **formats),
  'adamw': lambda **formats: lpmm.adamw(0.01, **formats),
  'lion': lambda **formats: lpmm.lion(0.01, **formats),
  'rmsprop': lambda **formats: lpmm.low_precision(optax.rmsprop(0.01, momentum=0.9), **formats),
  'accumulation': lambda **formats: lpmm.MultiSteps(lpmm.adamw(0.01, **formats), 2, accumulator=lpmm.INT8),
}
SHAPE = (64, 128)


@pytest.fixture
def interpreted(monkeypatch):
  """Switches to the kernel from where it is called on, and sees that it is traced; the loop runs before."""
  monkeypatch.delenv('LPMM_KERNEL', raising=False)
  calls = []
  call = pl.pallas_call
  monkeypatch.setattr(pl, 'pallas_call', lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))

  def switch():
    jax.clear_caches()
    monkeypatch.setenv('LPMM_KERNEL', 'interpret')

  yield switch
  assert calls


def start(format=lpmm.INT8, shape=SHAPE):
  return lpmm.quantize({'w': jax.random.normal(jax.random.key(0), shape)}, format)


def gradient(step, shape=SHAPE):
  """Gradients; the second has blocks with NaN, with infinity, and of zeros."""
  g = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), shape) * 0.3
  if step == 1:
    flat = g.reshape(-1)
    g = flat.at[3].set(jnp.nan).at[300].set(-jnp.inf).at[512:768].set(0).at[800].set(1e-40).reshape(shape)
  return {'w': g}


def run(tx, params, route='step', steps=2, place=lambda x: x):
  state = jax.jit(tx.init)(params)

  @jax.jit
  def one(params, state, grads):
    if route == 'step':
      return lpmm.step(tx, grads, params, state)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  for i in range(steps):
    params, state = one(params, state, place(gradient(i, params['w'].shape)))
  return params, state


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def stacked(n):
  """Parameters and gradients of n models."""
  params = lpmm.quantize(jax.random.normal(jax.random.key(0), (n, *SHAPE)), lpmm.INT8)
  return params, jax.random.normal(jax.random.key(1), (n, *SHAPE))


CASES = [
  ('adamw', lpmm.INT8, (509, 64), 'update'),
  *slow(
    ('sgdm', lpmm.INT8, (256, 1024), 'step'),
    ('sgdm', lpmm.INT8, (509, 64), 'step'),
    ('sgdm', lpmm.BFLOAT16, (3, 3, 64, 64), 'update'),
    ('sgdm', lpmm.INT16, (131072,), 'step'),
    ('sgdm without feedback', lpmm.INT8, (509, 64), 'update'),
    ('adamw', lpmm.INT16, (3, 3, 64, 64), 'step'),
    ('adamw', lpmm.BFLOAT16, (131072,), 'step'),
    ('lion', lpmm.INT8, SHAPE, 'step'),
    ('rmsprop', lpmm.INT8, SHAPE, 'step'),
    ('accumulation', lpmm.INT16, SHAPE, 'step'),
    ('accumulation', lpmm.INT8, (509, 64), 'update'),
  ),
]


@pytest.mark.parametrize(('name', 'format', 'shape', 'route'), CASES, ids=str)
def test_the_kernel_gives_the_loops_bits(interpreted, name, format, shape, route):
  tx = OPTIMIZERS[name]()
  expected = run(tx, start(format, shape), route)
  interpreted()
  assert_same_bits(run(tx, start(format, shape), route), expected)


# Of 16 columns, the last, the shards are the loop's.
@pytest.mark.parametrize(
  ('spec', 'axis_type'),
  [
    (P('x', 'y'), AxisType.Auto),
    *slow(
      (P(('x', 'y'), None), AxisType.Auto),
      (P(), AxisType.Auto),
      (P('x', 'y'), AxisType.Explicit),
      (P(None, ('x', 'y')), AxisType.Auto),
    ),
  ],
  ids=str,
)
def test_every_sharding_gives_the_same_bits_without_communication(interpreted, spec, axis_type):
  tx = OPTIMIZERS['sgdm'](formats=lpmm.Format(block_size=16))
  params = start(lpmm.Format(block_size=16))
  expected = run(tx, params)
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
  interpreted()
  with jax.set_mesh(mesh):
    new, state = run(tx, place(params), place=place)
    step = jax.jit(functools.partial(lpmm.step, tx)).lower(place(gradient(0)), new, state).compile()
  assert_same_bits((new, state), expected)
  assert not re.search(r'all-gather|all-to-all|all-reduce|collective-permute', step.as_text())
  assert new['w'].codes.sharding.shard_shape(SHAPE) == NamedSharding(mesh, spec).shard_shape(SHAPE)


@pytest.mark.parametrize('is_mapped', [True, *slow(False)])
def test_shard_map_and_vmap_give_the_same_bits(interpreted, is_mapped):
  tx = OPTIMIZERS['sgdm']()
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  params, grads = stacked(4 if is_mapped else 2)

  state = jax.vmap(tx.init)(params)

  def run():
    def one(*args):
      return lpmm.step(tx, *args)

    def first(*args):
      return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], args)))

    shard = jax.vmap(one) if is_mapped else first
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=P('x'), out_specs=P('x'), check_vma=False)
    return jax.jit(sharded)(grads, params, state)

  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


@pytest.mark.slow
def test_gradients_accumulated_in_the_backward_pass_have_the_same_bits(interpreted):
  tx = lpmm.MultiSteps(lpmm.adamw(0.01), 2, accumulator=lpmm.INT8)
  params = lpmm.quantize({'w': jax.random.normal(jax.random.key(0), (3, 64, 64))}, lpmm.INT8)
  batch = jax.random.normal(jax.random.key(1), (8, 64))

  def loss(params, batch):
    layer = lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None)
    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), batch, params['w'])[0])

  def run():
    step = jax.jit(lambda *args: lpmm.value_and_step(loss, tx)(*args))
    _, new, state = step(params, tx.init(params), batch)
    return step(new, state, batch)

  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


@pytest.mark.slow
def test_what_is_vmapped_under_automatic_sharding_is_the_loop(interpreted):
  tx = OPTIMIZERS['sgdm']()
  run = lambda: jax.jit(jax.vmap(lambda grads, params: lpmm.step(tx, grads, params, tx.init(params))))(
    *stacked(2)[::-1]
  )
  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


@pytest.mark.parametrize(
  ('shape', 'blocks', 'tiles'),
  [
    ((256, 1024), [(1, 64), (1, 128)], [((1, 1024), (256, 1), (0, 0))]),
    ((50257, 768), [(1, 64)], [((4, 256), (12564, 3), (0, 0)), ((1, 256), (1, 3), (50256, 0))]),
    ((3, 3, 64, 64), [(3, 64)], [((1, 1, 16, 64), (3, 3, 4, 1), (0, 0, 0, 0))]),
    ((96, 64), [(0, 32)], [((32, 32), (3, 2), (0, 0))]),
    ((3, 5, 4, 32), [(0, 1)], [((1, 1, 4, 32), (3, 5, 1, 1), (0, 0, 0, 0))]),
    ((320, 48 * 64), [(0, 64), (1, 16)], [((64, 16), (5, 192), (0, 0))]),
    ((131072,), [(0, 64)], [((1024,), (128,), (0,))]),
  ],
)
def test_lots_cover_the_array_and_cut_no_block(shape, blocks, tiles):
  lots = _triton.choose_lots(shape, blocks, 1024)
  assert lots == tiles
  written = np.zeros(shape, int)
  for lot in lots:
    assert all(lot.tile[axis] % size == 0 for axis, size in blocks)
    begins = [np.multiply(n, f) for n, f in zip(lot.tile, lot.first, strict=True)]
    ends = [b + np.multiply(n, g) for b, n, g in zip(begins, lot.tile, lot.grid, strict=True)]
    written[tuple(map(slice, begins, ends))] += 1
  np.testing.assert_array_equal(written, 1)


def test_what_the_kernel_cannot_do_has_a_reason():
  reason = lambda shape, format: _triton.why_not([lpmm.quantize(jnp.ones(shape), format, where=lambda *_: format)])
  assert reason((64, 128), lpmm.INT8) is None
  assert reason((64, 128), lpmm.INT4) == 'arrays of int4'
  assert reason((64, 100), lpmm.INT8) == 'blocks of 50, no power of two'
  assert reason((64, 16), lpmm.BFLOAT16) == 'the last axis, of 16, is no multiple of 32'
  assert reason((64, 2**14), lpmm.Format(block_size=2**14)) == 'blocks of more than 8192 elements'
  large = jax.eval_shape(lambda: start(shape=(2**16, 2**16)))['w']
  assert _triton.why_not([large]) == _body.TOO_LARGE
  assert _triton.why_not([large], (2**13, 2**16)) is None


def test_the_switch_is_an_environment_variable(monkeypatch):
  monkeypatch.delenv('LPMM_KERNEL', raising=False)
  assert _driver.chosen() is _driver.Driver.LOOP  # There is no GPU here.
  monkeypatch.setenv('LPMM_KERNEL', '1')
  assert _driver.chosen() is _driver.Driver.KERNEL
  monkeypatch.setenv('LPMM_KERNEL', 'yes')
  with pytest.raises(ValueError, match="LPMM_KERNEL='yes' must be '0', '1' or 'interpret'"):
    _driver.chosen()


def on_an_h100():
  """A context with a mesh of one GPU, 'x', that there is not; JAX asks which one Triton is for."""
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')
@pytest.mark.parametrize(
  ('name', 'format', 'shape'),
  [
    ('accumulation', lpmm.INT8, (509, 64)),
    *slow(
      ('sgdm', lpmm.INT16, (3, 3, 64, 64)),
      ('lion', lpmm.BFLOAT16, (131072,)),
      ('rmsprop', lpmm.INT8, SHAPE),
      ('sgdm without feedback', lpmm.INT8, SHAPE),
    ),
  ],
  ids=str,
)
def test_the_platform_that_is_lowered_for_decides(monkeypatch, name, format, shape):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  tx, params = OPTIMIZERS[name](), start(format, shape)
  args = gradient(0, shape), params, tx.init(params)
  with on_an_h100():
    traced = jax.jit(functools.partial(lpmm.step, tx)).trace(*args)
    kernels = lambda platform: traced.lower(lowering_platforms=(platform,)).as_text().count('xla.gpu.triton')
    assert kernels('cuda') > 0
    assert kernels('cpu') == kernels('rocm') == kernels('tpu') == 0


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')
@pytest.mark.parametrize('is_sharded', [True, *slow(False)])
def test_the_kernel_knows_along_which_manual_axes_arrays_vary(monkeypatch, is_sharded):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  tx, params = OPTIMIZERS['sgdm'](), start()
  args = gradient(0), params, tx.init(params)
  whole, rows = P(), P('x') if is_sharded else P()
  specs = (rows, rows, optax.tree.map_params(tx, lambda _: rows, tx.init(params), transform_non_params=lambda _: whole))
  with on_an_h100():
    step = functools.partial(lpmm.step, tx)
    # An interpreter would see the types, and does not know how to cast what meets; Triton does not see them.
    sharded = jax.shard_map(step, in_specs=specs, out_specs=specs[1:], check_vma=True)
    assert 'xla.gpu.triton' in jax.jit(sharded).trace(*args).lower(lowering_platforms=('cuda',)).as_text()
