"""The `formats` argument: how each field of an optimizer's state is stored."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import Literal

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


def _same_for_all(format: Format, is_nonnegative: bool) -> Format:
  """One Format given for every field, on the grid that a field's values need."""
  if not is_nonnegative or not format.signed or not format.has_scales:
    return format
  if format.bits > 8:
    return dataclasses.replace(_format.BFLOAT16, rounding=format.rounding)
  return dataclasses.replace(_format.UINT8_SQRT, block_size=format.block_size, rounding=format.rounding)


def choose(
  formats: Formats, params: _plan.Params, leaves: list[Any], entries: Sequence[_plan.Entry], uses: _uses.Uses
) -> dict[int, Format | None]:
  """A Format or None for every entry of the inner state that belongs to a leaf.

  Raises:
    ValueError, TypeError: for a format that cannot hold its field, naming field and leaf.
  """
  owned = _plan.owned(entries)
  if owned:
    check(formats, list(dict.fromkeys(entries[e].field for e in owned)))
  chosen = {}
  for e, i in owned.items():
    field, path = entries[e].field, f'{entries[e].field}/{params.paths[i]}'
    default: Format | None = uses.default_format(e, _array.format_of(leaves[i]))
    where: _array.Where | None = None
    if formats is None or isinstance(formats, Format):
      default = formats and _same_for_all(formats, e in uses.nonnegative)
    elif isinstance(formats, Mapping) and field in formats:
      wanted = formats[field]
      if wanted is None or isinstance(wanted, Format):
        default = wanted
      else:
        where = wanted
    format = _array.pick_format(params.paths[i], leaves[i], default, where, _format.STATE_BLOCK_SIZE)
    if format is not None:
      if not format.signed and e not in uses.nonnegative:
        raise ValueError(f'{path}: {format} stores nonnegative values only, and this field may turn negative')
      if e in uses.nonnegative and field in uses.divided_by and format.grid == 'linear':
        raise ValueError(
          f'{path}: the update divides by this field, and a linear grid ({format}) stores its small values as zero; '
          'use UINT8_SQRT or BFLOAT16'
        )
      if params.templates[i].dtype == jnp.float64:
        raise TypeError(f'{path}: state of a float64 parameter cannot be kept in {format}; pass formats=None')
    chosen[e] = format
  return chosen
