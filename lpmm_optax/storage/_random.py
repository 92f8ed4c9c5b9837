"""Random bits for stochastic rounding: a pure function of (key, step, leaf path, slot, global element index).

Two levels. A scalar level, `jax.random` (threefry), turns the user's key, the step count and the leaf's path into
64-bit words, one per slot (the parameter and each state field). An elementwise level, `random_bits`, mixes such a word
with the element's index in the whole array. The result depends on neither tile size nor sharding nor device count, and
costs no memory of its own because XLA fuses it into the rounding.
"""

from collections.abc import Sequence
import hashlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np


def raw_key(key: jax.Array | None) -> jax.Array:
  """Canonical raw key data, uint32[2], from any kind of `jax.random` key; the default is `jax.random.key(0)`."""
  if key is None:
    key = jax.random.key(0)
  try:
    return jax.random.bits(key, (2,), jnp.uint32)
  except (TypeError, ValueError) as error:
    raise TypeError(f'key must be a jax.random key, got {key!r}') from error


def slot_words(key: jax.Array, counts: Sequence[jax.Array], paths: list[str], slots: int) -> jax.Array:
  """The 64-bit words that key one step's rounding.

  Args:
    key: uint32[2], from `raw_key`.
    counts: int32[] each: the step, or the step and the microbatch in it.
    paths: the leaves' paths.
    slots: how many arrays are rounded per leaf.

  Returns:
    uint32[len(paths), slots, 2].
  """
  if not paths:
    return jnp.zeros((0, slots, 2), jnp.uint32)
  step_key = jax.random.wrap_key_data(key, impl='threefry2x32')
  for count in counts:
    step_key = jax.random.fold_in(step_key, count)
  digests = [hashlib.blake2s(path.encode(), digest_size=8).digest() for path in paths]
  hashes = np.frombuffer(b''.join(digests), dtype='<u4').reshape(-1, 2)

  def words(path_hash):
    leaf_key = jax.random.fold_in(jax.random.fold_in(step_key, path_hash[0]), path_hash[1])
    return jax.random.bits(leaf_key, (slots, 2), jnp.uint32)

  return jax.vmap(words)(jnp.asarray(hashes, jnp.uint32))


def random_bits(word: jax.Array | tuple[jax.Array, jax.Array], index: tuple[jax.Array, jax.Array]) -> jax.Array:
  """32 random bits per element.

  The two multiply-xorshift rounds and their constants are "lowbias32" of C. Wellons' hash-prospector, which was
  searched for least avalanche bias; the key enters before each round, so that two keys do not merely permute one
  sequence.

  Args:
    word: uint32[2], one slot's word, or its two halves; elements may have one each.
    index: the element's position, (low, high) uint32 arrays that broadcast against each other.

  Returns:
    uint32, in the broadcast shape of index.
  """
  low, high = index
  x = low ^ word[0]
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = x ^ (high + word[1])
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def element_index(shape: tuple[int, ...], coordinates: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """The (low, high) position of elements in a row-major array of `shape`.

  Args:
    shape: of the whole array.
    coordinates: per axis, a uint32 array of global coordinates; they broadcast against each other.

  Returns:
    low, the linear index modulo 2^32, and high: zero for arrays of at most 2^32 elements; beyond that the leading
    coordinate, times an odd constant, which tells apart the elements whose low words agree.
  """
  low, stride = jnp.uint32(0), 1
  for n, coordinate in zip(reversed(shape), reversed(coordinates), strict=True):
    low = low + coordinate * jnp.uint32(stride % 2**32)
    stride *= n
  if stride <= 2**32:
    return low, jnp.uint32(0)
  return low, lax.convert_element_type(coordinates[0], jnp.uint32) * jnp.uint32(0x9E3779B9)
