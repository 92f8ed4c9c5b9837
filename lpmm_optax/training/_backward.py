"""`value_and_step`: a loss and the optimizer's step in one, whose gradients never exist as a tree.

The loss gets its quantized parameters as they are, tracked (`_tracking`). In the backward pass each layer's gradient
goes where it is due at once: into the accumulator or the momentum of a `MultiSteps`, or, with an optimizer alone, into
the update of the layer: of its elements, or, with a `layerwise` optimizer, of the layer as a whole.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.trace import _plan
from lpmm_optax.training import _layerwise
from lpmm_optax.training import _multi_steps
from lpmm_optax.training import _reads
from lpmm_optax.training import _step
from lpmm_optax.training import _tracking


@dataclasses.dataclass(frozen=True, eq=False)
class _Loss:
  """A loss of given parameters.

  Attributes:
    fun: `params -> loss` or `(loss, aux)`.
    has_aux: which of the two.
    structure: of the parameters.
    leaves: the parameters.
  """

  fun: Callable[[Any], Any]
  has_aux: bool
  structure: _plan.Params
  leaves: list[Any]

  def reads(self, tracked: Sequence[int]) -> dict[int, list[bool]]:
    """Per place where a quantized leaf is dequantized, whether that is all of it, and each element once.

    Raises:
      TypeError, ValueError: for anything but that and slices along leading axes, naming the leaf.
    """
    paths = self.structure.paths
    sinks = {i: _tracking.Sink(paths[i], self.leaves[i].shape) for i in tracked}
    arrays = {i: _tracking.track(self.leaves[i], sink) for i, sink in sinks.items()}
    dense = self._dense(tracked)
    owners = [paths[i] for i in arrays for _ in jax.tree.leaves(arrays[i])]
    found = _reads.find(jax.make_jaxpr(lambda arrays: self._call(dense | arrays))(arrays).jaxpr, owners)
    return {i: found.get(paths[i], []) for i in tracked}

  def differentiate(
    self, sinks: Mapping[int, _tracking.Sink], quantized: Sequence[int]
  ) -> tuple[Any, dict[int, jax.Array]]:
    """What `fun` returns, and the gradients of the leaves that are not among those seen as quantized ones."""
    tracked = {i: _tracking.track(self.leaves[i], sink) for i, sink in sinks.items()}

    def call(anchors, dense):
      return self._call(dense | {i: dataclasses.replace(x, anchor=anchors[i]) for i, x in tracked.items()})

    anchors = {i: x.anchor for i, x in tracked.items()}
    value, (_, gradients) = jax.value_and_grad(call, argnums=(0, 1), has_aux=self.has_aux)(
      anchors, self._dense(quantized)
    )
    return value, gradients

  def _call(self, instead: Mapping[int, Any]) -> Any:
    return self.fun(self.structure.treedef.unflatten([instead.get(i, leaf) for i, leaf in enumerate(self.leaves)]))

  def _dense(self, quantized: Sequence[int]) -> dict[int, jax.Array]:
    return {i: _array.dequantize(self.leaves[i]) for i in self.structure.active if i not in quantized}


def _refs(tree: Any) -> Any:
  return jax.tree.map(jax.new_ref, tree)


def _frozen(tree: Any) -> Any:
  return jax.tree.map(jax.freeze, tree)


def _no_uses(leaf: Any) -> Any:
  return jax.new_ref(jnp.zeros(leaf.shape[:-1], jnp.int32))


def _accumulate(
  microbatches: _multi_steps.Microbatches, extra_args: Callable[[Any], dict[str, Any]], loss: _Loss, opt_state: Any
) -> tuple[Any, Any, Any]:
  """`value_and_step` of a `MultiSteps`: gradients go into its accumulator or its momentum."""
  structure, leaves = loss.structure, loss.leaves
  targets = microbatches.targets(structure, opt_state)
  steps = microbatches.leaf_steps(structure, opt_state)
  tracked = [i for i in structure.active if _array.is_quantized(leaves[i]) and _array.is_quantized(targets[i])]
  loss.reads(tracked)
  places, sinks = {}, {}
  for i in tracked:
    weight = microbatches.gradient(opt_state, targets[i], None).weight
    places[i] = _tracking.Place(steps[i], [_refs(targets[i])], weight, _no_uses(leaves[i]))
    sinks[i] = _tracking.Sink(structure.paths[i], leaves[i].shape, places[i])
  value, gradients = loss.differentiate(sinks, tracked)
  targets |= {i: _frozen(place.slots[0]) for i, place in places.items()}
  state = microbatches.with_targets(structure, opt_state, targets)
  state = microbatches.with_targets(structure, state, microbatches.accumulate(structure, state, gradients))

  summed = microbatches.summed(structure, state, {})
  last = microbatches.is_last(opt_state)
  state = microbatches.counted(state, ~last)
  advance = functools.partial(_step.step, microbatches.tx, summed, **extra_args(value))
  params = structure.treedef.unflatten(leaves)
  return value, *microbatches.take_step(advance, params, last, state)


# Static, for it has no arrays.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Sum:
  """In place of the step of a leaf, the sum of its gradients in a dense array."""

  def of_use(self, use: jax.Array) -> '_Sum':
    del use  # Nothing is rounded.
    return self

  def run(
    self, gradient: _gradient.Gradient, target: jax.Array, fields: list[Any], start: list[jax.Array]
  ) -> tuple[jax.Array, list[Any]]:
    del start
    return gradient.combine(target, gradient.recent, target.dtype), fields


def _differentiate(
  loss: _Loss, reads: Mapping[int, list[bool]], moving: Mapping[int, _tracking.Sink]
) -> tuple[Any, dict[int, list[Any]], dict[int, _gradient.Gradient]]:
  """What the loss returns; of the leaves that have moved, what was in the slots; and the gradients of the others.

  What is dequantized at several places, or in slices that may overlap, accumulates its gradient, in float32.

  Args:
    loss: with its parameters.
    reads: of its quantized leaves, as `_Loss.reads` has it.
    moving: where the gradients of those that move go.
  """
  structure, leaves = loss.structure, loss.leaves
  sinks = dict(moving)
  for i, whole in reads.items():
    if whole and i not in moving:
      total = _array.full(leaves[i], 0, None, structure.templates[i].dtype)
      target = _tracking.Place(_Sum(), [_refs(total)], uses=_no_uses(leaves[i]))
      sinks[i] = _tracking.Sink(structure.paths[i], leaves[i].shape, target)
  value, dense = loss.differentiate(sinks, list(reads))
  gradients = {i: _gradient.Gradient(recent=gradient) for i, gradient in dense.items()}
  moved: dict[int, list[Any]] = {}
  for i in reads:
    place = sinks[i].place if i in sinks and sinks[i].was_reached else None
    if place is None:
      gradients[i] = _gradient.Gradient()  # Zero: the loss does not depend on it.
    elif i in moving:
      moved[i] = _frozen(place.slots)
    else:
      gradients[i] = _gradient.Gradient(recent=_frozen(place.slots[0]))
  return value, moved, gradients


def _move(optimizer: _low_precision.LowPrecision, loss: _Loss, opt_state: Any) -> tuple[Any, Any, Any]:
  """`value_and_step` of an optimizer without a `MultiSteps`: each layer moves when its gradient comes."""
  structure, leaves = loss.structure, loss.leaves
  planned = optimizer.planned(structure, leaves, opt_state, {})
  plan = planned.plan
  reads = loss.reads([i for i in structure.active if _array.is_quantized(leaves[i])])
  moving = [i for i, whole in reads.items() if whole == [True]]
  reductions = _check_layerwise(planned, moving)
  scalars = [v for i in moving for v in plan.leaves[i].scalars]
  scalars += [v for reduction in reductions.values() for v in reduction.scalars]
  before = planned.outer(scalars, {}, with_effects=False)

  sinks, totals = {}, {}
  for i in moving:
    own = {v: reduction for v, reduction in reductions.items() if reduction.leaf == i}
    totals[i] = _refs({v: _update.neutral(r.name, plan.graph.avals[v].dtype) for v, r in own.items()})
    place = _tracking.Place(
      planned.leaf(i, before, in_place=True),
      _refs([leaves[i], *planned.fields(i)]),
      scalars={v: [before[scalar] for scalar in reduction.scalars] for v, reduction in own.items()},
      totals=totals[i],
    )
    sinks[i] = _tracking.Sink(structure.paths[i], leaves[i].shape, place, True, own)
  value, moved, gradients = _differentiate(loss, reads, sinks)

  new: dict[int, Any] = {i: (target, fields) for i, (target, *fields) in moved.items()}
  reduced: dict[int, jax.Array] = {}
  for i in moved:
    reduced |= _frozen(totals[i])
  rest = [i for i in plan.leaves if i not in new]
  after = planned.outer(_outer_of(plan, rest), gradients, reduced, with_effects=True)
  for i in rest:
    new[i] = planned.leaf(i, after, in_place=True).run(gradients[i], leaves[i], planned.fields(i))
  return value, *planned.finish(new, after, leaves)


def _move_layers(optimizer: _layerwise.Layerwise, loss: _Loss, opt_state: Any) -> tuple[Any, Any, Any]:
  """`value_and_step` of a `layerwise`: each leaf, or slice of a stack, moves when all of its gradient has come."""
  structure, leaves = loss.structure, list(loss.leaves)
  layers, states = optimizer.layers(structure, leaves), optimizer.states(structure, opt_state)
  reads = loss.reads([i for i in structure.active if _array.is_quantized(leaves[i])])
  sinks = {}
  for i, whole in reads.items():
    if whole == [True]:
      place = _tracking.Place(layers[i], _refs([leaves[i], states[i]]))
      most = int(layers[i].is_stacked)
      sinks[i] = _tracking.Sink(structure.paths[i], leaves[i].shape, place, True, most_axes=most)
  value, moved, gradients = _differentiate(loss, reads, sinks)
  for i, (leaf, state) in moved.items():
    leaves[i], states[i] = leaf, state
  for i, gradient in gradients.items():
    leaves[i], states[i] = layers[i].advance(gradient, leaves[i], states[i], True, {})
  return value, structure.treedef.unflatten(leaves), optimizer.with_states(structure, states)


def _outer_of(plan: _plan.Plan, leaves: Sequence[int]) -> list[int]:
  """The outer values that some leaves and the state that belongs to none need."""
  return [*plan.shared.values(), *(v for i in leaves for v in (*plan.leaves[i].reads, *plan.leaves[i].scalars))]


def _check_layerwise(planned: _low_precision.PlannedStep, moved: Sequence[int]) -> dict[int, _plan.Reduction]:
  """The reductions of gradients of leaves that move in the backward pass, which what is left after it needs.

  Raises:
    ValueError: if any of them, or what is left, needs a whole gradient, naming the leaf.
  """
  plan, paths = planned.plan, planned.structure.paths

  def refuse(i, what):
    raise ValueError(
      f'{paths[i]}: {what}, which never exists where value_and_step moves one layer after the other. Wrap the '
      'optimizer: lpmm_optax.MultiSteps(tx, 1), to accumulate gradients first, or lpmm_optax.layerwise(tx, stacked), '
      'for every layer to have one of its own. Or clip each element, optax.clip, or by the norm of the step before, '
      'lpmm_optax.clip_by_previous_norm'
    )

  for i in moved:
    leaf = plan.leaves[i]
    if leaf.obstacle or leaf.reads:
      refuse(i, f'its update is not elementwise ({leaf.obstacle}): it needs its whole gradient')
    others = plan.gradients_of(plan.sources(leaf.scalars))
    if others:
      refuse(i, f'its update needs the whole gradient of {_array.name_some([paths[j] for j in sorted(others)])}')
  reductions = {
    value: reduction
    for value, reduction in plan.reductions.items()
    if reduction.leaf in moved and not plan.gradients_of(plan.sources(reduction.scalars))
  }
  rest = _outer_of(plan, [i for i in plan.leaves if i not in moved])
  sources = plan.sources([*rest, *plan.graph.effects], reductions)
  for i in sorted(plan.gradients_of(sources) & set(moved)):
    refuse(i, 'the state of the optimizer, or another parameter, needs its whole gradient')
  return {value: reduction for value, reduction in reductions.items() if value in sources}


def value_and_step(
  fun: Callable[..., Any],
  tx: _transformation.InPlaceTransformation,
  has_aux: bool = False,
  *,
  extra_args: Callable[..., dict[str, Any]] | None = None,
) -> Callable[..., tuple[Any, Any, Any]]:
  """`jax.value_and_grad` and the optimizer's step in one, so that no gradient outlives the layer it belongs to.

  Where ``jax.value_and_grad(fun)(params, *args)`` gives a value and gradients, this gives the value, and parameters and
  optimizer state after the microbatch. `fun` gets the quantized parameters as they are, and calls `dequantize` on each
  where it is used: in the body of the scan over layers, in the layer's function, or, in Flax, through
  ``nn.map_variables(Layer, 'params', lpmm_optax.dequantize, init=self.is_initializing())``. No tree of gradients
  exists. Nor does one of dense weights, if layers dequantize theirs inside of `jax.checkpoint`, which decodes them
  again; else they are kept for the backward pass, as activations are.

  With a `MultiSteps`, each layer's gradient is added to the accumulator or the momentum as soon as it is there. The
  result is that of `tx.step` but for one rounding: the last microbatch's gradient is added to the accumulator too,
  before the update. Clipping that `tx` does to accumulated gradients (``MultiSteps(chain(clip, adamw), k)``) is exact.
  What needs all of one microbatch's gradient at once, a skip function or clipping with `INTO_MOMENTUM`, there cannot
  be.

  With any other optimizer, each layer moves as soon as its gradient is there, so there is no accumulator: the model
  memory is that of parameters and state alone. The result is that of `tx.step`. The update must be elementwise and need
  nothing of the gradient of other layers: no `optax.clip_by_global_norm`, but `clip_by_previous_norm`. With a
  `layerwise` optimizer, whose layers know nothing of each other, it may be anything that needs no more than the layer's
  gradient: Adafactor, Muon, LAMB, clipping by the layer's norm. A parameter that is dequantized at several places (tied
  embeddings), or in slices that a Python loop takes, accumulates its gradient first, in float32.

  A quantized parameter may be dequantized any number of times, under `jax.checkpoint`, in `lax.scan`, and sliced along
  leading axes (``jax.tree.map(lambda x: x[i], p)``). Nothing else may be done with it: no arithmetic, no transposition,
  no `lax.cond` or `lax.while_loop`, no `jax.vmap` over it. Leaves that are dense, or whose accumulator is dense, are
  differentiated as usual. `fun` is traced twice.

  Args:
    fun: `(params, *args, **kwargs) -> loss` or, with has_aux, `(loss, aux)`; it must be differentiable in reverse mode.
    tx: a `MultiSteps`, of one microbatch or more, or an optimizer, `chain` or `layerwise` of this package.
    has_aux: whether fun returns a pair.
    extra_args: `(value, *args, **kwargs) -> dict`, what the optimizer of a `MultiSteps` gets besides gradients, state
      and parameters; value is the loss of the last microbatch. None is ``{'value': value}``.

  Returns:
    `(params, opt_state, *args, **kwargs) -> (value, params, opt_state)`, to be jitted with params and opt_state
    donated; value is what fun returns.

  Raises:
    TypeError: if tx is neither; and where fun is traced, for a quantized parameter with which anything else is done,
      naming it.
    ValueError: if tx is a `MultiSteps` with a skip function, or anything else with extra_args; and where fun is traced,
      for a parameter used in a slice that cannot be added to, or, without a `MultiSteps`, for one whose update needs
      more than the gradient that comes at once, naming it.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> def loss_fn(params, x):
  ...   layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None))
  ...   x, _ = jax.lax.scan(layer, x, params)
  ...   return jnp.mean((x - 0.5) ** 2)
  >>> params = lpmm.quantize(jax.random.normal(jax.random.key(0), (4, 64, 64)) / 8, lpmm.INT8)
  >>> tx = lpmm.MultiSteps(lpmm.sgdm(1.0), every_k_schedule=2, accumulator=lpmm.INTO_MOMENTUM)
  >>> state = tx.init(params)
  >>> train_step = jax.jit(lpmm.value_and_step(loss_fn, tx), donate_argnums=(0, 1))
  >>> for i in range(6):
  ...   value, params, state = train_step(params, state, jnp.ones((8, 64)))
  ...   print(f'{value:.2f}')
  0.46
  0.46
  0.20
  0.20
  0.10
  0.10
  """
  is_layerwise = isinstance(tx, _layerwise.LayerwiseTransformation)
  optimizer: Any = tx.layerwise if is_layerwise else _transformation.optimizer_of(tx)
  if not isinstance(tx, _multi_steps.MultiSteps) and optimizer is None:
    raise TypeError(
      f'value_and_step takes an optimizer of lpmm_optax, alone or last in lpmm_optax.chain (not optax.chain), or an '
      f'lpmm_optax.layerwise or MultiSteps, which is outermost, got {type(tx).__name__}; wrap what is none, '
      'MultiSteps(tx, 1)'
    )
  if isinstance(tx, _multi_steps.MultiSteps) and tx.microbatches.should_skip is not None:
    raise ValueError(
      'value_and_step cannot skip a microbatch: should_skip_update_fn must see all of its gradient, which never exists '
      'at once; use jax.value_and_grad and lpmm_optax.step'
    )
  if extra_args is not None and optimizer is not None:
    raise ValueError(
      'value_and_step updates parameters before the loss is known to the optimizer, which so gets no extra arguments; '
      'wrap it, lpmm_optax.MultiSteps(tx, 1)'
    )

  def wrapped(params, opt_state, *args, **kwargs):
    structure, leaves = _plan.flatten(params)
    loss = _Loss(lambda params: fun(params, *args, **kwargs), has_aux, structure, leaves)
    if optimizer is not None:
      return (_move_layers if is_layerwise else _move)(optimizer, loss, opt_state)

    def extra(value):
      value = value[0] if has_aux else value
      return {'value': value} if extra_args is None else extra_args(value, *args, **kwargs)

    tx.microbatches.check(opt_state)
    return _accumulate(tx.microbatches, extra, loss, opt_state)

  return wrapped
