"""`memory_report`: where the bytes of training go."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lpmm_optax import _array
from lpmm_optax import _format
from lpmm_optax import _transform

_FP32_BYTES = 4


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
  """

  group: str
  path: str
  elements: int
  bytes: int
  format: str
  exempt: str | None


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
      lines += [f'  {row.group}/{row.path}: {row.format}, {row.exempt}' for row in self.exempt]
    return '\n'.join(lines)


def _rows(group: str, tree: Any, block_size: int) -> list[MemoryRow]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_array.is_quantized)
  formats = [leaf.format for _, leaf in leaves if _array.is_quantized(leaf)]
  rows = []
  for path, leaf in leaves:
    exempt = None
    if formats and not _array.is_quantized(leaf):
      expected = formats[0].with_block_size(block_size)
      exempt = _format.exemption(leaf.shape, leaf.dtype, expected) or 'chosen by the caller'
    name = str(leaf.format) if _array.is_quantized(leaf) else leaf.dtype.name
    rows.append(MemoryRow(group, _array.path_str(path), leaf.size, _array.count_bytes(leaf), name, exempt))
  return rows


def memory_report(params: Any, opt_state: Any = ()) -> MemoryReport:
  """Counts the bytes that parameters and optimizer state occupy for the whole of training.

  Args:
    params: the parameters, quantized or dense; arrays or ShapeDtypeStructs (from `jax.eval_shape`).
    opt_state: the state of an optimizer of this package, alone or inside Optax's wrappers, or of any Optax optimizer.

  Returns:
    A `MemoryReport`. Bytes follow from shapes and bit widths, not from an allocator.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'kernel': jnp.ones((1024, 1024)), 'bias': jnp.ones(1024)}, lpmm.INT8)
  >>> report = lpmm.memory_report(params, lpmm.sgdm(0.1).init(params))
  >>> round(report.bytes_per_param, 2)
  2.05
  >>> print(report)
  group                            MiB   bytes/param
  params                         1.035         1.034
  trace                          1.020         1.019
  other state                    0.000         0.000
  total                          2.055         2.053
  the same in float32            8.008         8.000  (-74.3%)
  dense by exemption: 2 arrays, 0.008 MiB
    params/bias: float32, under 4096 elements
    trace/bias: float32, under 4096 elements
  """
  rows = _rows('params', params, _format.PARAM_BLOCK_SIZE)
  leaves = jax.tree.leaves(params, is_leaf=_array.is_quantized)
  parameters = sum(leaf.size for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating))
  like_params = {tuple(leaf.shape) for leaf in leaves} - {()}
  other = 0
  is_ours = lambda x: isinstance(x, _transform.LowPrecisionState)
  is_leaf = lambda x: is_ours(x) or _array.is_quantized(x)
  for path, part in jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_leaf)[0]:
    if is_ours(part):
      for name, tree in part.fields.items():
        rows += _rows(name, tree, _format.STATE_BLOCK_SIZE)
      other += _array.count_bytes(part.count) + _array.count_bytes(part.key)
    elif tuple(part.shape) in like_params:
      (row,) = _rows('state', part, _format.STATE_BLOCK_SIZE)
      rows.append(dataclasses.replace(row, path=_array.path_str(path)))
    else:
      other += _array.count_bytes(part)
  return MemoryReport(tuple(rows), parameters, other)
