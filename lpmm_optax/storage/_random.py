"""Random bits for stochastic rounding: one stream, a pure function of what is rounded, when, and why.

Two levels. A scalar level, threefry, turns the user's key, a domain, the counts of steps, the path of a leaf and the
slot in it (the parameter, and each state field) into 64-bit words. An elementwise level, `random_bits`,
mixes such a word with the element's index in the whole array. The result depends on neither tile size nor sharding nor
device count, and costs no memory of its own because XLA fuses it into the rounding.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import enum
import hashlib
from typing import Any

import jax
from jax import lax
from jax.extend import random as jex_random
import jax.numpy as jnp
import numpy as np


class Domain(enum.IntEnum):
  """What is rounded for; bits of different domains are independent, though key, counts and paths agree."""

  QUANTIZE = 0
  CONVERT = 1
  STEP = 2
  ACCUMULATE = 3
  AVERAGE = 4


def raw_key(key: jax.Array | None) -> jax.Array:
  """Canonical raw key data, uint32[2], from any kind of `jax.random` key; the default is `jax.random.key(0)`."""
  if key is None:
    key = jax.random.key(0)
  try:
    return jax.random.bits(key, (2,), jnp.uint32)
  except (TypeError, ValueError) as error:
    raise TypeError(f'key must be a jax.random key, got {key!r}') from error


def _digest(path: Sequence[Any], slot: int) -> bytes:
  """8 bytes of a key path, in which 'a/b' is not a -> b; containers of any kind count by the names of their keys."""
  names = [jax.tree_util.keystr((key,), simple=True).encode() for key in path]
  text = b''.join(len(name).to_bytes(4, 'little') + name for name in names)
  return hashlib.blake2s(text, digest_size=8, salt=slot.to_bytes(8, 'little')).digest()


def _halves(paths: Sequence[Sequence[Any]], slots: int) -> np.ndarray:
  """The digests of all slots of all paths, uint32[2, len(paths) * slots]."""
  digests = b''.join(_digest(path, slot) for path in paths for slot in range(slots))
  return np.frombuffer(digests, dtype='<u4').reshape(-1, 2).T.astype(np.uint32)


def words(
  key: jax.Array, domain: Domain, counts: Sequence[jax.Array], paths: Sequence[Sequence[Any]], slots: int
) -> jax.Array:
  """The 64-bit words that key one rounding of a tree.

  Args:
    key: uint32[2], from `raw_key`.
    domain: what for.
    counts: int32[] each: the step, or the step and the microbatch in it.
    paths: the leaves' key paths, as `jax.tree_util` gives them.
    slots: how many arrays are rounded per leaf.

  Returns:
    uint32[len(paths), slots, 2].
  """
  if not paths:
    return jnp.zeros((0, slots, 2), jnp.uint32)
  # Few calls, for each is a loop that takes as long to compile as the update of a small leaf.
  numbers = [jnp.uint32(domain), *(count.astype(jnp.uint32) for count in counts), jnp.uint32(0)]
  for first, second in zip(numbers[::2], numbers[1::2], strict=False):
    key = jex_random.threefry_2x32(key, jnp.stack([first, second]))
  halves = jnp.asarray(_halves(paths, slots)).reshape(-1)
  return jex_random.threefry_2x32(key, halves).reshape(2, len(paths), slots).transpose(1, 2, 0)


def steady_words(key: jax.Array, step: jax.Array, paths: Sequence[Sequence[Any]]) -> jax.Array:
  """The words, uint32[len(paths), 2], of what is rounded with the same bits for 512 steps, but for their `turn`.

  Args:
    key: uint32[2], from `raw_key`.
    step: int32[].
    paths: as in `words`.
  """
  low, high = jnp.asarray(_halves(paths, 1))
  low = low + step.astype(jnp.uint32) // _STEADY * jnp.uint32(0x9E3779B9)
  return jnp.stack([random_bits(key, (low ^ jnp.uint32(half), high)) for half in (1, 2)], axis=-1)


# By how much bits turn in a step: one of eight, the first and j times the second, modulo 2^32. Each is far from
# fractions of small denominators (partial quotients up to 8 while these are under 2048), so that thresholds of any run
# of steps are spread evenly; and there is no k for which all eight have come back after k steps. Of pairs found at
# random, that with the least variance at the worst k, among those that leave least of it at every step.
_TURNS = 2522168028, 4040812858
_STEADY = 512


def turn(step: jax.Array) -> tuple[jax.Array, jax.Array]:
  """What `turned` takes, uint32[] each."""
  first, further = (step.astype(jnp.uint32) * jnp.uint32(x) for x in _TURNS)
  return first, further


def turned(bits: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
  """The same bits in another step: uint32, which add to themselves one of eight constants with each step.

  So thresholds are a Weyl sequence, of which any run of steps is spread evenly: an element that has to move by p grid
  steps in each step of the optimizer does so once in every 1 / p steps or so, rather than with that probability. Which
  of the eight it is, the lowest bits say: what moves in every k-th step alone would meet thresholds that hardly change
  if k were nearly a period of them, as the Fibonacci numbers are of the golden ratio.
  """
  return bits + turn[0] + (bits & 7) * turn[1]


def _derive(word: jax.Array, number: jax.Array, what: int) -> jax.Array:
  index = lambda half: (number.astype(jnp.uint32), jnp.uint32(2 * what + half))
  return jnp.stack([random_bits(word, index(half)) for half in (1, 2)])


def of_use(word: jax.Array, use: jax.Array) -> jax.Array:
  """The word, uint32[2], of one more use of what it is for; `use`, int32[], is 0 for the first, which keeps it."""
  return jnp.where(use == 0, word, _derive(word, use, 0))


def of_shard(words: jax.Array, axes: Iterable[Any]) -> jax.Array:
  """The words, uint32[n, 2], of this device's shard along manual mesh axes; as they are if there are none."""
  names = tuple(sorted(axes, key=str))
  if not names:
    return words
  number = lax.axis_index(names)
  return jax.vmap(lambda word: _derive(word, number, 1))(words)


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
