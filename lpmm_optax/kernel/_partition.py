"""A kernel on sharded arrays: each device runs it on its shard.

XLA cannot split a kernel that it does not know, so it would gather every array on every device. Here it is told how:
the kernel runs on shards, with the coordinates at which each begins, in `jax.shard_map` where types say how arrays are
sharded, and else in `jax.custom_partitioning`, which asks XLA.
"""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.experimental import custom_partitioning
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from lpmm_optax.storage import _mesh

# Whose compilers call back to split what they do not know; that for TPUs does not: jax-ml/jax issue 38196.
PLATFORMS = frozenset({'cpu', 'cuda'})


def by_known_shard(run_shard: Callable, sharding: NamedSharding, shape: tuple[int, ...], shared: int) -> Callable:
  """`run_shard` on each shard of arrays that are sharded alike, as near to `sharding` as their shapes allow.

  Args:
    run_shard: as for `by_shard`.
    sharding: on the current mesh, whose axes are automatic.
    shape: of the leaf.
    shared: as for `by_shard`.
  """

  def call(*args):
    even = _mesh.reshard_for(sharding, shape, *(x.shape for x in jax.tree.leaves(args[shared:])))

    def local(*args):
      return run_shard(*_place(even, shape), *args)

    specs = (PartitionSpec(),) * shared + (even.spec,) * (len(args) - shared)
    return jax.shard_map(local, in_specs=specs, out_specs=even.spec, check_vma=False)(*args)

  return call


def by_shard(
  run: Callable, run_shard: Callable, run_batched: Callable, shape: tuple[int, ...], shared: int
) -> Callable:
  """`run`, which takes pytrees of arrays, so that it runs shard by shard where they are sharded.

  Args:
    run: `(*shared, reads, writes) -> new writes`, for one device.
    run_shard: `(shape, origin, *shared, reads, writes) -> new writes`, for a shard of `shape` whose first element has
      the coordinates `origin`, uint32[] each.
    run_batched: as `run`, but XLA's own, for `jax.vmap`.
    shape: of the leaf; arrays of it and arrays of its rank, with fewer elements along some axis, are split alike.
    shared: how many arguments come first, of which every device gets all.
  """

  def call(*args):
    flat, tree = jax.tree.flatten(args)
    outputs, output_tree = jax.tree.flatten(args[-1])
    first = len(jax.tree.leaves(args[:shared]))  # The arrays from here on are split.

    @custom_partitioning.custom_partitioning
    def partitioned(*flat):
      return tuple(jax.tree.leaves(run(*jax.tree.unflatten(tree, flat))))

    def partition(mesh, arg_shapes, result_shape):
      del result_shape
      whole = next(x for x in arg_shapes[first:] if x.shape == shape)
      even = _mesh.reshard_for(whole.sharding, *(x.shape for x in arg_shapes[first:]))

      def lower(*flat):
        # What XLA calls back runs under the mesh of whoever compiles, whose explicit axes do not concern a shard.
        with _mesh.no_mesh():
          return tuple(jax.tree.leaves(run_shard(*_place(even, shape), *jax.tree.unflatten(tree, flat))))

      args = (_mesh.replicated(mesh),) * first + (even,) * (len(flat) - first)
      return mesh, lower, (even,) * len(outputs), args

    partitioned.def_partition(partition=partition, sharding_rule=_rule([x.shape for x in flat], first, len(outputs)))

    @jax.custom_batching.custom_vmap
    def batchable(*flat):
      return partitioned(*flat)

    @batchable.def_vmap
    def batched(axis_size, in_batched, *flat):
      del axis_size
      one = lambda *flat: tuple(jax.tree.leaves(run_batched(*jax.tree.unflatten(tree, flat))))
      out = jax.vmap(one, in_axes=[0 if is_batched else None for is_batched in in_batched])(*flat)
      return out, (True,) * len(outputs)

    return jax.tree.unflatten(output_tree, batchable(*flat))

  return call


def _index(mesh: Any, names: Sequence[str]) -> jax.Array:
  """Which part along some mesh axes this device has."""
  index = jnp.uint32(0)
  for name in names:
    index = index * jnp.uint32(mesh.shape[name]) + lax.axis_index(name).astype(jnp.uint32)
  return index


def _place(sharding: NamedSharding, shape: tuple[int, ...]) -> tuple[tuple[int, ...], list[jax.Array]]:
  """The shape of this device's shard, and per axis the coordinate of its first element, uint32[]."""
  local, entries = sharding.shard_shape(shape), map(_mesh.names_in, sharding.spec)
  return local, [_index(sharding.mesh, names) * jnp.uint32(n) for names, n in zip(entries, local, strict=True)]


def _rule(shapes: Sequence[tuple[int, ...]], first: int, outputs: int) -> str:
  """Shardy's rule: arrays from `first` on are sharded alike, axis by axis, where they are equally long."""

  def dims(i, shape):
    return ' '.join(f's{i}x{axis}' if i < first else f'd{axis}x{n}' for axis, n in enumerate(shape))

  named = [dims(i, shape) for i, shape in enumerate(shapes)]
  return f'{", ".join(named)} -> {", ".join(named[len(named) - outputs :])}'
