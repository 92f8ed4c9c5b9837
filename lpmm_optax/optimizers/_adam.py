"""Adam and AdamW."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _feedback
from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.trace import _field_formats

# For how many steps the learning rate is foreseen; what an error leaves in the first moment after them is beta_1^128.
_HORIZON = 128
# By how much an error may change a first moment, in roots of the second. With 16, a rate that rises unforeseen from a
# thirtieth of a grid step, thirty-fold, makes the loss of a quadratic ten times larger for a while; with 4, by a third.
_LARGEST_CHANGE = 4.0
# Of a first moment that takes errors.
_LEAST_BITS = 4


def _correct_first_moment(
  fields: dict[str, jax.Array], error: jax.Array, grid: _update.Grid, hyper: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  mu, nu = fields['mu'], fields['nu']
  scale = jnp.sqrt(nu * hyper['debias'] + hyper['eps_root']) + hyper['eps']
  # Of all errors the same part is fed back: cut to size one by one, they would not be zero in the mean any more.
  least = jnp.maximum(grid.step / _LARGEST_CHANGE, jnp.finfo(grid.step.dtype).tiny)
  divisor = jnp.where(hyper['reach'] < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(hyper['reach']), least)
  # Whether XLA divides or takes a reciprocal would depend on whether a view of tiles shows that blocks share a divisor.
  mu = mu - scale * error * (1.0 / divisor)
  # Where the second moment is zero, the least code of a first moment would be a step without bound.
  return fields | {'mu': jnp.where(nu > 0, mu, 0.0)}


def _first_moment_feedback(hyper: dict[str, Any], is_required: bool) -> _feedback.Feedback:
  r"""Puts a parameter's rounding error into the first moment.

  What is added to the first moment in step t, c, moves the parameter by :math:`-\eta_{t+k} \beta_1^k c /
  ((1 - \beta_1^{t+k}) d)` in the k-th step after it, with :math:`d = \sqrt{\hat v} + \epsilon`. So that all of it
  together is the error e, c is :math:`-d e / \sum_{k \ge 1} \eta_{t+k} \beta_1^k / (1 - \beta_1^{t+k})`.
  """

  def reach(step, b1):
    """The sum, of the step with this count; beyond the horizon the rate is taken to stay as it is there."""
    rate = functools.partial(_hyperparams.current, hyper['learning_rate'])
    ahead = jnp.arange(1, _HORIZON + 1, dtype=step.dtype)
    last = jnp.iinfo(step.dtype).max  # The counter may be at its end.
    counts = jnp.where(step > last - ahead, last, step + ahead)
    try:
      rates = jax.vmap(rate)(counts)
    except Exception as error:
      error.add_note('error feedback looks the schedule up ahead, under jax.vmap; error_feedback=False does without')
      raise
    # A schedule need not be defined past its end.
    rates = jnp.where(jnp.isfinite(rates), rates, rate(step))
    terms = rates * b1 ** ahead.astype(b1.dtype) / (1 - b1 ** (counts.astype(b1.dtype) + 1))
    return jnp.sum(terms) + terms[-1] * b1 / (1 - b1)

  def hyperparams(step, inner_state):
    del inner_state
    b1, b2 = jnp.asarray(hyper['b1'], float), jnp.asarray(hyper['b2'], float)
    return {
      'reach': reach(step, b1),
      'debias': 1 / (1 - b2 ** (step.astype(b2.dtype) + 2)),
      'eps': jnp.asarray(hyper['eps'], float),
      'eps_root': jnp.asarray(hyper['eps_root'], float),
    }

  return _feedback.Feedback(('mu', 'nu'), _LEAST_BITS, is_required, _correct_first_moment, hyperparams)


def _choose_feedback(
  hyper: dict[str, Any], nesterov: bool, formats: _field_formats.Formats, error_feedback: bool | None
) -> _feedback.Feedback | _feedback.ByDerivatives | None:
  """The feedback that the arguments ask for, after a check of `formats`."""
  _field_formats.check(formats, ('mu', 'nu'))
  problem = _feedback.problem_with(formats, 'mu', ('b1', hyper['b1']), _LEAST_BITS)
  if not _feedback.decide(error_feedback, problem, formats, 'mu'):
    return None
  is_required = error_feedback is True
  return _feedback.ByDerivatives(is_required) if nesterov else _first_moment_feedback(hyper, is_required)


def _checked(learning_rate: optax.ScalarOrSchedule, **scalars: Any) -> dict[str, Any]:
  scalars = {name: _hyperparams.check_scalar(name, value) for name, value in scalars.items()}
  return {'learning_rate': _hyperparams.check_scalar_or_schedule('learning_rate', learning_rate), **scalars}


def adam(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any = None,
  *,
  nesterov: bool = False,
  formats: _field_formats.Formats = 'default',
  error_feedback: bool | None = None,
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> _transformation.InPlaceTransformation:
  r"""Adam, with parameters and both moments stored in low precision.

  This is `optax.adam`, whose arguments it takes, rounded once per step: with dense parameters and ``formats=None`` it
  equals it to float rounding. The first moment (state field ``'mu'``) is kept in `INT8`, the second (``'nu'``) in
  `UINT8_SQRT`: its square root is stored, unsigned, and never as zero where it is not, for a coordinate whose second
  moment is lost divides by epsilon alone.

  With error feedback, the error e of rounding a parameter goes into its first moment through the preconditioner of the
  update,

  .. math::
    m_t \leftarrow m_t - (\sqrt{\hat v_t} + \epsilon) e_t \Big/
      \sum_{k \ge 1} \frac{\eta_{t+k} \beta_1^k}{1 - \beta_1^{t+k}},

  which returns it to the parameter over the following steps; exactly so if the second moment did not change. A schedule
  is looked up 128 steps ahead for that (under `jax.vmap`), and taken to be constant from there on. So that a rate which
  rises unforeseen, an injected one or that of another run, does no harm, the sum counts as a quarter of the parameter's
  grid step at least: no error changes a first moment by more than :math:`4 \sqrt{\hat v}`, and at rates under about a
  thirty-sixth of a grid step (with :math:`\beta_1 = 0.9`) feedback fades. With Nesterov momentum it is that of
  `low_precision`. On a noisy quadratic it leaves a third of what stochastic rounding alone adds to the loss
  (`tests/optimizers/test_adam.py`).

  Moments take four bits, with ``formats={'nu': lpmm_optax.UINT4_SQRT}`` for the second alone, which costs little, or
  ``formats=lpmm_optax.INT4`` for both: on that quadratic, feedback leaves a half of what rounding adds, and adds a
  tenth to it. The second moment then has a dispersion of a quarter, and none is under a 225th of the largest of its
  block: small blocks serve both, ``lpmm_optax.Format(bits=4, block_size=32)``.

  Args:
    learning_rate: a scalar, or a schedule of the step count.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the denominator, outside of the root.
    eps_root: added inside of the root.
    mu_dtype: dtype of the first moment where it is dense; None is the parameter's, but float32 at least.
    nesterov: whether to use Nesterov momentum (Dozat, 2016).
    formats: how state is stored, see `low_precision`. How parameters are stored is decided by what `init` and `update`
      are given.
    error_feedback: None for on wherever it works (a first moment rounded stochastically, and not dense by `formats`),
      True to insist, False for stochastic rounding alone.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.
    shard_axes: as for `low_precision`.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`.

  Raises:
    TypeError, ValueError: if formats, key or a hyperparameter does not fit, or error_feedback=True cannot work.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> target = jax.random.normal(jax.random.key(0), (64, 128))
  >>> params = lpmm.quantize(jnp.zeros((64, 128)), lpmm.INT8)
  >>> tx = lpmm.adam(0.3)
  >>> state = tx.init(params)
  >>> for _ in range(4):
  ...   value, grads = jax.value_and_grad(lambda w: jnp.mean((w - target) ** 2))(lpmm.dequantize(params))
  ...   print(f'{value:.2f}')
  ...   params, state = lpmm.step(tx, grads, params, state)
  1.03
  0.63
  0.37
  0.22

  References:
    Kingma and Ba, `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_, 2014.
  """
  hyper = _checked(learning_rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
  feedback = _choose_feedback(hyper, nesterov, formats, error_feedback)
  inner = optax.adam(**hyper, mu_dtype=mu_dtype, nesterov=nesterov)
  return _low_precision.transform(
    inner, 'adam', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes, feedback=feedback
  )


def adamw(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any = None,
  weight_decay: optax.ScalarOrSchedule = 1e-4,
  mask: Any = None,
  *,
  nesterov: bool = False,
  formats: _field_formats.Formats = 'default',
  error_feedback: bool | None = None,
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> _transformation.InPlaceTransformation:
  """Adam with decoupled weight decay, with parameters and both moments stored in low precision.

  This is `optax.adamw`, whose arguments it takes; see `adam` for what low precision and error feedback add.

  Args:
    learning_rate: a scalar, or a schedule of the step count.
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the denominator, outside of the root.
    eps_root: added inside of the root.
    mu_dtype: dtype of the first moment where it is dense; None is the parameter's, but float32 at least.
    weight_decay: times the parameter, and times the learning rate, is subtracted in each step; or a schedule of it.
    mask: which parameters decay: a tree of booleans, one per parameter (made with
      ``is_leaf=lpmm_optax.is_quantized``), or a function of the parameters, to which they are dense arrays.
    nesterov: whether to use Nesterov momentum.
    formats: how state is stored, see `low_precision`.
    error_feedback: as for `adam`.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.
    shard_axes: as for `low_precision`.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`.

  Raises:
    TypeError, ValueError: if formats, key or a hyperparameter does not fit, or error_feedback=True cannot work.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'kernel': jnp.ones((64, 128)), 'bias': jnp.ones(128)}, lpmm.INT8)
  >>> tx = lpmm.adamw(0.1, weight_decay=0.1, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
  >>> grads = {'kernel': jnp.zeros((64, 128)), 'bias': jnp.zeros(128)}
  >>> params, state = lpmm.step(tx, grads, params, tx.init(params))
  >>> float(lpmm.dequantize(params)['bias'][0])
  1.0
  >>> bool(jnp.mean(lpmm.dequantize(params)['kernel']) < 1.0)
  True

  References:
    Loshchilov and Hutter, `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_, 2017.
  """
  hyper = _checked(learning_rate, b1=b1, b2=b2, eps=eps, eps_root=eps_root)
  feedback = _choose_feedback(hyper, nesterov, formats, error_feedback)
  decay = _hyperparams.check_scalar_or_schedule('weight_decay', weight_decay)
  inner = optax.adamw(**hyper, mu_dtype=mu_dtype, weight_decay=decay, mask=mask, nesterov=nesterov)
  return _low_precision.transform(
    inner, 'adamw', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes, feedback=feedback
  )
