"""`MultiSteps`: one optimizer step for several microbatches, their gradients accumulated in low precision."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import enum
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program
from lpmm_optax.training import _step


class Into(enum.Enum):
  """Where gradients can be accumulated other than in an accumulator."""

  MOMENTUM = 'momentum'

  def __repr__(self) -> str:
    return f'INTO_{self.name}'


INTO_MOMENTUM = Into.MOMENTUM


class MultiStepsState(NamedTuple):
  """State of `MultiSteps`: the fields of `optax.MultiStepsState`, and two of its own.

  Attributes:
    mini_step: microbatches accumulated since the last optimizer step, int32[].
    gradient_step: optimizer steps taken, int32[].
    inner_opt_state: the optimizer's.
    acc_grads: the accumulator, a tree like the parameters of QuantizedArrays or dense arrays; () with `INTO_MOMENTUM`.
    skip_state: what the skip function returned last, () without one.
    key: raw key data that the accumulator's rounding derives from, uint32[2]; it never changes.
    microbatches: of the step in progress, int32[], for what is accumulated is divided by it; 0 before the first.
  """

  mini_step: jax.Array
  gradient_step: jax.Array
  inner_opt_state: Any
  acc_grads: Any
  skip_state: Any
  key: jax.Array
  microbatches: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Microbatches:
  """How `MultiSteps` accumulates; its arguments, checked.

  A leaf's gradients go into its *target*: its accumulator, or its momentum.
  """

  tx: optax.GradientTransformationExtraArgs
  momentum: _low_precision.IntoMomentum | None
  every_k: Callable[[jax.Array], Any]
  use_grad_mean: bool
  should_skip: Callable[..., tuple[jax.Array, Any]] | None
  accumulator: Format | None
  raw_key: jax.Array
  tile_size: int | None
  shard_axes: frozenset[str]

  def init(self, params: Any) -> MultiStepsState:
    """The state before the first microbatch."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    acc_grads: Any = ()
    if self.momentum is None:
      acc_grads = structure.tree({i: self._new_target(structure, i, leaves[i]) for i in structure.active})
    # One each, since a step that donates the state deletes it.
    mini_step, step, microbatches = (jnp.zeros((), jnp.int32) for _ in range(3))
    skip_state: Any = ()
    if self.should_skip is not None:
      # What it says of gradients of zero is of no interest, and they would take memory.
      shapes = jax.eval_shape(self.should_skip, structure.tree(structure.templates), step, params)[1]
      skip_state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    key = jnp.array(self.raw_key)
    return MultiStepsState(mini_step, step, self.tx.init(params), acc_grads, skip_state, key, microbatches)

  def _new_target(self, structure: _plan.Params, i: int, leaf: Any) -> Any:
    format = _array.pick_format(structure.paths[i], leaf, self.accumulator, None, _format.STATE_BLOCK_SIZE)
    dtype = structure.templates[i].dtype
    if format is not None and dtype == jnp.float64:
      raise TypeError(f'acc_grads/{structure.paths[i]}: gradients of a float64 parameter cannot be kept in {format}')
    return _array.full(leaf, 0, format, dtype)

  def check(self, state: Any) -> None:
    """Raises unless it is what `update` takes."""
    if not isinstance(state, MultiStepsState):
      raise TypeError(f'MultiSteps got a state of type {type(state).__name__}, which it did not create')

  def targets(self, structure: _plan.Params, state: MultiStepsState) -> dict[int, Any]:
    """The target of every active leaf.

    Raises:
      ValueError: if the state was made for other parameters.
    """
    if self.momentum is not None:
      entries, arrays, _ = _plan.take_apart(structure, state.inner_opt_state)
      owned = {entry.leaf: x for entry, x in zip(entries, arrays, strict=True) if entry.field == self.momentum.field}
      found = {i: owned.get(i) for i in structure.active}
    else:
      try:
        flat = structure.treedef.flatten_up_to(state.acc_grads)
      except (ValueError, TypeError, KeyError) as error:
        raise ValueError('MultiSteps got an accumulator that it did not create for these parameters') from error
      found = {i: flat[i] for i in structure.active}
    for i, target in found.items():
      shape = structure.templates[i].shape
      if getattr(target, 'shape', None) != shape:
        raise ValueError(f'{structure.paths[i]}: the parameter has shape {shape}, its accumulator is {target!r}')
    return found

  def with_targets(self, structure: _plan.Params, state: MultiStepsState, targets: dict[int, Any]) -> MultiStepsState:
    """The state with other targets."""
    if self.momentum is None:
      return state._replace(acc_grads=structure.tree(targets))
    entries, arrays, treedef = _plan.take_apart(structure, state.inner_opt_state)
    arrays = [
      targets[entry.leaf] if entry.leaf is not None and entry.field == self.momentum.field else x
      for entry, x in zip(entries, arrays, strict=True)
    ]
    return state._replace(inner_opt_state=treedef.unflatten(arrays))

  def count(self, state: MultiStepsState) -> jax.Array:
    """Microbatches in this step, int32[]: as many as when it began, though a run may go on with another number."""
    wanted = jnp.asarray(self.every_k(state.gradient_step)).astype(jnp.int32)
    has_begun = (state.mini_step > 0) & (state.microbatches > 0)
    return jnp.where(has_begun, state.microbatches, wanted)

  def counted(self, state: MultiStepsState, when: jax.Array) -> MultiStepsState:
    """The state with one more microbatch where `when`, bool[]."""
    mini_step = jnp.where(when, optax.safe_increment(state.mini_step), state.mini_step)
    microbatches = jnp.where(when, self.count(state), state.microbatches)
    return state._replace(mini_step=mini_step, microbatches=microbatches)

  def gradient(self, state: MultiStepsState, target: Any, recent: Any) -> _gradient.Gradient:
    """A target and one more microbatch's gradient, to be summed."""
    if self.use_grad_mean and self.momentum is None and not _array.is_quantized(target):
      count = _program.hidden(state.mini_step).astype(jnp.float32) + 1
      return _gradient.Gradient(target, recent, 1 / count, is_mean=True)
    weight = None
    if self.use_grad_mean:
      weight = 1 / self.count(state).astype(jnp.float32)
    if self.momentum is not None:
      rate = self.momentum.weight(state.inner_opt_state.step)
      weight = rate if weight is None else weight * rate
    return _gradient.Gradient(target, recent, weight)

  def leaf_steps(self, structure: _plan.Params, state: MultiStepsState) -> dict[int, _low_precision.LeafStep]:
    """The update of each leaf's target by this microbatch's gradient."""
    keys = [structure.keys[i] for i in structure.active]
    words = _random.words(state.key, _random.Domain.ACCUMULATE, (state.gradient_step, state.mini_step), keys, 1)
    zero = _program.runtime_zero(_program.hidden(state.mini_step))
    shapes = {i: structure.templates[i].shape for i in structure.active}
    size = self.tile_size or _tiles.default_tile_size(sum(map(math.prod, shapes.values())), 1)
    return {
      i: _low_precision.LeafStep(
        structure.paths[i], _update.LeafUpdate(None, shapes[i], size, self.shard_axes), leaf_words, zero
      )
      for i, leaf_words in zip(structure.active, words, strict=True)
    }

  def accumulate(
    self, structure: _plan.Params, state: MultiStepsState, gradients: Mapping[int, jax.Array]
  ) -> dict[int, Any]:
    """The targets of all leaves, after the dense gradients of some have been added."""
    targets, steps = self.targets(structure, state), self.leaf_steps(structure, state)
    for i, recent in gradients.items():
      gradient = dataclasses.replace(self.gradient(state, targets[i], recent), accumulated=None)
      targets[i], _ = steps[i].run(gradient, targets[i], [])
    return targets

  def summed(self, structure: _plan.Params, state: MultiStepsState, recent: Mapping[int, jax.Array]) -> Any:
    """The tree of gradients that the optimizer takes: of each leaf's target, and of a last gradient where there is one.

    With a momentum as target, the optimizer has what was accumulated already.
    """
    targets = self.targets(structure, state)
    gradients = {}
    for i, target in targets.items():
      gradient = self.gradient(state, target, recent[i]) if i in recent else _gradient.Gradient(target)
      gradients[i] = gradient if self.momentum is None else dataclasses.replace(gradient, accumulated=None)
    return structure.tree(gradients)

  def take_step(self, advance: Callable, start: Any, when: jax.Array, state: MultiStepsState) -> tuple[Any, Any]:
    """The optimizer's step where `when`, bool[], and the emptying of the accumulator after it.

    Args:
      advance: `(result, inner_state) -> (result, inner_state)`, the step.
      start: the result where there is none: what `advance` overwrites.
      when: whether this microbatch completes the step.
      state: of which counts and accumulator are those after the microbatch, if it does not complete the step.
    """
    stepped = _program.runtime_zero(_program.hidden(state.mini_step)) != 0  # False.

    def emit(carried):
      result, inner_state, stepped = carried
      return *advance(result, inner_state), ~stepped

    result, inner_state, stepped = _step.where(when, emit, (start, state.inner_opt_state, stepped))
    # That `stepped` comes out of it makes this wait for the step, and so overwrite the accumulator in place. Emptied
    # inside, beside the loops that read it, it would exist twice.
    acc_grads = jax.tree.map(lambda x: jnp.where(stepped, jnp.zeros_like(x), x), state.acc_grads)
    return result, state._replace(
      mini_step=jnp.where(stepped, 0, state.mini_step),
      gradient_step=jnp.where(stepped, optax.safe_increment(state.gradient_step), state.gradient_step),
      inner_opt_state=inner_state,
      acc_grads=acc_grads,
    )

  def is_last(self, state: MultiStepsState) -> jax.Array:
    """Whether the next microbatch completes a step, bool[]."""
    return state.mini_step >= self.count(state) - 1

  def update(self, updates: Any, state: MultiStepsState, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    """Deltas, all zero until the last microbatch of a step, and the state."""
    self.check(state)

    def advance(gradients, inner_state):
      if not isinstance(self.tx, _transformation.InPlaceTransformation):
        gradients = _gradient.dense(gradients, params)
      deltas, inner_state = self.tx.update(gradients, inner_state, params, **extra_args)
      return _array.unseal(deltas), inner_state

    gradients, last, state = self._accumulated(updates, params, state)
    no_change = _step.no_change(params, advance, gradients, state.inner_opt_state)
    return self.take_step(lambda _, inner_state: advance(gradients, inner_state), no_change, last, state)

  def step(self, gradients: Any, params: Any, state: MultiStepsState, **extra_args: Any) -> tuple[Any, Any]:
    """Parameters and state, in place."""
    self.check(state)
    gradients, last, state = self._accumulated(gradients, params, state)
    advance = functools.partial(_step.step, self.tx, gradients, **extra_args)
    return self.take_step(advance, params, last, state)

  def _accumulated(self, gradients, params, state):
    """The gradients that the optimizer takes, whether it takes them now, bool[], and the state with what came."""
    structure, _ = _plan.flatten(params)
    gradients = _gradient.dense(gradients, params)
    recent: dict[int, Any] = {i: gradient.recent for i, gradient in _gradient.flatten(structure, gradients).items()}
    last, more = self.is_last(state), ~self.is_last(state)
    if self.should_skip is not None:
      # As at `init`, without the leaves that are never updated, whose gradients are of no dtype that has numbers.
      skip, skip_state = self.should_skip(structure.tree(recent), state.gradient_step, params)
      if (skip.dtype, skip.shape) != (jnp.bool_, ()):
        raise ValueError(f'should_skip_update_fn must return a boolean scalar, got {skip.dtype}{list(skip.shape)}')
      last, more = last & ~skip, more & ~skip
      state = state._replace(skip_state=skip_state)

    def accumulate(targets):
      return self.accumulate(structure, self.with_targets(structure, state, targets), recent)

    targets = _step.where(more, accumulate, self.targets(structure, state))
    state = self.with_targets(structure, state, targets)
    gradients = self.summed(structure, state, recent)
    return gradients, last, self.counted(state, more)


class MultiSteps(_transformation.InPlaceTransformation):
  r"""`optax.MultiSteps` with a low-precision accumulator, or without any.

  Microbatches are accumulated until k of them have come; the last one's gradient is added to the accumulated ones in
  the update itself, tile by tile, and not rounded before. Until then, parameters and optimizer state stay as they are,
  bit for bit.

  With a Format, the accumulator holds :math:`\sum_i g_i / k` so far (:math:`\sum_i g_i` for sums), rounded
  stochastically and so without bias; where a gradient is zero, nothing is rounded. A dense accumulator (of exempt
  leaves, or of all with None) holds the mean of the microbatches so far, by Welford's recurrence, as Optax has it. The
  two agree once the last has come.

  With `INTO_MOMENTUM` there is no accumulator: as heavy-ball momentum is linear in the gradients, they are added to it
  one by one,

  .. math::
    u \leftarrow u + g_i / k \quad (i < k), \qquad
    m = u + g_k / k, \quad w \leftarrow Q(w - \eta m), \quad u \leftarrow \beta m

  (with `sgdm`'s error feedback, in velocity form). The state field 'trace' then is u, the momentum with its decay
  already applied. The grid of a momentum is wider than that of a gradient: to gradients whose means over a step have
  noise of variance :math:`s^2`, 8-bit momentum adds :math:`k (2.9 / 127)^2 / (6 (1 - \beta^2))` of :math:`s^2`, as a
  block of 128 reaches 2.9 standard deviations; with 8 microbatches 0.4 % at :math:`\beta = 0.9`, 3.5 % at 0.99.

  The result is a gradient transformation as it stands: it has `init`, `update` and the in-place `step`, so
  `lpmm_optax.step`, `TrainState` and `nnx.Optimizer` take it, and `lpmm_optax.value_and_step` accumulates during the
  backward pass.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  >>> tx = lpmm.MultiSteps(lpmm.sgdm(0.1), every_k_schedule=2)
  >>> state = tx.init(params)
  >>> for i in range(4):
  ...   params, state = lpmm.step(tx, jnp.ones((64, 128)), params, state)
  ...   print(bool(tx.has_updated(state)), f'{jnp.mean(lpmm.dequantize(params)):.2f}')
  False 0.00
  True -0.10
  False -0.10
  True -0.29
  """

  microbatches: Microbatches

  def __new__(
    cls,
    tx: optax.GradientTransformation,
    every_k_schedule: int | Callable[[jax.Array], jax.typing.ArrayLike],
    use_grad_mean: bool = True,
    should_skip_update_fn: Callable[..., tuple[jax.Array, Any]] | None = None,
    accumulator: Format | Into | None = _format.INT8,
    *,
    key: jax.Array | None = None,
    tile_size: int | None = None,
    shard_axes: Sequence[str] = (),
  ):
    """A transformation of microbatches' gradients.

    Args:
      tx: the optimizer: one of this package, a `chain`, or, for dense parameters, one of Optax's. What a chain does
        before its optimizer (clipping) is done with the accumulated gradient, exactly.
      every_k_schedule: microbatches per step, an int or a function of the gradient step.
      use_grad_mean: whether to average the gradients rather than sum them.
      should_skip_update_fn: `(gradients, gradient_step, params) -> (skip, skip_state)`, such as
        `optax.skip_not_finite`. A skipped microbatch changes nothing but `skip_state`.
      accumulator: a Format, None for dense arrays, or `INTO_MOMENTUM`.
      key: a `jax.random` key that the accumulator's rounding derives from; None is `jax.random.key(0)`.
      tile_size: elements accumulated at a time, a matter of speed and memory alone; None chooses by backend.
      shard_axes: as for `low_precision`.

    Raises:
      ValueError: for fewer than one microbatch, a format that stores no negative values, or `INTO_MOMENTUM` with any
        optimizer but a bare heavy-ball `sgdm`.
      TypeError: for an accumulator that is none of these.
    """
    if not callable(every_k_schedule) and every_k_schedule < 1:
      raise ValueError(f'every_k_schedule must be at least 1, got {every_k_schedule}')
    momentum = None
    if isinstance(accumulator, Format):
      if not accumulator.signed:
        raise ValueError(f'{accumulator} stores nonnegative values only, and gradients have signs')
      accumulator = accumulator.with_block_size(_format.STATE_BLOCK_SIZE)
    elif accumulator is INTO_MOMENTUM:
      optimizer = _transformation.whole_optimizer_of(tx)
      momentum = None if optimizer is None else optimizer.into_momentum
      if momentum is None:
        raise ValueError(
          'accumulator=INTO_MOMENTUM adds gradients to the momentum, so the optimizer must be linear in them: it takes '
          'lpmm.sgdm with a momentum and nesterov=False, and nothing around it. To transform the gradient of each '
          'microbatch, write lpmm.chain(..., lpmm.MultiSteps(lpmm.sgdm(...), ...)); for all else use a Format'
        )
    elif accumulator is not None:
      raise TypeError(f'accumulator must be a Format, None or INTO_MOMENTUM, got {accumulator!r}')
    _tiles.check_size(tile_size)
    inner = optax.with_extra_args_support(tx if momentum is None else momentum.tx)
    microbatches = Microbatches(
      tx=inner,
      momentum=momentum,
      every_k=every_k_schedule if callable(every_k_schedule) else lambda step: every_k_schedule,
      use_grad_mean=use_grad_mean,
      should_skip=should_skip_update_fn,
      accumulator=accumulator if isinstance(accumulator, Format) else None,
      raw_key=_random.raw_key(key),
      tile_size=tile_size,
      shard_axes=_mesh.axis_names(shard_axes),
    )
    explain = _transformation.explain(inner)
    self = super().__new__(
      cls, 'MultiSteps', microbatches.init, microbatches.update, microbatches.step, explain=explain
    )
    self.microbatches = microbatches
    return self

  @property
  def inner_opt(self) -> optax.GradientTransformationExtraArgs:
    """The optimizer that takes the accumulated gradients."""
    return self.microbatches.tx

  def has_updated(self, state: MultiStepsState) -> jax.Array:
    """Whether the last microbatch completed a step, bool[]."""
    return (state.mini_step == 0) & (state.gradient_step > 0)

  def mean_gradients(self, state: MultiStepsState) -> Any:
    """The mean of the microbatches' gradients since the last optimizer step, to be looked at; zero where none came.

    It is of what has come before a step, whose last gradient goes from the backward pass into the update. To log a norm
    of what the optimizer takes, all microbatches included, give it a preceding transformation that keeps one, such as
    ``lpmm.MultiSteps(lpmm.chain(optax.snapshot('norm', optax.tree.norm), tx), k)``, and read
    ``optax.tree.get(state, 'norm')``.

    Args:
      state: of this.

    Returns:
      A tree like the parameters of dense arrays; under jit, a norm of it takes no memory for them.

    Raises:
      ValueError: with `INTO_MOMENTUM`, which has no accumulator.

    >>> import jax.numpy as jnp, lpmm_optax as lpmm
    >>> params, tx = lpmm.quantize(jnp.zeros((64, 64)), lpmm.INT8), lpmm.MultiSteps(lpmm.sgdm(0.1), 4)
    >>> state = tx.init(params)
    >>> for g in (1.0, 2.0):
    ...   params, state = lpmm.step(tx, jnp.full((64, 64), g), params, state)
    >>> print(f'{jnp.mean(tx.mean_gradients(state)):.2f}')
    1.50
    """
    if self.microbatches.momentum is not None:
      raise ValueError(
        'with accumulator=INTO_MOMENTUM there is no accumulator, and so no mean of gradients; the norm of each '
        "microbatch's is kept by lpmm_optax.chain(optax.snapshot('norm', optax.tree.norm), MultiSteps(...)), with "
        'lpmm_optax.step'
      )
    count = state.mini_step.astype(jnp.float32)
    scale = jnp.where(count > 0, 1 / jnp.maximum(count, 1), 0.0)
    if self.microbatches.use_grad_mean:
      scale = scale * self.microbatches.count(state).astype(jnp.float32)

    def mean(x):
      # A dense accumulator of a mean holds the mean so far; all others hold a sum, of which the mean divides by k.
      is_mean = self.microbatches.use_grad_mean and not _array.is_quantized(x)
      return x if is_mean else _array.dequantize(x) * scale.astype(x.dtype)

    return jax.tree.map(mean, state.acc_grads, is_leaf=_array.is_quantized)

  def gradient_transformation(self) -> 'MultiSteps':
    """Itself: a gradient transformation already."""
    return self
