"""Time of one optimizer step against the same optimizer of Optax in float32, and against flashoptim-jax.

  pip install -e '.[benchmarks]'
  python benchmarks/step_time.py --output benchmarks/results/step_time_cpu.json

All optimizers run in one process and take turns, one step each per round, so that a slow moment of the machine meets
them all; the figure is the median over rounds of the ratio to float32 within a round. The gradient is given, in
float32, so nothing but the optimizer is timed. On a GPU, steps are enqueued in batches, and a copy of the same memory
gives the bandwidth to compare with.
"""

import argparse
from collections.abc import Callable
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import statistics
import time
from typing import Any
from typing import NamedTuple

import flashoptim_jax as flashoptim
import jax
import jax.numpy as jnp
import optax

import lpmm_optax as lpmm


class Method(NamedTuple):
  """An optimizer, how it stores parameters, and what it is compared with.

  Attributes:
    tx: has `init(params)`.
    step: `(params, opt_state, grads) -> (params, opt_state)`.
    store: float32 parameters to what is trained.
    baseline: name of a method.
  """

  tx: Any
  step: Callable[[Any, Any, Any], tuple[Any, Any]]
  store: Callable[[Any], Any]
  baseline: str


def ours(tx: optax.GradientTransformation, params: lpmm.Format, baseline: str) -> Method:
  step = lambda params, opt_state, grads: lpmm.step(tx, grads, params, opt_state)
  return Method(tx, step, lambda dense: lpmm.quantize(dense, params), baseline)


def stock(tx: optax.GradientTransformation, name: str) -> Method:
  step = lambda params, opt_state, grads: lpmm.step(tx, grads, params, opt_state)
  return Method(tx, step, lambda dense: dense, name)


def flash(tx: flashoptim.FlashOptimizer, baseline: str) -> Method:
  """bfloat16 parameters with an 8-bit correction, and 8-bit state: its defaults."""
  return Method(tx, tx.step, lambda dense: jax.tree.map(lambda x: x.astype(jnp.bfloat16), dense), baseline)


def learning_rate(count: jax.Array) -> jax.Array:
  """A schedule, as in practice: a learning rate that the compiler does not know."""
  return 0.1 / (1 + count.astype(jnp.float32) / 1000)


SGD, ADAMW, LION = 'optax.sgd fp32', 'optax.adamw fp32', 'optax.lion fp32'
# Its fused kernels are Triton's.
FUSED = jax.default_backend() == 'gpu'
METHODS = {
  SGD: stock(optax.sgd(learning_rate, 0.9), SGD),
  'lpmm.sgdm 8/8': ours(lpmm.sgdm(learning_rate), lpmm.INT8, SGD),
  'lpmm.sgdm 8/8 paper': ours(lpmm.sgdm(learning_rate, error_feedback=False), lpmm.INT8, SGD),
  'lpmm.sgdm bf16/8': ours(lpmm.sgdm(learning_rate), lpmm.BFLOAT16, SGD),
  'flash_sgdw': flash(flashoptim.flash_sgdw(learning_rate, momentum=0.9, fused=FUSED), SGD),
  ADAMW: stock(optax.adamw(learning_rate), ADAMW),
  'lpmm.adamw 8/8/8': ours(lpmm.adamw(learning_rate), lpmm.INT8, ADAMW),
  'lpmm.adamw 8/8/8 plain': ours(lpmm.adamw(learning_rate, error_feedback=False), lpmm.INT8, ADAMW),
  'flash_adamw': flash(flashoptim.flash_adamw(learning_rate, fused=FUSED), ADAMW),
  LION: stock(optax.lion(learning_rate), LION),
  'lpmm.lion 8/8': ours(lpmm.lion(learning_rate), lpmm.INT8, LION),
  'flash_lion': flash(flashoptim.flash_lion(learning_rate, fused=FUSED), LION),
}


def compiled_bytes(memory: Any) -> dict[str, int]:
  """What the compiled step holds at once, and how much of that is temporary."""
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  return {'temporary_bytes': memory.temp_size_in_bytes, 'peak_bytes': held + memory.temp_size_in_bytes}


def make_runner(method: Method, shapes: list[tuple[int, ...]], repeats: int) -> tuple[Callable[[], float], dict]:
  """A function that runs `repeats` steps and returns seconds per step; with it, the compiled step's bytes."""
  keys = jax.random.split(jax.random.key(0), 2 * len(shapes))
  params = method.store([jax.random.normal(key, shape) for key, shape in zip(keys[::2], shapes, strict=True)])
  grads = [1e-2 * jax.random.normal(key, shape) for key, shape in zip(keys[1::2], shapes, strict=True)]
  state = [params, method.tx.init(params)]
  del params
  compiled = jax.jit(method.step, donate_argnums=(0, 1)).lower(*state, grads).compile()

  def run() -> float:
    start = time.perf_counter()
    for _ in range(repeats):
      state[:] = compiled(*state, grads)
    jax.block_until_ready(state)
    return (time.perf_counter() - start) / repeats

  run()
  return run, compiled_bytes(compiled.memory_analysis())


def copy_bandwidth(elements: int, repeats: int) -> float:
  """Bytes per second, read and written, of a copy of float32 on the device."""
  x = jnp.zeros(elements)
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  times = []
  for _ in range(7):
    x = jax.block_until_ready(copy(x))
    start = time.perf_counter()
    for _ in range(repeats):
      x = copy(x)
    jax.block_until_ready(x)
    times.append((time.perf_counter() - start) / repeats)
  return 8 * elements / min(times)


def state_bytes(method: Method, elements: int) -> int:
  """Bytes of parameters and optimizer state."""
  params = jax.eval_shape(method.store, jax.ShapeDtypeStruct((elements // 1024, 1024), jnp.float32))
  return lpmm.memory_report(params, jax.eval_shape(method.tx.init, params)).bytes


def bench(millions: int, leaves: int, rounds: int) -> list[dict[str, Any]]:
  """One row per method for a model of so many million parameters in equal square-ish leaves."""
  per_leaf = millions * 2**20 // leaves
  rows = 2 ** (int(math.log2(per_leaf)) // 2)
  shapes = [(rows, per_leaf // rows)] * leaves
  on_gpu = jax.default_backend() != 'cpu'
  repeats = 50 if on_gpu else 1
  made = {name: make_runner(method, shapes, repeats) for name, method in METHODS.items()}
  times: dict[str, list[float]] = {name: [] for name in METHODS}
  for _ in range(rounds):
    for name, (run, _) in made.items():
      times[name].append(run())
  bandwidth = copy_bandwidth(per_leaf * leaves, repeats) if on_gpu else None
  out = []
  for name, method in METHODS.items():
    ratios = sorted(ours / base for ours, base in zip(times[name], times[method.baseline], strict=True))
    quartile = len(ratios) // 4
    median = statistics.median(times[name])
    row = {
      'parameters': per_leaf * leaves,
      'leaves': leaves,
      'method': name,
      'baseline': method.baseline,
      'bytes_per_param': state_bytes(method, per_leaf * leaves) / (per_leaf * leaves),
      'median_ms': 1e3 * median,
      'ratio': statistics.median(ratios),
      'ratio_quartiles': [ratios[quartile], ratios[-1 - quartile]],
      **made[name][1],
    }
    if bandwidth is not None:
      # The gradient is read, the state is read and written.
      moved = (4 * per_leaf * leaves + 2 * state_bytes(method, per_leaf * leaves)) / median
      row |= {'gb_per_s': moved / 1e9, 'share_of_copy_bandwidth': moved / bandwidth}
    out.append(row)
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--millions', type=int, nargs='+', default=[16, 64], help='parameters, times 2^20')
  parser.add_argument('--leaves', type=int, nargs='+', default=[1, 8])
  parser.add_argument('--rounds', type=int, default=41)
  parser.add_argument('--output', type=Path, metavar='FILE', help='also write the rows there, as JSON')
  args = parser.parse_args()
  results = []
  head = f'{"parameters":>12}{"leaves":>8}  {"method":<24}{"B/param":>8}{"ms":>9}{"ratio":>7}  {"quartiles":<14}'
  print(f'{head}{"temporaries":>12}')
  for millions in args.millions:
    for leaves in args.leaves:
      for row in bench(millions, leaves, args.rounds):
        low, high = row['ratio_quartiles']
        extra = f'  {row["gb_per_s"]:.0f} GB/s' if 'gb_per_s' in row else ''
        print(
          f'{row["parameters"]:>12}{row["leaves"]:>8}  {row["method"]:<24}{row["bytes_per_param"]:>8.2f}'
          f'{row["median_ms"]:>9.2f}{row["ratio"]:>7.2f}'
          f'  {f"{low:.2f} to {high:.2f}":<14}{row["temporary_bytes"] / 2**20:>8.1f} MiB{extra}',
          flush=True,
        )
        results.append(row)
  if args.output is not None:
    listed = lambda values: ' '.join(map(str, values))
    device = jax.devices()[0]
    about = {
      'command': f'python benchmarks/step_time.py --millions {listed(args.millions)} --leaves {listed(args.leaves)} '
      f'--rounds {args.rounds}',
      'device': device.device_kind,
      'cores': os.cpu_count(),
      'machine': platform.machine(),
      'python': platform.python_version(),
      'jax': jax.__version__,
      'optax': optax.__version__,
      'flashoptim_jax': importlib.metadata.version('flashoptim-jax'),
      'lpmm_optax': lpmm.__version__,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({'about': about, 'results': results}, indent=1) + '\n')


if __name__ == '__main__':
  main()
