"""What goes wrong in long runs: killed writes, full disks, a NaN on one replica, absurd rates, counters at the end."""

import functools
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from runs import slow

import lpmm_optax as lpmm
from lpmm_optax import checkpoint

pytestmark = pytest.mark.usefixtures('compile_fast')

DENSE = {'w': jax.random.normal(jax.random.key(0), (64, 128)), 'b': jnp.zeros(128)}
GRADS = jax.tree.map(lambda x: 0.1 * jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape), DENSE)
OPTIMIZERS = {'sgdm': lpmm.sgdm, 'adamw': lpmm.adamw, 'lion': lpmm.lion}


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def dense_leaves(tree):
  return [np.asarray(x) for x in jax.tree.leaves(lpmm.dequantize(tree)) if jnp.issubdtype(x.dtype, jnp.floating)]


# ---------------------------------------------------------------------------------------------------------------------
# Writes that do not end
# ---------------------------------------------------------------------------------------------------------------------

# Saves a state as step 1, and another as step 2, in the middle of which something happens.
WRITER = """
import sys, os, resource, signal
import jax, jax.numpy as jnp, orbax.checkpoint as ocp
import lpmm_optax as lpmm
from lpmm_optax import checkpoint

def state(step):
  params = lpmm.quantize({'w': step + jax.random.normal(jax.random.key(0), (256, 1024))}, lpmm.INT8)
  return params, lpmm.sgdm(0.1).init(params)

if __name__ == '__main__':
  manager = ocp.CheckpointManager(sys.argv[1])
  manager.save(1, args=checkpoint.Save(state(1)))
  manager.wait_until_finished()
"""
KILLED = """
  # All is written then, and not yet in its place.
  checkpoint.Handler.finalize = lambda self, directory: os.kill(os.getpid(), signal.SIGKILL)
  manager.save(2, args=checkpoint.Save(state(2)))
  manager.wait_until_finished()
"""
KILLED_EARLY = """
  # The folder has been made, and nothing written.
  ocp.StandardCheckpointHandler.async_save = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
  manager.save(2, args=checkpoint.Save(state(2)))
"""
FULL = """
  # No file may grow beyond this: a write ends in an OSError, as it does where no space is left.
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
  manager.save(2, args=checkpoint.Save(state(2)))
  manager.wait_until_finished()
"""


def write(folder, ending):
  return subprocess.run(
    [sys.executable, '-c', WRITER + ending, str(folder)], capture_output=True, text=True, timeout=120, check=False
  )


def state_of_writer(step):
  names = {'__name__': 'writer'}
  exec(textwrap.dedent(WRITER), names)
  return names['state'](step)


@pytest.mark.parametrize(
  ('ending', 'returncode'),
  slow((KILLED, -signal.SIGKILL), (KILLED_EARLY, -signal.SIGKILL), (FULL, 1)),
  ids=['killed at the end', 'killed at the beginning', 'file size limit'],
)
def test_a_write_that_does_not_end_leaves_the_checkpoint_before_it(tmp_path, ending, returncode):
  process = write(tmp_path, ending)
  assert process.returncode == returncode, process.stderr
  if returncode == 1:
    assert 'File too large' in process.stderr
  with ocp.CheckpointManager(tmp_path) as manager:
    assert manager.latest_step() == 1
    like = jax.eval_shape(lambda: state_of_writer(1))
    assert_same_bits(manager.restore(1, args=checkpoint.Restore(like)), state_of_writer(1))
    # And the next run saves the step again.
    manager.save(2, args=checkpoint.Save(state_of_writer(2)))
    manager.wait_until_finished()
    assert_same_bits(manager.restore(2, args=checkpoint.Restore(like)), state_of_writer(2))


# ---------------------------------------------------------------------------------------------------------------------
# Replicas
# ---------------------------------------------------------------------------------------------------------------------


def replicas(tree):
  """Per device, its copy of every array."""
  arrays = jax.tree.leaves(tree)
  return [[np.asarray(x.addressable_shards[d].data) for x in arrays] for d in range(8)]


def data_parallel(tx, batches, params=DENSE):
  """A jitted step in which a batch is split over eight devices; parameters and state are replicated."""
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P('data'))

  def loss(weights, x):
    return jnp.mean((x @ weights['w'] + weights['b'][None]) ** 2)

  @functools.partial(jax.jit, out_shardings=(everywhere, everywhere))
  def step(params, state, x):
    grads = jax.grad(loss)(lpmm.dequantize(params), x)
    return lpmm.step(tx, grads, params, state)

  params = jax.device_put(lpmm.quantize(params, lpmm.INT8), everywhere)
  state = jax.device_put(tx.init(params), everywhere)
  states = []
  for x in batches:
    params, state = step(params, state, jax.device_put(x, split))
    states.append(jax.tree.map(np.asarray, (params, state)))
  return states, (params, state)


def batch(i):
  return jax.random.normal(jax.random.fold_in(jax.random.key(5), i), (32, 64))


@pytest.mark.slow
def test_replicas_have_the_same_codes_after_a_hundred_steps():
  tx = lpmm.MultiSteps(lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.sgdm(0.1)), 2)
  _, final = data_parallel(tx, [batch(i) for i in range(100)])
  first, *others = replicas(final)
  assert first
  assert all(len(other) == len(first) for other in others)
  for other in others:
    assert_same_bits(other, first)
  # They have moved, and not apart.
  assert np.mean(first[1] != np.asarray(lpmm.quantize(DENSE, lpmm.INT8)['w'].codes)) > 0.5


def skips(microbatches, **kwargs):
  return lpmm.MultiSteps(lpmm.sgdm(0.01), microbatches, should_skip_update_fn=optax.skip_not_finite, **kwargs)


SKIPPING = {
  'skip_not_finite': functools.partial(skips, 1),
  'skip_not_finite into momentum': functools.partial(skips, 2, accumulator=lpmm.INTO_MOMENTUM),
  'apply_if_finite': lambda: lpmm.apply_if_finite(lpmm.sgdm(0.01), 5),
}


@pytest.mark.parametrize('name', ['skip_not_finite', *slow('skip_not_finite into momentum', 'apply_if_finite')])
def test_a_nan_on_one_replica_is_skipped_by_all(name):
  tx = SKIPPING[name]()
  poisoned = batch(2).at[17].set(jnp.nan)  # On the fifth of eight devices.
  with jax.numpy_dtype_promotion('standard'):
    states, final = data_parallel(tx, [batch(0), batch(1), poisoned, batch(3)])
  inner = lambda state: [x for x in jax.tree.leaves(state) if isinstance(x, np.ndarray) and x.ndim > 1]
  assert_same_bits(inner(states[2]), inner(states[1]))
  assert any(np.any(a != b) for a, b in zip(inner(states[3]), inner(states[2]), strict=True))
  assert all(np.all(np.isfinite(x)) for x in dense_leaves(final))
  first, *others = replicas(final)
  for other in others:
    assert_same_bits(other, first)


# ---------------------------------------------------------------------------------------------------------------------
# Rates and counters
# ---------------------------------------------------------------------------------------------------------------------


def steps(tx, count=3, state=None, params=None):
  params = lpmm.quantize(DENSE, lpmm.INT8) if params is None else params
  state = tx.init(params) if state is None else state
  one = jax.jit(lambda params, state: lpmm.step(tx, GRADS, params, state))
  for _ in range(count):
    params, state = one(params, state)
  return params, state


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_a_learning_rate_of_zero_leaves_the_parameters_bit_for_bit(name):
  params, _ = steps(OPTIMIZERS[name](0.0))
  assert_same_bits(params, lpmm.quantize(DENSE, lpmm.INT8))


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('rate', [1e30, 3e38])
def test_a_huge_learning_rate_gives_huge_values_or_none(name, rate):
  params, _ = steps(OPTIMIZERS[name](rate), 1)
  for before, after in zip(dense_leaves(DENSE), dense_leaves(params), strict=True):
    moved = np.abs(after - before)
    # What float32 would hold, to within the grid; where it overflows, NaN or Inf and no finite value.
    expected = np.abs({'sgdm': 0.1}.get(name, 1.0) * rate)
    finite = np.isfinite(moved)
    assert np.all(moved[finite] <= 1.1 * expected)
    assert np.max(moved[finite], initial=0.0) > 0.3 * expected or not finite.all()


@pytest.mark.parametrize('name', OPTIMIZERS)
@pytest.mark.parametrize('rate', [jnp.nan, jnp.inf])
def test_a_learning_rate_that_is_no_number_is_seen_in_every_parameter(name, rate):
  params, _ = steps(OPTIMIZERS[name](jnp.float32(rate)), 1)
  assert not any(np.any(np.isfinite(x)) for x in dense_leaves(params))


@pytest.mark.parametrize('name', ['adamw', *slow('sgdm', 'lion')])
def test_counters_stop_at_their_end(name):
  last = np.iinfo(np.int32).max
  tx = OPTIMIZERS[name](0.01)
  params, state = steps(tx)
  near_end = lambda path, x: jnp.int32(last - 1) if x.shape == () and x.dtype == jnp.int32 else x
  state = jax.tree_util.tree_map_with_path(near_end, state)
  for _ in range(3):
    before = params
    params, state = steps(tx, 1, state, params)
    assert all(np.all(np.isfinite(x)) for x in dense_leaves((params, state)))
    assert np.any(np.asarray(before['w'].codes) != np.asarray(params['w'].codes))
  assert int(state.step) == last


def test_microbatches_go_on_when_the_counter_of_steps_is_at_its_end():
  last = np.iinfo(np.int32).max
  tx = lpmm.MultiSteps(lpmm.sgdm(0.01), 2)
  params, state = steps(tx, 2)
  state = state._replace(gradient_step=jnp.int32(last))
  params, state = steps(tx, 4, state, params)
  assert (int(state.gradient_step), int(state.mini_step)) == (last, 0)
  assert all(np.all(np.isfinite(x)) for x in dense_leaves((params, state)))


@pytest.mark.parametrize('change', ['lost', 'gained'])
def test_parameters_that_lost_or_gained_a_leaf_are_refused_by_the_step(change):
  tx = lpmm.adamw(0.01)
  dense = {'w': DENSE['w']} if change == 'lost' else DENSE | {'new': jnp.ones(3)}
  params = lpmm.quantize(dense, lpmm.INT8)
  with pytest.raises(ValueError, match=r'\b(b|new)\b'):
    lpmm.step(tx, dense, params, tx.init(lpmm.quantize(DENSE, lpmm.INT8)))
