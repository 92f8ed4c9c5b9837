"""Which entries of a state provably never turn negative.

The proof is interval arithmetic on the traced functions, and induction: if an entry is nonnegative at the start, and an
update leaves it so whenever it was, it always is.
"""

import itertools
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program

Range = tuple[float, float]

_ANY: Range = (-math.inf, math.inf)
_NONNEGATIVE: Range = (0.0, math.inf)

# The result, where there is one, is some of the first operand's values.
_SAME = (
  _program.CASTS | _program.MOVES | {'cummax', 'cummin', 'optimization_barrier', 'reduce_max', 'reduce_min', 'sort'}
)
# fmt: off
# Monotone in each operand, so that their extremes are at corners of the operands' ranges.
_MONOTONE = {
  'add': np.add, 'add_any': np.add, 'ceil': np.ceil, 'clamp': lambda low, x, high: np.clip(x, low, high),
  'floor': np.floor, 'max': np.maximum, 'min': np.minimum, 'mul': np.multiply, 'neg': np.negative, 'round': np.round,
  'sign': np.sign, 'sub': np.subtract,
}
# fmt: on
_NEVER_NEGATIVE = frozenset({'abs', 'exp', 'exp2', 'logistic', 'rsqrt', 'sqrt'})


def _corners(fn: Any, ranges: list[Range]) -> Range:
  with np.errstate(all='ignore'):
    values = [float(fn(*corner)) for corner in itertools.product(*ranges)]
  if fn is np.multiply:  # An infinite bound times zero.
    values = [0.0 if math.isnan(value) else value for value in values]
  return _ANY if any(map(math.isnan, values)) else (min(values), max(values))


def is_square(op: _program.Op) -> bool:
  """Whether an operation gives an even power of its operand."""
  is_power = op.name == 'square' or (op.name == 'integer_pow' and op.params['y'] % 2 == 0)
  return is_power or (op.name == 'mul' and op.inputs[0] == op.inputs[1])


def squared_factor(graph: _program.Graph, op: _program.Op) -> int | None:
  """y, where an operation gives x (y x)."""
  for x, product in (op.inputs, op.inputs[::-1]) if op.name == 'mul' else ():
    producer = graph.producers.get(product)
    if producer is not None and graph.ops[producer].name == 'mul' and x in graph.ops[producer].inputs:
      first, second = graph.ops[producer].inputs
      return second if first == x else first
  return None


def _apply(op: _program.Op, x: list[Range]) -> Range:
  """The range of an operation's results, from those of its operands."""
  name = op.name
  if name in _SAME:
    return x[0]
  if is_square(op) or name in _NEVER_NEGATIVE:
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
    factor = squared_factor(graph, op)
    found = _apply(op, [out[value] for value in op.inputs])
    if factor is not None:
      found = _corners(np.multiply, [out[factor], _NONNEGATIVE])
    for value in op.outputs:
      if len(op.outputs) == 1 and not any(math.isnan(v) for v in found):
        out[value] = found
  return out


def nonnegative(init: _program.Graph, plan: _plan.Plan) -> tuple[set[int], list[Range]]:
  """The entries of the state, by index, that provably never turn negative.

  Args:
    init: the traced `inner.init`.
    plan: of the update.

  Returns:
    (entries, the range of every value of the update).
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
      return proven, after
    proven = kept
