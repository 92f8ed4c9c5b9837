"""The kernel for TPUs, interpreted on a CPU, gives the loop's bits in every shape; none other lowers it."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest
from runs import slow
import updates

import lpmm_optax as lpmm
from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _tpu

INTERPRETED = 'interpret_tpu'


# Rows and columns that are no whole vectors, tiles or blocks, with scales turned and not; blocks along either axis, of
# powers of two and not; several tiles and blocks along each axis, and several matrices in one.
@pytest.mark.parametrize(
  ('name', 'format', 'shape', 'route'),
  [
    ('lion', lpmm.INT8, (40, 12, 64), 'step'),
    *slow(
      ('adamw', lpmm.INT8, (509, 64), 'update'),
      ('sgdm', lpmm.INT8, updates.SHAPE, 'step'),
      ('sgdm', lpmm.INT8, (256, 1024), 'step'),
      ('sgdm', lpmm.INT8, (300, 6400), 'step'),
      ('sgdm', lpmm.INT8, (40, 6400), 'update'),
      ('sgdm', lpmm.INT8, (50, 1000), 'step'),
      ('sgdm', lpmm.INT8, (7, 7, 3, 64), 'update'),
      ('sgdm', lpmm.INT16, (4, 64, 256), 'step'),
      ('sgdm', lpmm.BFLOAT16, (3, 3, 64, 64), 'update'),
      ('sgdm without feedback', lpmm.INT8, (509, 64), 'update'),
      ('adamw', lpmm.INT16, (512, 512), 'step'),
      ('adamw', lpmm.INT8, (768, 1301), 'step'),
      ('adamw', lpmm.BFLOAT16, (130, 200), 'step'),
      ('rmsprop', lpmm.INT8, updates.SHAPE, 'step'),
      ('accumulation', lpmm.INT16, updates.SHAPE, 'step'),
      ('accumulation', lpmm.INT8, (509, 64), 'update'),
    ),
  ],
  ids=str,
)
def test_the_kernel_gives_the_loops_bits(interpreted, name, format, shape, route):
  updates.check_bits(interpreted, name, format, shape, route)


@pytest.mark.parametrize(
  ('shape', 'blocks', 'block', 'tile', 'turns'),
  [
    ((2048, 2048), [(1, 64), (1, 128)], (128, 2048), (32, 2048), True),
    ((50257, 768), [(1, 64), (1, 128)], (256, 768), (32, 768), True),
    ((768, 50257), [(0, 64), (0, 128)], (768, 512), (128, 512), False),
    ((32, 4096, 14336), [(2, 64), (2, 128)], (1, 128, 4096), (1, 32, 2048), True),
    ((100, 16384), [(1, 64), (1, 128)], (32, 16384), (32, 2048), False),
    ((3, 3, 512, 512), [(3, 64)], (1, 1, 512, 512), (1, 1, 32, 512), True),
    ((768, 12, 64), [(2, 64)], (128, 12, 64), (32, 12, 64), False),
    ((7, 7, 3, 64), [(3, 64)], (1, 4, 3, 64), (1, 4, 3, 64), False),
    ((2048, 1000), [(1, 50), (1, 125)], (256, 1000), (32, 1000), True),
    ((4096, 11008), [(1, 64), (1, 128)], (128, 5120), (32, 1280), True),
    ((768, 1301), [(0, 64), (0, 128)], (768, 512), (128, 512), False),
    ((64, 4096), [(1, 8)], (64, 4096), (32, 1024), False),
  ],
)
def test_blocks_and_tiles_cut_no_block_of_scales(shape, blocks, block, tile, turns):
  plan = _tpu.choose_plan(shape, blocks)
  assert plan == (block, tile, turns)
  assert all(b % t == 0 for b, t in zip(block, tile, strict=True))
  assert all(tile[axis] % size == 0 for axis, size in blocks)


def test_what_the_kernel_cannot_do_has_a_reason():
  def reason(shape, format):
    leaf = jax.eval_shape(lambda: lpmm.quantize(jnp.ones(shape), format, where=lambda *_: format))
    return _tpu.why_not([leaf])

  assert reason((64, 128), lpmm.INT8) is None
  assert reason((64, 100), lpmm.INT8) is None
  assert reason((64, 128), lpmm.INT4) == 'arrays of int4'
  assert reason((131072,), lpmm.INT8) == 'one axis alone'
  assert reason((64, 3, 5), lpmm.INT8) == 'blocks along a leading axis'
  assert reason((100, 7), lpmm.INT8) == 'blocks of 50 rows, no multiple of 8'
  reason_of_5000 = 'no small tile of rows of 5000 has whole blocks and vectors'
  assert reason((64, 5000), lpmm.Format(block_size=50)) == reason_of_5000
  large = jax.eval_shape(lambda: updates.start(shape=(2**16, 2**16)))['w']
  assert _tpu.why_not([large]) == _body.TOO_LARGE
  assert _tpu.why_not([large], (2**13, 2**16)) is None
  assert _tpu.why_not([large], (2**13, 2**5)) == 'a shard cuts blocks'


def on_a_v5e():
  """A context with a mesh of one TPU, 'x', that there is not."""
  device = jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
  ('name', 'format', 'shape'),
  [
    ('sgdm', lpmm.INT8, (509, 64)),
    *slow(
      ('adamw', lpmm.INT16, (3, 3, 64, 64)),
      ('lion', lpmm.BFLOAT16, (130, 200)),
      ('rmsprop', lpmm.INT8, updates.SHAPE),
      ('accumulation', lpmm.INT8, (768, 11)),
      ('sgdm without feedback', lpmm.INT8, (50, 1000)),
    ),
  ],
  ids=str,
)
def test_the_platform_that_is_lowered_for_decides(monkeypatch, name, format, shape):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  monkeypatch.setattr(jax, 'device_count', lambda: 1)
  with on_a_v5e():
    lowered = updates.lower_for(name, format, shape, ('tpu', 'cpu', 'rocm'))
  assert [platform for platform, text in lowered.items() if 'tpu_custom_call' in text] == ['tpu']


@pytest.mark.parametrize(('axis_type', 'is_kernel'), [(AxisType.Auto, False), *slow((AxisType.Explicit, True))])
def test_of_several_tpus_types_must_say_how_arrays_are_split(monkeypatch, axis_type, is_kernel):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, P('x', 'y')))
  with jax.set_mesh(mesh):
    lowered = updates.lower_for('sgdm', lpmm.Format(block_size=16), (64, 512), ['tpu'], place)
  assert ('tpu_custom_call' in lowered['tpu']) == is_kernel


@pytest.mark.parametrize('is_sharded', slow(True, False))
def test_the_kernel_knows_along_which_manual_axes_arrays_vary(monkeypatch, is_sharded):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  with on_a_v5e():
    step, args = updates.step_in_shard_map(is_sharded)
    assert 'tpu_custom_call' in step.trace(*args).lower(lowering_platforms=('tpu',)).as_text()
