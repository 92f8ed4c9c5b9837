"""Hyperparameters: numbers, arrays, tracers or schedules, and the one mistake that would pass unseen."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_scalar(name: str, value: Any) -> Any:
  """The scalar; refuses an array that was cast to the integer type of quantized parameters.

  Raises:
    TypeError: if it has an integer dtype, or is a schedule.
    ValueError: if it is no scalar.
  """
  if callable(value):
    raise TypeError(f'{name} must be a number, got {value!r}; optax.inject_hyperparams takes a schedule of it')
  if isinstance(value, jax.Array) and not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(
      f'{name} has dtype {value.dtype}: optax.inject_hyperparams takes it from the parameters, whose codes are '
      'integers, unless it is given hyperparam_dtype=jnp.float32'
    )
  if jnp.shape(value):
    raise ValueError(f'{name} must be a scalar, got shape {jnp.shape(value)}')
  return value


def check_scalar_or_schedule(name: str, value: optax.ScalarOrSchedule) -> optax.ScalarOrSchedule:
  """The scalar, or the schedule with every one of its values checked."""
  return (lambda count: check_scalar(name, value(count))) if callable(value) else check_scalar(name, value)


def current(value: optax.ScalarOrSchedule, step: jax.Array) -> jax.Array:
  """A checked hyperparameter at a step, in float."""
  with jax.numpy_dtype_promotion('standard'):  # Optax's schedules mix the integer count with floats.
    return jnp.asarray(value(step) if callable(value) else value, float)


def is_known(value: Any) -> bool:
  """Whether a hyperparameter is a number, for good; a jax array is not: what is injected is one before it is traced."""
  return isinstance(value, float | int | np.generic | np.ndarray)


def is_zero(value: Any) -> bool:
  """Whether a hyperparameter is known to be zero."""
  return is_known(value) and value == 0
