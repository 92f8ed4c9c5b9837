"""Lion."""

from collections.abc import Sequence
from typing import Any

import jax
import optax

from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.trace import _field_formats


def lion(
  learning_rate: optax.ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.99,
  mu_dtype: Any = None,
  weight_decay: optax.ScalarOrSchedule = 1e-3,
  mask: Any = None,
  *,
  formats: _field_formats.Formats = 'default',
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> _transformation.InPlaceTransformation:
  """Lion, with parameters and momentum stored in low precision.

  This is `optax.lion`, whose arguments it takes, rounded once per step: with dense parameters and ``formats=None`` it
  equals it. The momentum (state field ``'mu'``) is kept in `INT8`. Rounding errors of the parameters are not fed back:
  the update is a sign, which forgets by how much. Their thresholds are spread evenly over the steps instead.

  Args:
    learning_rate: a scalar, or a schedule of the step count.
    b1: weight of the momentum against the gradient in the update.
    b2: decay of the momentum.
    mu_dtype: dtype of the momentum where it is dense; None is the parameter's, but float32 at least.
    weight_decay: times the parameter, and times the learning rate, is subtracted in each step; or a schedule of it.
    mask: which parameters decay, as for `adamw`.
    formats: how state is stored, see `low_precision`.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: elements updated at a time, a matter of speed and memory alone; None chooses by backend.
    shard_axes: as for `low_precision`.

  Returns:
    A transformation for `optax.apply_updates`, or, without a tree of updates, `lpmm_optax.step`.

  Raises:
    TypeError, ValueError: if formats, key or a hyperparameter does not fit.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize(jnp.ones((64, 128)), lpmm.INT8)
  >>> tx = lpmm.lion(0.25, weight_decay=0.0)
  >>> params, state = lpmm.step(tx, jnp.ones((64, 128)), params, tx.init(params))
  >>> round(float(jnp.mean(lpmm.dequantize(params))), 3)
  0.75

  References:
    Chen et al., `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_, 2023.
  """
  _field_formats.check(formats, ('mu',))
  hyper = {name: _hyperparams.check_scalar(name, x) for name, x in (('b1', b1), ('b2', b2))}
  rate = _hyperparams.check_scalar_or_schedule('learning_rate', learning_rate)
  decay = _hyperparams.check_scalar_or_schedule('weight_decay', weight_decay)
  inner = optax.lion(rate, **hyper, mu_dtype=mu_dtype, weight_decay=decay, mask=mask)
  return _low_precision.transform(inner, 'lion', formats=formats, key=key, tile_size=tile_size, shard_axes=shard_axes)
