"""What the trace of a transformation tells: whether it runs in tiles, and a format for every field of its state."""

import re

import jax
import optax
import pytest
from transformations import TILED
from transformations import WHOLE
from transformations import field_formats
from transformations import tree

import lpmm_optax as lpmm
from lpmm_optax.optimizers import _transformation

pytestmark = pytest.mark.usefixtures('standard_promotion')


@pytest.mark.parametrize('name', TILED)
def test_elementwise_updates_run_in_tiles_with_formats_by_use(name):
  make, expected = TILED[name]
  tx = lpmm.low_precision(make())
  params = lpmm.quantize(tree(), lpmm.INT8)
  assert _transformation.explain(tx)(params).obstacles == {}
  assert field_formats(tx.init(params)) == {field: {format} for field, format in expected.items()}


@pytest.mark.parametrize('name', WHOLE)
def test_other_updates_are_whole_and_the_report_says_so(name):
  make, expected, operation = WHOLE[name]
  tx = lpmm.low_precision(make())
  params = lpmm.quantize(tree(), lpmm.INT8)
  state = tx.init(params)
  assert field_formats(state) == {field: {format} for field, format in expected.items()}
  report = lpmm.memory_report(params, state, tx=tx)
  assert f'  a: updated whole, for {operation}, 8192 elements' in str(report)
  assert _transformation.explain(tx)(params).obstacles['c/kernel'] == operation


def test_formats_by_field_and_by_path():
  params = lpmm.quantize(tree(), lpmm.INT8)

  def formats(**kwargs):
    state = lpmm.adamw(0.1, **kwargs).init(params)
    return [
      str(lpmm.is_quantized(x) and x.format) for x in jax.tree.leaves(state, is_leaf=lpmm.is_quantized) if x.ndim > 1
    ]

  # mu/a, mu/c/kernel, nu/a, nu/c/kernel.
  assert formats() == ['int8', 'int8', 'uint8_sqrt', 'uint8_sqrt']
  assert formats(formats=None) == ['False'] * 4
  assert formats(formats=lpmm.INT8) == ['int8', 'int8', 'uint8_sqrt', 'uint8_sqrt']
  assert formats(formats=lpmm.INT4) == ['int4', 'int4', 'uint4_sqrt', 'uint4_sqrt']
  # The first moment follows the second, by which it is divided.
  assert formats(formats=lpmm.INT16) == ['bfloat16'] * 4
  assert formats(formats=lpmm.BFLOAT16) == ['bfloat16'] * 4
  assert formats(formats={'nu': None}) == ['bfloat16', 'bfloat16', 'False', 'False']
  assert formats(formats={'nu': lpmm.BFLOAT16}) == ['bfloat16'] * 4
  assert formats(formats={'nu': [('kernel', lpmm.BFLOAT16)]}) == ['int8', 'bfloat16', 'uint8_sqrt', 'bfloat16']
  by_path = {'mu': [('kernel', lpmm.BFLOAT16)], 'nu': lambda path, leaf: None if path == 'a' else lpmm.BFLOAT16}
  state = lpmm.adamw(0.1, formats=by_path | {'nu': lambda path, leaf: None if leaf.ndim < 2 else lpmm.UINT8_SQRT}).init(
    params
  )
  assert [str(x.format) for x in jax.tree.leaves(state, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)] == [
    'int8',
    'bfloat16',
    'uint8_sqrt',
    'uint8_sqrt',
  ]


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: lpmm.low_precision(optax.adam(0.1), formats={'momentum': lpmm.INT8}), r"\['momentum'\].*\['mu', 'nu'\]"),
    (lambda: lpmm.adam(0.1, formats={'momentum': lpmm.INT8}), r"\['momentum'\].*\['mu', 'nu'\]"),
    (lambda: lpmm.adam(0.1, formats={'mu': 8}), r"formats\['mu'\]"),
    (lambda: lpmm.adam(0.1, formats=8), 'formats must be'),
    (lambda: lpmm.adam(0.1, formats=lpmm.UINT8_SQRT), 'mu/a: uint8_sqrt.*negative'),
    (
      lambda: lpmm.adam(0.1, formats={'nu': lpmm.INT8}),
      'nu/a: int8 .*is taken of it: store it in UINT8_SQRT or BFLOAT16 or',
    ),
    (lambda: lpmm.adam(0.1, formats={'nu': [('a', lpmm.INT16)]}), 'nu/a: int16 cannot.*quotient is taken of it'),
  ],
)
def test_formats_that_cannot_work_are_refused_with_advice(make, message):
  with pytest.raises((TypeError, ValueError)) as info:
    make().init(lpmm.quantize(tree(), lpmm.INT8))
  assert re.search(message, '\n'.join([str(info.value), *getattr(info.value, '__notes__', [])]))
