"""Stochastic gradient descent with momentum."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax import _format
from lpmm_optax import _transform
from lpmm_optax._format import Format


def _why_no_feedback(formats: dict[str, Format | None], momentum: Any, nesterov: bool) -> str | None:
  """Why rounding errors cannot be put back into this momentum, or None if they can."""
  if 'trace' not in formats or (isinstance(momentum, float | int) and not 0 < momentum < 1):
    return f'it needs a momentum between 0 and 1, got {momentum}'
  if nesterov:
    return 'its correction is derived for heavy-ball momentum, not for nesterov=True'
  format = formats['trace']
  if format is not None and format.rounding == 'nearest':
    return f'it oscillates when the momentum is rounded to nearest ({format})'
  if format is not None and format.bits < 8:
    return f'it diverges with a momentum of fewer than 8 bits ({format})'
  return None


def _scalar(name: str, value: Any) -> jax.Array:
  """A hyperparameter in float; refuses one that was cast to the integer type of quantized parameters."""
  if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(
      f'{name} has dtype {value.dtype}: optax.inject_hyperparams takes it from the parameters, whose codes are '
      'integers, unless it is given hyperparam_dtype=jnp.float32'
    )
  value = jnp.asarray(value, float)
  if value.shape:
    raise ValueError(f'{name} must be a scalar, got shape {value.shape}')
  return value


def _heavy_ball(nesterov: bool):
  """Optax's form: m <- b m + g, w <- w - lr m."""

  def update(gradient, param, fields, hyper):
    gradient = gradient + hyper['weight_decay'] * param
    direction = gradient
    if 'trace' in fields:
      trace = gradient + hyper['momentum'] * fields['trace']
      direction = gradient + hyper['momentum'] * trace if nesterov else trace
      fields = {'trace': trace}
    return -hyper['learning_rate'] * direction, fields

  return update


def _velocity(gradient, param, fields, hyper):
  """v <- b v + lr g, w <- w - v; a learning rate of zero leaves both as they are."""
  gradient = gradient + hyper['weight_decay'] * param
  velocity = hyper['decay'] * fields['trace'] + hyper['learning_rate'] * gradient
  return -hyper['moves'] * velocity, {'trace': velocity}


def _velocity_feedback(fields, error, hyper):
  return {'trace': fields['trace'] + hyper['correction'] * error}


def sgdm(
  learning_rate: optax.ScalarOrSchedule,
  momentum: float | jax.Array | None = 0.9,
  *,
  nesterov: bool = False,
  weight_decay: float | jax.Array = 0.0,
  formats: _transform.Formats = _format.INT8,
  error_feedback: bool | None = None,
  key: jax.Array | None = None,
  tile_size: int | None = None,
) -> _transform.InPlaceTransformation:
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
    formats: how the momentum (state field ``'trace'``) is stored: a Format, ``{'trace': Format}``, or None for float32.
      How parameters are stored is decided by what `init` and `update` are given.
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
  has_trace = momentum is not None and not (isinstance(momentum, float | int) and momentum == 0)
  fields = ('trace',) if has_trace else ()
  if nesterov and not has_trace:
    raise ValueError(f'nesterov=True needs a momentum, got {momentum}')
  if not has_trace and isinstance(formats, Format):
    formats = None
  by_field = _transform.field_formats(formats, fields)
  problem = _why_no_feedback(by_field, momentum, nesterov)
  if error_feedback and problem:
    raise ValueError(f'error_feedback cannot work here: {problem}')
  if error_feedback is None:
    error_feedback = problem is None and by_field['trace'] is not None

  def hyperparams(count):
    rate = _scalar('learning_rate', learning_rate(count) if callable(learning_rate) else learning_rate)
    hyper = {'learning_rate': rate, 'weight_decay': _scalar('weight_decay', weight_decay)}
    if has_trace:
      decay = _scalar('momentum', momentum)
      hyper |= {'momentum': decay}
      if error_feedback:
        frozen = rate == 0
        hyper |= {
          'decay': jnp.where(frozen, 1.0, decay),
          'moves': jnp.where(frozen, 0.0, 1.0),
          'correction': 1 - 1 / decay,
        }
    return hyper

  rule = _transform.Rule(
    name='sgdm',
    fields=fields,
    hyperparams=hyperparams,
    update=_velocity if error_feedback else _heavy_ball(nesterov),
    feedback=_velocity_feedback if error_feedback else None,
  )
  return _transform.from_rule(rule, formats, key, tile_size)
