"""Error feedback: what becomes of the rounding errors of parameters."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from lpmm_optax.kernel import _update
from lpmm_optax.optimizers import _hyperparams
from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _field_formats


@dataclasses.dataclass(frozen=True)
class Feedback:
  """Where the rounding errors of the parameters go.

  Attributes:
    fields: the state fields it needs; a leaf that lacks one gets none.
    correct: puts an error into them.
    hyperparams: `(step, inner_state) -> {name: scalar}` of what correct takes, computed once per step.
  """

  fields: frozenset[str]
  correct: _update.Correction
  hyperparams: Callable[[jax.Array, Any], dict[str, jax.Array]]


def _may_be(formats: _field_formats.Formats, field: str) -> list[Format | None]:
  """The formats that a field may be stored in, as far as the argument tells; `INT8` stands for the default."""
  wanted: Any = formats.get(field, 'default') if isinstance(formats, Mapping) else formats
  if wanted == 'default':
    return [_format.INT8]
  if wanted is None or isinstance(wanted, Format):
    return [wanted]
  return [] if callable(wanted) else [format for _, format in wanted]


def problem_with(
  formats: _field_formats.Formats, field: str, decay: tuple[str, Any], nesterov: bool, least_bits: int
) -> str | None:
  """Why rounding errors cannot be put into a momentum, given its decay with the argument's name; None if they can."""
  name, value = decay
  if value is None or (_hyperparams.is_known(value) and not 0 < value < 1):
    return f'it needs a {name} between 0 and 1, got {value}'
  if nesterov:
    return 'its correction is derived for nesterov=False'
  for format in _may_be(formats, field):
    if format is not None and format.rounding == 'nearest':
      return f'it oscillates when the momentum is rounded to nearest ({format})'
    if format is not None and format.bits < least_bits:
      return f'it diverges with a momentum of fewer than {least_bits} bits ({format})'
  return None


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
