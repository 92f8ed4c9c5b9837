"""Who runs the update of a leaf: the tile loop, which XLA compiles for any device, or a Triton kernel on NVIDIA GPUs.

Both run the same stages and give the same bits. The platform that is lowered for decides, not the one that traces.
"""

from collections.abc import Callable
from collections.abc import Sequence
import enum
import functools
import math
import os
from typing import Any

import jax
from jax import lax

from lpmm_optax.kernel import _partition
from lpmm_optax.kernel import _tiles
from lpmm_optax.kernel import _triton
from lpmm_optax.storage import _array

_VARIABLE = 'LPMM_GPU_KERNEL'


class Driver(enum.Enum):
  """What may update a leaf.

  Attributes:
    LOOP: the tile loop alone.
    KERNEL: the kernel where it is lowered for an NVIDIA GPU, else the loop.
    INTERPRETED: the kernel, run by JAX, also on a CPU: for tests, and slow.
  """

  LOOP = '0'
  KERNEL = '1'
  INTERPRETED = 'interpret'


def chosen() -> Driver:
  """What the environment variable LPMM_GPU_KERNEL says when a step is traced.

  '0' is for the loop on every platform, '1' for the kernel wherever a step is lowered for an NVIDIA GPU, whether there
  is one or not, 'interpret' for tests. Unset, it is '1' where JAX has a GPU, and '0' elsewhere, which spares a CPU the
  tracing, and `jax.export` the kernel: Triton's programs cannot be exported, so on a GPU set it to '0' for that.

  Raises:
    ValueError: for another value.
  """
  value = os.environ.get(_VARIABLE, '1' if jax.default_backend() == 'gpu' else '0')
  try:
    return Driver(value)
  except ValueError:
    raise ValueError(f"{_VARIABLE}={value!r} must be '0', '1' or 'interpret'") from None


def update_in_place(
  driver: Driver,
  leaves: Sequence[Any],
  stages: Callable[[tuple[int, ...], Any], _tiles.Stages],
  tilings: list[_tiles.Tiling],
  values: Any,
  zero: jax.Array,
  reads: Any,
  writes: Any,
) -> Any:
  """Runs a staged update over all tiles of a leaf.

  Args:
    driver: what may run it.
    leaves: whose arrays `reads` and `writes` are, QuantizedArrays and dense arrays of one shape.
    stages: of the update, for tiles of a shape and for `values`; it closes over no arrays.
    tilings: of the leaf, for the loop.
    values: small arrays that all tiles share.
    zero: uint32[], zero at run time.
    reads: arrays that are only read.
    writes: arrays that are replaced; donated ones are overwritten in place.

  Returns:
    The new `writes`.
  """
  args = values, zero, reads, writes
  shape = tilings[0].shape
  blocks = [block for leaf in leaves for block in _array.blocks_of(leaf)]

  def loop(values, zero, reads, writes):
    return _tiles.update_in_place(stages, tilings, values, zero, reads, writes, fused=False)

  def kernel(interpret, values, zero, reads, writes, shape=shape, origin=None):
    del zero
    return _triton.update_in_place(stages, shape, blocks, interpret, values, reads, writes, origin)

  def shard(interpret, shape, origin, values, zero, reads, writes):
    """The update of one device's shard, of `shape`, whose first element has the coordinates `origin`."""
    if _triton.why_not(leaves, shape) is None:
      return kernel(interpret, values, zero, reads, writes, shape, origin)
    tile_size = math.prod(tilings[0].tile_shape) * math.prod(shape) // math.prod(tilings[0].shape)
    local = _tiles.choose_tilings(shape, blocks, max(tile_size, 1))
    moved = lambda tile_shape, values: _moved(stages(tile_shape, values), origin)
    return _tiles.update_in_place(moved, local, values, zero, reads, writes, fused=False)

  mesh = jax.sharding.get_abstract_mesh()
  is_partly_manual = 0 < len(mesh.manual_axes) < len(mesh.axis_names)
  is_split = jax.device_count() > 1 and not mesh.manual_axes
  is_wide = any(x.dtype.itemsize > 4 for x in jax.tree.leaves(values))  # With jax_enable_x64.
  reason = _triton.why_not(leaves)
  fits_in_shards = is_split and reason == _triton.TOO_LARGE
  if driver is Driver.LOOP or is_partly_manual or is_wide or (reason and not fits_in_shards):
    return loop(*args)

  def run(interpret):
    whole = loop if reason else functools.partial(kernel, interpret)
    if not is_split:
      return whole
    return _partition.by_shard(whole, functools.partial(shard, interpret), loop, shape, shared=2)

  interpreted = {'cpu': run(True)} if driver is Driver.INTERPRETED else {}
  return lax.platform_dependent(*args, default=loop, cuda=run(False), **interpreted)


def _moved(stages: _tiles.Stages, origin: Sequence[jax.Array]) -> _tiles.Stages:
  """The stages of an array that begins elsewhere."""

  def move(stage):
    return lambda coordinates, *args: stage([x + at for x, at in zip(coordinates, origin, strict=True)], *args)

  return stages._replace(first=move(stages.first), second=move(stages.second))
