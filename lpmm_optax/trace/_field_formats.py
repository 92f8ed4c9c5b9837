"""The `formats` argument: how each field of an optimizer's state is stored."""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal
from typing import NamedTuple

import jax.numpy as jnp

from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _uses

Formats = Literal['default'] | Format | Mapping[str, Format | _array.Where | None] | None


def check(formats: Formats, fields: Sequence[str] | None = None) -> None:
  """Checks a `formats` argument before any parameter is seen.

  Args:
    formats: as users give it.
    fields: names of the state fields, if they are known already.

  Raises:
    TypeError, ValueError: for what can be no `formats` argument.
  """
  if formats is None or formats == 'default' or isinstance(formats, Format):
    return
  if not isinstance(formats, Mapping):
    raise TypeError(f"formats must be a Format, a dict of Formats by state field, None or 'default', got {formats!r}")
  if fields is not None and set(formats) - set(fields):
    raise ValueError(f'formats has no state field for {sorted(set(formats) - set(fields))}; the fields are {[*fields]}')
  for name, format in formats.items():
    if not (format is None or isinstance(format, Format) or callable(format) or isinstance(format, list | tuple)):
      raise TypeError(
        f'formats[{name!r}] must be a Format, None, a list of (regex, Format) or a callable, got {format!r}'
      )


class Choice(NamedTuple):
  """How an entry of a state is stored.

  Attributes:
    format: or None for dense.
    reason: what is done with the entry, as far as it decides; or that the caller chose; None for one that is too small
      to be quantized.
  """

  format: Format | None
  reason: str | None


def choose(
  formats: Formats, params: _plan.Params, leaves: list[Any], entries: Sequence[_plan.Entry], known: _uses.Uses
) -> dict[int, Choice]:
  """How every entry of the inner state that belongs to a leaf is stored.

  Args:
    formats: as users give it.
    params: the parameters' structure.
    leaves: the parameters.
    entries: of the state.
    known: of its uses.

  Raises:
    ValueError, TypeError: for a format that cannot hold its field, naming field and leaf.
  """
  owned = _plan.owned(entries)
  if owned:
    check(formats, list(dict.fromkeys(entries[e].field for e in owned)))

  def one(e: int, uses: set[_uses.Use]) -> Choice:
    leaf, path, field = leaves[owned[e]], params.paths[owned[e]], entries[e].field
    param = _array.format_of(leaf)
    usual = default = known.default_format(e, param, uses)
    where: _array.Where | None = None
    if formats is None:
      default = None
    elif isinstance(formats, Format):
      variants = formats.variants(e in known.nonnegative)
      default = next((x for x in variants if _uses.holds(x, *uses)), variants[-1])
    elif isinstance(formats, Mapping) and field in formats:
      wanted = formats[field]
      if wanted is None or isinstance(wanted, Format):
        default = wanted
      else:
        where = wanted
    pick = lambda default, where: _array.pick_format(path, leaf, default, where, _format.STATE_BLOCK_SIZE)
    format = pick(default, where)
    if format != pick(usual, None):
      return Choice(format, 'chosen by the caller')
    return Choice(format, None if format is None and usual else known.reason(e, param, uses))

  chosen: dict[int, Format | None] = {}
  while True:  # What is divided by a field follows it, and may be divided by itself.
    uses = {e: known.uses_with(e, chosen) for e in owned}
    choices = {e: one(e, uses[e]) for e in owned}
    if chosen == (chosen := {e: choice.format for e, choice in choices.items()}):
      break
  for e, format in chosen.items():
    if format is not None:
      path = f'{entries[e].field}/{params.paths[owned[e]]}'
      _check_field(path, format, e in known.nonnegative, uses[e], params.templates[owned[e]].dtype)
  return choices


def _check_field(path: str, format: Format, is_nonnegative: bool, uses: Collection[_uses.Use], dtype: Any) -> None:
  """Raises a ValueError or TypeError if a field cannot be stored in a format."""
  if not format.signed and not is_nonnegative:
    raise ValueError(f'{path}: {format} stores nonnegative values only, and this field may turn negative')
  strict = [use for use in uses if use.value.is_strict]
  broken = [use.value.text for use in strict if not _uses.holds(format, use)]
  if broken:
    own = _format.UINT8_SQRT if is_nonnegative else _format.INT8
    fit = [str(x).upper() for x in (own, *_format.WIDE) if _uses.holds(x, *strict)]
    raise ValueError(
      f'{path}: {format} cannot hold this field, for {"; ".join(broken)}: store it in '
      f'{" or ".join([*fit, "None (dense)"])}'
    )
  if dtype == jnp.float64:
    raise TypeError(f'{path}: state of a float64 parameter cannot be kept in {format}; pass formats=None')
