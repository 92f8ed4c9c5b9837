"""Finds the uses of the entries of a state in the graph of an update.

They are read along the operations that an entry passes through element by element.
"""

from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.extend import core as jex
import jax.numpy as jnp

from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program
from lpmm_optax.trace import _ranges
from lpmm_optax.trace._uses import Use
from lpmm_optax.trace._uses import Uses

_SLOWEST_IN_8_BITS = 0.9991  # A decay.
_LATE = 1_000_000  # A step, when a schedule of a decay has reached its end.

_ROOTS = frozenset({'cbrt', 'log', 'log1p', 'pow', 'rsqrt', 'sqrt'})
_FORGETS = frozenset({'eq', 'ge', 'gt', 'is_finite', 'le', 'lt', 'ne', 'sign'})
_MOVES = _program.MOVES | {'concatenate'}
# What starts as its parameter has that's codes, though not once it is rounded.
_COPIES = _program.CASTS - {'reduce_precision'}
_MATRIX_PRODUCTS = frozenset({'conv_general_dilated', 'dot_general', 'fft'})
# fmt: off
_DECOMPOSITIONS = frozenset({
  'cholesky', 'eig', 'eigh', 'geqp3', 'geqrf', 'hessenberg', 'lu', 'qr', 'schur', 'svd', 'triangular_solve',
  'tridiagonal', 'tridiagonal_solve',
})
# fmt: on


@dataclasses.dataclass(frozen=True)
class _Flow:
  """The entries that a value depends on element by element, by index.

  Attributes:
    above: as a term or a factor.
    below: as a divisor.
    squared: of these, the ones of which it has squares.
    differs: the ones whose difference it is, which may be far smaller than they are.
    changes: the ones that keep the last gradient or parameter, and of whose change it is a multiple, or a sum of such.
  """

  above: frozenset[int] = frozenset()
  below: frozenset[int] = frozenset()
  squared: frozenset[int] = frozenset()
  differs: frozenset[int] = frozenset()
  changes: frozenset[int] = frozenset()

  @property
  def all(self) -> frozenset[int]:
    return self.above | self.below

  def inverse(self) -> '_Flow':
    return dataclasses.replace(self, above=self.below, below=self.above)


def _joined(flows: Iterable[_Flow]) -> _Flow:
  out = _Flow()
  for flow in flows:
    out = _Flow(*(getattr(out, x.name) | getattr(flow, x.name) for x in dataclasses.fields(_Flow)))
  return out


def _operations(op: _program.Op) -> set[str]:
  """The names of all operations in the functions that an operation calls: the body of a loop, say."""
  names: set[str] = set()
  pending = [op.params]
  while pending:
    for x in jax.tree.leaves(pending.pop(), is_leaf=lambda x: isinstance(x, jex.Jaxpr | jex.ClosedJaxpr)):
      jaxpr = x.jaxpr if isinstance(x, jex.ClosedJaxpr) else x
      if isinstance(jaxpr, jex.Jaxpr):
        names |= {eqn.primitive.name for eqn in jaxpr.eqns}
        pending += [eqn.params for eqn in jaxpr.eqns]
  return names


class _Reader:
  """Goes through the operations of an update once, and notes what becomes of the entries.

  Attributes:
    flows: of every value.
    uses: of every entry, by index.
    divisors: for every entry, those that it is divided by.
  """

  def __init__(self, plan: _plan.Plan, ranges: Sequence[_ranges.Range]):
    self._plan, self._graph, self._ranges = plan, plan.graph, ranges
    self.flows = [_Flow()] * len(plan.graph.avals)
    self.uses: dict[int, set[Use]] = {e: set() for e in _plan.owned(plan.entries)}
    self.divisors: dict[int, set[int]] = {e: set() for e in self.uses}
    for value, (what, index) in plan.inputs.items():
      if what == 'state' and index in self.uses:
        self.flows[value] = _Flow(frozenset({index}))
    for op in self._graph.ops:
      flow = self._read(op, [self.flows[value] for value in op.inputs])
      for value in op.outputs:
        self.flows[value] = flow

  def source(self, value: int) -> int:
    """The value that this one is a copy of."""
    return _source(self._graph, value, _program.CASTS)

  def _note(self, use: Use, entries: Iterable[int]) -> None:
    for e in entries:
      self.uses[e].add(use)

  def _read(self, op: _program.Op, x: list[_Flow]) -> _Flow:
    """Notes the uses in one operation; returns the flow of its results."""
    names, flow = {op.name} | _operations(op), _joined(x)
    entries = flow.all
    if not (entries or flow.changes) or op.name in _FORGETS:
      return _Flow()
    if names & _DECOMPOSITIONS:
      self._note(Use.DECOMPOSITION, entries)
    # A product to one number is a sum, in which errors average out; and those of a divisor stay relative.
    if names & _MATRIX_PRODUCTS and any(self._graph.avals[value].size > 1 for value in op.outputs):
      self._note(Use.PRODUCT, flow.above)
    if len(names) > 1 and names & (_ROOTS | {'div'}):
      self._note(Use.DIVISOR, entries)
    if op.name in _MOVES or self._graph.elementwise(op):
      return self._element(op, x)
    # A norm is no value of one element any more.
    return _Flow(changes=flow.changes)

  def _element(self, op: _program.Op, x: list[_Flow]) -> _Flow:
    name = op.name
    factor = _ranges.squared_factor(self._graph, op)
    if _ranges.is_square(op) or factor is not None:
      flow = _joined(x)
      squared = x[0] if factor is None else self.flows[factor]
      return dataclasses.replace(flow, squared=flow.squared | squared.all, differs=flow.differs - squared.all)
    if name == 'mul':
      return self._product(*x)
    if name == 'div':
      self._root(x[1])
      return self._product(x[0], x[1].inverse())
    if name in _ROOTS or (name == 'integer_pow' and op.params['y'] < 0):
      self._root(x[0])
      return x[0].inverse() if self._inverts(op) else x[0]
    if name in ('max', 'min'):
      self._note(Use.MAXIMUM, self._maximum(op, x))
    flow = _joined(x[1:] if name == 'select_n' else x)
    if name in ('add', 'add_any', 'sub'):
      # Sums over leaves start at zero.
      terms = [each.changes for value, each in zip(op.inputs, x, strict=True) if not self._graph.is_literal(value)]
      changes = flow.changes if all(terms) else frozenset()
      flow = dataclasses.replace(flow, changes=changes | (self._changes(op) if name == 'sub' else frozenset()))
      if all(each.all for each in x) and len(flow.all) > 1:
        low, high = self._ranges[op.outputs[0]]
        return flow if low >= 0 or high <= 0 else dataclasses.replace(flow, differs=flow.all)
    return flow

  def _changes(self, op: _program.Op) -> set[int]:
    """The entry that a difference is the change of: of the last gradient or parameter and the present one."""
    new, old = (self._plan.inputs.get(self.source(value), (None, -1)) for value in op.inputs)
    is_last = old[0] == 'state' and old[1] in self.uses and new[0] in ('gradient', 'param')
    return {old[1]} if is_last and self._plan.inputs.get(self.source(self._plan.new[old[1]])) == new else set()

  def _inverts(self, op: _program.Op) -> bool:
    if op.name == 'pow':
      return self._ranges[op.inputs[1]][1] < 0
    return op.name in ('integer_pow', 'rsqrt')

  def _root(self, flow: _Flow) -> None:
    self._note(Use.DIFFERENCE, flow.differs)
    self._note(Use.CHANGE, flow.changes)
    self._note(Use.DEVIATION, flow.all & flow.squared)
    self._note(Use.DIVISOR, flow.all - flow.squared)

  def _product(self, a: _Flow, b: _Flow) -> _Flow:
    for above, below in ((a, b), (b, a)):
      for e in above.above:
        self.divisors[e] |= below.below - below.squared - {e}
    return _joined((a, b))

  def _maximum(self, op: _program.Op, x: list[_Flow]) -> frozenset[int]:
    """The entries of max(entry, something of others)."""
    for value, other in zip(op.inputs, x[::-1], strict=True):
      what, e = self._plan.inputs.get(self.source(value), (None, -1))
      if what == 'state' and e in self.uses and other.all - {e}:
        return other.all | {e}
    return frozenset()

  def factors(self, nonnegative: Collection[int]) -> set[int]:
    """The entries without a sign that updates are proportional to, and those computed from them."""
    above = lambda value: self.flows[value].above
    reach = frozenset().union(*(above(delta) for delta in self._graph.outputs[: len(self._plan.leaves)]))
    while reach != (reach := reach.union(*(above(self._plan.new[e]) for e in reach))):
      pass
    found = reach & frozenset(nonnegative)
    return {e for e in reach if e in found or found & above(self._plan.new[e])}

  def decay(self, e: int, number: Callable[[int], float]) -> float:
    """d, where the update makes d m + (anything else) of an entry m; NaN if it does not.

    Args:
      e: its index.
      number: gives a value as a number, or NaN.
    """
    graph = self._graph
    slopes = {value: 1.0 for value, source in self._plan.inputs.items() if source == ('state', e)}

    def slope(value: int) -> float:
      if e not in self.flows[value].all:
        return 0.0
      if value not in slopes:
        slopes[value] = find_slope(graph.ops[graph.producers[value]])
      return slopes[value]

    def find_slope(op: _program.Op) -> float:
      first, *rest = op.inputs
      if op.name in _program.CASTS | _program.RESHAPES:
        return slope(first)
      if op.name == 'select_n':  # Of what a step may do, that which forgets most.
        found = [slope(case) for case in rest]
        return math.nan if any(map(math.isnan, found)) else min(found, key=abs)
      if op.name in ('add', 'add_any'):
        return slope(first) + slope(rest[0])
      if op.name == 'sub':
        return slope(first) - slope(rest[0])
      if op.name == 'mul' and e not in self.flows[first].all:
        return number(first) * slope(rest[0])
      if op.name in ('div', 'mul') and e not in self.flows[rest[0]].all:
        return slope(first) / number(rest[0]) if op.name == 'div' else slope(first) * number(rest[0])
      return math.nan

    return slope(self._plan.new[e])


class _UnknownError(Exception):
  pass


class _LateNumbers:
  """The values of an update that follow from hyperparameters and counts, late in training."""

  def __init__(self, init: _program.Graph, plan: _plan.Plan):
    self._init, self._plan, self._graph = init, plan, plan.graph
    owned = _plan.owned(plan.entries)
    self._shared = {v: e for v, (what, e) in plan.inputs.items() if what == 'state' and e not in owned}
    is_integer = lambda value: jnp.issubdtype(self._graph.avals[value].dtype, jnp.integer)
    self._counts = {value for value in self._shared if is_integer(value)}
    # A counter that starts anew, as of microbatches, says nothing of when.
    self._counts = {v for v in self._counts if self.number(plan.new[self._shared[v]]) >= _LATE}

  def number(self, value: int) -> float:
    """A value as a number, NaN if it is not known or none."""
    if not self._graph.uniform[value]:
      return math.nan
    try:
      with jax.ensure_compile_time_eval():
        return float(self._graph.evaluate([value], self._argument, rules=_program.WITHOUT_MESH)[value])
    except _UnknownError:
      return math.nan

  def _argument(self, value: int) -> Any:
    if value in self._graph.known:
      return _concrete(self._graph.known[value])
    if value in self._counts:
      aval = self._graph.avals[value]
      return jnp.full(aval.shape, min(_LATE, jnp.iinfo(aval.dtype).max), aval.dtype)
    if value not in self._shared or jnp.issubdtype(self._graph.avals[value].dtype, jnp.integer):
      raise _UnknownError
    start = self._init.outputs[self._shared[value]]
    return self._init.evaluate([start], self._at_start, rules=_program.WITHOUT_MESH)[start]

  def _at_start(self, value: int) -> Any:
    if value not in self._init.known:
      raise _UnknownError
    return _concrete(self._init.known[value])


def _concrete(x: Any) -> Any:
  if isinstance(x, jax.core.Tracer):
    raise _UnknownError
  return x


def find(init: _program.Graph, plan: _plan.Plan) -> Uses:
  """What the traced `inner.init` and the planned update tell of the state."""
  if not plan.leaves:
    return Uses(plan.entries)
  nonnegative, ranges = _ranges.nonnegative(init, plan)
  reader, numbers = _Reader(plan, ranges), _LateNumbers(init, plan)
  inputs = {index: value for value, (what, index) in plan.inputs.items() if what == 'state'}
  copies = {e for e in reader.uses if _source(init, init.outputs[e], _COPIES) in init.inputs}
  for e in reader.factors(nonnegative):
    reader.uses[e].add(Use.FACTOR)
  for e, uses in reader.uses.items():
    is_constant = reader.source(plan.new[e]) == inputs[e]
    if is_constant and e in copies:
      # It has the parameter's own codes, for ever.
      uses.clear()
      reader.divisors[e].clear()
    elif not (is_constant or e in copies):
      decay = reader.decay(e, numbers.number)
      # Averages of what has one sign do not become small, nor do errors count against anything smaller. Sums grow.
      if e in nonnegative or Use.DIVISOR in uses:
        uses |= {Use.SLOW_DIVISOR} if Use.DIVISOR in uses and _SLOWEST_IN_8_BITS < decay < 1 else set()
      elif decay > _SLOWEST_IN_8_BITS:
        uses.add(Use.SLOW_AVERAGE)
  return Uses(plan.entries, nonnegative, copies, reader.uses, reader.divisors)


def _source(graph: _program.Graph, value: int, through: Collection[str]) -> int:
  """The value that one is computed from by operations of these names alone."""
  while value in graph.producers and graph.ops[graph.producers[value]].name in through:
    value = graph.ops[graph.producers[value]].inputs[0]
  return value
