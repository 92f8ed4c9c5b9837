"""Which format suits a state field, from what the inner transformation does with it.

A field that provably never turns negative is a second moment or the like, and is stored on the square-root grid. One
that may turn negative but is divided by, or put under a root or a logarithm, needs relative precision: bfloat16. All
others are averages of gradients, or weights, for which 8 bits do.

The proof is interval arithmetic on the traced functions, and induction: if the field is nonnegative at the start, and
an update leaves it so whenever it was, it always is.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np

from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program

Range = tuple[float, float]

_ANY: Range = (-math.inf, math.inf)
_NONNEGATIVE: Range = (0.0, math.inf)

# fmt: off
_SAME = _program.RESHAPES | {
  'convert_element_type', 'copy', 'cummax', 'cummin', 'dynamic_slice', 'gather', 'optimization_barrier', 'reduce_max',
  'reduce_min', 'reduce_precision', 'rev', 'slice', 'sort', 'stop_gradient', 'transpose',
}
_MONOTONE = {
  'ceil': math.ceil, 'exp': math.exp, 'exp2': lambda x: 2.0**x, 'expm1': math.expm1, 'floor': math.floor,
  'logistic': lambda x: 1 / (1 + math.exp(-x)), 'round': round, 'sign': lambda x: float(np.sign(x)), 'sqrt': math.sqrt,
  'tanh': math.tanh,
}
# fmt: on
_ROOTS = frozenset({'cbrt', 'log', 'log1p', 'pow', 'rsqrt', 'sqrt'})
_FORGETS = frozenset({'eq', 'ge', 'gt', 'is_finite', 'le', 'lt', 'ne', 'sign'})


def _times(a: float, b: float) -> float:
  return 0.0 if a == 0 or b == 0 else a * b


def _monotone(fn: Any, x: float) -> float:
  try:
    return float(fn(x))
  except (OverflowError, ValueError):  # Infinities, and what lies outside of the domain.
    return math.inf if x > 0 else -math.inf


def _product(a: Range, b: Range) -> Range:
  corners = [_times(x, y) for x in a for y in b]
  return min(corners), max(corners)


def _power(x: Range, exponent: int) -> Range:
  if exponent < 0:
    return _NONNEGATIVE if x[0] >= 0 or exponent % 2 == 0 else _ANY
  ends = sorted(_monotone(lambda v: v**exponent, v) for v in x)
  if exponent % 2 == 0:
    return (0.0 if x[0] <= 0 <= x[1] else min(abs(v) for v in ends), max(abs(v) for v in ends))
  return ends[0], ends[1]


def _apply(op: _program.Op, x: list[Range]) -> Range:
  """The range of an operation's results, from those of its operands."""
  name = op.name
  if name in _SAME:
    return x[0]
  if name in _MONOTONE:
    low, high = (_monotone(_MONOTONE[name], v) for v in x[0])
    return (max(low, 0.0), high) if name in ('exp', 'exp2', 'logistic', 'sqrt') else (low, high)
  if name in ('add', 'add_any'):
    return x[0][0] + x[1][0], x[0][1] + x[1][1]
  if name == 'sub':
    return x[0][0] - x[1][1], x[0][1] - x[1][0]
  if name == 'neg':
    return -x[0][1], -x[0][0]
  if name == 'mul':
    return _power(x[0], 2) if op.inputs[0] == op.inputs[1] else _product(x[0], x[1])
  if name == 'div':
    if x[1][0] < 0:
      return _ANY
    low, high = (1 / v if v else math.inf for v in x[1][::-1])
    return _product(x[0], (low, high))
  if name == 'max':
    return max(x[0][0], x[1][0]), max(x[0][1], x[1][1])
  if name == 'min':
    return min(x[0][0], x[1][0]), min(x[0][1], x[1][1])
  if name == 'clamp':
    return max(x[0][0], min(x[1][0], x[2][1])), min(x[2][1], max(x[1][1], x[0][0]))
  if name == 'square':
    return _power(x[0], 2)
  if name == 'integer_pow':
    return _power(x[0], op.params['y'])
  if name == 'abs':
    return 0.0 if x[0][0] <= 0 <= x[0][1] else min(map(abs, x[0])), max(map(abs, x[0]))
  if name == 'pow':
    if x[0][0] < 0:
      return _ANY
    shrinks = (x[0][1] <= 1 and x[1][0] >= 0) or (x[0][0] >= 1 and x[1][1] <= 0)
    return (0.0, 1.0) if shrinks else _NONNEGATIVE
  if name == 'rsqrt':
    return _NONNEGATIVE
  if name == 'select_n':
    return min(v[0] for v in x[1:]), max(v[1] for v in x[1:])
  if name == 'concatenate':
    return min(v[0] for v in x), max(v[1] for v in x)
  if name in ('reduce_sum', 'cumsum'):
    return (0.0 if x[0][0] >= 0 else -math.inf, 0.0 if x[0][1] <= 0 else math.inf)
  return _ANY


def _known_range(value: Any) -> Range:
  """Of a literal exactly. What the caller closed over is a hyperparameter: decays and rates lie between 0 and 1."""
  if isinstance(value, np.ndarray):
    finite = value.size and jnp.issubdtype(value.dtype, jnp.number) and np.isfinite(value.astype(np.float64)).all()
    return (float(value.min()), float(value.max())) if finite else _ANY
  return _hyperparameter(value)


def _hyperparameter(array: Any) -> Range:
  if jnp.issubdtype(array.dtype, jnp.floating):
    return (0.0, 1.0) if array.shape == () else _ANY
  return _NONNEGATIVE  # A count.


def _ranges(graph: _program.Graph, inputs: dict[int, Range]) -> list[Range]:
  out = [_ANY] * len(graph.avals)
  for value, const in graph.known.items():
    out[value] = _known_range(const)
  for value, known in inputs.items():
    out[value] = known
  for op in graph.ops:
    found = _apply(op, [out[value] for value in op.inputs])
    for value in op.outputs:
      if len(op.outputs) == 1 and not any(math.isnan(v) for v in found):
        out[value] = found
  return out


def _nonnegative(init: _program.Graph, plan: _plan.Plan) -> set[int]:
  """The entries of the state, by index, that provably never turn negative.

  Args:
    init: the traced `inner.init`.
    plan: of the update.
  """
  entries = plan.entries
  at_start = _ranges(init, {})
  proven = {e for e, entry in enumerate(entries) if entry.leaf is not None and at_start[init.outputs[e]][0] >= 0}
  while True:
    inputs = {}
    for value, (what, index) in plan.inputs.items():
      if what == 'state' and entries[index].leaf is None:
        inputs[value] = _hyperparameter(plan.graph.avals[value])
      elif what == 'state' and index in proven:
        inputs[value] = _NONNEGATIVE
    after = _ranges(plan.graph, inputs)
    kept = {e for e in proven if after[plan.new[e]][0] >= 0}
    if kept == proven:
      return proven
    proven = kept


def _has_inner_function(op: _program.Op) -> bool:
  return any(isinstance(x, jex.Jaxpr | jex.ClosedJaxpr) for x in jax.tree.leaves(list(op.params.values())))


def _divided_by(plan: _plan.Plan) -> set[str]:
  """The fields that reach a denominator, a root or a logarithm."""
  entries = plan.entries
  bits = {field: 1 << k for k, field in enumerate(dict.fromkeys(entry.field for entry in entries))}
  reach = [0] * len(plan.graph.avals)
  for value, (what, index) in plan.inputs.items():
    if what == 'state' and entries[index].leaf is not None:
      reach[value] = bits[entries[index].field]
  found = 0
  for op in plan.graph.ops:
    operands = [reach[value] for value in op.inputs]
    if op.name in _ROOTS:
      found |= operands[0]
    elif _has_inner_function(op):
      # A loop may do anything with it.
      for mask in operands:
        found |= mask
    elif op.name == 'div':
      found |= operands[1]
    # A norm, or a product of matrices, is no value of one element any more.
    if plan.graph.elementwise(op) and op.name not in _FORGETS:
      for value in op.outputs:
        for mask in operands[1:] if op.name == 'select_n' else operands:
          reach[value] |= mask
  return {field for field, bit in bits.items() if found & bit}


@dataclasses.dataclass(frozen=True)
class Uses:
  """What is known of the fields of an inner state.

  Attributes:
    entries: of the state.
    nonnegative: the entries, by index, that never turn negative.
    divided_by: the fields that reach a denominator, a root or a logarithm.
  """

  entries: Sequence[_plan.Entry]
  nonnegative: set[int]
  divided_by: set[str]

  def default_format(self, entry: int) -> Format:
    """The format that suits an entry."""
    if entry in self.nonnegative:
      return _format.UINT8_SQRT
    return _format.BFLOAT16 if self.entries[entry].field in self.divided_by else _format.INT8


def find(init: _program.Graph, plan: _plan.Plan) -> Uses:
  """What the traced `inner.init` and the planned update tell of the state."""
  if not plan.leaves:
    return Uses(plan.entries, set(), set())
  return Uses(plan.entries, _nonnegative(init, plan), _divided_by(plan))
