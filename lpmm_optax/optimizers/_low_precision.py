"""From any Optax transformation to one whose parameters and state are stored in low precision.

The inner transformation is the mathematics on dense values and knows nothing of bits; `_plan` finds what of it is
elementwise, and `_update` runs that on one leaf, tile by tile. Here is the rest: random words, checks, and what of the
mathematics is not of one leaf.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _feedback
from lpmm_optax.optimizers import _first_state
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.trace import _field_formats
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program


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


class IntoMomentum(NamedTuple):
  """An optimizer whose momentum takes the gradients of all microbatches of a step, one after the other.

  Attributes:
    tx: takes the step, from a momentum to which all gradients but the given one have been added.
    field: of its state, the momentum.
    weight: `step -> float32[]`, what a gradient is multiplied by when it is added.
  """

  tx: _transformation.InPlaceTransformation
  field: str
  weight: Callable[[jax.Array], jax.Array]


def low_precision(
  inner: optax.GradientTransformation,
  *,
  formats: _field_formats.Formats = 'default',
  error_feedback: bool | None = None,
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> _transformation.InPlaceTransformation:
  """Keeps the parameters, and the state of any Optax transformation, in low precision.

  What `inner` computes is found out by tracing it on dense arrays, once per trace of the step. Where a leaf's update is
  elementwise, but for scalars that come from counts, schedules, gradients (the norm that clips them) or extra
  arguments, it runs tile by tile, in place: sgd, adam, lion, rmsprop, schedule-free and their kin, with weight decay,
  masks and partitions. Any other leaf (a norm of the parameters in lamb, a product of matrices in muon) is decoded,
  updated and encoded whole, and so exists dense for that while; `memory_report` tells which, and why. `layerwise` does
  that with one layer of a stack at a time.

  State arrays of a parameter's shape take a format each; counts, keys and statistics of other shapes (the factors of
  adafactor) stay as they are. Small parameters stay dense, and so does their state, in float32 whatever the parameter's
  dtype, for an average in bfloat16 stops moving.

  Args:
    inner: the transformation. It sees float32 arrays, one per parameter (float64 for float64 ones).
    formats: how state is stored. 'default' chooses for each field the smallest format that holds what `inner` does with
      it: 8 bits, on a square-root grid for what never turns negative; `INT16` for a slow average and for what is
      multiplied as a matrix; `BFLOAT16` for a divisor that may turn negative or is a slow average, for what is divided
      by a field in `BFLOAT16` or dense, for a maximum over all steps; none where a root or quotient is taken of a
      difference of two fields, or of what a field changes by.
      `memory_report` says which, and why. Decays and rates are taken to lie between 0 and 1, and decays that follow
      from the step as they are late in training; one that comes from elsewhere is not known, and not taken for slow.
      One Format is for every field, on the grid it needs: fields that are never negative take `UINT8_SQRT` for `INT8`
      and `UINT4_SQRT` for `INT4`, and of 16 bits a field takes `INT16` or `BFLOAT16`, whichever holds it. None keeps
      all state dense. A dict {field: ...} gives a Format, None, or, as in `quantize`, a list of (regular expression,
      Format or None) or a function of (path, leaf), for the fields it names, such as 'mu'; the others keep their
      defaults.
    error_feedback: whether the error of rounding a parameter goes into the momentum that moves it: a field that decays
      by one factor between 0 and 1, in a format of 8 bits or more with stochastic rounding, and that the update
      depends on differentiably. With the decay b and the update's derivative s by the momentum, both of the program
      that `inner` was traced to, an error e is e (1 - b) / s there, so that it comes back over the following steps. It
      is bounded by what gradients do (`docs/theory.md`). None for feedback wherever there is such a momentum and the
      update is elementwise, False for stochastic rounding alone, True to insist.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.
    shard_axes: manual mesh axes over which parameters are sharded, so that every shard rounds with bits of its own, in
      a `jax.shard_map` with check_vma=False or a `jax.pmap`; with check_vma, and elsewhere, it is known.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`. It must come last in a
    chain: nothing may transform its integer deltas.

  Raises:
    TypeError, ValueError: for what is no key, or a tile_size under 1; for formats that cannot hold a field, at `init`,
      naming field and leaf, what is done with it and which formats can; at `update`, for a quantized leaf that has no
      momentum if error_feedback is True, and for a state that it did not make. What `inner` itself raises gets a note
      that says how it was called.

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
  feedback = None if error_feedback is False else _feedback.ByDerivatives(is_required=error_feedback is True)
  return transform(
    inner, 'low_precision', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes, feedback=feedback
  )


def _evaluate_outer(
  plan: _plan.Plan,
  wanted: Sequence[int],
  tile_size: int,
  zero: jax.Array,
  gradients: Mapping[int, _gradient.Gradient],
  arrays: list[Any],
  leaves: list[Any],
  reduced: Mapping[int, jax.Array],
  with_effects: bool,
) -> dict[int, jax.Array]:
  """Outer values of a plan.

  Args:
    plan: of the update.
    wanted: numbers of the values.
    tile_size: in elements.
    zero: uint32[], zero at run time.
    gradients: by leaf, as far as the values need them.
    arrays: of the plan's entries.
    leaves: the parameters.
    reduced: reductions of gradients that are known already.
    with_effects: whether side effects happen.
  """
  # An accumulated gradient would be decoded whole to be reduced.
  reductions = {
    value: reduction
    for value, reduction in plan.reductions.items()
    if reduction.leaf in gradients and _array.is_quantized(gradients[reduction.leaf].accumulated)
  }

  given = {*reductions, *reduced}

  def evaluate(zero, sources):
    reduced_here: dict[int, jax.Array] = {}

    def exact(fn, x):
      return _program.uncontracted(fn, zero)(x)

    def argument(value):
      aval = plan.graph.avals[value]
      if value in reduced:
        return sources['reduced'][value]
      if value in reductions:
        if value not in reduced_here:
          reduction = reductions[value]
          # Of what a first norm has clipped, a second one needs the first.
          scalars = plan.graph.evaluate(reduction.scalars, argument, given=given, zero=zero)
          values = [scalars[v] for v in reduction.scalars]
          gradient = sources['gradient'][reduction.leaf]
          args = reduction.name, aval.dtype, reduction.program, tile_size, gradient, values
          reduced_here[value] = _update.reduce_leaf(*args)
        return reduced_here[value]
      if value in plan.graph.known:
        return sources['closure'][value]
      what, index = plan.inputs[value]
      x = sources[what][index]
      if what == 'gradient':
        return exact(lambda x: x.dense(aval), x)
      if what == 'state' and plan.entries[index].leaf is None:
        is_number = not aval.shape and jnp.issubdtype(aval.dtype, jnp.number)
        return _program.hidden(x) if is_number else x
      return exact(lambda x: _array.dequantize(x, aval.dtype), x)

    return plan.graph.evaluate(wanted, argument, given=given, zero=zero, with_effects=with_effects)

  templates = {value: _array.stored(leaves[i]).codes for i, leaf in plan.leaves.items() for value in leaf.reads}
  closure = {value: x for value, x in plan.graph.known.items() if not plan.graph.is_literal(value)}
  sources = {'gradient': gradients, 'state': arrays, 'param': leaves, 'closure': closure, 'reduced': dict(reduced)}
  return _mesh.follow_each(evaluate, templates, zero, sources)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _without_derivative(path: str, x: jax.Array) -> jax.Array:
  """x, of which a quantized leaf is made."""
  return x


@_without_derivative.defjvp
def _no_derivative(path, primals, tangents):
  raise TypeError(
    f'{path}: a step has no derivative where parameters or their state are rounded; differentiate one with dense '
    'parameters and formats=None'
  )


@dataclasses.dataclass(frozen=True, eq=False)
class LowPrecision:
  """What `transform` makes a transformation of; its arguments, checked.

  Attributes:
    inner: the transformation.
    name: for messages.
    formats: of the inner state.
    raw_key: for rounding.
    tile_size: in elements, or None.
    shard_axes: manual axes over which parameters are sharded, besides those that are known.
    feedback: of rounding errors, or None.
    into_momentum: how microbatches can be added to the optimizer's own momentum; None where they cannot.
    domain: what parameters and state are rounded for.
    preceding: what transforms the gradients first, or None; the state is a tuple if it is not None.
  """

  inner: optax.GradientTransformationExtraArgs
  name: str
  formats: _field_formats.Formats
  raw_key: jax.Array
  tile_size: int | None
  shard_axes: frozenset[str]
  feedback: _feedback.Feedback | _feedback.ByDerivatives | None
  into_momentum: IntoMomentum | None
  domain: _random.Domain = _random.Domain.STEP
  preceding: tuple[optax.GradientTransformation, ...] | None = None

  @functools.cached_property
  def composite(self) -> optax.GradientTransformationExtraArgs:
    """The transformation of the gradients as they come."""
    if self.preceding is None:
      return self.inner
    return optax.with_extra_args_support(optax.chain(*self.preceding, self.inner))

  @property
  def transformation(self) -> _transformation.InPlaceTransformation:
    """As it is used."""
    return _transformation.InPlaceTransformation(
      self.name, self.init, self.update, self.step, optimizer=self, explain=self.explain
    )

  def preceded_by(
    self, transformations: Sequence[optax.GradientTransformation]
  ) -> _transformation.InPlaceTransformation:
    """The same of gradients that others have transformed first, all as one."""
    # What is accumulated into the momentum are the gradients as they come, so there it stays alone.
    preceding = (*transformations, *(self.preceding or ()))
    return dataclasses.replace(self, preceding=preceding, into_momentum=None).transformation

  def init(self, params: Any) -> Any:
    """The state before the first step."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    # A copy, since a step that donates the state deletes it.
    key = jnp.array(self.raw_key)
    inner_state = _first_state.make(self.formats, self.inner, structure, leaves)
    own = LowPrecisionState(jnp.zeros((), jnp.int32), key, inner_state)
    if self.preceding is None:
      return own
    before = _first_state.make(None, optax.chain(*self.preceding), structure, leaves) if self.preceding else ()
    return (*before, own)

  def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    """Deltas, and the state."""
    return self._advance(updates, params, state, False, extra_args)

  def step(self, gradients: Any, params: Any, state: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Parameters, and the state."""
    return self._advance(gradients, params, state, True, extra_args)

  def explain(self, params: Any, **extra_args: Any) -> _transformation.Explanation:
    """As in `explain`."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    state = _plan.trace_init(self.composite, structure)[1]
    plan = _plan.plan_first_update(self.composite, structure, state, extra_args)
    obstacles = {structure.paths[i]: leaf.obstacle for i, leaf in plan.leaves.items() if leaf.obstacle}
    traced = _plan.trace_init(self.inner, structure)
    uses, choices = _first_state.choose(self.formats, self.inner, structure, leaves, *traced)
    names = {e: (uses.entries[e].field, structure.paths[i]) for e, i in _plan.owned(uses.entries).items()}
    return _transformation.Explanation(obstacles, {names[e]: choice for e, choice in choices.items()})

  def _split(self, state: Any) -> tuple[tuple[Any, ...], LowPrecisionState]:
    """The states of the preceding transformations, and our own."""
    before, own = (), state
    if self.preceding is not None:
      _transformation.check_chain(state, len(self.preceding) + 1)
      *before, own = state
    if not isinstance(own, LowPrecisionState):
      raise TypeError(
        f'{self.name} got a state of type {type(own).__name__}, which it did not create; see that the chain that made '
        'the state is the one that uses it'
      )
    return tuple(before), own

  def planned(
    self,
    structure: _plan.Params,
    leaves: list[Any],
    state: Any,
    extra_args: dict[str, Any],
    gradients: Mapping[int, _gradient.Gradient] | None = None,
  ) -> 'PlannedStep':
    """The next step.

    Args:
      structure: of the parameters.
      leaves: of the parameters.
      state: as `init` made it, or a step.
      extra_args: passed on.
      gradients: by leaf, of which types alone count; None if they are not known yet.
    """
    before, own = self._split(state)
    combined = own.inner_state if self.preceding is None else (*before, own.inner_state)
    state = _plan.take_apart(structure, combined)
    _plan.check_state(self.name, self.composite, structure, state)
    templates = None
    if gradients is not None:
      templates = {i: gradient.template(structure.templates[i]) for i, gradient in gradients.items()}
    plan = _plan.plan_update(self.composite, structure, state, extra_args, templates)
    step = _program.hidden(own.step)
    most = max((len(leaf.fields) for leaf in plan.leaves.values()), default=0)
    keys = [structure.keys[i] for i in structure.active]
    words = _random.words(own.key, self.domain, [own.step], keys, 1 + most)
    # An average is to lag behind its parameter by as much as in float32, and thresholds that turn run ahead.
    turns = self.domain is _random.Domain.STEP
    steady = words.at[:, 0].set(_random.steady_words(own.key, own.step, keys)) if turns else words
    # A field of a preceding transformation may have the name of one of ours.
    foreign = len(jax.tree.leaves(before))
    names = ['' if e < foreign else entry.field for e, entry in enumerate(state.entries)]
    return PlannedStep(
      structure,
      leaves,
      own,
      state,
      plan,
      names,
      dict(zip(structure.active, words, strict=True)),
      dict(zip(structure.active, steady, strict=True)),
      _random.turn(own.step) if turns else None,
      _program.runtime_zero(step),
      self.feedback,
      self.feedback.hyperparams(step, own.inner_state) if self.feedback else {},
      self.tile_size or _tiles.default_tile_size(sum(leaf.size for leaf in leaves), 1 + most),
      self.shard_axes,
      self.preceding is None,
    )

  def _advance(
    self, gradients: Any, params: Any, state: Any, in_place: bool, extra_args: dict[str, Any]
  ) -> tuple[Any, Any]:
    structure, leaves = _plan.flatten(params)
    by_leaf = _gradient.flatten(structure, gradients)
    planned = self.planned(structure, leaves, state, extra_args, by_leaf)
    outer = planned.outer(planned.plan.outer, by_leaf, with_effects=True)
    new = {
      i: planned.leaf(i, outer, in_place).run(by_leaf[i], leaves[i], planned.fields(i)) for i in planned.plan.leaves
    }
    rest = [leaf if in_place else jax.tree.map(jnp.zeros_like, leaf) for leaf in leaves]
    return planned.finish(new, outer, rest)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=('words', 'zero', 'reads', 'scalars', 'hyperparams', 'turn'),
  meta_fields=('path', 'static'),
)
@dataclasses.dataclass(frozen=True)
class LeafStep:
  """The update of one leaf, but for its gradient, its arrays and those of its state.

  Attributes:
    path: of the leaf.
    static: of the update.
    words: its random words.
    zero: uint32[], zero at run time.
    reads: dense arrays of the leaf's shape.
    scalars: of the program.
    hyperparams: of the feedback.
    turn: what the leaf's own random bits turn by, or None.
  """

  path: str
  static: _update.LeafUpdate
  words: jax.Array
  zero: jax.Array
  reads: list[jax.Array] = dataclasses.field(default_factory=list)
  scalars: list[jax.Array] = dataclasses.field(default_factory=list)
  hyperparams: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
  turn: tuple[jax.Array, jax.Array] | None = None

  def of_use(self, use: jax.Array) -> 'LeafStep':
    """The same for one more use of the leaf in a microbatch, int32[]: with other random bits."""
    return dataclasses.replace(self, words=jax.vmap(lambda word: _random.of_use(word, use))(self.words))

  def run(
    self, gradient: _gradient.Gradient, target: Any, fields: Sequence[Any], start: Sequence[jax.Array] = ()
  ) -> tuple[Any, list[Any]]:
    """(new target or delta, new fields), as `update_leaf` gives them."""
    values = gradient, self.reads, self.scalars
    if any(_array.is_quantized(x) for x in (target, *fields)):
      values = jax.tree.map(functools.partial(_without_derivative, self.path), values)
    gradient, reads, scalars = values
    arrays = gradient, target, self.words, self.zero, fields, reads, scalars, self.hyperparams, start, self.turn
    return _update.follow(self.static, _array.stored(target).codes, *arrays)


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedStep:
  """A step of an optimizer whose gradients may be still to come.

  Attributes:
    structure: of the parameters.
    leaves: the parameters.
    own: the state of the optimizer.
    state: of what precedes it, and its inner one.
    plan: of the update.
    names: of the entries, empty for those of what precedes the optimizer.
    words: uint32[slots, 2] per leaf.
    steady: the same without feedback, where the parameter's hardly ever changes.
    turn: what that turns by in this step, or None.
    zero: uint32[], zero at run time.
    feedback: of rounding errors, or None.
    hyperparams: of the feedback.
    tile_size: in elements.
    shard_axes: manual axes over which parameters are sharded, besides those that are known.
    is_alone: whether nothing precedes the optimizer; else the state is a tuple.
  """

  structure: _plan.Params
  leaves: list[Any]
  own: LowPrecisionState
  state: _plan.InnerState
  plan: _plan.Plan
  names: list[str]
  words: dict[int, jax.Array]
  steady: dict[int, jax.Array]
  turn: tuple[jax.Array, jax.Array] | None
  zero: jax.Array
  feedback: _feedback.Feedback | _feedback.ByDerivatives | None
  hyperparams: dict[str, jax.Array]
  tile_size: int
  shard_axes: frozenset[str]
  is_alone: bool

  def outer(
    self,
    wanted: Sequence[int],
    gradients: Mapping[int, _gradient.Gradient],
    reduced: Mapping[int, jax.Array] = types.MappingProxyType({}),
    *,
    with_effects: bool,
  ) -> dict[int, jax.Array]:
    """Outer values of the plan, by number; see `_evaluate_outer`."""
    return _evaluate_outer(
      self.plan, wanted, self.tile_size, self.zero, gradients, self.state.arrays, self.leaves, reduced, with_effects
    )

  def fields(self, i: int) -> list[Any]:
    """The state of a leaf, in the order of its update."""
    return [self.state.arrays[e] for e in self.plan.leaves[i].fields]

  def leaf(self, i: int, outer: Mapping[int, jax.Array], in_place: bool) -> LeafStep:
    """The update of a leaf, from the outer values that it needs."""
    leaf = self.plan.leaves[i]
    named = [self.names[e] for e in leaf.fields]
    names = tuple(name if name and named.count(name) == 1 else f'{k}' for k, name in enumerate(named))
    path = self.structure.paths[i]
    program: _update.LeafProgram = leaf.program
    correct = None
    if self.feedback is not None and _array.is_quantized(self.leaves[i]):
      fields = dict(zip(names, self.fields(i), strict=True))
      program, correct = self.feedback.of_leaf(path, leaf, fields)
    static = _update.LeafUpdate(
      program,
      self.leaves[i].shape,
      self.tile_size,
      self.shard_axes,
      names,
      correct,
      in_place,
      leaf.is_difference,
    )
    reads, scalars = [outer[value] for value in leaf.reads], [outer[value] for value in leaf.scalars]
    if correct is None:
      return LeafStep(path, static, self.steady[i], self.zero, reads, scalars, turn=self.turn)
    return LeafStep(path, static, self.words[i], self.zero, reads, scalars, self.hyperparams)

  def finish(
    self, new: Mapping[int, tuple[Any, list[Any]]], outer: Mapping[int, jax.Array], rest: list[Any]
  ) -> tuple[Any, Any]:
    """(parameters or deltas, state) after the step.

    Args:
      new: by leaf, the parameter or delta, and its fields.
      outer: the values that what belongs to no leaf becomes.
      rest: the parameters or deltas of the leaves that are not updated, among all leaves.
    """
    leaves, arrays = list(rest), list(self.state.arrays)
    for e, value in self.plan.shared.items():
      shared = jnp.broadcast_to(outer[value], arrays[e].shape)
      arrays[e] = shared if shared.dtype == arrays[e].dtype else shared.astype(arrays[e].dtype)
    for i, (leaf, fields) in new.items():
      leaves[i] = leaf
      for e, array in zip(self.plan.leaves[i].fields, fields, strict=True):
        arrays[e] = array
    combined = self.state.treedef.unflatten(arrays)
    *before, inner_state = (combined,) if self.is_alone else combined
    own = LowPrecisionState(optax.safe_increment(self.own.step), self.own.key, inner_state)
    return self.structure.treedef.unflatten(leaves), own if self.is_alone else (*before, own)


def transform(
  inner: optax.GradientTransformation,
  name: str,
  *,
  formats: _field_formats.Formats,
  key: jax.Array | None,
  tile_size: int | None,
  shard_axes: Sequence[str],
  feedback: _feedback.Feedback | _feedback.ByDerivatives | None = None,
  into_momentum: IntoMomentum | None = None,
  domain: _random.Domain = _random.Domain.STEP,
) -> _transformation.InPlaceTransformation:
  """`low_precision` with more that its kin need: a name for messages, feedback, `IntoMomentum`, a domain."""
  _field_formats.check(formats)
  _tiles.check_size(tile_size)
  axes = _mesh.axis_names(shard_axes)
  inner, raw_key = optax.with_extra_args_support(inner), _random.raw_key(key)
  return LowPrecision(inner, name, formats, raw_key, tile_size, axes, feedback, into_momentum, domain).transformation
