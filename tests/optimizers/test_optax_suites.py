"""Optax's own test suites, which ship in its wheel, run on our optimizers and on `low_precision` of each of Optax's.

The suites are `optax/_src/alias_test.py` and `optax/contrib/_common_test.py`, whose classes of common tests are built
here anew, with other optimizers. Their parameters are a few numbers, hence dense: what they hold us to is what users of
Optax rely on. Optax is written for implicit promotion, so its tests run under JAX's own settings.
"""

import ast
import functools
import importlib.util
import itertools
import pathlib
import re
import types

from absl.testing import parameterized
import jax
import optax
import pytest

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('compile_fast')

OURS = [
  {'opt_name': 'sgdm', 'opt_kwargs': {'learning_rate': 1e-3, 'error_feedback': True}},
  {'opt_name': 'sgdm', 'opt_kwargs': {'learning_rate': 1e-3, 'error_feedback': False, 'weight_decay': 1e-5}},
  {'opt_name': 'sgdm', 'opt_kwargs': {'learning_rate': 1e-3, 'nesterov': True}},
  {'opt_name': 'sgdm', 'opt_kwargs': {'learning_rate': 1e-3, 'momentum': None}},
  {'opt_name': 'adam', 'opt_kwargs': {'learning_rate': 1e-1}},
  {'opt_name': 'adam', 'opt_kwargs': {'learning_rate': 1e-2, 'nesterov': True}},
  {'opt_name': 'adamw', 'opt_kwargs': {'learning_rate': 1e-1}},
  {'opt_name': 'lion', 'opt_kwargs': {'learning_rate': 1e-2, 'weight_decay': 1e-4}},
]

IN_ALIAS_TEST = 'AliasTest has the same test of this optimizer'
ANOTHER = 'another target, or another dtype, goes the same way through low_precision'

# By a regular expression for the test's name, whose first part is that of the suite.
EXCLUDED = {
  r'dtype=complex': 'complex parameters and state are refused, by name',
  r'params_dtype=bfloat16,state_dtype=None': 'state is float32 where the parameter is bfloat16: an average in bfloat16 '
  'would stop moving',
  r'^AliasTestOfOurs\..*opt_name=sgd_mom': 'sgdm has no accumulator_dtype: formats say how its momentum is stored',
  r'^ContribTestOfOurs\.test_(gradient_acc|optimizers_can_be_wrapped|preserve_dtype|state_shape)': IN_ALIAS_TEST,
  r'^Contrib.*test_state_shape.*wrapper_name=[a-z]': IN_ALIAS_TEST,  # It does without the wrapper.
  r'^Contrib.*extra_args.*wrapper_name=[a-z].*wrap=False': IN_ALIAS_TEST,
  r'^Contrib.*extra_args.*wrapper_name=None.*wrap=True': 'there is no wrapper: the same as with wrap=False',
  r'InLowPrecision\.test_optimiz.*target=_setup_(matrix_)?parabola': ANOTHER,
  r'InLowPrecision\.test_state_shape.*dtype=float(16|64)': ANOTHER,
  r'InLowPrecision\.test_(preserve_dtype|gradient_acc).*dtype=float32': ANOTHER,
}


class Named:
  """`absl.testing.parameterized`, but a test has its parameters in its name rather than a number, as EXCLUDED needs."""

  def __getattr__(self, name):
    return getattr(parameterized, name)

  def product(self, *cases, **grid):
    axes = [*cases, *([{name: value} for value in values] for name, values in grid.items())]
    products = [functools.reduce(dict.__or__, case) for case in itertools.product(*axes)]
    return parameterized.named_parameters(*({'testcase_name': named(case), **case} for case in products))


def named(params):
  """Parameters as they stand in a name: 'opt_name=adam,learning_rate=0.1,dtype=float32'."""
  parts = (
    named(value) if isinstance(value, dict) else f'{name}={getattr(value, "__name__", value)}'
    for name, value in params.items()
  )
  return ','.join(filter(None, parts))


def load_suite(name, module_name, class_name, modules, replace, optimizers=None):
  """A class of tests from a fresh copy of its module, of which only what comes before the class is run.

  Args:
    name: of the class to return.
    module_name: Optax's.
    class_name: Optax's.
    modules: names under which the copy imports the modules that it takes factories from.
    replace: what replaces such a module, as a function of it.
    optimizers: what replaces each list of the optimizers under test; None keeps Optax's.
  """
  spec = importlib.util.find_spec(module_name)
  assert spec is not None, f'Optax comes without {module_name}'
  body = ast.parse(pathlib.Path(spec.origin).read_text()).body
  at = next(k for k, node in enumerate(body) if isinstance(node, ast.ClassDef) and node.name == class_name)
  scope = types.ModuleType(f'{__name__}.{name}').__dict__
  run = lambda nodes: exec(compile(ast.Module(nodes, []), spec.origin, 'exec'), scope)
  run(body[:at])
  lists = {node.id for node in ast.walk(body[at]) if isinstance(node, ast.Name) and node.id.endswith('_UNDER_TEST')}
  assert lists, f'{module_name} has no list of the optimizers under test'
  for each in lists if optimizers else ():
    scope[each] = [dict.fromkeys(scope[each][0]) | optimizer for optimizer in optimizers]
  for each in modules:
    scope[each] = replace(scope[each])
  assert scope['parameterized'] is parameterized
  scope['parameterized'] = Named()
  run([body[at]])
  suite = scope[class_name]
  suite.__name__ = suite.__qualname__ = name
  for test in cases_of(suite):
    if reason := why_excluded(suite, test):
      pytest.mark.skip(reason=reason)(vars(suite)[test])
  return suite


def cases_of(suite):
  return [name for name in vars(suite) if name.startswith('test')]


def why_excluded(suite, test):
  found = (reason for pattern, reason in EXCLUDED.items() if re.search(pattern, f'{suite.__name__}.{test}'))
  return next(found, None)


class InLowPrecision:
  """A module of Optax's with `low_precision` around every transformation that its functions make, once."""

  def __init__(self, module):
    self.module = module

  def __getattr__(self, name):
    function = getattr(self.module, name)

    @functools.wraps(function)
    def in_low_precision(*args, **kwargs):
      out = function(*map(inner_of, args), **kwargs)
      if not isinstance(out, optax.GradientTransformation):
        return out
      tx = lpmm.low_precision(out)
      tx.inner = out
      return tx

    return in_low_precision


def inner_of(x):
  """What has `low_precision` around it: a transformation, or its state."""
  if isinstance(x, lpmm.InPlaceTransformation):
    return x.inner
  return x.inner_state if isinstance(x, lpmm.LowPrecisionState) else x


@pytest.fixture(autouse=True)
def _settings_that_optax_needs():
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


ALIAS = 'optax._src.alias_test', 'AliasTest', ('alias',)
CONTRIB = 'optax.contrib._common_test', 'ContribTest', ('alias', 'combine', 'contrib')

AliasTestOfOurs = load_suite('AliasTestOfOurs', *ALIAS, lambda _: lpmm, OURS)
ContribTestOfOurs = pytest.mark.slow(load_suite('ContribTestOfOurs', *CONTRIB, lambda _: lpmm, OURS))
AliasTestInLowPrecision = pytest.mark.slow(load_suite('AliasTestInLowPrecision', *ALIAS, InLowPrecision))
ContribTestInLowPrecision = pytest.mark.slow(load_suite('ContribTestInLowPrecision', *CONTRIB, InLowPrecision))
SUITES = AliasTestOfOurs, ContribTestOfOurs, AliasTestInLowPrecision, ContribTestInLowPrecision


def test_every_exclusion_names_a_test():
  names = [f'{suite.__name__}.{test}' for suite in SUITES for test in cases_of(suite)]
  assert [pattern for pattern in EXCLUDED if not any(re.search(pattern, name) for name in names)] == []


@pytest.mark.parametrize(('alias', 'contrib'), [SUITES[:2], SUITES[2:]], ids=['of_ours', 'in_low_precision'])
def test_what_is_left_to_alias_test_is_there(alias, contrib):
  kind_of = lambda test: test.partition(',')[0]
  left = {kind_of(test) for test in cases_of(contrib) if why_excluded(contrib, test) == IN_ALIAS_TEST}
  assert left
  assert left <= {kind_of(test) for test in cases_of(alias) if not why_excluded(alias, test)}
