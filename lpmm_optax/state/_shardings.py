"""`shardings`: where the arrays of an optimizer's state go, from where the parameters go."""

from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.trace import _plan


def shardings(tree: Any, params: Any, specs: Any, mesh: Mesh | jax.sharding.AbstractMesh) -> Any:
  """The shardings of a tree of optimizer state, or of parameters, from those of the parameters.

  State arrays of a parameter's shape (momentum, moments, accumulators) are sharded as it is, everything else is on
  every device. Block scales are sharded as their codes are, except along an axis that they cannot split evenly, along
  which every device has all. No step then communicates but to reduce gradients.

  Args:
    tree: what is wanted the shardings of: parameters, a state of this package's optimizers or of Optax's, or a
      container of both, such as (params, opt_state) or a Flax TrainState; of concrete or abstract arrays.
    params: the parameters, quantized or not, concrete or abstract, in Flax's boxes (`nn.Partitioned`) or without.
    specs: a PartitionSpec or a NamedSharding per parameter (one for a quantized one), or per subtree of parameters, as
      `flax.linen.get_partition_spec` and `flax.linen.get_sharding` give them.
    mesh: the mesh, also that of every NamedSharding.

  Returns:
    A tree like `tree`, with a NamedSharding for every array: for `jax.device_put`, ``out_shardings`` of `jax.jit`, or
    abstract arrays into which a checkpoint is restored.

  Raises:
    ValueError: if specs do not fit the parameters, or a spec its parameter or the mesh, naming it.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> from jax.sharding import PartitionSpec as P
  >>> mesh = jax.make_mesh((1,), ('data',))
  >>> tx, dense = lpmm.sgdm(0.1), {'w': jnp.ones((64, 128)), 'b': jnp.ones(3)}
  >>> def init():
  ...   params = lpmm.quantize(dense, lpmm.INT8)
  ...   return params, tx.init(params)
  >>> state = jax.eval_shape(init)
  >>> where = lpmm.shardings(state, state[0], {'w': P('data', None), 'b': P()}, mesh)
  >>> params, opt_state = jax.jit(init, out_shardings=where)()
  >>> params['w'].sharding.spec
  P('data', None)
  """
  structure, leaves = _plan.flatten(_array.unwrap(params))
  specs = _array.of_codes(specs)
  is_spec = lambda x: isinstance(x, PartitionSpec | NamedSharding)
  numbered = structure.treedef.unflatten(range(len(leaves)))
  spec_structure: Any = jax.tree.structure(specs, is_leaf=is_spec)
  try:
    parts = spec_structure.flatten_up_to(numbered)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(
      f'specs must have a PartitionSpec per parameter, or per subtree of them, or NamedShardings: {error}'
    ) from error
  spec_of = {
    i: spec
    for spec, part in zip(jax.tree.leaves(specs, is_leaf=is_spec), parts, strict=True)
    for i in jax.tree.leaves(part)
  }
  of_param = {i: _of_param(structure.paths[i], leaves[i].shape, spec_of[i], mesh) for i in spec_of}
  everywhere = _mesh.replicated(mesh)
  # By path, as the state's own arrays are found, but for parameters that no optimizer updates too.
  by_keys = {structure.keys[i]: i for i in of_param}

  def one(path: Any, x: Any) -> Any:
    found = _plan.find_parameter(path, by_keys)
    own = of_param[found[2]] if found and x.shape == leaves[found[2]].shape else everywhere
    if not _array.is_quantized(x):
      return own
    return jax.tree.map(lambda part: _mesh.reshard_for(own, part.shape), x)

  return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_array.is_quantized)


def _of_param(path: str, shape: tuple[int, ...], spec: Any, mesh: Any) -> NamedSharding:
  if isinstance(spec, NamedSharding):
    if spec.mesh != mesh:
      raise ValueError(f'{path}: {spec} is on another mesh than {mesh}')
    spec = spec.spec
  if not isinstance(spec, PartitionSpec):
    raise ValueError(f'{path}: expected a PartitionSpec, got {spec!r}')
  if len(spec) > len(shape):
    raise ValueError(f'{path}: {spec} has more axes than the parameter, of shape {shape}')
  try:
    sharding = NamedSharding(mesh, spec)
    sharding.shard_shape(shape)
  except ValueError as error:
    raise ValueError(f'{path}: {spec} does not split the shape {shape} over {mesh}: {error}') from error
  return sharding
