"""Data-parallel training in any number of processes, with parameters and optimizer state sharded over all devices.

  python examples/data_parallel.py
  for i in 0 1; do python examples/data_parallel.py --processes 2 --process $i & done; wait

The second command starts two processes on one machine; on several, `--coordinator` is the address of the first, and
every process gets the same one. Each reads its own part of every batch. The gradient is reduced over all devices, in
float32, by `jax.jit` itself; then each device updates its part of parameters and state, and no device sees another's.
With `--checkpoint-dir`, on storage that all share, a run resumes by itself, in as many processes as there are then.
"""

import argparse
import functools
from pathlib import Path

from checkpoints import open_checkpoints
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import lpmm_optax as lpmm

WIDTH = 512
BATCH_SIZE = 64
CHECKPOINT_EVERY = 10


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--coordinator', default='localhost:8476', metavar='HOST:PORT', help='(default %(default)s)')
  add('--processes', type=int, default=1, help='(default %(default)s)')
  add('--process', type=int, default=0, help='which of them this is, from 0')
  add('--steps', type=int, default=40, help='(default %(default)s)')
  add('--checkpoint-dir', type=Path, metavar='DIR', help=f'save every {CHECKPOINT_EVERY} steps, and resume from there')
  return parser.parse_args(argv)


def make_batch(step: int, split: NamedSharding) -> tuple[jax.Array, jax.Array]:
  """Inputs and targets, float32[batch, width], of which each process makes what its devices need."""

  def rows(seed, index):
    start, stop, _ = index[0].indices(BATCH_SIZE)
    return np.stack(
      [np.random.default_rng((seed, step, i)).standard_normal(WIDTH, np.float32) for i in range(start, stop)]
    )

  inputs = jax.make_array_from_callback((BATCH_SIZE, WIDTH), split, functools.partial(rows, 0))
  noise = jax.make_array_from_callback((BATCH_SIZE, WIDTH), split, functools.partial(rows, 1))
  return inputs, jnp.sin(jnp.roll(inputs, 1, axis=1)) + 0.1 * noise


def mean_loss(params, inputs, targets):
  weights = lpmm.dequantize(params)
  return jnp.mean((jnp.tanh(inputs @ weights['in']) @ weights['out'] - targets) ** 2)


def main(argv: list[str] | None = None) -> None:
  args = parse_args(argv)
  if args.processes > 1:
    # Before anything else asks for devices.
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
  mesh = jax.make_mesh((jax.device_count(),), ('data',))
  split = NamedSharding(mesh, P('data'))
  tx = lpmm.adamw(3e-3)

  def init():
    weights = jax.random.normal(jax.random.key(0), (2, WIDTH, WIDTH)) / WIDTH**0.5
    dense = {'in': weights[0], 'out': weights[1]}
    params = lpmm.quantize(dense, lpmm.INT8)
    return params, tx.init(params)

  # Rows of weights and of all that belongs to them, over all devices; on which no array is ever whole.
  state = jax.eval_shape(init)
  where = lpmm.shardings(state, state[0], P('data', None), mesh)
  params, opt_state = jax.jit(init, out_shardings=where)()

  @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(*where, None))
  def train_step(params, opt_state, inputs, targets):
    loss, grads = jax.value_and_grad(lambda w: mean_loss(w, inputs, targets))(lpmm.dequantize(params))
    params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, loss

  with open_checkpoints(args.checkpoint_dir, {}) as checkpoints:
    start = 0
    if checkpoints is not None and (restored := checkpoints.restore((params, opt_state))) is not None:
      start, (params, opt_state), _ = restored
    for step in range(start, args.steps):
      params, opt_state, loss = train_step(params, opt_state, *make_batch(step, split))
      if args.process == 0:
        print(f'step {step + 1}  loss {loss:.6f}', flush=True)
      if checkpoints is not None and ((step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == args.steps):
        checkpoints.save(step + 1, (params, opt_state), {})


if __name__ == '__main__':
  main()
