"""From any Optax transformation to one whose parameters and state are stored in low precision.

The inner transformation is the mathematics on dense values and knows nothing of bits; `_plan` finds what of it is
elementwise, and `_update` runs that on one leaf, tile by tile. Here is the rest: formats, state, random words, checks,
and what of the mathematics is not of one leaf.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _barrier
from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _feedback
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.trace import _field_formats
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program
from lpmm_optax.trace import _uses


class LowPrecisionState(NamedTuple):
  """State of an lpmm_optax optimizer.

  Attributes:
    step: steps taken, int32[].
    key: raw key data that all rounding derives from, uint32[2]; it never changes.
    inner_state: the inner transformation's, in which arrays that belong to a parameter are QuantizedArrays or, for
      exempt leaves, dense; parameters that are never updated (integers, 0-size) have `optax.MaskedNode()` there.
  """

  step: jax.Array
  key: jax.Array
  inner_state: Any


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
  """An Optax transformation that also has the in-place `step`.

  Attributes:
    init: `params -> state`.
    update: `(gradients, state, params, **extra) -> (deltas, state)`, for `optax.apply_updates`.
    step: `(gradients, params, state, **extra) -> (params, state)`, without a tree of deltas.
    obstacles: `(params, **extra) -> {path: operation}`, the leaves that are processed whole rather than in tiles, with
      the operation that is not elementwise.
    preceded_by: `transformations -> InPlaceTransformation`, the same optimizer of gradients that these have transformed
      first, all as one; None for a wrapper, which must see the gradients themselves.
    into_momentum: how microbatches can be added to the optimizer's own momentum; None where they cannot.
  """

  step: Callable[..., tuple[Any, Any]]
  obstacles: Callable[..., dict[str, str]]
  preceded_by: Callable[[Sequence[optax.GradientTransformation]], 'InPlaceTransformation'] | None
  into_momentum: 'IntoMomentum | None'

  def __new__(cls, init, update, step, obstacles, *, preceded_by=None, into_momentum=None):
    self = super().__new__(cls, init, update)
    self.step = step
    self.obstacles = obstacles
    self.preceded_by = preceded_by
    self.into_momentum = into_momentum
    return self

  def __copy__(self):
    """Itself: functions are not copied, and nothing else is in it."""
    return self

  def __deepcopy__(self, memo):
    """The same, where a train state is copied."""
    return self


class IntoMomentum(NamedTuple):
  """An optimizer whose momentum takes the gradients of all microbatches of a step, one after the other.

  Attributes:
    tx: takes the step, from a momentum to which all gradients but the given one have been added.
    field: of its state, the momentum.
    weight: `step -> float32[]`, what a gradient is multiplied by when it is added.
  """

  tx: InPlaceTransformation
  field: str
  weight: Callable[[jax.Array], jax.Array]


def _find_uses(
  inner: optax.GradientTransformationExtraArgs,
  params: _plan.Params,
  entries: Sequence[_plan.Entry],
  arrays: Sequence[Any],
  treedef: Any,
  init: _program.Graph,
) -> _uses.Uses:
  """What the inner transformation does with its state, as far as it can be known before the first update."""
  try:
    plan = _plan.plan_update(inner, params, entries, arrays, treedef, {})
  except Exception:  # It needs extra arguments, a loss value say; a mistake comes up again at the first update.
    return _uses.Uses(entries, set(), {entry.field for entry in entries})
  return _uses.find(init, plan)


def _init_inner(
  formats: _field_formats.Formats,
  inner: optax.GradientTransformationExtraArgs,
  params: _plan.Params,
  leaves: list[Any],
) -> Any:
  """The inner transformation's first state, each array in its format."""
  graph, shapes = _plan.trace_init(inner, params)
  entries, arrays, treedef = _plan.entries_of(params, shapes)
  uses = _find_uses(inner, params, entries, arrays, treedef, graph)
  chosen = _field_formats.choose(formats, params, leaves, entries, uses)
  owned = _plan.owned(entries)

  def from_params(e, leaves):
    """An entry that is no constant: a copy of the parameters, or a random key."""
    of_input = dict(zip(graph.inputs, params.active, strict=True))

    def argument(value):
      if value in graph.known:
        return graph.known[value]
      return _array.dequantize(leaves[of_input[value]], graph.avals[value].dtype)

    x = jnp.broadcast_to(graph.evaluate([graph.outputs[e]], argument)[graph.outputs[e]], arrays[e].shape)
    x = _array.encode(x, chosen[e], arrays[e].dtype) if e in owned else x
    # A parameter can be donated only once, and what inner holds on to not at all.
    return jnp.copy(x) if any(x is other for other in (*leaves, *graph.known.values())) else x

  is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(leaves))
  out = []
  for e, shape in enumerate(arrays):
    constant = graph.constant(graph.outputs[e])
    if constant is not None and e in owned:
      out.append(_array.full(leaves[owned[e]], constant, chosen[e], shape.dtype))
    elif constant is not None:
      out.append(jnp.full(shape.shape, constant, shape.dtype))
    elif is_abstract:
      out.append(jax.eval_shape(functools.partial(from_params, e), leaves))
    else:
      out.append(from_params(e, leaves))
  return treedef.unflatten(out)


def low_precision(
  inner: optax.GradientTransformation,
  *,
  formats: _field_formats.Formats = 'default',
  key: jax.Array | None = None,
  tile_size: int | None = None,
) -> InPlaceTransformation:
  """Keeps the parameters, and the state of any Optax transformation, in low precision.

  What `inner` computes is found out by tracing it on dense arrays, once per trace of the step. Where a leaf's update is
  elementwise, but for scalars that come from counts, schedules, gradients (the norm that clips them) or extra
  arguments, it runs tile by tile, in place: sgd, adam, lion, rmsprop, schedule-free and their kin, with weight decay,
  masks and partitions. Any other leaf (a norm of the parameters in lamb, a product of matrices in muon) is decoded,
  updated and encoded whole, and so exists dense for that while; `memory_report` tells which, and why.

  State arrays of a parameter's shape take a format each; counts, keys and statistics of other shapes (the factors of
  adafactor) stay as they are. Small parameters stay dense, and so does their state, in float32 whatever the parameter's
  dtype, for an average in bfloat16 stops moving.

  Args:
    inner: the transformation. It sees float32 arrays, one per parameter (float64 for float64 ones).
    formats: how state is stored. 'default' chooses by what `inner` does with a field: `UINT8_SQRT` for one that never
      turns negative (a second moment), `BFLOAT16` for another that reaches a denominator, a root or a logarithm, `INT8`
      for all others (momentum, weights). Decays and rates are taken to lie between 0 and 1. One Format is for every
      field, on the grid it needs: fields that are never negative take `UINT8_SQRT` for 8 bits or fewer, `BFLOAT16` for
      more. None keeps all state dense. A dict {field: ...} gives a Format, None, or, as in `quantize`, a list of
      (regular expression, Format or None) or a function of (path, leaf), for the fields it names, such as 'mu'; the
      others keep their defaults.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`. It must come last in a
    chain: nothing may transform its integer deltas.

  Raises:
    TypeError, ValueError: for formats that cannot hold a field, at `init`, naming field and leaf; for a state that it
      did not make, at `update`. What `inner` itself raises gets a note that says how it was called.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> inner = optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.01, momentum=0.9))
  >>> tx = lpmm.low_precision(inner)
  >>> target = jax.random.normal(jax.random.key(0), (64, 128))
  >>> params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  >>> state = tx.init(params)
  >>> optax.tree.get(state, 'nu'), optax.tree.get(state, 'trace')
  (QuantizedArray(float32[64, 128] as uint8_sqrt), QuantizedArray(float32[64, 128] as int8))
  >>> loss = lambda w: jnp.mean((w - target) ** 2)
  >>> for _ in range(4):
  ...   value, grads = jax.value_and_grad(loss)(lpmm.dequantize(params))
  ...   print(f'{value:.2f}')
  ...   params, state = lpmm.step(tx, grads, params, state)
  1.03
  1.00
  0.94
  0.88
  """
  return transform(inner, 'low_precision', formats, key, tile_size)


def _evaluate_outer(
  plan: _plan.Plan,
  tile_size: int,
  zero: jax.Array,
  gradients: dict[int, _gradient.Gradient],
  arrays: list[Any],
  leaves: list[Any],
) -> dict[int, jax.Array]:
  """The outer values of a plan: from the gradients of its leaves, the arrays of its entries, and the parameters."""
  # An accumulated gradient would be decoded whole to be reduced.
  reductions = {
    value: reduction
    for value, reduction in plan.reductions.items()
    if reduction.name in _update.REDUCERS and _array.is_quantized(gradients[reduction.leaf].accumulated)
  }

  def evaluate(zero, sources):
    def argument(value):
      if value in reductions:
        reduction = reductions[value]
        scalars = plan.graph.evaluate(reduction.scalars, argument)
        values = [scalars[v] for v in reduction.scalars]
        return _update.reduce_leaf(
          reduction.name, reduction.program, tile_size, sources['gradient'][reduction.leaf], values
        )
      if value in plan.graph.known:
        return sources['closure'][value]
      what, index = plan.inputs[value]
      x, aval = sources[what][index], plan.graph.avals[value]
      if what == 'gradient':
        return x.dense(aval)
      is_shared = what == 'state' and plan.entries[index].leaf is None
      return x if is_shared else _array.dequantize(x, aval.dtype)

    return _barrier.uncontracted(lambda: plan.graph.evaluate(plan.outer, argument, reductions), zero)()

  templates = {value: _array.stored(leaves[i]).codes for i, leaf in plan.leaves.items() for value in leaf.reads}
  closure = {value: x for value, x in plan.graph.known.items() if not plan.graph.is_literal(value)}
  sources = {'gradient': gradients, 'state': arrays, 'param': leaves, 'closure': closure}
  return _mesh.follow_each(evaluate, templates, zero, sources)


@dataclasses.dataclass(frozen=True, eq=False)
class LowPrecision:
  """What `transform` makes a transformation of; its arguments, checked.

  Attributes:
    inner: the transformation.
    name: for messages.
    formats: of the inner state.
    raw_key: for rounding.
    tile_size: in elements, or None.
    feedback: of rounding errors, or None.
    preceding: what transforms the gradients first, or None; the state is a tuple if it is not None.
  """

  inner: optax.GradientTransformationExtraArgs
  name: str
  formats: _field_formats.Formats
  raw_key: jax.Array
  tile_size: int | None
  feedback: _feedback.Feedback | None
  preceding: tuple[optax.GradientTransformation, ...] | None

  @functools.cached_property
  def composite(self) -> optax.GradientTransformationExtraArgs:
    """The transformation of the gradients as they come."""
    if self.preceding is None:
      return self.inner
    return optax.with_extra_args_support(optax.chain(*self.preceding, self.inner))

  def init(self, params: Any) -> Any:
    """The state before the first step."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    # A copy, since a step that donates the state deletes it.
    key = jnp.array(self.raw_key)
    inner_state = _init_inner(self.formats, self.inner, structure, leaves)
    own = LowPrecisionState(jnp.zeros((), jnp.int32), key, inner_state)
    if self.preceding is None:
      return own
    before = _init_inner(None, optax.chain(*self.preceding), structure, leaves) if self.preceding else ()
    return (*before, own)

  def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    """Deltas, and the state."""
    return self._advance(updates, params, state, False, extra_args)

  def step(self, gradients: Any, params: Any, state: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Parameters, and the state."""
    return self._advance(gradients, params, state, True, extra_args)

  def obstacles(self, params: Any, **extra_args: Any) -> dict[str, str]:
    """As in `InPlaceTransformation`."""
    structure, _ = _plan.flatten(_array.unwrap(params))
    _, shapes = _plan.trace_init(self.composite, structure)
    plan = _plan.plan_update(self.composite, structure, *_plan.entries_of(structure, shapes), extra_args)
    return {structure.paths[i]: leaf.obstacle for i, leaf in plan.leaves.items() if leaf.obstacle}

  def preceded_by(self, transformations: Sequence[optax.GradientTransformation]) -> InPlaceTransformation:
    """The same of gradients that others have transformed first."""
    # What is accumulated into the momentum are the gradients as they come, so there it stays alone.
    return dataclasses.replace(self, preceding=(*transformations, *(self.preceding or ()))).transformation(None)

  def transformation(self, into_momentum: IntoMomentum | None) -> InPlaceTransformation:
    """As it is used."""
    return InPlaceTransformation(
      self.init, self.update, self.step, self.obstacles, preceded_by=self.preceded_by, into_momentum=into_momentum
    )

  def _split(self, state: Any) -> tuple[tuple[Any, ...], LowPrecisionState]:
    """The states of the preceding transformations, and our own."""
    before, own = (), state
    if self.preceding is not None:
      count = len(state) if isinstance(state, tuple) else 1
      if count != len(self.preceding) + 1:
        raise ValueError(f'a chain of {len(self.preceding) + 1} transformations got a state of {count}')
      *before, own = state
    if not isinstance(own, LowPrecisionState):
      raise TypeError(
        f'{self.name} got a state of type {type(own).__name__}, which it did not create; see that the chain that made '
        'the state is the one that uses it'
      )
    return tuple(before), own

  def _advance(
    self, gradients: Any, params: Any, state: Any, in_place: bool, extra_args: dict[str, Any]
  ) -> tuple[Any, Any]:
    if params is None:
      raise ValueError(f'{self.name} needs the parameters: call update(gradients, state, params)')
    before, own = self._split(state)
    structure, leaves = _plan.flatten(params)
    gradients = _gradient.flatten(structure, gradients)
    combined = own.inner_state if self.preceding is None else (*before, own.inner_state)
    entries, arrays, treedef = _plan.entries_of(structure, combined)
    _plan.check_state(self.name, self.composite, structure, entries, arrays)
    plan = _plan.plan_update(self.composite, structure, entries, arrays, treedef, extra_args)
    zero = _barrier.runtime_zero(own.step)
    most = max((len(leaf.fields) for leaf in plan.leaves.values()), default=0)
    tile_size = self.tile_size or _tiles.default_tile_size(sum(leaf.size for leaf in leaves), 1 + most)
    outer = _evaluate_outer(plan, tile_size, zero, gradients, arrays, leaves)
    hyperparams = self.feedback.hyperparams(own.step) if self.feedback else {}
    paths = [structure.paths[i] for i in structure.active]
    words = dict(zip(structure.active, _random.slot_words(own.key, [own.step], paths, 1 + most), strict=True))
    # A field of a preceding transformation may have the name of one of ours.
    foreign = len(jax.tree.leaves(before))
    names = [entry.field if e >= foreign else entry.path for e, entry in enumerate(entries)]

    new_leaves = [leaf if in_place else jnp.zeros_like(leaf) for leaf in leaves]
    new_arrays = list(arrays)
    for e, value in plan.shared.items():
      new = jnp.broadcast_to(outer[value], arrays[e].shape)
      new_arrays[e] = new if new.dtype == arrays[e].dtype else new.astype(arrays[e].dtype)
    for i, leaf in plan.leaves.items():
      fields = tuple(names[e] for e in leaf.fields)
      feedback = self.feedback if self.feedback and self.feedback.fields <= set(fields) else None
      static = _update.LeafUpdate(leaf.program, fields, feedback, in_place, tile_size)
      new_leaves[i], new_fields = _mesh.follow(
        functools.partial(_update.update_leaf, static),
        _array.stored(leaves[i]).codes,
        gradients[i],
        leaves[i],
        [arrays[e] for e in leaf.fields],
        [outer[value] for value in leaf.reads],
        [outer[value] for value in leaf.scalars],
        hyperparams,
        words[i],
        zero,
      )
      for e, array in zip(leaf.fields, new_fields, strict=True):
        new_arrays[e] = array
    combined = treedef.unflatten(new_arrays)
    *new_before, inner_state = (combined,) if self.preceding is None else combined
    new_own = LowPrecisionState(optax.safe_increment(own.step), own.key, inner_state)
    return structure.treedef.unflatten(new_leaves), new_own if self.preceding is None else (*new_before, new_own)


def transform(
  inner: optax.GradientTransformation,
  name: str,
  formats: _field_formats.Formats,
  key: jax.Array | None,
  tile_size: int | None,
  feedback: _feedback.Feedback | None = None,
  into_momentum: IntoMomentum | None = None,
) -> InPlaceTransformation:
  """`low_precision` with more that its aliases need.

  Args:
    inner: the transformation.
    name: for messages.
    formats: of the inner state.
    key: for rounding.
    tile_size: in elements.
    feedback: of rounding errors.
    into_momentum: passed on.

  Returns:
    The transformation.
  """
  _field_formats.check(formats)
  _tiles.check_size(tile_size)
  inner = optax.with_extra_args_support(inner)
  low_precision = LowPrecision(inner, name, formats, _random.raw_key(key), tile_size, feedback, None)
  return low_precision.transformation(into_momentum)
