"""Time of one step outside of `jax.jit`, and under it, against the same optimizer of Optax outside of it.

  python benchmarks/eager.py --output benchmarks/results/eager_cpu.json

All take turns in one process, one step each per round; the figure is the median over rounds of the ratio within a
round. The model is four layers of 64 x 128 with biases, so next to nothing but the work of Python is timed.
"""

import argparse
import json
from pathlib import Path
import statistics
import time
import warnings

import jax
import jax.numpy as jnp
import optax

import lpmm_optax as lpmm

ROUNDS = 30
DENSE = {
  f'layer_{i}': {'kernel': jax.random.normal(jax.random.key(i), (64, 128)), 'bias': jnp.zeros(128)} for i in range(4)
}
GRADS = jax.tree.map(jnp.ones_like, DENSE)
PAIRS = {
  'adamw': (optax.adamw(1e-3), lpmm.adamw(1e-3)),
  'sgdm': (optax.sgd(0.1, 0.9), lpmm.sgdm(0.1)),
}


def seconds(step, *args):
  start = time.perf_counter()
  jax.block_until_ready(jax.tree.leaves(step(*args)))
  return time.perf_counter() - start


def measure(theirs, ours):
  quantized = lpmm.quantize(DENSE, lpmm.INT8)
  eager = lambda tx: lambda params, state: lpmm.step(tx, GRADS, params, state)
  runs = {
    'optax': (eager(theirs), DENSE, theirs.init(DENSE)),
    'eager': (eager(ours), quantized, ours.init(quantized)),
    'jitted': (jax.jit(eager(ours)), quantized, ours.init(quantized)),
  }
  rounds = [{name: seconds(*run) for name, run in runs.items()} for _ in range(ROUNDS + 3)][3:]
  ratios = {name: statistics.median(r[name] / r['optax'] for r in rounds) for name in ('eager', 'jitted')}
  return {'optax_ms': 1e3 * statistics.median(r['optax'] for r in rounds), 'ratios': ratios}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--output', type=Path)
  args = parser.parse_args()
  warnings.simplefilter('ignore', lpmm.EagerStepWarning)
  about = {'device': jax.default_backend(), 'jax': jax.__version__, 'optax': optax.__version__}
  results = {'about': about} | {name: measure(*pair) for name, pair in PAIRS.items()}
  text = json.dumps(results, indent=1)
  print(text)
  if args.output:
    args.output.write_text(text + '\n')


if __name__ == '__main__':
  main()
