"""Properties of any tree: odd shapes, dtypes, block sizes, and values from subnormal to the largest."""

import math

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpmm_optax as lpmm
from lpmm_optax.storage import _array

SIZES = st.sampled_from([1, 2, 3, 7, 8, 31, 64, 97, 100, 128])
SHAPES = st.one_of(
  st.sampled_from([(), (0,), (3, 0), (1,), (1, 1), (4099,), (65537,), (70001,), (2, 35003), (1, 4096), (4096, 1)]),
  st.lists(SIZES, min_size=1, max_size=3).map(tuple),
)
DTYPES = st.sampled_from([jnp.float32, jnp.float32, jnp.bfloat16, jnp.float16])
FORMATS = st.one_of(
  st.just(lpmm.BFLOAT16),
  st.builds(
    lpmm.Format,
    bits=st.sampled_from([4, 8, 16]),
    block_size=st.sampled_from([None, 1, 5, 32, 64, 100, 128, 1000]),
    rounding=st.sampled_from(['stochastic', 'nearest']),
  ),
)


@st.composite
def arrays(draw, shapes=SHAPES, dtypes=DTYPES):
  """Of magnitudes that differ between the elements of a block, some of them zero."""
  shape, dtype = draw(shapes), draw(dtypes)
  limits = jnp.finfo(dtype)
  lowest, highest = math.log2(float(limits.smallest_subnormal)), math.log2(float(limits.max))
  low = draw(st.floats(lowest, highest))
  high = draw(st.floats(low, highest))
  rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
  # Of float64, in which the powers of two are no subnormals.
  x = rng.choice([-1.0, 0.0, 1.0], shape) * 2.0 ** rng.uniform(low, high, shape)
  return jnp.asarray(np.clip(x, -float(limits.max), float(limits.max)).astype(np.float32)).astype(dtype)


def block_maxima(x, q):
  """Of every element's block, as float64."""
  x = np.abs(x)
  if q.scales is None:
    return x
  axis, size = len(q.shape) + q.blocks.axis, q.blocks.size
  blocks = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
  return np.broadcast_to(blocks.max(axis + 1, keepdims=True), blocks.shape).reshape(x.shape)


def check_stored(x, q):
  """That an array is finite, exact where it is zero, and elsewhere to within a step of its grid."""
  assert q.shape == x.shape
  assert q.dtype == x.dtype
  values = np.asarray(x.astype(jnp.float32), np.float64)
  y = lpmm.dequantize(q)
  assert y.dtype == x.dtype
  y = np.asarray(y.astype(jnp.float32), np.float64)
  assert np.all(np.isfinite(y))
  assert np.all(y[values == 0] == 0)
  if not lpmm.is_quantized(q):
    np.testing.assert_array_equal(y, values)
    return
  # A step is the scale, which is at most 2^-7 above the maximum over the codes, and at least 2^-100; that of bfloat16
  # is a 128th of the value. Then the rounding of what is decoded to the array's own dtype.
  step = (
    block_maxima(values, q) * (1 + 2.0**-7) / q.format.max_code if q.format.has_scales else np.abs(values) * 2.0**-7
  )
  own = np.abs(y) * float(jnp.finfo(x.dtype).eps) + float(jnp.finfo(x.dtype).smallest_normal)
  assert np.all(np.abs(y - values) <= np.maximum(step, 2.0**-100 if q.format.has_scales else 2.0**-126) + own)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
  tree=st.lists(arrays(), min_size=1, max_size=3),
  format=FORMATS,
  key=st.one_of(st.none(), st.integers(0, 2**31 - 1)),
  force=st.booleans(),
)
def test_any_tree_is_stored_to_within_a_grid_step(tree, format, key, force):
  where = (lambda path, leaf: format if leaf.size and leaf.ndim else None) if force else None
  key = None if key is None else jax.random.key(key)
  stored = lpmm.quantize(tree, format, key=key, where=where)
  for x, q in zip(tree, stored, strict=True):
    check_stored(x, q)
    if force:
      assert lpmm.is_quantized(q) == bool(x.size and x.ndim)


# Few shapes, since each is compiled for.
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  x=arrays(st.just((8, 128)), st.sampled_from([jnp.float32, jnp.bfloat16])),
  format=st.sampled_from([lpmm.INT8, lpmm.INT8, lpmm.INT4, lpmm.INT16]),
  key=st.one_of(st.none(), st.integers(0, 2**31 - 1)),
  factor=st.sampled_from([1.0, 0.5, 0.8, 0.1]),
)
def test_what_is_decoded_and_stored_again_stays_as_it_is(x, format, key, factor):
  force = lambda path, leaf: format
  q = lpmm.quantize(x, format, key=None if key is None else jax.random.key(key), where=force)
  values = lpmm.dequantize(q)
  # Chance may have left 6 for the largest of 4-bit codes; and bfloat16 has not the bits for 16-bit ones.
  if (key is None or format.bits > 4) and (format.bits < 16 or x.dtype == jnp.float32):
    np.testing.assert_array_equal(lpmm.dequantize(lpmm.quantize(values, format, where=force)), values)
  # As a block that has kept its scale may: its largest value is no longer near the end of the grid.
  moved = lpmm.convert((factor * values.astype(jnp.float32)).astype(x.dtype), q)
  if format.bits < 16 or x.dtype == jnp.float32:
    again = lpmm.convert(lpmm.dequantize(moved), moved)
    np.testing.assert_array_equal(lpmm.dequantize(again), lpmm.dequantize(moved))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  x=arrays(st.just((8, 128)), st.just(jnp.float32)),
  format=st.sampled_from([lpmm.UINT8_SQRT, lpmm.UINT4_SQRT]),
  key=st.one_of(st.none(), st.integers(0, 2**31 - 1)),
)
def test_what_is_not_negative_is_stored_to_within_a_step_of_its_root_and_never_lost(x, format, key):
  x = jnp.minimum(jnp.abs(x), 1e38)  # The largest code may be of a value that is 1.6 % above.
  word = None if key is None else jax.random.bits(jax.random.key(key), (2,), jnp.uint32)
  q = _array.encode(x, format.with_block_size(128), word=word)
  values, y = np.asarray(x, np.float64), np.asarray(lpmm.dequantize(q), np.float64)
  root, largest = np.sqrt(values), np.sqrt(block_maxima(values, q))
  step = np.maximum(largest * (1 + 2.0**-7) / format.max_code, 2.0**-100)
  assert np.all(np.abs(np.sqrt(y) - root) <= step * (1 + 1e-6))
  # XLA on a CPU takes a subnormal number for zero.
  normal = values >= float(jnp.finfo(jnp.float32).smallest_normal)
  assert np.all((y > 0)[normal & (step > 2.0**-60)])
  assert np.all(y[values == 0] == 0)
  np.testing.assert_array_equal(lpmm.dequantize(_array.encode_as(lpmm.dequantize(q), q)), lpmm.dequantize(q))


@pytest.mark.slow
@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
  x=arrays().filter(lambda x: x.size <= 20000),
  format=FORMATS.filter(lambda format: format.bits >= 8),
  name=st.sampled_from(['sgdm', 'adamw', 'lion']),
  power=st.integers(-149, 60),
)
def test_a_step_from_any_tree_stays_finite_and_without_gradient_does_nothing(x, format, name, power):
  # A step of SGD may not fit into float16, without us either.
  hypothesis.assume(not (x.dtype == jnp.float16 and name == 'sgdm'))
  x = jnp.clip(x, -1e4, 1e4)
  params = lpmm.quantize({'x': x}, format, where=lambda path, leaf: format if leaf.size and leaf.ndim else None)
  tx = getattr(lpmm, name)(0.01, weight_decay=0.0) if name != 'sgdm' else lpmm.sgdm(0.01)
  state = tx.init(params)
  grads = {'x': jnp.full(x.shape, 2.0**power, jnp.float32)}
  zero = jax.tree.map(jnp.zeros_like, grads)
  same, state = lpmm.step(tx, zero, params, state)
  jax.tree.map(np.testing.assert_array_equal, same, params)
  finite = lambda tree: all(
    bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(lpmm.dequantize(tree)) if leaf.dtype.kind == 'f'
  )
  assert finite(lpmm.step(tx, grads, params, state))
