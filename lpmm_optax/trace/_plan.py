"""An Optax transformation seen leaf by leaf: what of its state belongs to which parameter, and what of its update is
elementwise.

Nothing here goes by names: `inner.update` is traced once on the dense tree, masks, partitions, schedules and all, and
the graph is cut into one elementwise program per leaf and the rest, the *outer* part: step counts, learning rates,
norms of gradients, and whole leaves where the update is not elementwise.
"""

from collections.abc import Container
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import re
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.storage import _mesh
from lpmm_optax.trace import _program


@dataclasses.dataclass(frozen=True)
class Params:
  """The parameters' structure, and the leaves that are updated; inner transformations see a MaskedNode for others.

  Attributes:
    treedef: of the whole tree, quantized leaves being leaves.
    keys: the key path of every leaf.
    paths: the same as users write it.
    active: indices of the leaves that are updated: floating point, and not empty.
    templates: the dense array that each active leaf stands for.
  """

  treedef: Any
  keys: tuple[Any, ...]
  paths: tuple[str, ...]
  active: tuple[int, ...]
  templates: dict[int, jax.ShapeDtypeStruct]

  def tree(self, by_leaf: Any) -> Any:
    """The tree that an inner transformation sees, from a value per active leaf."""
    leaves: list[Any] = [optax.MaskedNode()] * len(self.keys)
    for i in self.active:
      leaves[i] = by_leaf[i]
    return self.treedef.unflatten(leaves)


def flatten(params: Any) -> tuple[Params, list[Any]]:
  """The structure of a parameter tree, and its leaves.

  Raises:
    TypeError: for a leaf that cannot be a parameter, naming it.
  """
  items, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_array.is_quantized)
  templates = {}
  for i, (path, leaf) in enumerate(items):
    if not hasattr(leaf, 'dtype'):
      raise TypeError(f'{_array.path_str(path)}: a parameter must be an array, got {leaf!r}')
    _array.check(_array.path_str(path), leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      raise TypeError(
        f'{_array.path_str(path)}: complex parameters are not supported; split them into real and imaginary parts'
      )
    if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.size:
      templates[i] = _mesh.template(_array.stored(leaf).codes, _codec.compute_dtype(leaf.dtype))
  keys = tuple(path for path, _ in items)
  paths = tuple(_array.path_str(path) for path in keys)
  return Params(treedef, keys, paths, tuple(templates), templates), [leaf for _, leaf in items]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One array of an inner state.

  Attributes:
    path: where it stands in the state.
    field: the last name on the way there that is not part of a parameter's path: 'mu', 'trace', 'count'.
    leaf: index of the parameter that it has an element for each element of; None if it is shared or of another shape.
    below: path of the parameter whose place it has in a tree like the parameters; None outside such a tree.
  """

  path: str
  field: str
  leaf: int | None
  below: str | None


class InnerState(NamedTuple):
  """An inner state, taken apart.

  Attributes:
    entries: what its arrays are.
    arrays: these, quantized ones as one; or ShapeDtypeStructs.
    treedef: its structure.
  """

  entries: list[Entry]
  arrays: list[Any]
  treedef: Any


def owned(entries: Sequence[Entry]) -> dict[int, int]:
  """For the entries that belong to a leaf, by index, the leaf."""
  return {e: entry.leaf for e, entry in enumerate(entries) if entry.leaf is not None}


def find_parameter(path: Any, by_keys: dict[Any, int]) -> tuple[int, int, int] | None:
  """(start, end, leaf): where a parameter's whole path stands in that of an array of the state, the latest and longest.

  It ends the array's path, for state trees are made like the parameters; or the array is kept below it, where every
  parameter has a dict of its own.
  """
  for end in range(len(path), -1, -1):
    for start in range(end + 1):
      # A bare array has an empty path, which stands everywhere.
      if path[start:end] in by_keys and (start < end or end == len(path)):
        return start, end, by_keys[path[start:end]]
  return None


def take_apart(params: Params, state: Any) -> InnerState:
  """The entries of an inner state with their arrays, and its structure."""
  by_keys = {params.keys[i]: i for i in params.active}
  items, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=_array.is_quantized)
  entries = []
  for path, x in items:
    start, end, leaf = find_parameter(path, by_keys) or (len(path), len(path), None)
    names = [str(getattr(key, 'name', getattr(key, 'key', ''))) for key in (*path[:start], *path[end:])]
    field = next((name for name in reversed(names) if name and not name.isdigit()), 'state')
    below = None if leaf is None else params.paths[leaf]
    if leaf is not None:
      same = getattr(x, 'shape', None) == params.templates[leaf].shape and jnp.issubdtype(x.dtype, jnp.floating)
      leaf = leaf if same else None
    entries.append(Entry(_array.path_str(path), field, leaf, below))
  return InnerState(entries, [x for _, x in items], treedef)


def _explained(inner_method: str, fn: Any, *args: Any) -> Any:
  # Optax's optimizers and schedules mix dtypes, whatever the user's setting is for code of their own. Shapes alone are
  # traced, which no mesh of the context should reach, for ours run in automatic mode; but in `jax.shard_map` types name
  # axes of that mesh.
  axis_types = [x.manual_axis_type for x in jax.tree.leaves(args)]
  is_manual = any(t is not None and t.varying for t in axis_types)
  try:
    with jax.numpy_dtype_promotion('standard'), contextlib.nullcontext() if is_manual else _mesh.no_mesh():
      return _program.trace(fn, *args)
  except Exception as error:
    error.add_note(
      f'lpmm_optax was tracing {inner_method} of the inner transformation, to which parameters are dense arrays, one '
      'per leaf. Its state must be arrays; a mask or label tree must have one entry per parameter (make it with '
      'is_leaf=lpmm_optax.is_quantized, or pass a function), or go around with lpmm_optax.masked or partition.'
    )
    raise


def trace_init(inner: optax.GradientTransformation, params: Params) -> tuple[_program.Graph, InnerState]:
  """The graph of `inner.init` on the dense parameters, and the state as ShapeDtypeStructs.

  Raises:
    TypeError: for complex state, naming it.
  """
  graph, shapes = _explained('init', inner.init, params.tree(params.templates))
  for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
      raise TypeError(
        f'{_array.path_str(path)}: complex state is not supported, the inner transformation has {x.dtype}'
      )
  return graph, take_apart(params, shapes)


def check_state(
  name: str,
  inner: optax.GradientTransformation,
  params: Params,
  state: InnerState,
) -> None:
  """Raises a ValueError, naming the array, unless the state is one that inner makes for these parameters."""
  _, expected = trace_init(inner, params)
  found = {entry.path: x.shape for entry, x in zip(state.entries, state.arrays, strict=True)}
  wanted = {entry.path: x.shape for entry, x in zip(expected.entries, expected.arrays, strict=True)}
  problem = next((f'{path} is missing' for path in wanted if path not in found), None)
  problem = problem or next((f'it has no {path}' for path in found if path not in wanted), None)
  for path, shape in wanted.items():
    if not problem and found[path] != shape:
      problem = f'{path} has shape {found[path]}, expected {shape}'
  if not problem and state.treedef != expected.treedef:
    problem = f'it is {state.treedef}, expected {expected.treedef}'
  if problem:
    raise ValueError(
      f'{name} got a state that it did not create for these parameters: {problem}; see that the chain that made the '
      'state is the one that uses it'
    )


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """How one leaf is updated.

  Attributes:
    program: gives delta and new fields from (gradient, parameter, *fields, *reads, *scalars).
    fields: indices of the leaf's entries.
    reads: outer values of the leaf's shape.
    scalars: outer values that are uniform.
    is_difference: whether the delta is computed as a new parameter minus the old one.
    obstacle: the operation that is not elementwise, if the leaf is processed whole, else None.
    templates: what the program's arguments are, scalars and, in place of tiles, some elements.
  """

  program: _program.Program
  fields: tuple[int, ...]
  reads: tuple[int, ...]
  scalars: tuple[int, ...]
  is_difference: bool
  obstacle: str | None
  templates: tuple[jax.ShapeDtypeStruct, ...]


@dataclasses.dataclass(frozen=True)
class Reduction:
  """A scalar that is reduced from one leaf's gradient, elementwise until then.

  Attributes:
    name: of the operation: 'reduce_sum'.
    leaf: index of the leaf.
    program: gives what is reduced from (gradient, *scalars).
    scalars: values of the graph that are uniform.
  """

  name: str
  leaf: int
  program: _program.Program
  scalars: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How an update is split.

  Attributes:
    graph: of the whole update.
    inputs: what each input of the graph is: ('gradient', leaf), ('state', entry) or ('param', leaf).
    entries: of the state.
    new: for each entry, the value that replaces it.
    leaves: by index of the active leaf.
    reductions: by the value that they result in.
  """

  graph: _program.Graph
  inputs: dict[int, tuple[str, int]]
  entries: tuple[Entry, ...]
  new: tuple[int, ...]
  leaves: dict[int, LeafPlan]
  reductions: dict[int, Reduction]

  @property
  def shared(self) -> dict[int, int]:
    """For each entry that belongs to no leaf, by index, the outer value that replaces it."""
    return {e: self.new[e] for e, entry in enumerate(self.entries) if entry.leaf is None}

  @property
  def outer(self) -> list[int]:
    """All outer values that are needed."""
    wanted = list(self.shared.values())
    for leaf in self.leaves.values():
      wanted += [*leaf.reads, *leaf.scalars]
    return list(dict.fromkeys(wanted))

  def sources(self, wanted: Sequence[int], given: Container[int] = ()) -> set[int]:
    """All values that some are computed from, themselves included, as far back as inputs and given values."""
    return {*wanted, *(v for op in self.graph.slice(wanted, given.__contains__) for v in op.inputs)}

  def gradients_of(self, values: Iterable[int]) -> set[int]:
    """The leaves whose gradients are among some values."""
    found = (self.inputs[value] for value in values if value in self.inputs)
    return {leaf for what, leaf in found if what == 'gradient'}


def plan_first_update(
  inner: optax.GradientTransformationExtraArgs,
  params: Params,
  state: InnerState,
  extra_args: Mapping[str, Any] = types.MappingProxyType({}),
) -> Plan:
  """`plan_update` before any update, when extra arguments may not be known.

  Of those that inner insists on, Optax's line searches take `grad`, a tree like the parameters, and `value_fn`, from
  parameters to a scalar, as Sophia takes `obj_fn`; any other is a scalar.
  """
  kinds = {'grad': params.tree(params.templates), 'value_fn': optax.tree.sum, 'obj_fn': optax.tree.sum}
  missing: dict[str, Any] = {}
  while True:
    try:
      return plan_update(inner, params, state, extra_args, placeholders=missing)
    except Exception as error:
      message = str(error)
      names = re.findall(r"'(\w+)'", message) if 'required keyword-only argument' in message else []
      names += re.findall(r'^(\w+) must be provided', message)
      if not set(names) - set(missing):
        error.add_note(
          'init traces one update, to see which format suits which field. So it must be called where an update can be: '
          'inside of the jax.shard_map or pmap whose axes inner names. Where that cannot be, low_precision(inner, '
          'formats=...) does without if that is None, or names a Format for every field.'
        )
        raise
      missing |= {name: kinds.get(name, jax.ShapeDtypeStruct((), jnp.float32)) for name in names}


def plan_update(
  inner: optax.GradientTransformationExtraArgs,
  params: Params,
  state: InnerState,
  extra_args: Mapping[str, Any],
  gradients: Any = None,
  placeholders: Mapping[str, Any] = types.MappingProxyType({}),
) -> Plan:
  """Traces `inner.update` and cuts it into the leaves' programs and the outer part.

  Args:
    inner: the transformation.
    params: the parameters' structure.
    state: of inner, of whose arrays shapes and dtypes count.
    extra_args: passed on; arrays in them are shared by all leaves.
    gradients: dense templates by leaf, for the manual axes along which they vary; None is those of the parameters.
    placeholders: extra arguments of which only shapes are known, and functions in their place.

  Raises:
    ValueError: if inner returns updates or a state of another structure than it got.
  """
  like_params = params.tree(params.templates)
  entries = state.entries
  like_state = state.treedef.unflatten([_mesh.template(_array.stored(x).codes, x.dtype) for x in state.arrays])
  like_gradients = like_params if gradients is None else params.tree(gradients)
  functions = {name: x for name, x in placeholders.items() if callable(x)}
  graph, (updates, new_state) = _explained(
    'update',
    lambda g, s, p, extra: inner.update(g, s, p, **extra_args, **functions, **extra),
    like_gradients,
    like_state,
    like_params,
    {name: x for name, x in placeholders.items() if name not in functions},
  )
  for what, got, expected in (('updates', updates, like_params), ('a state', new_state, like_state)):
    got_treedef: Any = jax.tree.structure(got)
    if got_treedef != jax.tree.structure(expected):
      raise ValueError(
        f'the inner transformation got {"gradients" if what == "updates" else "a state"} of structure '
        f'{jax.tree.structure(expected)} and returned {what} of structure {got_treedef}; lpmm_optax.chain and '
        'low_precision take those that keep both, as optax.snapshot does, but not optax.monitor'
      )
  numbers = iter(graph.inputs)
  inputs = {next(numbers): ('gradient', i) for i in params.active}
  inputs |= {next(numbers): ('state', e) for e in range(len(entries))}
  inputs |= {next(numbers): ('param', i) for i in params.active}
  of = {what: value for value, what in inputs.items()}
  outputs = iter(graph.outputs)
  deltas = {i: next(outputs) for i in params.active}
  new = tuple(outputs)

  owners, stored = _owners(graph, entries, inputs)
  fields: dict[int, tuple[int, ...]] = dict.fromkeys(params.active, ())
  for e, i in owned(entries).items():
    fields[i] += (e,)
  leaves = {}
  for i in params.active:
    arguments = [of['gradient', i], of['param', i], *(of['state', e] for e in fields[i])]
    wanted = [deltas[i], *(new[e] for e in fields[i])]
    for value in wanted:
      if not graph.uniform[value] and graph.shape(value) != params.templates[i].shape:
        raise ValueError(
          f'{params.paths[i]}: the inner transformation returned an update or state of shape {graph.shape(value)} for '
          f'one of shape {params.templates[i].shape}'
        )
    leaves[i] = _plan_leaf(graph, i, arguments, wanted, fields[i], owners, stored)
  return Plan(graph, inputs, tuple(entries), new, leaves, _find_reductions(graph, of, owners, stored))


def _owners(
  graph: _program.Graph, entries: Sequence[Entry], inputs: dict[int, tuple[str, int]]
) -> tuple[list[int | None], list[bool]]:
  """For every value, the leaf it depends on elementwise, if just one; and whether it depends on stored arrays."""
  owners: list[int | None] = [None] * len(graph.avals)
  stored = [False] * len(graph.avals)
  for value, (what, index) in inputs.items():
    owners[value] = entries[index].leaf if what == 'state' else index
    stored[value] = what != 'gradient' and owners[value] is not None
  for op in graph.ops:
    found = {owners[value] for value in op.inputs} - {None}
    pointwise = graph.elementwise(op) or (op.name in _program.RESHAPES and graph.uniform[op.outputs[0]])
    for value in op.outputs:
      owners[value] = found.pop() if pointwise and len(found) == 1 else None
      stored[value] = any(stored[value] for value in op.inputs)
  return owners, stored


def _boundary(graph: _program.Graph, wanted: Sequence[int], owners: Sequence[int | None], leaf: int) -> list[int]:
  """What a leaf's own values, those that depend on it elementwise, are computed from besides; but for literals."""
  inside = lambda value: owners[value] == leaf
  boundary = [value for op in graph.slice(wanted, lambda v: not inside(v)) for value in op.inputs if not inside(value)]
  boundary += [value for value in wanted if not inside(value)]
  return [v for v in dict.fromkeys(boundary) if not graph.is_literal(v)]


def _find_reductions(
  graph: _program.Graph, of: dict[tuple[str, int], int], owners: list[int | None], stored: list[bool]
) -> dict[int, Reduction]:
  found = {}
  for op in graph.ops:
    leaf = owners[op.inputs[0]] if op.name in _program.REDUCTIONS else None
    if leaf is None or stored[op.inputs[0]] or graph.shape(op.outputs[0]):
      continue
    scalars = tuple(_boundary(graph, op.inputs, owners, leaf))
    if all(graph.uniform[v] for v in scalars):
      program = _program.cut(graph, [of['gradient', leaf], *scalars], op.inputs)
      found[op.outputs[0]] = Reduction(op.name, leaf, program, scalars)
  return found


def _plan_leaf(
  graph: _program.Graph,
  leaf: int,
  arguments: list[int],
  wanted: list[int],
  fields: tuple[int, ...],
  owners: list[int | None],
  stored: list[bool],
) -> LeafPlan:
  boundary = _boundary(graph, wanted, owners, leaf)
  shape = graph.shape(arguments[0])
  fits = lambda v: owners[v] is None and not stored[v] and (graph.uniform[v] or graph.shape(v) == shape)
  misfit = next((value for value in boundary if not fits(value)), None)
  obstacle = None
  if misfit is not None:
    crossings = [
      op.name
      for op in graph.slice([misfit])
      if any(owners[v] is not None for v in op.inputs) and owners[op.outputs[0]] is None
    ]
    obstacle = crossings[0] if crossings else 'another leaf'
    # Computed outside; what is left to the leaf's program is to take the results.
    boundary = [value for value in dict.fromkeys(wanted) if not graph.is_literal(value)]
  reads = tuple(value for value in boundary if not graph.uniform[value])
  scalars = tuple(value for value in boundary if graph.uniform[value])
  inputs = [*arguments, *reads, *scalars]
  is_difference = _is_difference(graph, wanted[0], arguments[1])
  templates = tuple(_mesh.some_elements(graph.avals[v], () if v in scalars else (2,)) for v in inputs)
  program = _program.cut(graph, inputs, wanted)
  return LeafPlan(program, fields, reads, scalars, is_difference, obstacle, templates)


def _is_difference(graph: _program.Graph, delta: int, param: int) -> bool:
  producer = graph.producers.get(delta)
  return producer is not None and graph.ops[producer].name == 'sub' and graph.ops[producer].inputs[1] == param
