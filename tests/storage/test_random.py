"""Random bits: fair, uncorrelated, and the same whatever else there is."""

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey
import numpy as np
import pytest

from lpmm_optax.storage import _random


def words(paths, count=0, key=0, domain=_random.Domain.STEP):
  raw = _random.raw_key(jax.random.key(key))
  return _random.words(raw, domain, [jnp.int32(count)], [tuple(map(DictKey, path)) for path in paths], 2)


def draw(word, n=2**20, offset=0):
  index = jax.lax.iota(jnp.uint32, n) + jnp.uint32(offset)
  return np.asarray(_random.random_bits(word, (index, jnp.uint32(0))))


def test_every_random_bit_is_fair():
  bits = draw(words(['w'])[0, 0])
  for i in range(32):
    # 2^20 fair coins: sigma 2^-11; 32 of them within 5 sigma.
    assert abs(np.mean((bits >> i) & 1) - 0.5) < 5 * 2.0**-11, i


def test_random_bits_of_neighbours_steps_slots_and_leaves_are_uncorrelated():
  n = 2**20
  base = draw(words(['w'])[0, 0]) / 2.0**32 - 0.5
  word = words(['w'])[0, 0]
  others = {
    'neighbour': draw(words(['w'])[0, 0], offset=1),
    'next row': draw(words(['w'])[0, 0], offset=4096),
    'slot': draw(words(['w'])[0, 1]),
    'step': draw(words(['w'], count=1)[0, 0]),
    'leaf': draw(words(['v'])[0, 0]),
    'key': draw(words(['w'], key=1)[0, 0]),
    'quantize': draw(words(['w'], domain=_random.Domain.QUANTIZE)[0, 0]),
    'convert': draw(words(['w'], domain=_random.Domain.CONVERT)[0, 0]),
    'accumulate': draw(words(['w'], domain=_random.Domain.ACCUMULATE)[0, 0]),
    'second use': draw(_random.of_use(word, jnp.int32(1))),
  }
  for name, bits in others.items():
    correlation = np.mean(base * (bits / 2.0**32 - 0.5)) * 12
    assert abs(correlation) < 5 / np.sqrt(n), name


def test_uses_are_uncorrelated_with_one_another_and_the_first_keeps_the_word():
  word = words(['w'])[0, 0]
  np.testing.assert_array_equal(_random.of_use(word, jnp.int32(0)), word)
  bits = np.stack([draw(_random.of_use(word, jnp.int32(use)), n=2**18) for use in range(6)]) / 2.0**32 - 0.5
  correlations = 12 * bits @ bits.T / bits.shape[1] - np.eye(6)
  assert np.max(np.abs(correlations)) < 5 / np.sqrt(bits.shape[1])


def steady(*names, key=0, step=0):
  key = _random.raw_key(jax.random.key(key))
  return _random.steady_words(key, jnp.int32(step), [(DictKey(name),) for name in names])


def test_what_turns_is_uncorrelated_with_other_leaves_keys_and_what_is_drawn_anew():
  n = 2**18
  base, leaf = steady('w', 'v')
  later = steady('w', step=512)[0]
  others = [leaf, later, steady('w', key=1)[0], words(['w'])[0, 0], words(['w'])[0, 1]]
  others.append(_random.of_use(base, jnp.int32(1)))
  values = np.stack([draw(word, n) for word in (base, *others)]) / 2.0**32 - 0.5
  correlations = 12 * values @ values.T / n - np.eye(len(values))
  assert np.max(np.abs(correlations)) < 5 / np.sqrt(n)


def rounded_up(steps, share, n=2**13):
  """How many of these steps round each of n elements up, if it is to move by a share of a grid step in each."""
  turns = (np.asarray(x)[:, None] for x in _random.turn(jnp.asarray(steps)))
  bits = _random.turned(draw(steady('w')[0], n), tuple(turns))
  return np.sum(bits / 2.0**32 >= 1 - share, axis=0)


def test_what_turns_is_spread_evenly_over_any_run_of_steps():
  counts = rounded_up(np.arange(187, 187 + 100), 0.1)
  # Of independent ones, a deviation of 3.
  assert np.std(counts) < 0.9
  assert np.min(counts) >= 7
  assert np.max(counts) <= 14


def test_what_turns_is_spread_like_what_is_independent_over_every_kth_step():
  steady_steps = 512
  variances = {}
  for k in range(2, steady_steps):
    for share in (0.5, 0.2, 0.05):
      steps = np.arange(0, max(steady_steps, 2 * k), k)
      variances[k, share] = np.var(rounded_up(steps, share)) / (len(steps) * share * (1 - share))
  # By the golden ratio alone, 11 where k is 34.
  assert max(variances.values()) < 2.6
  assert np.mean(np.array(list(variances.values())) > 1.5) < 0.05


def test_a_slash_in_a_name_is_no_path():
  together, apart, other = words([['a/b'], ['a', 'b'], ['a', 'b/']])[:, 0]
  assert not np.array_equal(together, apart)
  assert not np.array_equal(apart, other)


def test_words_do_not_depend_on_the_other_leaves():
  np.testing.assert_array_equal(words(['a', 'b'])[1], words(['b'])[0])


def test_any_kind_of_key_is_accepted_and_nothing_else():
  typed, raw = _random.raw_key(jax.random.key(3)), _random.raw_key(jax.random.PRNGKey(3))
  np.testing.assert_array_equal(typed, raw)
  assert _random.raw_key(jax.random.key(3, impl='rbg')).shape == (2,)
  with pytest.raises(TypeError, match='key'):
    _random.raw_key('seed')


def test_leaves_beyond_32_bit_indices_do_not_repeat():
  shape = (8, 2**16, 2**14)  # 2^33 elements; rows 0 and 4 share their low words.
  at = lambda i: [jnp.full((1,), i, jnp.uint32), jnp.zeros((1,), jnp.uint32), jnp.arange(64, dtype=jnp.uint32)]
  low, high = zip(*(_random.element_index(shape, at(i)) for i in (0, 4)), strict=True)
  np.testing.assert_array_equal(low[0], low[1])
  word = words(['w'])[0, 0]
  a, b = (_random.random_bits(word, (lo, jnp.broadcast_to(hi, lo.shape))) for lo, hi in zip(low, high, strict=True))
  assert np.mean(np.asarray(a == b)) < 0.05
