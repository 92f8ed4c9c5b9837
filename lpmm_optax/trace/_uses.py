"""Which format suits a state field, from what the inner transformation does with it.

A field that provably never turns negative is a second moment or the like, and is stored on the square-root grid. One
that may turn negative but is divided by, or put under a root or a logarithm, needs relative precision: bfloat16. All
others are averages of gradients, or weights, for which 8 bits do.

The proof is interval arithmetic on the traced functions, and induction: if the field is nonnegative at the start, and
an update leaves it so whenever it was, it always is.
"""

from collections.abc import Sequence
import dataclasses
import itertools
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
# The result is one of the operands' values.
_SAME = _program.RESHAPES | {
  'convert_element_type', 'copy', 'cummax', 'cummin', 'dynamic_slice', 'gather', 'optimization_barrier', 'pcast',
  'pvary', 'reduce_max', 'reduce_min', 'reduce_precision', 'rev', 'slice', 'sort', 'stop_gradient', 'transpose',
}
# Monotone in each operand, so that their extremes are at corners of the operands' ranges.
_MONOTONE = {
  'add': np.add, 'add_any': np.add, 'ceil': np.ceil, 'clamp': lambda low, x, high: np.clip(x, low, high),
  'floor': np.floor, 'max': np.maximum, 'min': np.minimum, 'mul': np.multiply, 'neg': np.negative, 'round': np.round,
  'sign': np.sign, 'sub': np.subtract,
}
# fmt: on
_NEVER_NEGATIVE = frozenset({'abs', 'exp', 'exp2', 'logistic', 'rsqrt', 'sqrt', 'square'})
_ROOTS = frozenset({'cbrt', 'log', 'log1p', 'pow', 'rsqrt', 'sqrt'})
_FORGETS = frozenset({'eq', 'ge', 'gt', 'is_finite', 'le', 'lt', 'ne', 'sign'})


def _corners(fn: Any, ranges: list[Range]) -> Range:
  with np.errstate(all='ignore'):
    values = [float(fn(*corner)) for corner in itertools.product(*ranges)]
  if fn is np.multiply:  # An infinite bound times zero.
    values = [0.0 if math.isnan(value) else value for value in values]
  return _ANY if any(map(math.isnan, values)) else (min(values), max(values))


def _apply(op: _program.Op, x: list[Range]) -> Range:
  """The range of an operation's results, from those of its operands."""
  name = op.name
  if name in _SAME:
    return x[0]
  is_square = name == 'mul' and op.inputs[0] == op.inputs[1]
  if is_square or name in _NEVER_NEGATIVE or (name == 'integer_pow' and op.params['y'] % 2 == 0):
    return _NONNEGATIVE
  if name in _MONOTONE:
    return _corners(_MONOTONE[name], x)
  if name == 'div' and x[1][0] >= 0:
    low, high = (1 / v if v else math.inf for v in x[1][::-1])
    return _corners(np.multiply, [x[0], (low, high)])
  if name in ('integer_pow', 'pow') and x[0][0] >= 0:
    shrinks = x[0][1] <= 1 and (op.params['y'] if name == 'integer_pow' else x[1][0]) >= 0
    return (0.0, 1.0) if shrinks else _NONNEGATIVE
  if name in ('concatenate', 'select_n'):
    cases = x[name == 'select_n' :]
    return min(v[0] for v in cases), max(v[1] for v in cases)
  if name in ('cumsum', 'reduce_sum'):
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


def _copies(init: _program.Graph, entries: Sequence[_plan.Entry]) -> set[int]:
  """The entries that start as their parameter."""

  def source(value):
    while value in init.producers and init.ops[init.producers[value]].name in ('convert_element_type', 'copy'):
      value = init.ops[init.producers[value]].inputs[0]
    return value

  return {e for e in _plan.owned(entries) if source(init.outputs[e]) in init.inputs}


@dataclasses.dataclass(frozen=True)
class Uses:
  """What is known of the fields of an inner state.

  Attributes:
    entries: of the state.
    nonnegative: the entries, by index, that never turn negative.
    divided_by: the fields that reach a denominator, a root or a logarithm.
    copies: the entries that start as their parameter, a second set of weights.
  """

  entries: Sequence[_plan.Entry]
  nonnegative: frozenset[int] | set[int] = frozenset()
  divided_by: frozenset[str] | set[str] = frozenset()
  copies: frozenset[int] | set[int] = frozenset()

  def default_format(self, entry: int, param: Format | None) -> Format:
    """The format that suits an entry; `param` is that of its parameter."""
    if entry in self.nonnegative:
      return _format.UINT8_SQRT
    if self.entries[entry].field in self.divided_by:
      return _format.BFLOAT16
    return param if param is not None and entry in self.copies else _format.INT8


def find(init: _program.Graph, plan: _plan.Plan) -> Uses:
  """What the traced `inner.init` and the planned update tell of the state."""
  if not plan.leaves:
    return Uses(plan.entries)
  return Uses(plan.entries, _nonnegative(init, plan), _divided_by(plan), _copies(init, plan.entries))
