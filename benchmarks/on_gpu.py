"""What needs a real GPU: whether the kernel gives the loop's bits, and how long a step takes.

  python benchmarks/on_gpu.py --results results.jsonl --seconds 240
  python benchmarks/on_gpu.py --results rehearsal.jsonl --small   # on a CPU, the kernel interpreted

Stages run in order of value. Each result is appended as a line of JSON as soon as it is there, an error instead of a
result is one too, and what no longer fits into the time is named. Programs are traced one by one, compiled by threads,
and all of a stage are compiled before one of them is timed. Exit status: 0 if all ran, 4 if it hung past its time.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import concurrent.futures
import contextlib
import functools
import json
import math
import os
from pathlib import Path
import statistics
import threading
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lpmm_optax as lpmm
from lpmm_optax.kernel import _triton

Shapes = dict[str, tuple[int, ...]]

OURS: dict[str, Callable[[], Any]] = {
  'sgdm': lambda: lpmm.sgdm(0.1),
  'sgdm without feedback': lambda: lpmm.sgdm(0.1, error_feedback=False),
  'adamw': lambda: lpmm.adamw(1e-3),
  'lion': lambda: lpmm.lion(1e-4),
  'rmsprop': lambda: lpmm.low_precision(optax.rmsprop(1e-3, momentum=0.9)),
  'accumulation': lambda: lpmm.MultiSteps(lpmm.adamw(1e-3), 2, accumulator=lpmm.INT8),
}
STOCK = {
  'optax.sgd': lambda: optax.sgd(0.1, momentum=0.9),
  'optax.adamw': lambda: optax.adamw(1e-3),
  'optax.lion': lambda: optax.lion(1e-4),
}
MAIN = (128, 512)
MAIN_CASES = [(name, lpmm.INT8, MAIN, 'step') for name in OURS]
OTHER_CASES = [
  ('sgdm', lpmm.INT8, (256, 1024), 'update'),
  ('sgdm', lpmm.INT16, (3, 3, 64, 64), 'step'),
  ('sgdm', lpmm.BFLOAT16, (131072,), 'step'),
  ('sgdm', lpmm.INT8, (509, 64), 'step'),
  ('adamw', lpmm.INT16, (509, 64), 'update'),
  ('adamw', lpmm.BFLOAT16, (64, 128), 'step'),
  ('adamw', lpmm.INT8, (3, 3, 64, 64), 'step'),
  ('lion', lpmm.INT16, (64, 128), 'step'),
  ('sgdm', lpmm.INT8, MAIN, 'shard_map'),
  ('adamw', lpmm.INT8, (4, 64, 128), 'vmap'),
]
# In the first rows of a gradient.
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1e30, 3e38, 1e-30)


class Run:
  """The results file, the time, and the threads that compile."""

  def __init__(self, results: Path, seconds: float, small: bool):
    self.start, self.seconds, self.small = time.perf_counter(), seconds, small
    self.file = results.open('a')
    self.pool = concurrent.futures.ThreadPoolExecutor(2 if small else 8)
    self.device = jax.devices()[0]
    self.cpu = jax.devices('cpu')[0]
    watchdog = threading.Timer(seconds + 15, self.bark)
    watchdog.daemon = True
    watchdog.start()

  def bark(self) -> None:
    """Ends a process that hangs."""
    self.say(test='watchdog', error='hung past the time')
    os._exit(4)

  def left(self) -> float:
    """Seconds."""
    return self.seconds - (time.perf_counter() - self.start)

  def say(self, **fields: Any) -> None:
    """Appends a result."""
    line = json.dumps(fields | {'at': round(time.perf_counter() - self.start, 1)}, default=str)
    print(line[:600], flush=True)
    self.file.write(line + '\n')
    self.file.flush()

  @contextlib.contextmanager
  def reporting(self, **fields: Any) -> Iterator[None]:
    """Says an error rather than raise it."""
    try:
      yield
    except Exception as error:
      self.say(**fields, error=f'{type(error).__name__}: {str(error)[:1000]}')

  def has_time(self, needed: float = 5, **fields: Any) -> bool:
    """Whether so many seconds are left; if not, says what is skipped."""
    if self.left() < needed:
      self.say(**fields, skipped='no time left')
    return self.left() >= needed

  def compile(self, fn: Callable, args: Any, device: Any, driver: str, donate: tuple[int, ...] = ()) -> Any:
    """A future of (the compiled program, seconds), from arrays or their shapes; driver is 'kernel' or 'loop'."""
    os.environ['LPMM_KERNEL'] = {'loop': '0', 'kernel': 'interpret' if self.small else '1'}[driver]
    sharding = jax.sharding.SingleDeviceSharding(device)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    # A function of its own, for what JAX has traced of another says nothing of this driver.
    lowered = jax.jit(lambda *args: fn(*args), donate_argnums=donate).lower(*abstract)

    def compile_and_time():
      start = time.perf_counter()
      return lowered.compile(), round(time.perf_counter() - start, 2)

    return self.pool.submit(compile_and_time)

  def wait(self, future: Any) -> Any:
    """What `compile` promised."""
    return future.result(timeout=max(1.0, self.left()))


def environment(run: Run) -> None:
  run.say(
    test='environment',
    device=run.device.device_kind,
    platform=str(run.device.client.platform_version)[:80],
    jax=jax.__version__,
    optax=optax.__version__,
    kernel='interpreted' if run.small else f'{_triton.ELEMENTS} elements, {_triton.WARPS} warps',
  )
  n = 2**22 if run.small else 2**28
  copy = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jax.block_until_ready(copy(jnp.zeros(n)))
  times = []
  for _ in range(7):
    start = time.perf_counter()
    for _ in range(10):
      x = copy(x)
    jax.block_until_ready(x)
    times.append((time.perf_counter() - start) / 10)
  run.say(test='bandwidth', gb_per_s=round(8e-9 * n / min(times), 1), what='x + 1 in place, float32, read and written')


def gradients(shape: tuple[int, ...]) -> list[np.ndarray]:
  """Two of normal numbers, one with special values, and another of normal numbers after that."""
  rng = np.random.default_rng(0)
  out = [(0.1 * rng.standard_normal(shape)).astype(np.float32) for _ in range(4)]
  rows = out[2].reshape(-1, shape[-1]) if len(shape) > 1 else out[2].reshape(-1, 512)
  for row, value in enumerate(SPECIAL):
    if not np.isfinite(value):
      rows[row, 3] = value
    elif abs(value) > 1:
      rows[row, ::2] = value
    else:
      rows[row] = value
  return out


def step_of(tx: Any, route: str) -> Callable:
  """(gradients, params, state) -> (params, state)."""
  if route == 'update':

    def step(grads, params, state):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    return step
  step = functools.partial(lpmm.step, tx)
  if route == 'vmap':
    return jax.vmap(step)
  if route == 'shard_map':
    # On a mesh of the one device that the arguments are on. The kernel's interpreter does not know types that vary.
    spec, mesh = jax.sharding.PartitionSpec(), jax.sharding.AbstractMesh((1,), ('x',))
    check_vma = jax.default_backend() == 'gpu'
    return jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=check_vma)
  return step


def bits(run: Run, cases: list[Any]) -> None:
  """Kernel and loop on the device against the loop on the CPU, after each of four steps."""
  todo = []
  for name, format, shape, route in cases:
    case = {'test': 'bits', 'optimizer': name, 'format': str(format), 'shape': shape, 'route': route}
    with run.reporting(**case):
      if not run.has_time(**case):
        continue
      with jax.default_device(run.cpu):
        w = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
        params = lpmm.quantize({'w': jnp.asarray(w)}, format)
        init = OURS[name]().init
        state = (jax.vmap(init) if route == 'vmap' else init)(params)
      args = {'w': w}, params, state
      step = step_of(OURS[name](), route)
      devices = {'cpu': (run.cpu, 'loop'), 'loop': (run.device, 'loop'), 'kernel': (run.device, 'kernel')}
      todo.append((case, params, state, {k: (d, run.compile(step, args, d, how)) for k, (d, how) in devices.items()}))
  for case, params, state, programs in todo:
    with run.reporting(**case):
      if not run.has_time(2, **case):
        continue
      outputs, seconds = {}, {}
      for which, (device, future) in programs.items():
        program, seconds[which] = run.wait(future)
        p, s = jax.device_put((params, state), device)
        steps = outputs[which] = []
        for g in gradients(case['shape']):
          p, s = program({'w': jax.device_put(g, device)}, p, s)
          steps.append(jax.tree.map(np.asarray, (p, s)))
      run.say(
        **case,
        kernel_against_loop=differences(outputs['kernel'], outputs['loop']),
        kernel_against_cpu=differences(outputs['kernel'], outputs['cpu']),
        loop_against_cpu=differences(outputs['loop'], outputs['cpu']),
        compile_seconds=seconds,
      )


def differences(a: list[Any], b: list[Any]) -> dict[str, list[Any]]:
  """By path, for each step how many numbers differ in bits, and the first rows in which they do; only where some do."""
  out: dict[str, list[Any]] = {}
  for i, (one, other) in enumerate(zip(a, b, strict=True)):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
      differ = x.view(f'u{x.dtype.itemsize}') != y.view(f'u{y.dtype.itemsize}')
      if differ.any():
        rows = np.unique(np.argwhere(np.atleast_1d(differ))[:, 0])[:8].tolist()
        out.setdefault(jax.tree_util.keystr(path), [0] * len(a))[i] = [int(differ.sum()), rows]
  return out


class Entry(NamedTuple):
  """What is timed: an optimizer's name, who updates its leaves ('optax', 'kernel', 'loop'), and what else to say."""

  optimizer: str
  by: str
  also: dict[str, Any]


def times(run: Run, size: str, shapes: Shapes, entries: list[Entry]) -> None:
  """Seconds per step, the best and the median of five rounds."""
  n = sum(map(math.prod, shapes.values()))
  dense = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  quantize = functools.partial(lpmm.quantize, format=lpmm.INT8)
  todo = []
  for entry in entries:
    case = dict(test='time', size=size, optimizer=entry.optimizer, by=entry.by, **entry.also)
    with run.reporting(**case):
      if not run.has_time(15, **case):
        continue
      if 'elements' in entry.also:
        _triton.ELEMENTS, _triton.WARPS = entry.also['elements'], entry.also['warps']
        jax.clear_caches()
      is_stock = entry.by == 'optax'
      tx = (STOCK if is_stock else OURS)[entry.optimizer]()
      store = (lambda x: x) if is_stock else quantize
      params = jax.eval_shape(store, dense)
      args = dense, params, jax.eval_shape(tx.init, params)
      step = step_of(tx, 'update' if is_stock else 'step')
      todo.append((case, tx, store, run.compile(step, args, run.device, 'loop' if is_stock else entry.by, (1, 2))))
  if not todo:
    return

  @jax.jit
  def normal(scale):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {name: scale * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}

  grads, weights = normal(0.1), normal(1.0)
  for case, tx, store, future in todo:
    with run.reporting(**case):
      if not run.has_time(4, **case):
        continue
      program, seconds = run.wait(future)
      params = jax.tree.map(jnp.copy, store(weights))
      carry = params, tx.init(params)
      del params
      rounds, repeats = [], 3
      for i in range(6):
        start = time.perf_counter()
        for _ in range(repeats):
          carry = program(grads, *carry)
        jax.block_until_ready(carry)
        if i:
          rounds.append((time.perf_counter() - start) / repeats)
        else:  # The first round warms up and says how many steps fit.
          repeats = 2 if run.small else max(3, min(50, int(0.4 * repeats / (time.perf_counter() - start))))
      run.say(
        **case,
        best_ms=round(1e3 * min(rounds), 4),
        median_ms=round(1e3 * statistics.median(rounds), 4),
        best_ps_per_parameter=round(1e12 * min(rounds) / n, 3),
        repeats=repeats,
        temporary_bytes_per_parameter=round(program.memory_analysis().temp_size_in_bytes / n, 4),
        compile_seconds=seconds,
      )
      del carry, program


def gpt2(layers: int, width: int, vocabulary: int) -> Shapes:
  """The leaves of a GPT-2, one array per weight and layer."""
  out: Shapes = {'wte': (vocabulary, width), 'wpe': (1024, width), 'norm': (width,)}
  for i in range(layers):
    for name, (rows, columns) in {'qkv': (1, 3), 'proj': (1, 1), 'up': (1, 4), 'down': (4, 1)}.items():
      out[f'{i}/{name}'], out[f'{i}/{name}/bias'] = (rows * width, columns * width), (columns * width,)
    out[f'{i}/norm1'] = out[f'{i}/norm2'] = (width,)
  return out


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--results', type=Path, required=True, help='file that lines of JSON are appended to')
  parser.add_argument('--seconds', type=float, default=240, help='time after which nothing more is begun')
  parser.add_argument('--small', action='store_true', help='rehearse on a CPU')
  args = parser.parse_args()
  jax.config.update('jax_platforms', 'cpu' if args.small else 'cuda,cpu')
  run = Run(args.results, args.seconds, args.small)

  ours = [Entry(name, 'kernel', {}) for name in ('sgdm', 'adamw', 'lion', 'sgdm without feedback')]
  stock = [Entry(name, 'optax', {}) for name in STOCK]
  loops = [Entry(name, 'loop', {}) for name in ('sgdm', 'adamw')]
  tiles = [(1024, 1), (1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 4), (4096, 8)]
  sweep = [
    Entry(name, 'kernel', {'elements': elements, 'warps': warps})
    for elements, warps in tiles
    for name in ('sgdm', 'adamw')
  ]
  if run.small:
    sizes = {'2 x 128 x 256': {'w0': (128, 256), 'w1': (128, 256)}}
    stages = [
      ('environment', environment),
      ('bits', lambda run: bits(run, [MAIN_CASES[0], *OTHER_CASES[-2:]])),
      *(
        (f'times {size}', functools.partial(times, size=size, shapes=s, entries=[stock[0], ours[0], loops[0]]))
        for size, s in sizes.items()
      ),
      ('sweep', functools.partial(times, size='64 x 128', shapes={'w': (64, 128)}, entries=sweep[:1])),
    ]
  else:
    eight = {f'w{i}': (2048, 2048) for i in range(8)}
    stacked = {'w': (16, 2048, 8192)}
    stages = [
      ('environment', environment),
      ('bits', lambda run: bits(run, MAIN_CASES)),
      ('times', functools.partial(times, size='8 x 2048 x 2048', shapes=eight, entries=stock + ours + loops)),
      (
        'times stacked',
        functools.partial(times, size='16 x 2048 x 8192', shapes=stacked, entries=stock + ours + loops),
      ),
      ('other bits', lambda run: bits(run, OTHER_CASES)),
      (
        'times of GPT-2',
        functools.partial(times, size='GPT-2 small', shapes=gpt2(12, 768, 50257), entries=stock + ours),
      ),
      ('sweep', functools.partial(times, size='16384 x 8192', shapes={'w': (16384, 8192)}, entries=sweep)),
    ]
  for name, stage in stages:
    start = time.perf_counter()
    with run.reporting(test='stage', stage=name):
      if run.has_time(test='stage', stage=name):
        stage(run)
    run.say(test='stage', stage=name, seconds=round(time.perf_counter() - start, 1))
  run.say(test='end')
  os._exit(0)  # What still compiles is dropped.


if __name__ == '__main__':
  main()
