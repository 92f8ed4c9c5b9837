"""Every kernel, interpreted on a CPU, gives the loop's bits under every transformation of JAX and on every mesh."""

from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import pytest
from runs import slow
import updates

import lpmm_optax as lpmm

pytestmark = pytest.mark.parametrize('interpreted', ['interpret', 'interpret_tpu'], indirect=True)


@pytest.mark.parametrize(
  ('spec', 'axis_type'),
  [
    *slow(
      (P('x', 'y'), AxisType.Auto),
      (P(('x', 'y'), None), AxisType.Auto),
      (P(), AxisType.Auto),
      (P('x', 'y'), AxisType.Explicit),
      (P(None, ('x', 'y')), AxisType.Auto),
    ),
  ],
  ids=str,
)
def test_every_sharding_gives_the_same_bits_without_communication(interpreted, spec, axis_type):
  updates.check_bits_of_shards(interpreted, lpmm.Format(block_size=16), spec, axis_type)


@pytest.mark.parametrize('is_mapped', slow(True, False))
def test_shard_map_and_vmap_give_the_same_bits(interpreted, is_mapped):
  updates.check_bits_in_shard_map(interpreted, is_mapped)


@pytest.mark.slow
def test_gradients_accumulated_in_the_backward_pass_have_the_same_bits(interpreted):
  updates.check_bits_in_backward_pass(interpreted)


@pytest.mark.slow
def test_what_is_vmapped_under_automatic_sharding_is_the_loop(interpreted):
  updates.check_bits_vmapped(interpreted)
