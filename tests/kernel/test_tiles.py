"""Tiles: as small as asked, and all of an array between them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpmm_optax as lpmm
from lpmm_optax.kernel import _tiles


@pytest.mark.parametrize('make', [lpmm.sgdm, lambda *a, **kw: lpmm.MultiSteps(lpmm.sgdm(*a), 2, **kw)])
def test_a_tile_has_an_element_at_least(make):
  with pytest.raises(ValueError, match='tile_size must be at least 1'):
    make(0.1, tile_size=0)


def test_tiles_are_as_small_as_asked_and_cover_the_array():
  (tiling,) = _tiles.choose_tilings((4096, 4096), [(1, 64), (1, 128)], 2**18)
  assert (tiling.axis, tiling.groups * tiling.steps, tiling.groups) == (0, 8 * 64, 8)
  assert tiling.tile_shape == (64, 4096)
  (tiling,) = _tiles.choose_tilings((24, 6), [], 36)
  assert tiling.steps == 3  # 24 = 8 groups (one per device) of 3; the smallest tiles there are have 8 rows.


@pytest.mark.parametrize(
  ('shape', 'blocks', 'tile_size', 'lots'),
  [
    ((24, 6), [], 36, [(3, (8, 6))]),
    ((50257, 12), [(1, 4)], 2**14, [(37, (1358, 12)), (1, (11, 12))]),
    ((12, 50257), [(0, 4)], 2**14, [(37, (12, 1358)), (1, (12, 11))]),
    ((8 * 101, 4), [(0, 4)], 128, [(33, (24, 4)), (1, (16, 4))]),
  ],
)
def test_tiles_cover_the_array(shape, blocks, tile_size, lots):
  tilings = _tiles.choose_tilings(shape, blocks, tile_size)
  assert [(tiling.steps, tiling.tile_shape) for tiling in tilings] == lots
  x = jnp.arange(np.prod(shape)).reshape(shape)
  y = jnp.zeros_like(x)
  for tiling in tilings:
    for step in map(jnp.int32, range(tiling.steps)):
      tile = tiling.take(x, step)
      index = np.ix_(*map(np.asarray, tiling.coordinates(step)))
      np.testing.assert_array_equal(tile, x[index])
      np.testing.assert_array_equal(y[index], 0)
      y = tiling.put(y, tile, step)
  np.testing.assert_array_equal(x, y)


def test_a_loop_over_tiles_runs_on_all_cores_of_a_cpu():
  tx = lpmm.sgdm(0.1, tile_size=2**12)
  params, grads = lpmm.quantize({'w': jnp.ones((256, 256))}, lpmm.INT8), {'w': jnp.ones((256, 256))}
  step = jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state))
  text = step.lower(params, tx.init(params), grads).compile().as_text()
  ours = [line for line in text.splitlines() if 'jit(update_leaf)/while' in line]
  assert any(' while(' in line for line in ours)
  # XLA marks the loops that it takes for small ones and makes functions of one thread of.
  assert not any('xla_cpu_small_call' in line for line in ours)


@pytest.mark.parametrize('make', [lpmm.sgdm, lpmm.adamw])
def test_what_is_one_number_for_a_block_is_not_computed_where_its_elements_are_rounded(make):
  params, grads = lpmm.quantize({'w': jnp.ones((512, 512))}, lpmm.INT8), {'w': jnp.ones((512, 512))}
  tx = make(0.1, 0.9)
  step = jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state))
  text = step.lower(params, tx.init(params), grads).compile().as_text()
  kernels = re.findall(r'^%\S*fused_computation.*?^}', text, re.MULTILINE | re.DOTALL)
  rounding = [kernel for kernel in kernels if ' round-nearest-even(' in kernel]
  assert len(rounding) >= 2
  # Only the reciprocal of a scale takes a floor.
  of_scales = [kernel for kernel in kernels if ' floor(' in kernel]
  assert of_scales
  assert not set(rounding) & set(of_scales)
