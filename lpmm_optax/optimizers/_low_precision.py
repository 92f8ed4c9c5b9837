"""From any Optax transformation to one whose parameters and state are stored in low precision.

The inner transformation is the mathematics on dense values and knows nothing of bits; `_plan` finds what of it is
elementwise, and `_update` runs that on one leaf, tile by tile. Here is the rest: formats, state, random words, checks,
and what of the mathematics is not of one leaf.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any
from typing import NamedTuple
import warnings

import jax
import jax.numpy as jnp
import optax

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


class EagerStepWarning(UserWarning):
  """A loop takes its steps outside of `jax.jit`, which traces the optimizer anew each time."""


_eager_steps = itertools.count(1)
_MOST_EAGER_STEPS = 10  # One or two are somebody trying something out.


def _warn_of_eager_steps(gradients: Any) -> None:
  if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(gradients)):
    return
  if next(_eager_steps) == _MOST_EAGER_STEPS:
    warnings.warn(
      'steps of lpmm_optax outside of jax.jit trace the optimizer anew, and take tens of times as long as a compiled '
      'one; put the step under jax.jit, with parameters and state donated',
      EagerStepWarning,
      stacklevel=4,
    )


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
  """An Optax transformation that also has the in-place `step`.

  Attributes:
    init: `params -> state`.
    update: `(gradients, state, params, **extra) -> (deltas, state)`, for `optax.apply_updates`. Deltas of quantized
      parameters can be added to them and no more, and so are no results of a function that is jitted: jit both.
    step: `(gradients, params, state, **extra) -> (params, state)`, without a tree of deltas.
  """

  step: Callable[..., tuple[Any, Any]]
  # What there is behind it: the optimizer, if it is one and no wrapper, and what of it is not elementwise.
  _optimizer: 'LowPrecision | None'
  _obstacles: Callable[..., dict[str, str]]

  def __new__(cls, init, update, step, *, optimizer=None, obstacles=lambda params, **extra_args: {}):
    def sealed(updates, state, params=None, **extra_args):
      _warn_of_eager_steps(updates)
      deltas, state = update(updates, state, params, **extra_args)
      return _array.seal(deltas, params), state

    def watched(gradients, params, state, **extra_args):
      _warn_of_eager_steps(gradients)
      return step(gradients, params, state, **extra_args)

    self = super().__new__(cls, init, sealed)
    self.step = watched
    self._optimizer = optimizer
    self._obstacles = obstacles
    return self

  def __copy__(self):
    """Itself: functions are not copied, and nothing else is in it."""
    return self

  def __deepcopy__(self, memo):
    """The same, where a train state is copied."""
    return self

  def _replace(self, **fields):
    """With another `init` it keeps its in-place step; with another `update` it is a transformation without one."""
    replaced = optax.GradientTransformationExtraArgs(self.init, self.update)._replace(**fields)
    return replaced if 'update' in fields else _restore(type(self), *replaced, vars(self))

  def __reduce__(self):
    """For cloudpickle and its like: `__new__` takes other arguments than a tuple's."""
    return _restore, (type(self), self.init, self.update, vars(self))


def _restore(cls, init, update, attributes):
  self = optax.GradientTransformationExtraArgs.__new__(cls, init, update)
  vars(self).update(attributes)
  return self


def optimizer_of(tx: Any) -> 'LowPrecision | None':
  """The optimizer of this package that a transformation is; None if it is a wrapper, or another's."""
  return tx._optimizer if isinstance(tx, InPlaceTransformation) else None


def obstacles_of(tx: Any) -> Callable[..., dict[str, str]]:
  """`(params, **extra) -> {path: operation}`.

  These are the leaves that a transformation of this package processes whole rather than in tiles, with the operation
  that is not elementwise.
  """
  return tx._obstacles if isinstance(tx, InPlaceTransformation) else lambda params, **extra_args: {}


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


def _init_inner(
  formats: _field_formats.Formats,
  inner: optax.GradientTransformationExtraArgs,
  params: _plan.Params,
  leaves: list[Any],
) -> Any:
  """The inner transformation's first state, each array in its format."""
  graph, shapes = _plan.trace_init(inner, params)
  entries, arrays, treedef = _plan.entries_of(params, shapes)
  uses = _uses.Uses(entries)
  try:
    if formats is not None:
      uses = _uses.find(graph, _plan.plan_first_update(inner, params, entries, arrays, treedef))
  except Exception:
    # Only where a default has to be chosen must it be known what a field is for.
    named = formats if isinstance(formats, Mapping) else ()
    guessed = _field_formats.choose(formats, params, leaves, entries, uses)
    if any(format is not None and entries[e].field not in named for e, format in guessed.items()):
      raise
  chosen = _field_formats.choose(formats, params, leaves, entries, uses)
  owned = _plan.owned(entries)

  def from_params(e, leaves):
    """An entry that is no constant: a copy of the parameters, or a random key."""
    of_input = dict(zip(graph.inputs, params.active, strict=True))
    leaf = leaves[owned[e]] if e in uses.copies else None
    if leaf is not None and _array.is_quantized(leaf) and leaf.format == chosen[e]:
      return jax.tree.map(jnp.copy, dataclasses.replace(leaf, dtype=arrays[e].dtype))

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
  shard_axes: Sequence[str] = (),
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
    shard_axes: manual mesh axes over which parameters are sharded, so that every shard rounds with bits of its own, in
      a `jax.shard_map` with check_vma=False or a `jax.pmap`; with check_vma, and elsewhere, it is known.

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
  return transform(inner, 'low_precision', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes)


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
    if _array.is_quantized(gradients[reduction.leaf].accumulated)
  }

  def evaluate(zero, sources):
    def exact(fn, x):
      return _program.uncontracted(fn, zero)(x)

    def argument(value):
      aval = plan.graph.avals[value]
      if value in reductions:
        reduction = reductions[value]
        scalars = plan.graph.evaluate(reduction.scalars, argument, zero=zero)
        values = [scalars[v] for v in reduction.scalars]
        gradient = sources['gradient'][reduction.leaf]
        return _update.reduce_leaf(reduction.name, aval.dtype, reduction.program, tile_size, gradient, values)
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

    return plan.graph.evaluate(plan.outer, argument, given=reductions, zero=zero, with_effects=True)

  templates = {value: _array.stored(leaves[i]).codes for i, leaf in plan.leaves.items() for value in leaf.reads}
  closure = {value: x for value, x in plan.graph.known.items() if not plan.graph.is_literal(value)}
  sources = {'gradient': gradients, 'state': arrays, 'param': leaves, 'closure': closure}
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
    preceding: what transforms the gradients first, or None; the state is a tuple if it is not None.
  """

  inner: optax.GradientTransformationExtraArgs
  name: str
  formats: _field_formats.Formats
  raw_key: jax.Array
  tile_size: int | None
  shard_axes: frozenset[str]
  feedback: _feedback.Feedback | None
  into_momentum: IntoMomentum | None
  preceding: tuple[optax.GradientTransformation, ...] | None = None

  @functools.cached_property
  def composite(self) -> optax.GradientTransformationExtraArgs:
    """The transformation of the gradients as they come."""
    if self.preceding is None:
      return self.inner
    return optax.with_extra_args_support(optax.chain(*self.preceding, self.inner))

  @property
  def transformation(self) -> InPlaceTransformation:
    """As it is used."""
    return InPlaceTransformation(self.init, self.update, self.step, optimizer=self, obstacles=self.obstacles)

  def preceded_by(self, transformations: Sequence[optax.GradientTransformation]) -> InPlaceTransformation:
    """The same of gradients that others have transformed first, all as one."""
    # What is accumulated into the momentum are the gradients as they come, so there it stays alone.
    preceding = (*transformations, *(self.preceding or ()))
    return dataclasses.replace(self, preceding=preceding, into_momentum=None).transformation

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
    """As in `obstacles_of`."""
    structure, _ = _plan.flatten(_array.unwrap(params))
    _, shapes = _plan.trace_init(self.composite, structure)
    plan = _plan.plan_update(self.composite, structure, *_plan.entries_of(structure, shapes), extra_args)
    return {structure.paths[i]: leaf.obstacle for i, leaf in plan.leaves.items() if leaf.obstacle}

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
    templates = {i: gradient.template(structure.templates[i]) for i, gradient in gradients.items()}
    plan = _plan.plan_update(self.composite, structure, entries, arrays, treedef, extra_args, templates)
    step = _program.hidden(own.step)
    zero = _program.runtime_zero(step)
    most = max((len(leaf.fields) for leaf in plan.leaves.values()), default=0)
    tile_size = self.tile_size or _tiles.default_tile_size(sum(leaf.size for leaf in leaves), 1 + most)
    outer = _evaluate_outer(plan, tile_size, zero, gradients, arrays, leaves)
    hyperparams = self.feedback.hyperparams(step, own.inner_state) if self.feedback else {}
    keys = [structure.keys[i] for i in structure.active]
    words = _random.words(own.key, _random.Domain.STEP, [own.step], keys, 1 + most)
    # A field of a preceding transformation may have the name of one of ours.
    foreign = len(jax.tree.leaves(before))
    names = [entry.field if e >= foreign else entry.path for e, entry in enumerate(entries)]

    new_leaves = [leaf if in_place else jnp.zeros_like(leaf) for leaf in leaves]
    new_arrays = list(arrays)
    for e, value in plan.shared.items():
      new = jnp.broadcast_to(outer[value], arrays[e].shape)
      new_arrays[e] = new if new.dtype == arrays[e].dtype else new.astype(arrays[e].dtype)
    for (i, leaf), leaf_words in zip(plan.leaves.items(), words, strict=True):
      names_of_fields = tuple(names[e] for e in leaf.fields)
      feedback = self.feedback if self.feedback and self.feedback.fields <= set(names_of_fields) else None
      fields = [arrays[e] for e in leaf.fields]
      static = _update.LeafUpdate(
        leaf.program,
        leaves[i].shape,
        tile_size,
        self.shard_axes,
        names_of_fields,
        feedback.correct if feedback else None,
        in_place,
        leaf.is_difference,
      )
      values = gradients[i], [outer[value] for value in leaf.reads], [outer[value] for value in leaf.scalars]
      if any(_array.is_quantized(x) for x in (leaves[i], *fields)):
        values = jax.tree.map(functools.partial(_without_derivative, structure.paths[i]), values)
      gradient, reads, scalars = values
      new_leaves[i], new_fields = _update.follow(
        _update.update_leaf,
        static,
        _array.stored(leaves[i]).codes,
        gradient,
        leaves[i],
        leaf_words,
        zero,
        fields,
        reads,
        scalars,
        hyperparams if feedback else {},
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
  *,
  formats: _field_formats.Formats,
  key: jax.Array | None,
  tile_size: int | None,
  shard_axes: Sequence[str],
  feedback: _feedback.Feedback | None = None,
  into_momentum: IntoMomentum | None = None,
) -> InPlaceTransformation:
  """`low_precision` with more that its aliases need: a name for messages, feedback, and `IntoMomentum`."""
  _field_formats.check(formats)
  _tiles.check_size(tile_size)
  axes = _mesh.axis_names(shard_axes)
  inner, raw_key = optax.with_extra_args_support(inner), _random.raw_key(key)
  return LowPrecision(inner, name, formats, raw_key, tile_size, axes, feedback, into_momentum).transformation
