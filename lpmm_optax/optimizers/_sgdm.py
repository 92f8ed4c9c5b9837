"""Stochastic gradient descent with momentum."""

from collections.abc import Callable
from collections.abc import Sequence
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _feedback
from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.trace import _field_formats

# By how much a momentum may multiply, from one step to the next, what a velocity still has to move.
_LARGEST_GROWTH = 1.25


class VelocityState(NamedTuple):
  """State of `_velocity`.

  Attributes:
    count: steps taken, int32[].
    trace: the velocity, a tree like the parameters.
    momentum: the decay in the last step, float32[].
  """

  count: jax.Array  # type: ignore[assignment]  # As in Optax's states; tuples have a method of that name.
  trace: Any
  momentum: jax.Array


class DecayedMomentumState(NamedTuple):
  """State of `_decayed`: steps taken, int32[], and momentum times its decay, a tree like the parameters."""

  count: jax.Array  # type: ignore[assignment]
  trace: Any


class DecayedVelocityState(NamedTuple):
  """The same of a velocity, with the decay in the last step, as in `VelocityState`."""

  count: jax.Array  # type: ignore[assignment]
  trace: Any
  momentum: jax.Array


def _velocity(learning_rate: optax.ScalarOrSchedule, momentum: Any) -> optax.GradientTransformation:
  """v <- b v + lr g, w <- w - v; a learning rate of zero leaves both as they are."""

  def init(params):
    trace = jax.tree.map(jnp.zeros_like, params)
    return VelocityState(jnp.zeros((), jnp.int32), trace, jnp.asarray(momentum, jnp.float32))

  def update(updates, state, params=None):
    del params
    rate = _hyperparams.current(learning_rate, state.count)
    frozen = rate == 0
    decay, moves = jnp.where(frozen, 1.0, momentum), jnp.where(frozen, 0.0, 1.0)
    like = lambda scalar, x: scalar.astype(x.dtype)
    velocity = jax.tree.map(lambda g, v: like(decay, v) * v + like(rate, v) * g, updates, state.trace)
    delta = jax.tree.map(lambda v: -like(moves, v) * v, velocity)
    last = jnp.where(frozen, state.momentum, momentum)
    return delta, VelocityState(optax.safe_increment(state.count), velocity, last)

  return optax.GradientTransformation(init, update)


def _add_error(
  fields: dict[str, jax.Array], error: jax.Array, grid: _update.Grid, hyper: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Adds an error to the velocity, times a correction.

  What is there of earlier errors, a few grid steps at most, was put there to be brought back by the decay of then. If
  the decay grows at once, they would be brought back many times over; so that much of the velocity shrinks with it.
  """
  velocity = fields['trace'] + hyper['correction'] * error
  if 'shrink' in hyper:
    bound = hyper['residue'] * grid.step
    velocity = velocity - hyper['shrink'] * jnp.clip(velocity, -bound, bound)
  return fields | {'trace': velocity}


def _velocity_feedback(momentum: Any, is_required: bool, *, is_decayed: bool) -> _feedback.Feedback:
  """What puts rounding errors into a velocity, or into one that is stored times its decay."""

  def hyperparams(step, inner_state):
    del step
    decay = jnp.asarray(momentum, float)
    safe = jnp.where(decay > 0, decay, 1.0)
    # Without momentum nothing brings an error back, so none is kept; a decayed velocity has been through the decay.
    out = {'correction': decay - 1 if is_decayed else jnp.where(decay > 0, 1 - 1 / safe, 0.0)}
    if _hyperparams.is_known(momentum):
      return out
    (last,) = (state.momentum for state in _states(inner_state, VelocityState, DecayedVelocityState))
    gain = lambda b: b / jnp.maximum(1 - b, 1e-6)
    growth = gain(decay) / jnp.maximum(gain(last), 1e-6)
    # A momentum that warms up from step to step stays as it is.
    shrink = jnp.where(growth > _LARGEST_GROWTH, 1 - _LARGEST_GROWTH / growth, 0.0)
    return out | {'shrink': shrink, 'residue': jnp.ones(()) if is_decayed else 1 / jnp.maximum(last, 0.1)}

  return _feedback.Feedback(('trace',), _feedback.LEAST_BITS, is_required, _add_error, hyperparams)


def _states(state: Any, *types: type) -> list[Any]:
  found = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, types))
  return [x for x in found if isinstance(x, types)]


def _decayed(
  learning_rate: optax.ScalarOrSchedule, momentum: Any, weight_decay: Any, is_velocity: bool
) -> optax.GradientTransformation:
  r"""SGD whose momentum is stored decayed, so that a step's gradients can be added to it one by one.

  In place of m it keeps :math:`u = \beta m`. The gradients g of a step are added as they come; with the last,
  m = u + g, the parameters move by it, and :math:`\beta m` is stored. As a velocity, gradients count times the rate.
  """

  def init(params):
    count, trace = jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params)
    if is_velocity:
      return DecayedVelocityState(count, trace, jnp.asarray(momentum, jnp.float32))
    return DecayedMomentumState(count, trace)

  def update(updates, state, params):
    rate = _hyperparams.current(learning_rate, state.count)
    # As in `_velocity`: no step.
    frozen = (rate == 0) & is_velocity
    enters, moves = (rate, jnp.where(frozen, 0.0, 1.0)) if is_velocity else (jnp.ones_like(rate), rate)
    decay = jnp.where(frozen, 1.0, momentum)
    like = lambda scalar, x: jnp.asarray(scalar, x.dtype)
    # The gradients come multiplied by `enters` already; the decay of the weights does not.
    total = jax.tree.map(lambda g, w, u: u + g + like(enters * weight_decay, u) * w, updates, params, state.trace)
    delta = jax.tree.map(lambda m: -like(moves, m) * m, total)
    trace = jax.tree.map(lambda m: like(decay, m) * m, total)
    state = state._replace(count=optax.safe_increment(state.count), trace=trace)
    return delta, state._replace(momentum=jnp.where(frozen, state.momentum, momentum)) if is_velocity else state

  return optax.GradientTransformation(init, update)


def _into_momentum(
  learning_rate: optax.ScalarOrSchedule,
  momentum: Any,
  weight_decay: Any,
  error_feedback: bool,
  is_required: bool,
  transform: Callable,
) -> _low_precision.IntoMomentum:
  """`sgdm` for `MultiSteps` with `INTO_MOMENTUM`, of what makes an inner transformation low-precision."""
  feedback = _velocity_feedback(momentum, is_required, is_decayed=True) if error_feedback else None
  inner = _decayed(learning_rate, momentum, weight_decay, error_feedback)
  weight = lambda step: _hyperparams.current(learning_rate, step) if error_feedback else jnp.ones(())
  return _low_precision.IntoMomentum(transform(inner, feedback=feedback), 'trace', weight)


def sgdm(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float | jax.Array | None = 0.9,
  *,
  nesterov: bool = False,
  weight_decay: float | jax.Array = 0.0,
  formats: _field_formats.Formats = 'default',
  error_feedback: bool | None = None,
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> _transformation.InPlaceTransformation:
  r"""SGD with momentum, with parameters and momentum stored in low precision.

  Without error feedback this is `optax.sgd` with coupled weight decay, rounded once per step:

  .. math::
    g_t \leftarrow g_t + \lambda w_t, \quad m_{t+1} = \beta m_t + g_t, \quad w_{t+1} = Q(w_t - \eta_t m_{t+1})

  where Q rounds a parameter to the grid it is stored in (the identity for dense ones) and m is stored in its own
  format.
  With dense parameters and ``formats=None`` it equals `optax.sgd` to float rounding.

  With error feedback, the error of rounding the parameter goes into the momentum, which brings it back over the
  following steps. In velocity form,

  .. math::
    \tilde v = \beta v_t + \eta_t g_t, \quad \tilde w = w_t - \tilde v, \quad w_{t+1} = Q(\tilde w), \quad
    v_{t+1} = Q\bigl(\tilde v + (1 - 1/\beta)(\tilde w - w_{t+1})\bigr)

  so that the virtual weights :math:`z = w - \beta v / (1 - \beta)` follow exact SGD with step
  :math:`\eta_t / (1 - \beta)`, whatever the schedule, because the error cancels: Q changes w by -e and the velocity
  term by +e. The two forms are the same optimizer for a constant learning rate; under a schedule the velocity form
  applies to each gradient the rate at which it came (as Sutskever et al. have it). A learning rate of exactly zero is
  no step. With Nesterov momentum, the momentum is no velocity, and feedback is that of `low_precision`.

  Args:
    learning_rate: a scalar, or a schedule of the step count.
    momentum: the decay :math:`\beta`; None or 0 for plain SGD without momentum state.
    nesterov: whether to use Nesterov momentum.
    weight_decay: :math:`\lambda`, added to the gradient before the momentum as torch and the paper do.
    formats: how the momentum (state field ``'trace'``) is stored, see `low_precision`; the default is `INT8`. How
      parameters are stored is decided by what `init` and `update` are given.
    error_feedback: None for on wherever it works (a momentum of at least 8 bits rounded stochastically, and formats
      not None), True to insist, False for the paper's optimizer.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.
    shard_axes: as for `low_precision`.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`.

  Raises:
    TypeError, ValueError: if formats, key or a hyperparameter does not fit, or error_feedback=True cannot work.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> target = jax.random.normal(jax.random.key(0), (64, 128))
  >>> loss = lambda w: 0.5 * jnp.sum((w - target) ** 2)
  >>> params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  >>> tx = lpmm.sgdm(0.1, momentum=0.5)
  >>> state = tx.init(params)
  >>> for _ in range(5):
  ...   value, grads = jax.value_and_grad(loss)(lpmm.dequantize(params))
  ...   print(f'{value / params.size:.2f}')
  ...   updates, state = tx.update(grads, state, params)
  ...   params = optax.apply_updates(params, updates)
  0.52
  0.42
  0.30
  0.19
  0.12

  References:
    Li et al., Training Neural Networks with Low-Precision Model Memory, 2022.

    Sutskever et al., `On the importance of initialization and momentum in deep learning
    <http://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
  """
  has_trace = momentum is not None and not _hyperparams.is_zero(momentum)
  if nesterov and not has_trace:
    raise ValueError(f'nesterov=True needs a momentum, got {momentum}')
  _field_formats.check(formats, ('trace',))
  learning_rate = _hyperparams.check_scalar_or_schedule('learning_rate', learning_rate)
  problem = _feedback.problem_with(formats, 'trace', ('momentum', momentum), _feedback.LEAST_BITS)
  is_required = error_feedback is True
  error_feedback = _feedback.decide(error_feedback, problem, formats, 'trace')
  weight_decay = _hyperparams.check_scalar('weight_decay', weight_decay)
  # One structure of the state whatever the weight decay, which inject_hyperparams makes a tracer.
  decays = not _hyperparams.is_zero(weight_decay)
  inner = [optax.add_decayed_weights(weight_decay) if decays else optax.identity()]
  if has_trace:
    momentum = _hyperparams.check_scalar('momentum', momentum)
  feedback: _feedback.Feedback | _feedback.ByDerivatives | None = None
  if error_feedback and not nesterov:
    inner.append(_velocity(learning_rate, momentum))
    feedback = _velocity_feedback(momentum, is_required, is_decayed=False)
  else:
    if has_trace:
      inner.append(optax.trace(momentum, nesterov))
    inner.append(optax.scale_by_learning_rate(learning_rate))
    feedback = _feedback.ByDerivatives(is_required) if error_feedback else None
  transform = functools.partial(
    _low_precision.transform, name='sgdm', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes
  )
  into_momentum = None
  if has_trace and not nesterov:
    into_momentum = _into_momentum(learning_rate, momentum, weight_decay, error_feedback, is_required, transform)
  return transform(optax.chain(*inner), feedback=feedback, into_momentum=into_momentum)
