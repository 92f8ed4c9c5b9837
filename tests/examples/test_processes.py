"""Several processes, by the example that shows how: the bits of one process, and of a run that was killed."""

import os
from pathlib import Path
import signal
import socket
import subprocess
import sys

import data_parallel
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import lpmm_optax as lpmm
from lpmm_optax import checkpoint

pytestmark = pytest.mark.slow

STEPS = 24

# The example, with gradients that are sums of few multiples of 2^-14 and thus the same bits in whatever order devices
# add them up, as floating-point sums in general are not.
WORKER = f"""
import sys, time
sys.path.insert(0, {str(Path(data_parallel.__file__).parent)!r})
import data_parallel
import jax, jax.numpy as jnp
import lpmm_optax as lpmm

make_batch = data_parallel.make_batch

def signs(step, split):
  time.sleep(0.1)  # For whom waits to kill it between two steps.
  return jax.tree.map(jnp.sign, make_batch(step, split))

def mean_loss(params, inputs, targets):
  outputs = [inputs @ weights for weights in lpmm.dequantize(params).values()]
  errors = [jax.lax.stop_gradient(jnp.round(64 * jnp.clip(y - targets, -4, 4)) / 64) for y in outputs]
  return sum(jnp.sum(y * error) for y, error in zip(outputs, errors)) / data_parallel.BATCH_SIZE

data_parallel.make_batch, data_parallel.mean_loss = signs, mean_loss
data_parallel.main(sys.argv[1:])
"""


def free_port():
  with socket.socket() as s:
    s.bind(('localhost', 0))
    return s.getsockname()[1]


def launch(folder, processes, devices):
  """The processes of a run, each with so many devices."""
  coordinator = f'localhost:{free_port()}'
  environment = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}', 'JAX_PLATFORMS': 'cpu'}
  arguments = ('--coordinator', coordinator, '--processes', str(processes), '--steps', str(STEPS))
  return [
    subprocess.Popen(
      [sys.executable, '-c', WORKER, *arguments, '--process', str(i), '--checkpoint-dir', str(folder)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      env=environment,
    )
    for i in range(processes)
  ]


def finish(run):
  """The steps that the first process prints."""
  outputs = [process.communicate(timeout=240) for process in run]
  for process, (_, err) in zip(run, outputs, strict=True):
    assert process.returncode == 0, err
  return [line for line in outputs[0][0].splitlines() if line.startswith('step')]


def final_state(folder):
  def init():
    dense = {name: jax.numpy.zeros((data_parallel.WIDTH,) * 2) for name in ('in', 'out')}
    params = lpmm.quantize(dense, lpmm.INT8)
    return params, lpmm.adamw(3e-3).init(params)

  with ocp.CheckpointManager(folder) as manager:
    assert manager.latest_step() == STEPS
    like = ocp.args.Composite(state=checkpoint.Restore(jax.eval_shape(init)))
    return manager.restore(STEPS, args=like)['state']


def assert_same_bits(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope='module')
def in_one_process(tmp_path_factory):
  """Lines printed and last state of one process with eight devices."""
  folder = tmp_path_factory.mktemp('one')
  return finish(launch(folder, 1, 8)), final_state(folder)


def losses(lines):
  return [float(line.split()[-1]) for line in lines]


def test_two_processes_give_the_bits_of_one(tmp_path, in_one_process):
  lines, state = in_one_process
  assert lines[0].startswith('step 1 ')
  assert len(lines) == STEPS
  in_two = finish(launch(tmp_path, 2, 4))
  # Losses are printed sums of floats.
  np.testing.assert_allclose(losses(in_two), losses(lines), rtol=1e-4)
  assert_same_bits(final_state(tmp_path), state)


def test_a_killed_run_resumes_with_the_same_bits(tmp_path, in_one_process):
  lines, state = in_one_process
  run = launch(tmp_path, 2, 4)
  while not (tmp_path / '10').exists():  # Checkpoints are written in the background.
    assert run[0].stdout.readline(), run[0].stderr.read()
  for process in run:
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
  saved = max(int(folder.name) for folder in tmp_path.iterdir() if folder.name.isdigit())
  resumed = finish(launch(tmp_path, 2, 4))
  assert resumed[0].startswith(f'step {saved + 1} ')
  np.testing.assert_allclose(losses(resumed), losses(lines)[saved:], rtol=1e-4)
  assert_same_bits(final_state(tmp_path), state)
  # In another number of processes too: of a run that has ended, nothing is left to do.
  assert finish(launch(tmp_path, 1, 2)) == []
