"""What a saved tree says of itself: how each array is stored, by which version, and a checksum of its contents.

Plain data for a JSON file. It knows nothing of how trees are saved.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random


def describe(tree: Any, version: str) -> dict[str, Any]:
  """The description of a tree of concrete arrays; costs one pass over them."""
  leaves = _flatten(tree)
  sums = _checksums(leaves)
  arrays = {path: _how_stored(leaf) | {'checksum': sums[path]} for path, leaf in leaves.items()}
  return {'lpmm_optax': version, 'arrays': arrays}


def is_description(x: Any) -> bool:
  """Whether something is what `describe` makes."""
  if not isinstance(x, dict) or set(x) != {'lpmm_optax', 'arrays'} or not isinstance(x['arrays'], dict):
    return False
  return all(
    isinstance(entry, dict) and set(entry) == {'shape', 'stored', 'checksum'} for entry in x['arrays'].values()
  )


def check_formats(description: dict[str, Any], like: Any) -> None:
  """Raises a ValueError, naming leaves, unless a tree (abstract ones will do) stores what was described, as it was."""
  source = f'the checkpoint, written by lpmm_optax {description["lpmm_optax"]},'
  saved = {path: _say(entry) for path, entry in description['arrays'].items()}
  wanted = {path: _say(_how_stored(leaf)) for path, leaf in _flatten(like).items()}
  only_saved, only_wanted = ([f'{p} {a[p]}' for p in a if p not in b] for a, b in ((saved, wanted), (wanted, saved)))
  if only_saved or only_wanted:
    raise ValueError(
      f'{source} is not of the tree that it is to be restored into: it has {_array.name_some(only_saved)} that the '
      f'tree has not, and the tree {_array.name_some(only_wanted)} that it has not'
    )
  for path, entry in saved.items():
    if entry != wanted[path]:
      raise ValueError(
        f'{path}: {source} has {entry}, and is to be restored into {wanted[path]}; restore it as it is, then use '
        'lpmm_optax.convert'
      )


def check_contents(description: dict[str, Any], tree: Any) -> None:
  """Raises a ValueError, naming leaves, unless a tree of concrete arrays has the contents that were described."""
  sums = _checksums(_flatten(tree))
  odd = [path for path, entry in description['arrays'].items() if entry['checksum'] != sums[path]]
  if odd:
    raise ValueError(f'the checkpoint is damaged: not what was saved: {_array.name_some(odd)}')


def _flatten(tree: Any) -> dict[str, Any]:
  items, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_array.is_quantized)
  return {_array.path_str(path): leaf for path, leaf in items}


def _how_stored(leaf: Any) -> dict[str, Any]:
  if _array.is_quantized(leaf):
    return {'shape': list(leaf.shape), 'stored': ', '.join(leaf.format.storage)}
  dtype = leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype
  return {'shape': list(np.shape(leaf)), 'stored': str(dtype)}


def _say(entry: dict[str, Any]) -> str:
  return f'{entry["shape"]} as {entry["stored"]}'


def _words(x: Any) -> Any:
  """The bits of an array as unsigned integers of at most 32 bits; wider elements become two, along a last axis."""
  if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  x = x if isinstance(x, jax.Array) else np.asarray(x)
  if x.dtype in (jnp.int4, jnp.uint4, jnp.bool_):
    x = x.astype(np.uint8)
  width = min(x.dtype.itemsize, 4)
  if isinstance(x, jax.Array):
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * width}'))
  # NumPy's own arrays and numbers stay on the host, for JAX would take 64 bits for 32.
  words = np.ascontiguousarray(x).reshape(-1).view(f'uint{8 * width}')
  return words.reshape(x.shape if x.dtype.itemsize == width else (*x.shape, -1))


@jax.jit
def _checksum(words: jax.Array) -> jax.Array:
  """uint32[]: a sum over elements of a hash of value and place, hence the same on every mesh."""

  def add_up(sources):
    x = sources['words'].astype(jnp.uint32)
    coordinates = [jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) for d in range(x.ndim)]
    # The value is the key of the hash, and the place what is hashed. Zero is no value in particular.
    key = x ^ jnp.uint32(0x243F6A88)
    hashes = _random.random_bits((key, key * jnp.uint32(0x9E3779B9)), _random.element_index(x.shape, coordinates))
    return {'sum': jnp.sum(hashes, dtype=jnp.uint32)}

  return _mesh.follow_each(add_up, {}, {'words': words})['sum']


def _checksums(leaves: dict[str, Any]) -> dict[str, int]:
  """Of every leaf; of a quantized one, of codes and scales together."""

  def one(leaf):
    parts = [leaf] if not _array.is_quantized(leaf) else [leaf.codes, leaf.scales]
    # Each is waited for: XLA on a CPU aborts, now and then, with sums over devices of several programs on their way.
    sums = (int(_checksum(_words(x))) for x in parts if x is not None)
    return functools.reduce(lambda a, b: (3 * a + b) % 2**32, sums)

  return {path: one(leaf) for path, leaf in leaves.items()}
