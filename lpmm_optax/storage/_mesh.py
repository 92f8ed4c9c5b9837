"""Meshes on which array types say more than shape and dtype: explicit axes, and the manual ones of `jax.shard_map`.

On an explicit mesh, types carry shardings, and every reshape would have to spell its own. Our computations follow their
inputs' shardings and never need data from another device, which is what automatic mode infers. So there they run in
automatic mode, and only their results' shardings are declared. Inside of `jax.shard_map`, types say along which axes
devices have values of their own; what meets in a loop or a branch must agree in that.
"""

from collections.abc import Callable
import contextlib
import math
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec


def no_mesh() -> contextlib.AbstractContextManager[Any]:
  """In which no mesh reaches what is traced or computed."""
  return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ()))


def explicit_sharding(x: Any) -> NamedSharding | None:
  """The sharding in an array's type if its mesh has explicit axes, else None."""
  if not isinstance(x, jax.Array):
    return None
  sharding = jax.typeof(x).sharding
  explicit = not sharding.mesh.empty and AxisType.Explicit in sharding.mesh.axis_types
  return sharding if explicit else None


def names_in(entry: Any) -> tuple[str, ...]:
  """The mesh axes of an entry of a PartitionSpec."""
  return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def reshard_for(sharding: NamedSharding, *shapes: tuple[int, ...]) -> NamedSharding:
  """The same sharding for other arrays of that rank, replicated along axes that one of them cannot split evenly."""
  lengths = [math.gcd(*of_axis) for of_axis in zip(*shapes, strict=True)]
  spec = (*sharding.spec, *(None,) * (len(lengths) - len(sharding.spec)))
  fits = lambda entry, n: n % math.prod(sharding.mesh.shape[name] for name in names_in(entry)) == 0
  even = (entry if fits(entry, n) else None for entry, n in zip(spec, lengths, strict=True))
  return NamedSharding(sharding.mesh, PartitionSpec(*even))


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
  choose = lambda shapes: jax.tree.map(lambda s: reshard_for(sharding, s.shape), shapes)
  return _automatic(fn, sharding.mesh, choose, args)


def follow_each(fn: Callable, templates: dict[Any, Any], *args: Any) -> dict[Any, jax.Array]:
  """`fn(*args)`, a dict of arrays, of which those with a template are sharded as that is, and others replicated."""
  found = (explicit_sharding(x) for x in jax.tree.leaves(args))
  sharding = next((sharding for sharding in found if sharding is not None), None)
  if sharding is None:
    return fn(*args)
  of_template = {name: explicit_sharding(template) or replicated(sharding.mesh) for name, template in templates.items()}

  def choose(shapes):
    return {name: reshard_for(of_template.get(name, replicated(sharding.mesh)), s.shape) for name, s in shapes.items()}

  return _automatic(fn, sharding.mesh, choose, args)


def replicated(mesh: Any) -> NamedSharding:
  """The sharding of an array of which every device of a mesh has a copy."""
  return NamedSharding(mesh, PartitionSpec())


def _automatic(fn: Callable, mesh: Any, choose: Callable, args: tuple[Any, ...]) -> Any:
  """`fn(*args)` in automatic mode; `choose` gives the shardings of the results, from their shapes."""
  auto = lambda out_sharding: jax.sharding.auto_axes(fn, out_sharding=out_sharding)
  shapes = jax.eval_shape(lambda *args: auto(replicated(mesh))(*args), *args)
  return auto(choose(shapes))(*args)


def axis_names(axes: Any) -> frozenset[Any]:
  """The names in a `shard_axes` argument: of one axis, or a sequence of them."""
  return frozenset([axes] if isinstance(axes, str) else axes)


def varying_axes(*trees: Any) -> frozenset[Any]:
  """The manual axes along which some array varies, as far as `jax.shard_map` tracks it (check_vma)."""
  arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, jax.Array)]
  return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def vary(tree: Any, axes: frozenset[Any]) -> Any:
  """The tree, with arrays that vary along all of these axes."""

  def one(x):
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(missing), to='varying') if missing else x

  return jax.tree.map(one, tree)


def vary_as_results(fn: Callable[[Any], Any], x: Any) -> Any:
  """x, which a loop carries through `fn`, and so must vary along the manual axes along which its results do."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return x
  varying = lambda x, like: vary(x, like.manual_axis_type.varying) if like.manual_axis_type else x
  return jax.tree.map(varying, x, jax.eval_shape(fn, x))


def template(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
  """The shape of an array with another dtype, and the manual axes along which it varies."""
  if not varying_axes(x):
    return jax.ShapeDtypeStruct(x.shape, dtype)
  aval: Any = jax.typeof(x)
  return jax.ShapeDtypeStruct(x.shape, dtype, sharding=aval.sharding, manual_axis_type=aval.manual_axis_type)


def some_elements(aval: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  """An array of another shape, on any device as an array of type `aval` is."""
  if not aval.manual_axis_type.varying:
    return jax.ShapeDtypeStruct(shape, aval.dtype)
  sharding = replicated(aval.sharding.mesh)
  return jax.ShapeDtypeStruct(shape, aval.dtype, sharding=sharding, manual_axis_type=aval.manual_axis_type)
