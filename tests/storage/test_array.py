"""Storage: formats, blocks, scales, and what quantize and dequantize promise."""

import dataclasses

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import grid_steps
from runs import slow

import lpmm_optax as lpmm
from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.storage import _format
from lpmm_optax.storage import _view

LINEAR = [lpmm.INT4, lpmm.INT8, lpmm.INT16]


def forced(format):
  return lambda path, leaf: format


def normal(shape, seed=0, dtype=jnp.float32):
  return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize('kwargs', [{'bits': 3}, {'bits': 32}, {'block_size': 0}, {'block_size': -1}, {'grid': 'log'}])
@pytest.mark.parametrize('extra', [{}, {'rounding': 'nearest'}])
def test_a_format_without_storage_is_refused_by_argument(kwargs, extra):
  with pytest.raises(ValueError, match=next(iter(kwargs))):
    lpmm.Format(**kwargs, **extra)


@pytest.mark.parametrize(
  'kwargs',
  [
    {'bits': 16, 'grid': 'sqrt'},
    {'grid': 'bfloat16'},
    {'bits': 16, 'grid': 'bfloat16', 'block_size': 64},
    {'rounding': 'up'},
  ],
)
def test_contradictory_formats_are_refused(kwargs):
  with pytest.raises(ValueError, match=r'grid|rounding'):
    lpmm.Format(**kwargs)


@pytest.mark.parametrize('grid', ['linear', 'bfloat16'])
def test_one_format_for_all_fields_keeps_its_blocks_and_rounding(grid):
  size = 32 if grid == 'linear' else None
  given = lpmm.Format(bits=16, block_size=size, grid=grid, rounding='nearest')
  for variant in (*given.variants(True), *given.variants(False)):
    assert variant.rounding == 'nearest'
    assert variant.block_size == (size if variant.has_scales else None)


def test_formats_are_static_values():
  assert hash(lpmm.Format(bits=8)) == hash(lpmm.INT8)
  assert not callable(lpmm.INT8)
  with pytest.raises(dataclasses.FrozenInstanceError):
    lpmm.INT8.bits = 4


@pytest.mark.parametrize(
  ('shape', 'size', 'expected'),
  [
    ((512, 512), 64, (-1, 64)),
    ((512, 10), 64, (-2, 64)),  # The last axis is too short.
    ((3, 3, 64, 48), 64, (-1, 48)),  # The largest divisor of 48 that is not above 64,
    ((2048, 1000), 64, (-1, 50)),  # and of 1000, whose largest power of two is 8,
    ((64, 96), 48, (-1, 48)),  # and if just that was asked for;
    ((64, 96), 64, (-1, 32)),  # else a power of two, from 32 on,
    ((96, 160), 128, (-1, 32)),  # which does not choose the axis.
    ((256, 96), 128, (-1, 32)),
    ((50257, 768), 128, (-1, 128)),
    ((768, 50257), 64, (-2, 64)),  # 50257 = 29 * 1733.
    ((3, 3, 16, 16), 64, (-1, 16)),
    ((128, 40, 16), 64, (-2, 40)),  # Not along a leading axis, of which slices are taken,
    ((512, 4, 4), 64, (-3, 64)),  # unless both others are too short.
    ((65536,), 64, (-1, 64)),
  ],
)
def test_blocks_run_along_the_last_axis_unless_it_is_too_short(shape, size, expected):
  assert _format.choose_blocks(shape, size) == expected


@pytest.mark.parametrize('shape', [(8, 64, 128), (8, 40, 16), (16, 128, 4), (512, 4, 4), (8, 8, 12, 10), (64, 16, 16)])
@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT4, lpmm.BFLOAT16)], ids=str)
def test_a_slice_of_a_stack_decodes_as_the_stack_does_or_raises(shape, format):
  layers = jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1))
  stack = lpmm.quantize(
    normal(shape) * 10.0 ** (layers % 4).astype(jnp.float32), format, where=lambda path, leaf: format
  )
  whole = lpmm.dequantize(stack)
  axis = len(shape) if stack.blocks is None else len(shape) + stack.blocks.axis
  takes = [(1, lambda x: x[1]), (1, lambda x: x[2:4]), (2, lambda x: x[1, 2])]
  for axes, take in takes:
    part = jax.tree.map(take, stack)
    if axis < axes:
      with pytest.raises(ValueError, match='blocks of'):
        lpmm.dequantize(part)
    else:
      np.testing.assert_array_equal(lpmm.dequantize(part), take(whole))
  if axis > 0:
    looped = jax.lax.scan(lambda _, part: (None, lpmm.dequantize(part)), None, stack)[1]
    np.testing.assert_array_equal(looped, whole)


def test_codes_keep_the_shape_and_scales_the_rank():
  x = lpmm.quantize(normal((4, 32, 96, 128)), lpmm.INT8)
  assert x.codes.shape == x.shape == (4, 32, 96, 128)
  assert x.scales.shape == (4, 32, 96, 2)
  assert (x.codes.dtype, x.scales.dtype, x.dtype, x.ndim, x.size) == (
    jnp.int8,
    jnp.uint16,
    jnp.float32,
    4,
    4 * 32 * 96 * 128,
  )
  assert x.nbytes == x.size + 2 * x.size // 64


@pytest.mark.parametrize('format', [lpmm.INT4, lpmm.UINT4_SQRT], ids=str)
def test_sub_byte_codes_are_counted_from_bit_widths(format):
  x = _array.encode(jnp.abs(normal((128, 128))), format.with_block_size(64))
  assert x.codes.dtype == jnp.int4
  assert x.nbytes == 128 * 128 // 2 + 2 * 128 * 2


@pytest.mark.parametrize('format', LINEAR, ids=str)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
def test_nearest_rounding_is_within_half_a_step(format, dtype):
  x = normal((64, 256), dtype=dtype)
  q = lpmm.quantize(x, format)
  assert lpmm.dequantize(q).dtype == dtype
  error = np.abs(np.asarray(lpmm.dequantize(q, jnp.float32) - x.astype(jnp.float32)))
  # The grid of INT16 is as fine as a float32 at the block's maximum, hence the ulp.
  assert np.all(error <= grid_steps(q) / 2 + np.abs(np.asarray(x, np.float32)) * 2.0**-23)


def test_quantizing_with_a_key_is_unbiased():
  x = normal((64, 64))
  draws = 512
  quantized = jax.vmap(lambda key: lpmm.dequantize(lpmm.quantize(x, lpmm.INT8, key=key)))(
    jax.random.split(jax.random.key(1), draws)
  )
  steps = grid_steps(lpmm.quantize(x, lpmm.INT8))
  # An error of at most one step has a standard deviation of at most half a step; 4096 means, each within 5 sigma.
  assert np.all(np.abs(np.asarray(quantized.mean(0) - x)) <= 5 * 0.5 * steps / np.sqrt(draws))
  assert np.std(np.asarray(quantized[:, 1, 1])) > 0


def test_the_scale_is_the_smallest_bfloat16_that_holds_the_block():
  absmax = np.concatenate(
    [np.linspace(1, 2, 4099, dtype=np.float32) * np.float32(2.0**e) for e in (-80, -20, -1, 0, 7, 60, 119)]
  )
  for max_code in (7, 127, 255, 32767):
    scale = np.asarray(_codec.fresh_scale(jnp.asarray(absmax), max_code), np.float64)
    assert np.all(scale * max_code >= absmax)
    below = (scale.astype(np.float32).view(np.uint32) - 0x10000).view(np.float32).astype(np.float64)
    assert np.all(below * max_code < absmax)


@pytest.mark.parametrize('format', [*LINEAR, lpmm.UINT4_SQRT, lpmm.UINT8_SQRT], ids=str)
def test_a_block_keeps_its_scale_exactly_where_it_is_stored_again(format):
  bits = np.arange(0x3F00, 0x4080, dtype=np.uint16)
  scale = np.asarray(_codec.from_bfloat16_bits(jnp.asarray(bits)))[:, None]
  bound = np.float32([format.least_largest_code, format.max_code])
  around = np.arange(-64, 65, dtype=np.int32) * np.int32(2) ** np.arange(0, 16, 3, dtype=np.int32)[:, None]
  near = (scale[..., None, None] * bound[:, None, None]).view(np.int32) + around
  largest = near.reshape(len(bits), -1).view(np.float32)
  root = np.sqrt(largest * largest) if format.grid == 'sqrt' else largest
  codec = _codec.LinearCodec(format, _view.cells((1, 1), []), axis=1, size=1)
  absmax = jnp.asarray(largest * largest if format.grid == 'sqrt' else largest)
  scales, _ = codec._next_grid(absmax, jnp.broadcast_to(jnp.asarray(bits)[:, None], absmax.shape))
  is_kept = (root >= scale * bound[0]) & (root <= scale * bound[1])
  assert 0.2 < np.mean(is_kept) < 0.8
  np.testing.assert_array_equal(np.asarray(scales) == bits[:, None], is_kept)


def test_the_reciprocal_is_correctly_rounded_for_every_scale():
  bits = np.arange(0x0080, 0x7F00, dtype=np.uint16)
  scale = np.asarray(_codec.from_bfloat16_bits(jnp.asarray(bits)))
  largest = _codec.fresh_scale(jnp.finfo(jnp.float32).max, lpmm.INT4.max_code)
  scale = scale[(scale >= 2.0**-100) & (scale <= np.asarray(largest))]
  np.testing.assert_array_equal(np.asarray(_codec.reciprocal(jnp.asarray(scale))), np.float32(1) / scale)


def test_codes_of_a_poisoned_block_depend_on_no_denormal_number():
  # Times infinity, one that a device takes for zero gives NaN, which is another integer.
  assert _codec.reciprocal(jnp.float32(np.nan)) >= np.finfo(np.float32).tiny
  for bad in (np.nan, np.inf):
    codes = lpmm.quantize(normal((64, 128)).at[3, 5].set(bad), lpmm.INT8).codes
    assert codes[3, 5] == lpmm.INT8.max_code


def test_zero_blocks_have_scale_zero_and_decode_to_zero():
  x = normal((64, 128)).at[:, 64:].set(0.0)
  q = lpmm.quantize(x, lpmm.INT8)
  assert np.all(np.asarray(q.scales)[:, 1] == 0)
  assert np.all(np.asarray(lpmm.dequantize(q))[:, 64:] == 0)


@pytest.mark.parametrize(
  ('format', 'shape'), [(lpmm.INT8, (3, 64, 192)), (lpmm.INT4, (128, 10)), (lpmm.INT16, (96,))], ids=str
)
def test_a_tpu_decodes_to_the_same_bits(monkeypatch, format, shape):
  x = lpmm.quantize(jnp.abs(normal(shape)).at[0].set(np.nan), format, where=forced(format))
  monkeypatch.setenv('LPMM_KERNEL', '0')
  expected = np.asarray(lpmm.dequantize(x))
  assert np.isnan(expected).any()
  monkeypatch.setenv('LPMM_KERNEL', 'interpret_tpu')
  assert 'dot_general' in str(jax.make_jaxpr(lpmm.dequantize)(x)) or x.blocks.axis != -1
  np.testing.assert_array_equal(np.asarray(lpmm.dequantize(x)).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize('format', [*LINEAR, lpmm.BFLOAT16], ids=str)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_poisoned_block_is_not_finite_and_the_others_are_untouched(format, bad):
  x = normal((64, 128))
  y = lpmm.dequantize(lpmm.quantize(x.at[3, 5].set(bad), format))
  assert not np.isfinite(y[3, 5])
  clean = lpmm.dequantize(lpmm.quantize(x, format))
  np.testing.assert_array_equal(np.delete(y, 3, 0), np.delete(clean, 3, 0))
  np.testing.assert_array_equal(y[3, 64:], clean[3, 64:])


def test_bfloat16_rounds_to_nearest_even_as_jax_does_without_a_key():
  x = normal((64, 128))
  expected = x.astype(jnp.bfloat16).astype(jnp.float32)
  np.testing.assert_array_equal(lpmm.dequantize(lpmm.quantize(x, lpmm.BFLOAT16)), expected)


@pytest.mark.parametrize('format', [lpmm.INT8, *slow(lpmm.INT4, lpmm.INT16), lpmm.BFLOAT16], ids=str)
@pytest.mark.parametrize('key', [0, *slow(None)])
@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(
  rows=st.sampled_from([1, 2, 7]),
  columns=st.sampled_from([1, 3, 31, 64, 96, 97, 128, 200]),
  exponent=st.integers(-149, 127),
  seed=st.integers(0, 2**31 - 1),
)
def test_finite_values_of_any_size_stay_finite_and_within_a_step(format, key, rows, columns, exponent, seed):
  x = np.random.default_rng(seed).uniform(-1, 1, (rows, columns)).astype(np.float32) * np.float32(2.0**exponent)
  x[0, 0] = 0
  key = None if key is None else jax.random.key(key)
  q = lpmm.quantize(jnp.asarray(x), format, key=key, where=forced(format))
  y = np.asarray(lpmm.dequantize(q))
  assert np.all(np.isfinite(y))
  assert y[0, 0] == 0
  # Scales are at least 2^-100, a step for anything smaller; bfloat16 keeps 8 bits of everything.
  step = np.maximum(grid_steps(q), 2.0**-100) if format.has_scales else np.abs(x) * 2.0**-7 + 2.0**-126
  assert np.all(np.abs(y.astype(np.float64) - x) <= step * (1 + 1e-6))


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('format', [*LINEAR, lpmm.BFLOAT16], ids=str)
def test_the_largest_values_of_a_dtype_stay_finite_in_it(dtype, format):
  largest = float(jnp.finfo(dtype).max)
  y = lpmm.dequantize(lpmm.quantize(jnp.linspace(-largest, largest, 4096, dtype=jnp.float32).astype(dtype), format))
  assert np.all(np.isfinite(np.asarray(y, np.float32)))
  x = lpmm.quantize(jnp.full((64, 64), largest, dtype), format)
  np.testing.assert_allclose(np.asarray(lpmm.dequantize(x), np.float32), largest, rtol=2.0**-6)


def test_small_one_dimensional_and_integer_leaves_stay_dense():
  tree = {
    'small': normal((32, 64)),
    'bias': normal((65535,)),
    'long': normal((65536,)),
    'steps': jnp.arange(8192).reshape(64, 128),
    'empty': jnp.zeros((0, 8192)),
    'prime': normal((127, 131)),
    'scalar': jnp.float32(1),
    'none': None,
  }
  q = lpmm.quantize(tree, lpmm.INT8)
  assert {k for k, v in q.items() if lpmm.is_quantized(v)} == {'long'}
  assert all(q[k] is tree[k] for k in tree if k != 'long')


def test_where_chooses_a_format_by_path():
  tree = {'embed': {'kernel': normal((128, 64))}, 'out': {'kernel': normal((128, 64)), 'bias': normal((64,))}}
  rules = [('embed', lpmm.INT16), ('out/bias', lpmm.INT8), ('out', None)]
  q = lpmm.quantize(tree, lpmm.INT8, where=rules)
  assert q['embed']['kernel'].format.bits == 16
  assert q['out']['bias'].format.bits == 8
  assert not lpmm.is_quantized(q['out']['kernel'])
  q = lpmm.quantize(tree, lpmm.INT8, where=lambda path, leaf: lpmm.INT4 if path.endswith('kernel') else None)
  assert [v.format.bits for v in jax.tree.leaves(q, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(v)] == [4, 4]


def test_unsupported_leaves_are_refused_by_path():
  tree = {'a': {'b': jnp.arange(8192)}}
  with pytest.raises(TypeError, match=r'a/b.*int32'):
    lpmm.quantize(tree, lpmm.INT8, where=forced(lpmm.INT8))
  with pytest.raises(ValueError, match=r'a/b.*nonnegative'):
    lpmm.quantize({'a': {'b': normal((64, 64))}}, lpmm.UINT8_SQRT)
  with pytest.raises(TypeError, match=r'a/b.*where'):
    lpmm.quantize({'a': {'b': normal((64, 64))}}, lpmm.INT8, where=forced('int8'))
  with pytest.raises(ValueError, match=r'a/b.*shape'):
    lpmm.quantize({'a': {'b': jnp.float32(1)}}, lpmm.INT8, where=forced(lpmm.INT8))
  with pytest.raises(TypeError, match='Format'):
    lpmm.quantize(tree, 8)
  with pytest.raises(TypeError, match='where must be a list'):
    lpmm.quantize(tree, lpmm.INT8, where={'a': None})
  with jax.enable_x64(True), pytest.raises(TypeError, match=r'a/b.*float64'):
    lpmm.quantize({'a': {'b': jnp.ones((64, 64), jnp.float64)}}, lpmm.INT8)


def test_quantized_leaves_are_passed_through():
  q = lpmm.quantize({'w': normal((64, 128))}, lpmm.INT8)
  assert lpmm.quantize(q, lpmm.INT4)['w'] is q['w']


def test_quantize_and_dequantize_are_traceable():
  x = normal((4, 64, 128))
  eager = lpmm.quantize(x, lpmm.INT8)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda x: lpmm.quantize(x, lpmm.INT8))(x), eager)
  np.testing.assert_array_equal(jax.jit(lpmm.dequantize)(eager), lpmm.dequantize(eager))
  abstract = jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), x)
  assert jax.tree.structure(abstract) == jax.tree.structure(eager)


def test_a_stack_of_layers_can_be_scanned():
  stack = lpmm.quantize(normal((4, 64, 128)), lpmm.INT8)
  _, layers = jax.lax.scan(lambda _, layer: (None, lpmm.dequantize(layer)), None, stack)
  np.testing.assert_array_equal(layers, lpmm.dequantize(stack))
  np.testing.assert_array_equal(jax.vmap(lpmm.dequantize)(stack), lpmm.dequantize(stack))


@pytest.mark.parametrize('format', [lpmm.UINT8_SQRT, lpmm.UINT4_SQRT], ids=str)
def test_the_square_root_grid_keeps_positive_values_positive(format):
  codec = _codec.LinearCodec(format, _view.Cells((1, 64), (1, 64)), 1, 64)
  v = jnp.zeros((1, 1, 64)).at[0, 0, :3].set(jnp.array([1.0, 1e-12, 0.25]))
  bits = jax.random.bits(jax.random.key(0), v.shape, jnp.uint32)
  stored, _ = codec.finish(codec.encode(v, bits))
  back = np.asarray(codec.decode(stored._replace(codes=codec.view.merge(stored.codes))))[0, 0]
  assert stored.codes.dtype == format.code_dtype
  assert back[1] > 0
  assert np.all(back[3:] == 0)
  step = (1 + 2.0**-7) / format.max_code
  np.testing.assert_allclose(np.sqrt(back[[0, 2]]), [1.0, 0.5], atol=step)


@pytest.mark.parametrize('format', [lpmm.UINT8_SQRT, lpmm.UINT4_SQRT], ids=str)
def test_every_unsigned_code_is_what_its_bits_say(format):
  codes = np.arange(2**format.bits)
  x = _array.encode(jnp.asarray((0.5 * codes) ** 2, jnp.float32), format.with_block_size(codes.size))
  np.testing.assert_array_equal(np.asarray(x.codes).astype(int) % codes.size, codes)
  np.testing.assert_array_equal(lpmm.dequantize(x), (0.5 * codes) ** 2)


AS_AN_ARRAY = {
  'operator': lambda q: q + 1,
  'reversed operator': lambda q: jnp.ones((2, 64)) @ q,
  'operator of NumPy': lambda q: np.ones((64, 128)) * q,
  'comparison': lambda q: q < 1,
  'equality': lambda q: q == 0,
  'inequality': lambda q: q != q,
  'index': lambda q: q[0],
  'attribute': lambda q: q.T,
  'method': lambda q: q.astype(jnp.float32),
  'jax.numpy': lambda q: jnp.sum(q),
  'jax.nn': lambda q: jax.nn.relu(q),
  'einsum': lambda q: jnp.einsum('ij,jk', jnp.ones((2, 64)), q),
  'numpy': np.asarray,
}


@pytest.mark.parametrize('use', AS_AN_ARRAY.values(), ids=AS_AN_ARRAY)
def test_what_takes_it_for_an_array_is_told_to_dequantize_it(use):
  q = lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8)
  with pytest.raises(TypeError, match=r'int8\) is none: call lpmm_optax.dequantize\(params\) before the model'):
    use(q)


def test_it_has_no_attributes_of_an_array_and_can_always_be_printed():
  q = lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8)
  assert not hasattr(q, 'T')
  assert hasattr(q, 'shape')
  for leaf in (None, 1.5, 'text', (64, 128)):
    assert 'int8' in repr(jax.tree.map(lambda _, leaf=leaf: leaf, q))


REPLACED = {
  'a filter': (lambda x: None, r'have become None.*is_leaf=lpmm_optax\.is_quantized.*equinox\.is_array'),
  'a mask': (lambda x: True, 'have become True'),
  'an average': (lambda x: 0.5 * x.astype(jnp.float32), r'have become float32.*lpmm_optax\.ema'),
}


@pytest.mark.parametrize(('replace', 'message'), REPLACED.values(), ids=REPLACED)
def test_what_stands_in_the_place_of_codes_is_named_with_its_leaf(replace, message):
  params = jax.tree.map(replace, lpmm.quantize({'layer': {'weight': jnp.ones((64, 128))}}, lpmm.INT8))
  with pytest.raises(TypeError, match=rf'layer/weight: the codes .*{message}'):
    lpmm.dequantize(params)
  with pytest.raises(TypeError, match=rf'layer/weight: the codes .*{message}'):
    lpmm.sgdm(0.1).init(params)
