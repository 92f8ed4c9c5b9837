"""`memory_report`: where the bytes of training go."""

from collections.abc import Collection
from collections.abc import Iterable
import dataclasses
from typing import Any

import jax.numpy as jnp

from lpmm_optax.kernel import _driver
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _field_formats
from lpmm_optax.trace import _plan

_FP32_BYTES = 4
_IN_TILES = 'in tiles'


@dataclasses.dataclass(frozen=True)
class MemoryRow:
  """One array of the model memory.

  Attributes:
    group: 'params', or the state field.
    path: of the leaf.
    elements: how many numbers it holds.
    bytes: counted from bit widths, scales included.
    format: as it is stored, a Format's name or a dtype's.
    exempt: why it is dense although its group is quantized, else None.
    update: of a parameter, how it is updated: 'in tiles', or 'whole' and the operation that is not elementwise; None
      for state, and where `memory_report` was not given the optimizer.
    loops: of a parameter that is updated in tiles, by platform that has a kernel ('cuda', 'tpu'), why the loop updates
      it there all the same.
    reason: of state, why it is stored in this format: what the optimizer does with it, as far as that decides, or that
      the caller chose; None where `memory_report` was not given the optimizer, or the state is stored otherwise.
  """

  group: str
  path: str
  elements: int
  bytes: int
  format: str
  exempt: str | None
  update: str | None
  loops: dict[str, str] = dataclasses.field(default_factory=dict)
  reason: str | None = None


@dataclasses.dataclass(frozen=True)
class MemoryReport:
  """Bytes of parameters and optimizer state; prints as a table.

  Attributes:
    rows: one per array.
    parameters: number of floating-point parameters.
    other_bytes: of the optimizer state that belongs to no parameter (counts, keys, schedules).
  """

  rows: tuple[MemoryRow, ...]
  parameters: int
  other_bytes: int

  @property
  def bytes(self) -> int:
    """Bytes in all."""
    return self.other_bytes + sum(row.bytes for row in self.rows)

  @property
  def fp32_bytes(self) -> int:
    """Bytes if every row were float32."""
    return self.other_bytes + sum(_FP32_BYTES * row.elements for row in self.rows)

  @property
  def bytes_per_param(self) -> float:
    """Bytes in all, per parameter."""
    return self.bytes / max(self.parameters, 1)

  @property
  def reduction(self) -> float:
    """The share saved against float32, from 0 to 1."""
    return 1 - self.bytes / self.fp32_bytes if self.fp32_bytes else 0.0

  @property
  def groups(self) -> dict[str, int]:
    """Bytes by group."""
    out: dict[str, int] = {}
    for row in self.rows:
      out[row.group] = out.get(row.group, 0) + row.bytes
    return out

  @property
  def exempt(self) -> tuple[MemoryRow, ...]:
    """The rows that stayed dense although their group is quantized."""
    return tuple(row for row in self.rows if row.exempt)

  @property
  def formats(self) -> tuple[tuple[str, str], ...]:
    """(field in format, reason) of the state in low precision or kept out of it, each once."""
    found = [(f'{row.group} in {row.format}', row.reason) for row in self.rows if row.reason and not row.exempt]
    return tuple(dict.fromkeys(found))

  def __str__(self) -> str:
    count = max(self.parameters, 1)
    lines = [f'{"group":<24}{"MiB":>12}{"bytes/param":>14}']
    items = [*self.groups.items(), ('other state', self.other_bytes)]
    lines += [f'{name:<24}{size / 2**20:>12.3f}{size / count:>14.3f}' for name, size in items]
    lines.append(f'{"total":<24}{self.bytes / 2**20:>12.3f}{self.bytes_per_param:>14.3f}')
    fp32 = self.fp32_bytes
    lines.append(f'{"the same in float32":<24}{fp32 / 2**20:>12.3f}{fp32 / count:>14.3f}  ({-self.reduction:+.1%})')
    if self.exempt:
      dense = sum(row.bytes for row in self.exempt)
      lines.append(f'dense by exemption: {len(self.exempt)} arrays, {dense / 2**20:.3f} MiB')
      lines += _listed((f'  {row.group} in {row.format}, {row.exempt}', row) for row in self.exempt)
    lines += [f'{name}: {reason}' for name, reason in self.formats]
    updated = [row for row in self.rows if row.update]
    if updated:
      whole = [row for row in updated if row.update != _IN_TILES]
      tiled = sum(row.elements for row in updated) - sum(row.elements for row in whole)
      lines.append(f'updated in tiles: {len(updated) - len(whole)} parameters, {tiled} elements')
      lines += [f'  {row.path}: updated {row.update}, {row.elements} elements' for row in whole]
    lines += _listed(
      (f'no kernel on {platform}, for {reason}', row) for row in updated for platform, reason in row.loops.items()
    )
    return '\n'.join(lines)


def _listed(rows: Iterable[tuple[str, MemoryRow]]) -> list[str]:
  """A line per reason, with some of the rows that have it and the elements of all of them."""
  by_reason: dict[str, list[MemoryRow]] = {}
  for reason, row in rows:
    by_reason.setdefault(reason, []).append(row)
  return [
    f'{reason}: {_array.name_some([row.path for row in found])}, {sum(row.elements for row in found)} elements'
    for reason, found in by_reason.items()
  ]


def _row(
  group: str,
  path: str,
  x: Any,
  formats: Collection[Format],
  block_size: int,
  update: str | None = None,
  loops: dict[str, str] | None = None,
  reason: str | None = None,
) -> MemoryRow:
  """One array's row; `formats` are those that its group has, none if all of it is dense."""
  exempt = None
  if formats and not _array.is_quantized(x):
    found = (_format.exemption(x.shape, x.dtype, format.with_block_size(block_size)) for format in formats)
    exempt = next(filter(None, found), 'chosen by the caller')
  name = str(x.format) if _array.is_quantized(x) else jnp.dtype(x.dtype).name
  return MemoryRow(group, path, x.size, _array.count_bytes(x), name, exempt, update, loops or {}, reason)


def _state_rows(
  params: _plan.Params, state: _plan.InnerState, choices: dict[tuple[str, str], _field_formats.Choice]
) -> tuple[list[MemoryRow], int]:
  """The rows of what belongs to parameters in an inner state, or any other; and the bytes of the rest."""
  items = list(zip(state.entries, state.arrays, strict=True))
  formats: dict[str, dict[Format, None]] = {entry.field: {} for entry in state.entries}
  for entry, x in items:
    if _array.is_quantized(x):
      formats[entry.field][x.format] = None
  rows, other = [], 0
  for entry, x in items:
    if not hasattr(x, 'dtype'):
      continue  # A Python number takes nothing of the device.
    if entry.leaf is not None:
      path = params.paths[entry.leaf]
      choice = choices.get((entry.field, path))
      reason = choice.reason if choice and choice.format == _array.format_of(x) else None
      rows.append(_row(entry.field, path, x, formats[entry.field], _format.STATE_BLOCK_SIZE, reason=reason))
    elif entry.below is not None and jnp.issubdtype(x.dtype, jnp.floating):
      # Factors of a second moment, say: statistics of a parameter, but not of each of its elements.
      rows.append(_row(entry.field, entry.below, x, (), _format.STATE_BLOCK_SIZE))
    else:
      other += _array.count_bytes(x)
  return rows, other


def memory_report(
  params: Any, opt_state: Any = (), *, tx: _transformation.InPlaceTransformation | None = None, **extra_args: Any
) -> MemoryReport:
  """Counts the bytes that parameters and optimizer state occupy for the whole of training.

  Args:
    params: the parameters, quantized or dense; arrays or ShapeDtypeStructs (from `jax.eval_shape`).
    opt_state: the state of an optimizer of this package, alone or inside Optax's wrappers, or of any Optax optimizer.
    tx: the optimizer, one of this package, to find out as well how each parameter is updated: in tiles, or, where the
      update is not elementwise, whole, so that its dense values exist at once; which of the former take no kernel on
      a GPU or TPU, and why; and why each field of its state is stored as it is.
    **extra_args: what the optimizer's update takes besides, such as the loss `value`; used with tx alone.

  Returns:
    A `MemoryReport`. Bytes follow from shapes and bit widths, not from an allocator.

  Raises:
    TypeError: if tx is not an optimizer of this package.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'kernel': jnp.ones((1024, 1024)), 'bias': jnp.ones(1024)}, lpmm.INT8)
  >>> tx = lpmm.adamw(1e-3)
  >>> report = lpmm.memory_report(params, tx.init(params), tx=tx)
  >>> round(report.bytes_per_param, 2)
  3.07
  >>> print(report)
  group                            MiB   bytes/param
  params                         1.035         1.034
  mu                             1.020         1.019
  nu                             1.020         1.019
  other state                    0.000         0.000
  total                          3.074         3.071
  the same in float32           12.012        12.000  (-74.4%)
  dense by exemption: 3 arrays, 0.012 MiB
    params in float32, under 4096 elements: bias, 1024 elements
    mu in float32, under 4096 elements: bias, 1024 elements
    nu in float32, under 4096 elements: bias, 1024 elements
  mu in int8: nothing that is done with it takes more
  nu in uint8_sqrt: it never turns negative
  updated in tiles: 2 parameters, 1049600 elements
  """
  structure, leaves = _plan.flatten(_array.unwrap(params))
  formats = dict.fromkeys(leaf.format for leaf in leaves if _array.is_quantized(leaf))
  updates: dict[str, str] = {}
  choices: dict[tuple[str, str], _field_formats.Choice] = {}
  if tx is not None:
    if not isinstance(tx, _transformation.InPlaceTransformation):
      raise TypeError(f'tx must be an lpmm_optax optimizer, got {tx!r}')
    obstacles, choices = _transformation.explain(tx)(params, **extra_args)
    updates = {
      path: f'whole, for {obstacles[path]}' if path in obstacles else _IN_TILES
      for path in (structure.paths[i] for i in structure.active)
    }
  state = _plan.take_apart(structure, _array.unwrap(opt_state))
  rows = []
  for i, (path, leaf) in enumerate(zip(structure.paths, leaves, strict=True)):
    update = updates.get(path)
    own = [x for entry, x in zip(state.entries, state.arrays, strict=True) if entry.leaf == i]
    loops = _driver.without_kernel([leaf, *own]) if update == _IN_TILES else {}
    rows.append(_row('params', path, leaf, formats, _format.PARAM_BLOCK_SIZE, update, loops))
  state_rows, other = _state_rows(structure, state, choices)
  parameters = sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
  return MemoryReport(tuple(rows + state_rows), parameters, other)
