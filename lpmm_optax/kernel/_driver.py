"""Who runs the update of a leaf: the tile loop, which XLA compiles for any device, or a kernel on NVIDIA GPUs and TPUs.

All run the same stages and give the same bits. The platform that is lowered for decides, not the one that traces.
"""

from collections.abc import Sequence
import functools
import math
import types
from typing import Any
from typing import NamedTuple

import jax
from jax import lax

from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _partition
from lpmm_optax.kernel import _tiles
from lpmm_optax.kernel import _tpu
from lpmm_optax.kernel import _triton
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _targets


class Kernel(NamedTuple):
  """What may update a leaf besides the loop.

  Attributes:
    platform: that it is lowered for.
    driver: the module that makes it, with `why_not` and `update_in_place`.
    interpret: whether JAX runs it, operation by operation: for tests, and slow.
  """

  platform: str
  driver: types.ModuleType
  interpret: bool = False


_KERNELS = Kernel('cuda', _triton), Kernel('tpu', _tpu)


def chosen() -> tuple[Kernel, ...]:
  """The kernels that may run the update in what is traced now."""
  runs = _targets.chosen()
  return tuple(
    kernel._replace(platform=platform, interpret=platform != kernel.platform)
    for kernel in _KERNELS
    for platform in runs.get(kernel.platform, ())
  )


def without_kernel(leaves: Sequence[Any]) -> dict[str, str]:
  """By platform that has a kernel, why a leaf's arrays are updated by the loop there all the same.

  Args:
    leaves: a parameter and its state, QuantizedArrays and dense arrays of one shape.
  """
  if not any(map(_array.is_quantized, leaves)):
    return {}  # XLA fuses that by itself.
  reasons = {kernel.platform: kernel.driver.why_not(leaves) for kernel in _KERNELS}
  return {platform: reason for platform, reason in reasons.items() if reason}


def update_in_place(
  kernels: Sequence[Kernel],
  sharding: jax.sharding.NamedSharding | None,
  leaves: Sequence[Any],
  task: _tiles.Task,
  tilings: list[_tiles.Tiling],
) -> Any:
  """The new `task.writes`, by whoever suits the leaf.

  Args:
    kernels: what may run it, besides the loop.
    sharding: of the leaf, where types say it.
    leaves: whose arrays `task.reads` and `task.writes` are, QuantizedArrays and dense arrays of one shape.
    task: what is updated.
    tilings: of the leaf, for the loop.
  """
  stages, shape, blocks, *args, _ = task

  def loop(*args):
    return _tiles.update_in_place(_tiles.Task(stages, shape, blocks, *args), tilings, fused=False)

  def run_kernel(kernel, shape, origin, values, zero, reads, writes):
    axes = _mesh.varying_axes(values, reads, writes)
    args = _mesh.vary((values, zero, reads, writes, origin), axes)
    return kernel.driver.update_in_place(_tiles.Task(stages, shape, blocks, *args), kernel.interpret)

  def run_shard(kernel, shape, origin, *args):
    """The update of one device's shard, of `shape`, whose first element has the coordinates `origin`."""
    if kernel.driver.why_not(leaves, shape) is None:
      return run_kernel(kernel, shape, origin, *args)
    tile_size = math.prod(tilings[0].tile_shape) * math.prod(shape) // math.prod(tilings[0].shape)
    local = _tiles.choose_tilings(shape, blocks, max(tile_size, 1))
    shard = _tiles.Task(stages, shape, blocks, *args)._replace(origin=origin)
    return _tiles.update_in_place(shard, local, fused=False)

  mesh = jax.sharding.get_abstract_mesh()
  is_partly_manual = 0 < len(mesh.manual_axes) < len(mesh.axis_names)
  is_split = jax.device_count() > 1 and not mesh.manual_axes
  is_wide = any(x.dtype.itemsize > 4 for x in jax.tree.leaves(task.values))  # With jax_enable_x64.
  if is_partly_manual or is_wide:
    return loop(*args)

  def run(kernel):
    """The update with a kernel, or None if the loop alone can do it."""
    reason = kernel.driver.why_not(leaves)
    whole = loop if reason else lambda *args: run_kernel(kernel, shape, None, *args)
    if not is_split:
      return None if reason else whole
    if reason not in (None, _body.TOO_LARGE):
      return None
    if sharding is not None:
      return _partition.by_known_shard(functools.partial(run_shard, kernel), sharding, shape, shared=2)
    if kernel.platform not in _partition.PLATFORMS:
      return None
    return _partition.by_shard(whole, functools.partial(run_shard, kernel), loop, shape, shared=2)

  by_platform = {kernel.platform: run(kernel) for kernel in kernels}
  found = {platform: update for platform, update in by_platform.items() if update is not None}
  return lax.platform_dependent(*args, default=loop, **found) if found else loop(*args)
