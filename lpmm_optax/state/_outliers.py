"""`outlier_report`: which leaves a format does not suit, before any training."""

import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.storage import _mesh
from lpmm_optax.storage._format import Format

# Of a block of 64 normal numbers, one in a hundred becomes zero in 8 bits, and a third if one is 100 times as large.
_MOST_ZEROED = 0.2
# Of the same blocks 0.6 % in 8 bits, and 10 % in 4.
_LARGEST_ERROR = 0.05


@dataclasses.dataclass(frozen=True)
class Outliers:
  """What a format does to a leaf that it does not suit.

  Attributes:
    path: of the leaf.
    format: that it was to be stored in.
    blocks: the share of its blocks in which more than a fifth of the nonzero values become zero.
    error: the sum of all errors over the sum of all values, in magnitude.
    suggestion: the smallest preset that suits the leaf.
  """

  path: str
  format: Format
  blocks: float
  error: float
  suggestion: Format


@dataclasses.dataclass(frozen=True)
class OutlierReport:
  """The leaves that a format does not suit, and the formats that do; prints as a list.

  Attributes:
    rows: one per leaf.
  """

  rows: tuple[Outliers, ...]

  def __str__(self) -> str:
    if not self.rows:
      return 'every leaf suits its format'
    lines = [
      f'{row.path}: in {row.format}, {row.blocks:.1%} of the blocks lose more than a fifth of their values, all values '
      f'{row.error:.1%}; use {row.suggestion}'
      for row in self.rows
    ]
    return '\n'.join(lines)


def outlier_report(tree: Any, format: Format, *, where: _array.Where | None = None) -> OutlierReport:
  """Which leaves `quantize` would harm: a value far above the others of its block makes the grid too coarse for them.

  A leaf is listed if more than a fifth of the nonzero values of some block become zero, or if its errors are more than
  a twentieth of its values, both when rounded to nearest; with the smallest of `INT8`, `INT16` and `BFLOAT16` by which
  it would not be. Leaves that stay dense are not looked at.

  Args:
    tree: concrete parameters, as for `quantize`.
    format: as for `quantize`.
    where: as for `quantize`.

  Returns:
    An `OutlierReport`.

  Raises:
    TypeError, ValueError: as `quantize`.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> w = jax.random.normal(jax.random.key(0), (64, 64))
  >>> print(lpmm.outlier_report({'good': w, 'bad': w.at[3, 5].set(300.0)}, lpmm.INT8))
  bad: in int8, 1.6% of the blocks lose more than a fifth of their values, all values 1.7%; use int16
  """
  stored = jax.eval_shape(lambda tree: _array.quantize(tree, format, where=where), tree)
  is_leaf = _array.is_quantized
  items = jax.tree_util.tree_flatten_with_path(stored, is_leaf=is_leaf)[0]
  rows = []
  for (path, like), x in zip(items, jax.tree.leaves(tree, is_leaf=is_leaf), strict=True):
    if is_leaf(x) or not is_leaf(like):
      continue
    found = _measure(x, like.format)
    if not _suits(found):
      wider = [_format.INT8, *_format.WIDE]
      better = (other for other in wider[:-1] if _suits(_measure(x, _like(other, like.format))))
      suggestion = next(better, wider[-1])
      row = Outliers(_array.path_str(path), like.format, float(found.blocks), float(found.error), suggestion)
      rows.append(row)
  return OutlierReport(tuple(rows))


def _like(format: Format, other: Format) -> Format:
  return format.with_block_size(other.block_size or _format.PARAM_BLOCK_SIZE)


class _Measured(NamedTuple):
  """The largest share of the nonzero values of a block that become zero; the share of blocks with many; the error."""

  most: jax.Array
  blocks: jax.Array
  error: jax.Array


def _suits(found: _Measured) -> bool:
  return bool(found.most <= _MOST_ZEROED) and bool(found.error <= _LARGEST_ERROR)


@functools.partial(jax.jit, static_argnums=1)
def _measure(x: jax.Array, format: Format) -> _Measured:
  def measure(x):
    q = _array.encode(x, format, jnp.float32)
    values, stored = jnp.abs(x.astype(jnp.float32)), jnp.abs(_array.dequantize(q))
    axis, size = _array.blocks_of(q)[0] if q.blocks else (x.ndim - 1, 1)
    in_blocks = lambda x: x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    nonzero = in_blocks(values > 0)
    zeroed = jnp.sum(nonzero & in_blocks(stored == 0), axis + 1) / jnp.maximum(jnp.sum(nonzero, axis + 1), 1)
    error = jnp.sum(jnp.abs(values - stored)) / jnp.maximum(jnp.sum(values), jnp.finfo(jnp.float32).tiny)
    return {'most': jnp.max(zeroed), 'blocks': jnp.mean(zeroed > _MOST_ZEROED), 'error': error}

  return _Measured(**_mesh.follow_each(measure, {}, x))
