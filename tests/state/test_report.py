"""`memory_report`: bytes counted from bit widths, and why leaves are exempt."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

import lpmm_optax as lpmm

LARGE = {'a': jax.ShapeDtypeStruct((4096, 1024), jnp.float32), 'b': jax.ShapeDtypeStruct((1024, 2048), jnp.float32)}


def stored(tree, format):
  return jax.eval_shape(lambda x: lpmm.quantize(x, format), tree)


def test_bytes_per_parameter_on_large_leaves():
  params, tx = stored(LARGE, lpmm.INT8), lpmm.sgdm(0.1)
  state = tx.init(params)
  # Two bytes of scale per block of 64, and of 128.
  expected = (1 + 2 / 64) + (1 + 2 / 128)
  report = lpmm.memory_report(params, state)
  assert report.bytes_per_param == pytest.approx(expected, abs=1e-5)
  assert report.bytes_per_param <= 2.06
  assert report.reduction == pytest.approx(1 - expected / 8, abs=1e-5)
  accumulator = stored(LARGE, lpmm.Format(block_size=128))
  assert lpmm.memory_report(params, (state, accumulator)).bytes_per_param <= 3.08
  assert lpmm.memory_report(params, (state, accumulator)).reduction >= 0.74


def test_bytes_per_parameter_of_adamw_and_lion():
  params, accumulator = stored(LARGE, lpmm.INT8), stored(LARGE, lpmm.Format(block_size=128))
  eight, four = 1 + 2 / 128, 0.5 + 2 / 128
  for tx, moments in (
    (lpmm.adamw(0.1), 2 * eight),
    (lpmm.adamw(0.1, formats={'nu': lpmm.UINT4_SQRT}), eight + four),
    (lpmm.adamw(0.1, formats=lpmm.INT4), 2 * four),
    (lpmm.lion(0.1), eight),
  ):
    report = lpmm.memory_report(params, tx.init(params))
    assert report.bytes_per_param == pytest.approx((1 + 2 / 64) + moments, abs=1e-5)
  state = lpmm.adamw(0.1).init(params)
  assert lpmm.memory_report(params, state).bytes_per_param <= 3.10
  assert lpmm.memory_report(params, (state, accumulator)).bytes_per_param <= 4.13


@pytest.mark.parametrize(('bits', 'expected'), [(4, 0.5 + 2 / 64), (8, 1 + 2 / 64), (16, 2 + 2 / 64)])
def test_sub_byte_parameters_are_counted_by_their_bits(bits, expected):
  report = lpmm.memory_report(stored(LARGE, lpmm.Format(bits=bits)))
  assert report.bytes_per_param == expected


def test_bytes_are_those_of_the_arrays():
  params = lpmm.quantize({'w': jnp.ones((128, 256)), 'b': jnp.ones(256)}, lpmm.INT8)
  state = optax.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1)).init(params)
  report = lpmm.memory_report(params, state)
  assert report.bytes == sum(x.nbytes for x in jax.tree.leaves((params, state)))
  assert report.groups['params'] == sum(x.nbytes for x in jax.tree.leaves(params))


def test_stock_optax_in_float32_is_counted_too():
  params = {'w': jnp.ones((128, 256)), 'b': jnp.ones(256)}
  for tx, bytes_per_param in ((optax.sgd(0.1, momentum=0.9), 8), (optax.adamw(0.1), 12)):
    report = lpmm.memory_report(params, tx.init(params))
    assert report.bytes_per_param == pytest.approx(bytes_per_param, abs=1e-3)
    assert report.reduction == 0
    assert report.exempt == ()


def test_exempt_leaves_are_listed_with_the_reason():
  params = {
    'kernel': jnp.ones((64, 128)),
    'small': jnp.ones((32, 64)),
    'bias': jnp.ones(8192),
    'prime': jnp.ones((131, 137)),
    'head': jnp.ones((64, 128)),
    'steps': jnp.arange(8192).reshape(64, 128),
  }
  params = lpmm.quantize(params, lpmm.INT8, where=[('head', None)])
  report = lpmm.memory_report(params, lpmm.sgdm(0.1).init(params))
  reasons = {row.path: row.exempt for row in report.exempt if row.group == 'params'}
  assert reasons == {
    'small': 'under 4096 elements',
    'bias': 'one-dimensional, under 65536 elements',
    'prime': 'no axis has a divisor from 8 to 64',
    'head': 'chosen by the caller',
    'steps': 'not floating point',
  }
  assert report.parameters == 64 * 128 * 2 + 32 * 64 + 8192 + 131 * 137
  # Its state is stored in low precision although the parameter is not.
  assert {row.path for row in report.rows if row.group == 'trace' and not row.exempt} == {'kernel', 'head'}
  for path, reason in reasons.items():
    assert f'params in {params[path].dtype}, {reason}: {path}, {params[path].size} elements' in str(report)


def test_the_reason_is_found_among_formats_of_which_some_take_the_leaf():
  params = {'a': jnp.ones((64, 128)), 'b': jnp.ones((64, 128)), 'prime': jnp.ones((131, 137))}
  params = lpmm.quantize(params, lpmm.INT8, where=[('a', lpmm.BFLOAT16)])
  (row,) = lpmm.memory_report(params).exempt
  assert (row.path, row.exempt) == ('prime', 'no axis has a divisor from 8 to 64')


def test_many_exempt_leaves_are_a_line_for_each_reason():
  params = lpmm.quantize({'w': jnp.ones((64, 128)), **{f'b{i}': jnp.ones(3) for i in range(90)}}, lpmm.INT8)
  report = lpmm.memory_report(params, lpmm.sgdm(0.1).init(params))
  assert len(report.exempt) == 180
  assert 'params in float32, under 4096 elements: b0; b1; b10 and 87 more, 270 elements' in str(report)
  assert len(str(report).splitlines()) < 10


def test_an_empty_tree_has_a_report():
  report = lpmm.memory_report({}, ())
  assert (report.bytes, report.bytes_per_param, report.reduction) == (0, 0.0, 0.0)
  assert 'total' in str(report)


def test_leaves_that_no_kernel_takes_are_listed_with_the_reason():
  params = lpmm.quantize(
    {'w': jnp.ones((64, 128)), 'head': jnp.ones((4096, 10)), 'odd': jnp.ones((64, 100))}, lpmm.INT8
  )
  tx = lpmm.MultiSteps(lpmm.adamw(0.1), 2)
  report = lpmm.memory_report(params, tx.init(params), tx=tx)
  loops = {row.path: row.loops.get('cuda') for row in report.rows if row.group == 'params'}
  assert loops == {
    'w': None,
    'head': 'blocks along another axis than the last',
    'odd': 'blocks of 50, no power of two',
  }
  assert 'no kernel on cuda, for blocks along another axis than the last: head, 40960 elements' in str(report)
  assert lpmm.memory_report(params, tx.init(params)).rows[0].loops == {}


@pytest.mark.slow
def test_a_device_checks_itself():
  found = lpmm.self_check()
  assert [(row.optimizer, row.driver, row.not_of_loop, row.not_of_cpu) for row in found.rows] == [
    ('sgdm', 'loop', 0, 0),
    ('adamw', 'loop', 0, 0),
    ('lion', 'loop', 0, 0),
  ]
  assert found.is_sound
  row = found.rows[0]
  for wrong in ({'not_of_loop': 1}, {'not_of_cpu': row.stored // 100}):
    assert not dataclasses.replace(found, rows=(dataclasses.replace(row, **wrong),)).is_sound
  assert found.default == 'loop'
  assert 'sgdm      loop                none                  none' in str(found)
