"""The kernel for NVIDIA GPUs, interpreted on a CPU, gives the loop's bits in every shape; none other lowers it."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest
from runs import slow
import updates

import lpmm_optax as lpmm
from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _triton

INTERPRETED = 'interpret'

CASES = [
  ('adamw', lpmm.INT8, (509, 64), 'update'),
  *slow(
    ('adamw, int4', lpmm.INT8, (509, 64), 'step'),
    ('sgdm', lpmm.INT4, (509, 64), 'step'),
    ('sgdm without feedback', lpmm.INT4, (3, 3, 64, 64), 'update'),
    ('sgdm', lpmm.INT8, (256, 1024), 'step'),
    ('sgdm', lpmm.INT8, (509, 64), 'step'),
    ('sgdm', lpmm.BFLOAT16, (3, 3, 64, 64), 'update'),
    ('sgdm', lpmm.INT16, (131072,), 'step'),
    ('adamw', lpmm.INT16, (9, 61, 64), 'step'),
    ('sgdm without feedback', lpmm.INT8, (509, 64), 'update'),
    ('adamw', lpmm.INT16, (3, 3, 64, 64), 'step'),
    ('adamw', lpmm.BFLOAT16, (131072,), 'step'),
    ('lion', lpmm.INT8, updates.SHAPE, 'step'),
    ('rmsprop', lpmm.INT8, updates.SHAPE, 'step'),
    ('accumulation', lpmm.INT16, updates.SHAPE, 'step'),
    ('accumulation', lpmm.INT8, (509, 64), 'update'),
  ),
]


@pytest.mark.parametrize(('name', 'format', 'shape', 'route'), CASES, ids=str)
def test_the_kernel_gives_the_loops_bits(interpreted, name, format, shape, route):
  updates.check_bits(interpreted, name, format, shape, route)


@pytest.mark.parametrize(
  ('size', 'tile', 'lots'),
  [
    (256 * 1024, 1024, [(1024, 0, 256)]),
    (50257 * 768, 1024, [(1024, 0, 37692), (256, 150768, 3)]),
    (509 * 64, 1024, [(1024, 0, 31), (64, 496, 13)]),
    (7 * 3, 1024, [(1, 0, 21)]),
    (96, 64, [(64, 0, 1), (32, 2, 1)]),
  ],
)
def test_lots_cover_the_array_with_tiles_of_powers_of_two(size, tile, lots):
  assert _triton.choose_lots(size, tile) == lots
  written = np.zeros(size, int)
  for lot in _triton.choose_lots(size, tile):
    written[lot.tile * lot.first : lot.tile * (lot.first + lot.tiles)] += 1
  np.testing.assert_array_equal(written, 1)


def test_what_the_kernel_cannot_do_has_a_reason():
  reason = lambda shape, format: _triton.why_not([lpmm.quantize(jnp.ones(shape), format, where=lambda *_: format)])
  assert reason((64, 128), lpmm.INT8) is None
  assert reason((64, 128), lpmm.INT4) is None
  assert reason((63, 1), lpmm.Format(bits=4, block_size=1)) == 'an odd number of 4-bit codes'
  assert reason((64, 100), lpmm.INT8) == 'blocks of 50, no power of two'
  assert reason((64, 3), lpmm.BFLOAT16) is None
  assert reason((128, 3), lpmm.INT8) == 'blocks along another axis than the last'
  assert reason((64, 2**14), lpmm.Format(block_size=2**14)) == 'blocks of more than 8192 elements'
  large = jax.eval_shape(lambda: updates.start(shape=(2**16, 2**16)))['w']
  assert _triton.why_not([large]) == _body.TOO_LARGE
  assert _triton.why_not([large], (2**13, 2**16)) is None


def on_an_h100():
  """A context with a mesh of one GPU, 'x', that there is not; JAX asks which one Triton is for."""
  device = jax.sharding.AbstractDevice('NVIDIA H100 80GB HBM3', None, 'gpu')
  mesh = jax.sharding.AbstractMesh((1,), ('x',), (AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')
@pytest.mark.parametrize(
  ('name', 'format', 'shape'),
  [
    ('lion', lpmm.BFLOAT16, (131072,)),
    *slow(
      ('accumulation', lpmm.INT8, (509, 64)),
      ('adamw, int4', lpmm.INT8, (509, 64)),
      ('sgdm', lpmm.INT16, (3, 3, 64, 64)),
      ('rmsprop', lpmm.INT8, updates.SHAPE),
      ('sgdm without feedback', lpmm.INT8, updates.SHAPE),
    ),
  ],
  ids=str,
)
def test_the_platform_that_is_lowered_for_decides(monkeypatch, name, format, shape):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  with on_an_h100():
    lowered = updates.lower_for(name, format, shape, ('cuda', 'cpu', 'rocm', 'tpu'))
  assert [platform for platform, text in lowered.items() if 'xla.gpu.triton' in text] == ['cuda']
  # A product that LLVM knows of may become one operation with a sum.
  assert 'mul.rn.f32' in lowered['cuda']
  assert 'mulf' not in lowered['cuda']
  # Of a float to an integer JAX makes five operations.
  assert 'cvt.rni.s32.f32' in lowered['cuda']
  assert 'fptosi' not in lowered['cuda']


@pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated:DeprecationWarning')
@pytest.mark.parametrize('is_sharded', [True, *slow(False)])
def test_the_kernel_knows_along_which_manual_axes_arrays_vary(monkeypatch, is_sharded):
  monkeypatch.setenv('LPMM_KERNEL', '1')
  with on_an_h100():
    # An interpreter would see the types, and does not know how to cast what meets; Triton does not see them.
    step, args = updates.step_in_shard_map(is_sharded)
    assert 'xla.gpu.triton' in step.trace(*args).lower(lowering_platforms=('cuda',)).as_text()
