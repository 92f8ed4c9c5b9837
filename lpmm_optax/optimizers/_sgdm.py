"""Stochastic gradient descent with momentum."""

from collections.abc import Callable
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.optimizers import _feedback
from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.trace import _field_formats


class VelocityState(NamedTuple):
  """State of `_velocity`: steps taken, int32[], and the velocity, a tree like the parameters."""

  count: jax.Array  # type: ignore[assignment]  # As in Optax's states; tuples have a method of that name.
  trace: Any


class DecayedMomentumState(NamedTuple):
  """State of `_decayed`: steps taken, int32[], and momentum times its decay, a tree like the parameters."""

  count: jax.Array  # type: ignore[assignment]
  trace: Any


class DecayedVelocityState(NamedTuple):
  """The same of a velocity."""

  count: jax.Array  # type: ignore[assignment]
  trace: Any


def _velocity(learning_rate: optax.ScalarOrSchedule, momentum: Any) -> optax.GradientTransformation:
  """v <- b v + lr g, w <- w - v; a learning rate of zero leaves both as they are."""

  def init(params):
    return VelocityState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

  def update(updates, state, params=None):
    del params
    rate = _hyperparams.current(learning_rate, state.count)
    frozen = rate == 0
    decay, moves = jnp.where(frozen, 1.0, momentum), jnp.where(frozen, 0.0, 1.0)
    like = lambda scalar, x: scalar.astype(x.dtype)
    velocity = jax.tree.map(lambda g, v: like(decay, v) * v + like(rate, v) * g, updates, state.trace)
    return jax.tree.map(lambda v: -like(moves, v) * v, velocity), VelocityState(
      optax.safe_increment(state.count), velocity
    )

  return optax.GradientTransformation(init, update)


def _correction(momentum: Any) -> jax.Array:
  """1 - 1 / b; without momentum nothing brings an error back, so none is kept."""
  decay = jnp.asarray(momentum, float)
  return jnp.where(decay > 0, 1 - 1 / jnp.where(decay > 0, decay, 1.0), 0.0)


def _velocity_feedback(correction: Callable[[], jax.Array]) -> _feedback.Feedback:
  """What adds an error to the velocity, times a correction."""
  return _feedback.Feedback(
    fields=frozenset({'trace'}),
    hyperparams=lambda step: {'correction': correction()},
    apply=lambda fields, error, grid_step, hyper: fields | {'trace': fields['trace'] + hyper['correction'] * error},
  )


def _decayed(
  learning_rate: optax.ScalarOrSchedule, momentum: Any, weight_decay: Any, is_velocity: bool
) -> optax.GradientTransformation:
  r"""SGD whose momentum is stored decayed, so that a step's gradients can be added to it one by one.

  In place of m it keeps :math:`u = \beta m`. The gradients g of a step are added as they come; with the last,
  m = u + g, the parameters move by it, and :math:`\beta m` is stored. As a velocity, gradients count times the rate.
  """

  new_state = DecayedVelocityState if is_velocity else DecayedMomentumState

  def init(params):
    return new_state(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

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
    return delta, new_state(optax.safe_increment(state.count), trace)

  return optax.GradientTransformation(init, update)


def _into_momentum(
  learning_rate: optax.ScalarOrSchedule, momentum: Any, weight_decay: Any, error_feedback: bool, transform: Callable
) -> _low_precision.IntoMomentum:
  """`sgdm` for `MultiSteps` with `INTO_MOMENTUM`, of what makes an inner transformation low-precision."""
  feedback = None
  if error_feedback:
    # The correction of `sgdm`, times the decay that what is stored has been through; right without momentum, too.
    feedback = _velocity_feedback(lambda: jnp.asarray(momentum, float) - 1)
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
) -> _low_precision.InPlaceTransformation:
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
  no step.

  Args:
    learning_rate: a scalar, or a schedule of the step count.
    momentum: the decay :math:`\beta`; None or 0 for plain SGD without momentum state.
    nesterov: whether to use Nesterov momentum.
    weight_decay: :math:`\lambda`, added to the gradient before the momentum as torch and the paper do.
    formats: how the momentum (state field ``'trace'``) is stored, see `low_precision`; the default is `INT8`. How
      parameters are stored is decided by what `init` and `update` are given.
    error_feedback: None for on wherever it works (a momentum of at least 8 bits rounded stochastically, no Nesterov,
      and formats not None), True to insist, False for the paper's optimizer.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`.

  Raises:
    ValueError: if error_feedback is True where it cannot work, or formats does not fit.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> target = jax.random.normal(jax.random.key(0), (64, 128))
  >>> loss = lambda w: 0.5 * jnp.sum((w - target) ** 2)
  >>> params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  >>> tx = lpmm.sgdm(0.1, momentum=0.5)
  >>> state = tx.init(params)
  >>> for _ in range(5):
  ...   value, grads = jax.value_and_grad(loss)(lpmm.dequantize(params))
  ...   print(f'{value:.0f}')
  ...   updates, state = tx.update(grads, state, params)
  ...   params = optax.apply_updates(params, updates)
  4225
  3422
  2440
  1593
  972

  References:
    Li et al., Training Neural Networks with Low-Precision Model Memory, 2022.

    Sutskever et al., `On the importance of initialization and momentum in deep learning
    <http://proceedings.mlr.press/v28/sutskever13.html>`_, 2013.
  """
  has_trace = momentum is not None and not _hyperparams.is_zero(momentum)
  if nesterov and not has_trace:
    raise ValueError(f'nesterov=True needs a momentum, got {momentum}')
  _field_formats.check(formats, ('trace',))
  learning_rate = _hyperparams.checked('learning_rate', learning_rate)
  problem = _feedback.problem_with(formats, 'trace', ('momentum', momentum), nesterov)
  error_feedback = _feedback.decide(error_feedback, problem, formats, 'trace')
  weight_decay = _hyperparams.check('weight_decay', weight_decay)
  # One structure of the state whatever the weight decay, which inject_hyperparams makes a tracer.
  decays = not _hyperparams.is_zero(weight_decay)
  inner = [optax.add_decayed_weights(weight_decay) if decays else optax.identity()]
  if has_trace:
    momentum = _hyperparams.check('momentum', momentum)
  if error_feedback:
    inner.append(_velocity(learning_rate, momentum))
  else:
    if has_trace:
      inner.append(optax.trace(momentum, nesterov))
    inner.append(optax.scale_by_learning_rate(learning_rate))
  feedback = _velocity_feedback(lambda: _correction(momentum)) if error_feedback else None
  transform = functools.partial(_low_precision.transform, name='sgdm', formats=formats, key=key, tile_size=tile_size)
  into_momentum = None
  if has_trace and not nesterov:
    into_momentum = _into_momentum(learning_rate, momentum, weight_decay, error_feedback, transform)
  return transform(optax.chain(*inner), feedback=feedback, into_momentum=into_momentum)
