"""Error feedback: what becomes of the rounding errors of parameters."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _field_formats
from lpmm_optax.trace import _momentum
from lpmm_optax.trace import _plan

# With a momentum of four bits feedback makes the loss of a noisy quadratic under SGD larger (1.42 times float32's where
# rounding alone gives 1.39), for a momentum whose errors are not small beside what it is given loses it again.
LEAST_BITS = 8


def _why_not(format: Format | None, least_bits: int) -> str | None:
  """Why errors cannot be put into a momentum in a format, None being dense; None if they can."""
  if format is not None and format.rounding == 'nearest':
    return f'it oscillates when the momentum is rounded to nearest ({format})'
  if format is not None and format.bits < least_bits:
    return f'errors drown in those of a momentum of fewer than {least_bits} bits ({format})'
  return None


def _refused(path: str, why: str) -> ValueError:
  return ValueError(f'{path}: error_feedback cannot work here: {why}; error_feedback=None does without')


@dataclasses.dataclass(frozen=True)
class Feedback:
  """Where the rounding errors of the parameters go, as an optimizer of this package says.

  Attributes:
    fields: the state fields it needs, a momentum first; a leaf that lacks one gets none.
    least_bits: of the momentum; a leaf that stores it in fewer gets none.
    is_required: whether it is an error if it does.
    correct: puts an error into the fields.
    hyperparams: `(step, inner_state) -> {name: scalar}` of what correct takes, computed once per step.
  """

  fields: tuple[str, ...]
  least_bits: int
  is_required: bool
  correct: _update.Correction
  hyperparams: Callable[[jax.Array, Any], dict[str, jax.Array]]

  def of_leaf(
    self, path: str, leaf: _plan.LeafPlan, fields: Mapping[str, Any]
  ) -> tuple[_update.LeafProgram, _update.Correction | None]:
    """The program and the correction of a leaf.

    Args:
      path: of the leaf.
      leaf: how it is updated.
      fields: by name, its state.

    Raises:
      ValueError: if its momentum cannot take errors but has to.
    """
    if not set(self.fields) <= set(fields):
      return leaf.program, None
    problem = _why_not(_array.format_of(fields[self.fields[0]]), self.least_bits)
    if problem and self.is_required:
      raise _refused(path, problem)
    return leaf.program, None if problem else self.correct


@dataclasses.dataclass(frozen=True)
class ByDerivatives:
  """Where they go in any optimizer: into a momentum, if its update has one.

  Attributes:
    is_required: whether it is an error if there is none.
  """

  is_required: bool

  def hyperparams(self, step: jax.Array, inner_state: Any) -> dict[str, jax.Array]:
    """None, since the derivatives of the update know all."""
    del step, inner_state
    return {}

  def of_leaf(
    self, path: str, leaf: _plan.LeafPlan, fields: Mapping[str, Any]
  ) -> tuple[_update.LeafProgram, _update.Correction | None]:
    """As in `Feedback`.

    Raises:
      ValueError: if there is no momentum but has to be.
    """
    names = [*fields]
    stored = enumerate(map(_array.format_of, fields.values()))
    able = tuple(i for i, format in stored if format is not None and not _why_not(format, LEAST_BITS))
    found = None if leaf.obstacle else _momentum.find(leaf.program, leaf.templates, able)
    if found is not None:
      return _momentum.Linearized(leaf.program, found), ThroughProgram(names[found])
    if self.is_required:
      why = (
        f'it is not updated element by element, for {leaf.obstacle}'
        if leaf.obstacle
        else (
          f'it has no field that is stored in {LEAST_BITS} bits or more, rounded stochastically, decays by one '
          'factor between 0 and 1, and that the update depends on differentiably'
        )
      )
      raise _refused(path, why)
    return leaf.program, None


def _may_be(formats: _field_formats.Formats, field: str) -> list[Format | None]:
  """The formats that a field may be stored in, as far as the argument tells; `INT8` stands for the default."""
  wanted: Any = formats.get(field, 'default') if isinstance(formats, Mapping) else formats
  if wanted == 'default':
    return [_format.INT8]
  if wanted is None or isinstance(wanted, Format):
    return [wanted]
  return [] if callable(wanted) else [format for _, format in wanted]


def problem_with(formats: _field_formats.Formats, field: str, decay: tuple[str, Any], least_bits: int) -> str | None:
  """Why rounding errors cannot be put into any leaf's momentum, given its decay with the argument's name; else None."""
  name, value = decay
  if value is None or (_hyperparams.is_known(value) and not 0 < value < 1):
    return f'it needs a {name} between 0 and 1, got {value}'
  problems = [_why_not(format, least_bits) for format in _may_be(formats, field)]
  return problems[0] if problems and all(problems) else None


def decide(error_feedback: bool | None, problem: str | None, formats: _field_formats.Formats, field: str) -> bool:
  """Whether errors are fed back: as the user says, or wherever it works and the momentum is in low precision at all.

  Raises:
    ValueError: if the user insists where there is a problem.
  """
  if error_feedback and problem:
    raise ValueError(f'error_feedback cannot work here: {problem}')
  if error_feedback is None:
    return problem is None and _may_be(formats, field) != [None]
  return error_feedback


# How far an error of one grid step may move a parameter by way of the momentum, in what the largest gain of the block
# does. With 4, a rate that rises unforeseen from an eightieth of a grid step, thirty-fold, makes the loss of a
# quadratic eight times larger for a while.
_LARGEST_MOVE = 1.5
# By how much it may change the momentum, in the largest gain. With 1.5, blocks in which scales differ gain less.
_LARGEST_CHANGE = 4.0


@dataclasses.dataclass(frozen=True)
class ThroughProgram:
  """Puts an error into a momentum, for an update that tells how: a `_momentum.Linearized`.

  Attributes:
    field: the momentum.
  """

  field: str

  def __call__(
    self,
    fields: dict[str, jax.Array],
    error: jax.Array,
    grid: _update.Grid,
    hyper: dict[str, jax.Array],
    move: jax.Array,
    gain: jax.Array,
  ) -> dict[str, jax.Array]:
    del hyper
    size = jnp.abs(move)
    largest = lambda x: grid.largest(jnp.where(jnp.isfinite(x), jnp.broadcast_to(x, error.shape), 0.0))
    # The part of an error that is fed back does not depend on the error, which so stays zero in the mean.
    reach = jnp.minimum(_LARGEST_MOVE * largest(gain * size), _LARGEST_CHANGE * largest(gain) * size)
    least_step = jnp.maximum(grid.step, jnp.finfo(grid.step.dtype).tiny)
    part = jnp.minimum(reach * (1 / least_step), 1.0)
    momentum = fields[self.field]
    corrected = momentum + error * part / move
    return fields | {self.field: jnp.where(jnp.isfinite(corrected), corrected, momentum)}
