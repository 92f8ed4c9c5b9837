"""What a traced function computes: which of it is elementwise, and small programs that do that much on tiles.

A `Graph` is a jaxpr with its inner calls inlined; `Graph.evaluate` is the one interpreter of them. A `Program` is an
elementwise part of a graph, cut out between given values: hashable, since equal leaves share one compiled update, and
free of shapes, since a tile has another one than its leaf.

XLA lets LLVM contract a product and a sum into one fused multiply-add, which skips the product's rounding. Whether that
happens depends on what was fused with what, hence on tile size, on sharding and on whether the parameters are updated
in place or through deltas, so results would differ in the last bit and, once rounded stochastically, sometimes in a
whole grid step (`tests/kernel/test_determinism.py` shows both). `uncontracted` forbids it: every product passes through
an integer operation that does nothing at run time but that no compiler can see through.
"""

from collections.abc import Callable
from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
import types
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex
import jax.numpy as jnp
import numpy as np

from lpmm_optax.storage import _mesh

# By name of a primitive that calls a function once: which of its parameters is that.
CALLS = {
  'closed_call': 'call_jaxpr',
  'custom_jvp_call': 'call_jaxpr',
  'custom_vjp_call': 'call_jaxpr',
  'eval_jaxpr': 'call_jaxpr',
  'jit': 'jaxpr',
  'remat2': 'jaxpr',
}
# Of these, those with derivatives of their own.
CUSTOM_DERIVATIVES = frozenset({'custom_jvp_call', 'custom_vjp_call'})

# What says along which axes of a mesh a value varies.
_VARIES = frozenset({'pcast', 'pvary'})
# What gives its operand. An optimization barrier gives several theirs, so who takes the first for it must not know it.
IDENTITIES = _VARIES | {'copy', 'stop_gradient'}
# What gives its operand, as near as another format has it.
CASTS = IDENTITIES | {'convert_element_type', 'reduce_precision'}
# What only changes the shape of a value that is the same everywhere.
RESHAPES = frozenset({'broadcast_in_dim', 'expand_dims', 'reshape', 'squeeze'})
# What gives some of its first operand's elements.
TAKES = frozenset({'dynamic_slice', 'gather', 'slice'})
# What gives elements of its first operand, elsewhere.
MOVES = RESHAPES | TAKES | {'rev', 'transpose'}

# Their result at an index depends on their operands at that index alone, and their parameters name no shape.
# fmt: off
_ELEMENTWISE = CASTS | {
  'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan', 'atan2', 'atanh', 'bessel_i0e',
  'bessel_i1e', 'bitcast_convert_type', 'cbrt', 'ceil', 'clamp', 'cos', 'cosh', 'digamma', 'div', 'eq', 'erf',
  'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'integer_pow', 'is_finite', 'le', 'lgamma', 'log',
  'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'nextafter', 'not', 'or', 'population_count', 'pow',
  'rem', 'round', 'rsqrt', 'select_n', 'shift_left', 'shift_right_arithmetic', 'shift_right_logical', 'sign', 'sin',
  'sinh', 'sqrt', 'square', 'sub', 'tan', 'tanh', 'xor',
}
# fmt: on


def _least(dtype: Any) -> Any:
  return -np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).min


def _greatest(dtype: Any) -> Any:
  return np.inf if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).max


# By name of the operation: the reduction of a tile, of two tiles' results, and the result of none, by dtype.
REDUCTIONS: dict[str, tuple[Callable, Callable, Callable]] = {
  'reduce_and': (jnp.all, jnp.logical_and, lambda dtype: True),
  'reduce_max': (jnp.max, jnp.maximum, _least),
  'reduce_min': (jnp.min, jnp.minimum, _greatest),
  'reduce_or': (jnp.any, jnp.logical_or, lambda dtype: False),
  'reduce_sum': (lambda x: jnp.sum(x, dtype=x.dtype), jnp.add, lambda dtype: 0),
}

_PRODUCTS = frozenset({'integer_pow', 'mul', 'square'})
# What consumes a product without being able to absorb it into a fused multiply-add.
_ABSORBS_NOTHING = _PRODUCTS | {'abs', 'bitcast_convert_type', 'convert_element_type', 'round'}

_UINT_OF_BYTES = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}


# For `Graph.evaluate` where nothing is known of a mesh, as in a kernel.
WITHOUT_MESH = dict.fromkeys(_VARIES, lambda x, **_: x)


@dataclasses.dataclass(frozen=True)
class Op:
  """One operation, on values known by number."""

  primitive: jex.Primitive
  params: dict[str, Any]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  has_effects: bool = False

  @property
  def name(self) -> str:
    return self.primitive.name


@dataclasses.dataclass(frozen=True)
class Graph:
  """A function as operations in order; a value's number is its index in `avals`.

  Attributes:
    ops: the operations.
    avals: shape and dtype of every value.
    known: values that are no result of an operation and no input: literals, and what the function closed over.
    inputs: numbers of the arguments' leaves.
    outputs: numbers of the results' leaves.
    uniform: whether a value is one number throughout; such a value is computed as a scalar.
  """

  ops: tuple[Op, ...]
  avals: tuple[Any, ...]
  known: dict[int, Any]
  inputs: tuple[int, ...]
  outputs: tuple[int, ...]
  uniform: tuple[bool, ...]

  def shape(self, value: int) -> tuple[int, ...]:
    return tuple(self.avals[value].shape)

  def is_literal(self, value: int) -> bool:
    """Whether a value is a scalar that stands in the program."""
    const = self.known.get(value)
    return isinstance(const, np.ndarray) and const.ndim == 0

  def constant(self, value: int) -> float | int | bool | None:
    """The number that a uniform value is if it follows from literals alone, else None."""
    sources = {value, *(v for op in self.slice([value]) for v in op.inputs)}
    is_number = jnp.issubdtype(self.avals[value].dtype, jnp.number) or self.avals[value].dtype == bool
    if not (is_number and self.uniform[value] and all(self.is_literal(v) or v in self.producers for v in sources)):
      return None
    # In `jax.shard_map`, the mesh of the context has a part in every computation.
    with jax.ensure_compile_time_eval(), _mesh.no_mesh():
      return self.evaluate([value], lambda _: None, rules=WITHOUT_MESH)[value].item()

  def elementwise(self, op: Op) -> bool:
    """Whether every result at an index depends on the operands at that index alone."""
    shapes = {self.shape(value) for value in op.inputs if not self.uniform[value]}
    return op.name in _ELEMENTWISE and shapes <= {self.shape(op.outputs[0])}

  def slice(
    self,
    wanted: Iterable[int],
    stop: Callable[[int], bool] = lambda value: False,
    with_effects: bool = False,
  ) -> list[Op]:
    """The operations, in order, that compute the wanted values from inputs and from values at which to stop."""
    found = {i for i, op in enumerate(self.ops) if with_effects and op.has_effects}
    pending = [*wanted, *(self.effects if with_effects else ())]
    while pending:
      value = pending.pop()
      if value in self.producers and not stop(value) and self.producers[value] not in found:
        found.add(self.producers[value])
        pending += self.ops[self.producers[value]].inputs
    return [self.ops[i] for i in sorted(found)]

  def dependents(self, values: Iterable[int]) -> set[int]:
    """These values, and all that depend on some of them."""
    found = set(values)
    for op in self.ops:
      if not found.isdisjoint(op.inputs):
        found.update(op.outputs)
    return found

  @functools.cached_property
  def producers(self) -> dict[int, int]:
    """For every result of an operation, the operation's index."""
    return {value: i for i, op in enumerate(self.ops) for value in op.outputs}

  @functools.cached_property
  def effects(self) -> list[int]:
    """What operations with side effects (printing, callbacks) are given."""
    return [value for op in self.ops if op.has_effects for value in op.inputs]

  @functools.cached_property
  def absorbable(self) -> frozenset[int]:
    """The values that what consumes them could compute in one with a product."""
    return frozenset(self.outputs).union(*(op.inputs for op in self.ops if op.name not in _ABSORBS_NOTHING))

  def evaluate(
    self,
    wanted: Sequence[int],
    argument: Callable[[int], Any],
    *,
    given: Container[int] = (),
    zero: jax.Array | None = None,
    products: Container[str] = ('mul',),
    rules: Mapping[str, Callable] = types.MappingProxyType({}),
    with_effects: bool = False,
  ) -> dict[int, jax.Array]:
    """The wanted values, uniform ones as scalars.

    Args:
      wanted: numbers of values.
      argument: gives an input, or what the function closed over, by its number; asked only for what is needed.
      given: values that `argument` gives too, though they are results of operations.
      zero: uint32[], zero at run time, with which every floating-point product is rounded before it is used; None
        leaves that to the compiler.
      products: names of the operations that are products then. Squares are none by default: those of whole leaves are
        summed for a norm, and XLA on a CPU would write them to memory first.
      rules: by name of an elementwise operation, the function of (operand, **parameters) that stands in for it.
      with_effects: whether operations with side effects are executed besides.
    """
    env: dict[int, Any] = {}

    def read(value):
      if value not in env:
        x = self.known[value] if self.is_literal(value) else argument(value)
        env[value] = jnp.reshape(x, ()) if self.uniform[value] and np.ndim(x) else x
      return env[value]

    for op in self.slice(wanted, given.__contains__, with_effects):
      operands = [read(value) for value in op.inputs]
      if op.name in RESHAPES and self.uniform[op.outputs[0]]:
        results = operands
      elif op.name in rules:
        results = [rules[op.name](*operands, **op.params)]
      elif self.elementwise(op):
        results = [bind_elementwise(op.primitive, op.params, operands)]
      else:
        full = [jnp.broadcast_to(x, self.shape(value)) for x, value in zip(operands, op.inputs, strict=True)]
        results = op.primitive.bind(*full, **op.primitive.get_bind_params(op.params))
        results = results if op.primitive.multiple_results else [results]
      if zero is not None and op.name in products and op.outputs[0] in self.absorbable:
        results = [_opaque(x, zero) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in results]
      for value, x in zip(op.outputs, results, strict=True):
        env[value] = jnp.reshape(x, ()) if self.uniform[value] and np.ndim(x) else x
    return {value: read(value) for value in wanted}


def hidden(x: jax.Array) -> jax.Array:
  """A number that no compiler knows, though it be a constant, as where a state is made in the computation that uses it.

  XLA does not look through the barrier, nor, once it has removed that, does LLVM on a CPU look from one kernel into
  another, as the maximum is one.
  """
  return jnp.max(lax.optimization_barrier(jnp.broadcast_to(x, (64,))))


def runtime_zero(count: jax.Array) -> jax.Array:
  """uint32 zero, unknown at compile time: the sign bit of a `hidden` step count, which is never negative."""
  return (count >> 31).astype(jnp.uint32)


@jax.custom_jvp
def _opaque(x: jax.Array, zero: jax.Array) -> jax.Array:
  bits = _UINT_OF_BYTES[x.dtype.itemsize]
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) ^ zero.astype(bits), x.dtype)


@_opaque.defjvp
def _opaque_jvp(primals, tangents):
  return _opaque(*primals), tangents[0]


def uncontracted(fn: Callable, zero: jax.Array) -> Callable:
  """`fn`, a traceable function of arrays, with every floating-point product rounded before it is used.

  Args:
    fn: the function.
    zero: uint32[], from `runtime_zero`.
  """

  def wrapped(*args):
    graph, shapes = trace(fn, *args)
    arguments = dict(zip(graph.inputs, jax.tree.leaves(args), strict=True)) | graph.known
    found = graph.evaluate(graph.outputs, arguments.__getitem__, zero=zero, products=_PRODUCTS, with_effects=True)
    treedef: Any
    leaves, treedef = jax.tree.flatten(shapes)
    return treedef.unflatten(
      jnp.broadcast_to(found[value], s.shape) for value, s in zip(graph.outputs, leaves, strict=True)
    )

  return wrapped


def bind_elementwise(primitive: jex.Primitive, params: Mapping[str, Any], operands: Sequence[Any]) -> jax.Array:
  """Applies an elementwise primitive to arrays of one shape and to scalars.

  An array divided by a scalar is multiplied by its reciprocal, as a bias correction would otherwise take most of Adam's
  arithmetic; it differs in the last bit.
  """
  by_scalar = primitive is lax.div_p and np.ndim(operands[0]) and not np.ndim(operands[1])
  if by_scalar and jnp.issubdtype(operands[0].dtype, jnp.floating):
    return lax.mul(operands[0], jnp.broadcast_to(1 / operands[1], np.shape(operands[0])))
  shapes = {np.shape(x) for x in operands}
  if len(shapes) > 1:  # Where there is nothing to do, jnp takes its time to see that.
    shape = jnp.broadcast_shapes(*shapes)
    operands = [jnp.broadcast_to(x, shape) for x in operands]
  return primitive.bind(*operands, **params)


def _is_cheap(jaxpr: Any) -> bool:
  """Whether a branch can as well be computed and then thrown away, which makes it elementwise where its parts are."""
  inner: list[Any] = []
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in CALLS:
      inner.append(eqn.params[CALLS[eqn.primitive.name]])
    elif eqn.primitive is lax.cond_p:
      inner += eqn.params['branches']
    elif eqn.primitive.name not in _ELEMENTWISE | RESHAPES | REDUCTIONS.keys():
      return False
  return not jaxpr.effects and all(_is_cheap(part) for part in inner)


def trace(fn: Callable, *args: Any) -> tuple[Graph, Any]:
  """The graph of `fn(*args)` and its result's pytree of ShapeDtypeStructs; what fn closes over becomes `known`."""
  closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
  ops: list[Op] = []
  avals: list[Any] = []
  known: dict[int, Any] = {}

  def new(aval):
    avals.append(aval)
    return len(avals) - 1

  def inline(jaxpr, consts, arguments):
    env = dict(zip(jaxpr.invars, arguments, strict=True))
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      env[var] = new(var.aval)
      known[env[var]] = const

    def read(atom):
      if not isinstance(atom, jex.Literal):
        return env[atom]
      aval: Any = atom.aval
      value = new(aval)
      known[value] = np.asarray(atom.val, aval.dtype)
      return value

    for eqn in jaxpr.eqns:
      inputs = tuple(read(atom) for atom in eqn.invars)
      if eqn.primitive is lax.cond_p and all(_is_cheap(branch) for branch in eqn.params['branches']):
        index, *operands = inputs
        cases = [inline(branch.jaxpr, branch.consts, operands) for branch in eqn.params['branches']]
        outputs = [new(var.aval) for var in eqn.outvars]
        for value, *alternatives in zip(outputs, *cases, strict=True):
          ops.append(Op(lax.select_n_p, {}, (index, *alternatives), (value,)))
      elif eqn.primitive.name in CALLS:
        inner = eqn.params[CALLS[eqn.primitive.name]]
        open_jaxpr, inner_consts = (inner.jaxpr, inner.consts) if isinstance(inner, jex.ClosedJaxpr) else (inner, ())
        outputs = inline(open_jaxpr, inner_consts, inputs)
      else:
        outputs = [new(var.aval) for var in eqn.outvars]
        ops.append(Op(eqn.primitive, dict(eqn.params), inputs, tuple(outputs), bool(eqn.effects)))
      env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]

  inputs = [new(var.aval) for var in closed.jaxpr.invars]
  outputs = inline(closed.jaxpr, closed.consts, inputs)
  graph = Graph(tuple(ops), tuple(avals), known, tuple(inputs), tuple(outputs), ())
  return dataclasses.replace(graph, uniform=_uniform(graph)), out_shape


def _uniform(graph: Graph) -> tuple[bool, ...]:
  uniform = [math.prod(aval.shape) == 1 for aval in graph.avals]
  for op in graph.ops:
    if op.name in _ELEMENTWISE | RESHAPES and all(uniform[value] for value in op.inputs):
      uniform[op.outputs[0]] = True
  return tuple(uniform)


@dataclasses.dataclass(frozen=True)
class Program:
  """An elementwise function of arrays of one shape and of scalars.

  Attributes:
    steps: (primitive, parameters, operands) per operation; an operand is a number or a `Literal`. Numbers count first
      the arguments, then the results of the steps.
    results: what the program returns, by number or as a Literal.
  """

  steps: tuple[tuple[jex.Primitive, tuple[tuple[str, Any], ...], tuple[Any, ...]], ...]
  results: tuple[Any, ...]

  def __call__(self, *arguments: Any, constant: Container[Any] = ()) -> list[jax.Array]:
    """The results; scalars where they depend on scalars alone. Values that count as constant have no derivative."""
    env = list(arguments)
    read = lambda x: jnp.asarray(x.value, x.dtype) if isinstance(x, Literal) else env[x]
    for primitive, params, operands in self.steps:
      x = bind_elementwise(primitive, dict(params), [read(x) for x in operands])
      env.append(lax.stop_gradient(x) if len(env) in constant else x)
    return [read(x) for x in self.results]


@dataclasses.dataclass(frozen=True)
class Literal:
  """A scalar that the compiler may know."""

  value: float | int | bool
  dtype: str


def cut(graph: Graph, arguments: Sequence[int], wanted: Sequence[int]) -> Program:
  """The part of a graph between `arguments` and `wanted`, as a Program.

  Raises:
    ValueError: if the wanted values need anything but the arguments and literals.
  """
  number: dict[int, Any] = {value: i for i, value in enumerate(arguments)}

  def read(value):
    if value not in number:
      if not graph.is_literal(value):
        raise ValueError(f'value {value} is no argument of the program')
      number[value] = Literal(graph.known[value].item(), graph.known[value].dtype.name)
    return number[value]

  steps: list[Any] = []
  for op in graph.slice(wanted, stop=number.__contains__):
    if op.name in RESHAPES:
      number[op.outputs[0]] = read(op.inputs[0])
    else:
      steps.append((op.primitive, tuple(sorted(op.params.items())), tuple(read(value) for value in op.inputs)))
      number[op.outputs[0]] = len(arguments) + len(steps) - 1
  return Program(tuple(steps), tuple(read(value) for value in wanted))
