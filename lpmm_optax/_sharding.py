"""Explicit meshes: array types carry shardings there, and every reshape would have to spell its own.

Our computations follow their inputs' shardings and never need data from another device, which is what automatic mode
infers. So on an explicit mesh they run in automatic mode, and only their results' shardings are declared.
"""

from collections.abc import Callable
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def explicit_sharding(x: Any) -> NamedSharding | None:
  """The sharding in an array's type if its mesh has explicit axes, else None."""
  if not isinstance(x, jax.Array):
    return None
  sharding = jax.typeof(x).sharding
  explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
  return sharding if explicit else None


def reshard_for(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
  """The same sharding for another array of that rank, replicated along axes that it cannot split evenly."""
  sizes = dict(sharding.mesh.shape)

  def fits(names, n):
    names = names if isinstance(names, tuple) else (names,)
    return n % math.prod(sizes[name] for name in names if name is not None) == 0

  spec = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
  return NamedSharding(
    sharding.mesh, PartitionSpec(*(names if fits(names, n) else None for names, n in zip(spec, shape, strict=True)))
  )


def follow(fn: Callable, template: Any, *args: Any) -> Any:
  """`fn(*args)`, whose results are all sharded as `template` is, or as near to it as their shapes allow.

  Args:
    fn: a function of pytrees of arrays that gives a pytree of arrays of the template's rank.
    template: an array; on an automatic mesh, or without one, it does not matter and fn is just called.
    *args: of fn.
  """
  sharding = explicit_sharding(template)
  if sharding is None:
    return fn(*args)
  auto = lambda out_sharding: jax.sharding.auto_axes(fn, out_sharding=out_sharding)
  replicated = NamedSharding(sharding.mesh, PartitionSpec())
  shapes = jax.eval_shape(lambda *args: auto(replicated)(*args), *args)
  return auto(jax.tree.map(lambda s: reshard_for(sharding, s.shape), shapes))(*args)
