"""What needs a real GPU: whether the kernel gives the loop's bits, how long a step takes, and how much memory.

  pip install -e '.[examples,benchmarks]' and jax with CUDA
  python benchmarks/on_gpu.py --results results.jsonl --stories stories15M --text FILE --cifar10 DIR
  python benchmarks/on_gpu.py --results rehearsal.jsonl --small   # on a CPU, the kernel interpreted
  python benchmarks/on_gpu.py --results benchmarks/results/gpu_h100.jsonl --report docs/performance.md

Parts run in order of value, each in a process of its own, for a device tells the peak of its memory once a process: a
part that fails costs no other. Each result is appended as a line of JSON as soon as it is there, an error instead of a
result is one too, and what no longer fits into the time is named. Programs are traced one by one, compiled by threads,
and all of a stage are compiled before one of them is timed. Exit status: 0 if all parts ran to their ends, else 1.

One part runs scripts side by side, which share the device: `examples/finetune_llm.py` on a model of 8B random
parameters, and `benchmarks/accuracy.py`, which appends what it finds to a file of its own beside the results.
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
import subprocess
import sys
import threading
import time
from typing import Any
from typing import NamedTuple

from accelerators import METHODS
import jax
import jax.numpy as jnp
import numpy as np
import optax
from records import read
from records import with_lines

import lpmm_optax as lpmm
from lpmm_optax.kernel import _triton

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

BEGIN, END = '<!-- Begin: made by benchmarks/on_gpu.py -->', '<!-- End: made by benchmarks/on_gpu.py -->'
Shapes = dict[str, tuple[int, ...]]

OURS: dict[str, Callable[[], Any]] = {
  'sgdm': lambda: lpmm.sgdm(0.1),
  'sgdm without feedback': lambda: lpmm.sgdm(0.1, error_feedback=False),
  'adamw': lambda: lpmm.adamw(1e-3),
  'lion': lambda: lpmm.lion(1e-4),
  'adamw of 4 bits': lambda: lpmm.adamw(1e-3, formats=lpmm.Format(bits=4, block_size=32)),
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
  ('sgdm', lpmm.INT4, (256, 96), 'step'),
  ('adamw of 4 bits', lpmm.INT8, (509, 64), 'update'),
  ('adamw', lpmm.INT8, (4, 64, 128), 'vmap'),
]
# Methods of benchmarks/accuracy.py, by the scripts that run side by side.
STORIES = {
  'AdamW': ['adamw-fp32', 'adamw-8'],
  '4 bits': ['adamw-8/4', 'adamw-8/8/4'],
  'without feedback': ['adamw-8-nearest', 'adamw-8-plain'],
  'bfloat16': ['adamw-bf16-nearest', 'adamw-bf16'],
  'Lion': ['lion-fp32', 'lion-8'],
  'flashoptim-jax': ['adamw-flash'],
}
# Under vmap, a convolution with weights of each seed takes half as long again as one seed after the other.
CIFAR10 = ['sgdm-fp32', 'sgdm-fp32-velocity', 'sgdm-8-paper', 'sgdm-8']
SCRIPTS = 'scripts'
# In the first rows of a gradient.
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 1e30, 3e38, 1e-30)


class Run:
  """The results file, the time, and the threads that compile."""

  def __init__(self, args: argparse.Namespace):
    self.start, self.seconds, self.small, self.args = time.perf_counter(), args.seconds, args.small, args
    self.file = args.results.open('a')
    self.pool = concurrent.futures.ThreadPoolExecutor(2 if self.small else 8)
    self.device = jax.devices()[0]
    self.cpu = jax.devices('cpu')[0]
    watchdog = threading.Timer(args.seconds + 15, self.bark)
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
    os.environ['LPMM_KERNEL'] = {'loop': '0', 'kernel': 'interpret' if self.small else 'cuda'}[driver]
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
  """What is timed: an optimizer's name, by whom ('optax', 'flash', 'kernel', 'loop'), and what else to say."""

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
      driver = entry.by if entry.by in ('kernel', 'loop') else 'loop'
      if entry.by == 'flash':
        tx, store, step = flash(entry.optimizer, fused=not run.small)
      else:
        tx = (STOCK if entry.by == 'optax' else OURS)[entry.optimizer]()
        store = (lambda x: x) if entry.by == 'optax' else quantize
        step = step_of(tx, 'update' if entry.by == 'optax' else 'step')
      params = jax.eval_shape(store, dense)
      args = dense, params, jax.eval_shape(tx.init, params)
      todo.append((case, tx, store, run.compile(step, args, run.device, driver, (1, 2))))
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


def flash(optimizer: str, fused: bool) -> tuple[Any, Callable, Callable]:
  """Of flashoptim-jax: the optimizer, how it stores parameters, and (gradients, params, state) -> (params, state)."""
  import accelerator_steps

  tx = accelerator_steps.flash(optimizer, fused)
  store = lambda params: jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
  return tx, store, lambda grads, params, state: tx.step(params, state, grads)


def gpt2(layers: int, width: int, vocabulary: int) -> Shapes:
  """The leaves of a GPT-2, one array per weight and layer."""
  out: Shapes = {'wte': (vocabulary, width), 'wpe': (1024, width), 'norm': (width,)}
  for i in range(layers):
    for name, (rows, columns) in {'qkv': (1, 3), 'proj': (1, 1), 'up': (1, 4), 'down': (4, 1)}.items():
      out[f'{i}/{name}'], out[f'{i}/{name}/bias'] = (rows * width, columns * width), (columns * width,)
    out[f'{i}/norm1'] = out[f'{i}/norm2'] = (width,)
  return out


def random_params(shapes: Any) -> Any:
  """Parameters of the given shapes, QuantizedArrays and dense arrays, at random; none exists in float32 on the way."""

  @functools.partial(jax.jit, static_argnums=(1, 2))
  def draw(key, shape, dtype):
    def codes(key, shape):
      return jnp.maximum(jax.random.bits(key, shape, jnp.uint8).astype(jnp.int8), -127).astype(dtype)

    if len(shape) < 3:
      return codes(key, shape)
    return jax.lax.map(lambda key: codes(key, shape[1:]), jax.random.split(key, shape[0]))

  @functools.partial(jax.jit, donate_argnums=0)
  def scaled(codes):
    return codes / jnp.asarray(deviation(codes), codes.dtype)

  # Of codes that are uniform, for what keeps the size of activations.
  deviation = lambda matrix: 73 * math.sqrt(matrix.shape[-2])

  def one(number, leaf):
    is_matrix = len(leaf.shape) > 1 and leaf.shape[-2] >= 64  # Others are gains, of a layer or of all.
    key = jax.random.key(number)
    if lpmm.is_quantized(leaf):
      scale = np.asarray(1 / deviation(leaf), jnp.bfloat16).view(np.uint16)
      made = draw(key, leaf.shape, leaf.codes.dtype.name)
      return jax.tree.unflatten(jax.tree.structure(leaf), [made, jnp.full(leaf.scales.shape, scale)])
    return scaled(draw(key, leaf.shape, leaf.dtype)) if is_matrix else jnp.ones(leaf.shape, leaf.dtype)

  leaves, treedef = jax.tree.flatten(shapes, is_leaf=lpmm.is_quantized)
  return treedef.unflatten([one(*leaf) for leaf in enumerate(leaves)])


def training(run: Run, models: dict[str, Any], entries: list[tuple[str, str]]) -> None:
  """Seconds per microbatch of whole training steps, and the most that the device has held since the process began.

  Args:
    run: what it is part of.
    models: by name.
    entries: (model, method of benchmarks/accelerators.py), by rising peaks: one that is not higher cannot be seen.
  """
  import accelerator_steps

  todo = []
  for model, name in entries:
    case = {'test': 'training', 'model': model, 'method': name}
    with run.reporting(**case):
      if run.has_time(20, **case):
        program = accelerator_steps.training_step(METHODS[name], models[model])
        driver = METHODS[name].driver or 'loop'
        todo.append((case, program, run.compile(program.step, program.args, run.device, driver, (0, 1))))
  for case, program, future in todo:
    with run.reporting(**case):
      if not run.has_time(10, **case):
        continue
      compiled, seconds = run.wait(future)
      shapes, state_shapes, *batch_shapes = program.args
      params = random_params(shapes)
      state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state_shapes)
      batch = [jax.random.randint(jax.random.key(1), x.shape, 0, 256, x.dtype) for x in batch_shapes]
      n = sum(x.size for x in jax.tree.leaves(params, is_leaf=lpmm.is_quantized))
      accumulates = METHODS[case['method']].accumulates
      microbatches = accelerator_steps.peak_memory.MICROBATCHES if accumulates else 1
      rounds, values = [], []
      for i in range(3 if run.small else 5):  # Of all microbatches of a step; the first warms up.
        if i > 1 and not run.has_time(2 * rounds[-1] + 2, **case, round=i):
          break
        start = time.perf_counter()
        for _ in range(microbatches):
          params, state, value = compiled(params, state, *batch)
        values.append(float(value))
        rounds.append(time.perf_counter() - start)
      memory, stats = compiled.memory_analysis(), run.device.memory_stats() or {}
      arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
      run.say(
        **case,
        parameters=n,
        best_ms_per_microbatch=round(1e3 * min(rounds[1:]) / microbatches, 2),
        microbatches=microbatches,
        losses=values,
        compiled_peak_bytes=arguments + memory.temp_size_in_bytes,
        measured_peak_bytes=stats.get('peak_bytes_in_use'),
        compile_seconds=seconds,
      )
      del compiled, params, state, batch


def write_model(folder: Path, small: bool) -> None:
  """A Llama of random weights in Hugging Face's layout: of 8B parameters, or tiny. Its tokens are the bytes."""
  import finetune_llm
  import llama
  import tokenizers

  raw = finetune_llm.SMALL if small else finetune_llm.SHAPES['llama-3.1-8b']
  config = llama.parse_config(raw)
  normal = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(jnp.bfloat16)

  def get(name):
    shape, _ = llama.tensors(config)[name]
    if len(shape) == 1:
      return np.ones(shape, jnp.bfloat16)
    return np.resize(normal * np.asarray(shape[-1] ** -0.5, jnp.bfloat16), shape)

  llama.save(folder, raw, get, jnp.bfloat16)
  alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(sorted(alphabet))}, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.save(str(folder / 'tokenizer.json'))


def make_commands(args: argparse.Namespace) -> dict[str, tuple[list[Any], float]]:
  """By name, scripts with their arguments, and the share of the device's memory that each gets; none without data."""
  root = Path(__file__).parents[1]
  found = args.results.with_suffix('.accuracy.jsonl')
  accuracy = [root / 'benchmarks' / 'accuracy.py', '--microbatches', '1', '--results', found]
  seeds = ['--seeds', *map(str, range(2 if args.small else 5))]
  commands: dict[str, tuple[list[Any], float]] = {}
  if args.small:
    commands['accuracy'] = (
      [*accuracy, '--together', *seeds, '--tasks', 'digits', '--methods', 'sgdm-8', '--steps', '4'],
      0.2,
    )
  if args.stories is not None:
    data = ['--together', '--tasks', 'stories', '--stories', args.stories, '--text', args.text, '--methods']
    for name, methods in STORIES.items():
      commands[f'stories, {name}'] = [*accuracy, *seeds, *data, *methods], 0.08
  if args.cifar10 is not None:
    data = ['--tasks', 'cifar10', '--cifar10', args.cifar10, '--epochs', str(args.epochs), '--methods']
    for method in CIFAR10:
      commands[f'cifar10, {method}'] = [*accuracy, *seeds, *data, method], 0.08
  if args.model is not None or args.small:
    folder = args.model or args.results.with_suffix('.model')
    if not (folder / 'tokenizer.json').is_file():
      write_model(folder, args.small)
    steps, context = (2, 64) if args.small else (20, 2048)
    options = {
      'data': root / 'README.md',
      'batch-size': 1,
      'steps': steps,
      'context': context,
      'output': folder / 'out',
    }
    script = [root / 'examples' / 'finetune_llm.py', '--model', folder, '--sample-tokens', '8']
    commands['finetune_llm'] = [*script, *(f'--{name}={value}' for name, value in options.items())], 0.42
  return commands


def scripts(run: Run) -> None:
  """Scripts side by side: what they print, and whether they came to their ends."""
  args, started = run.args, {}
  for name, (command, share) in make_commands(args).items():
    environment = os.environ | {'XLA_PYTHON_CLIENT_MEM_FRACTION': str(share), 'COLUMNS': '160'}
    environment.pop('XLA_PYTHON_CLIENT_PREALLOCATE', None)
    log = args.results.with_suffix(f'.{name.replace(", ", "_")}.log')
    with log.open('w') as file:
      process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=file, stderr=subprocess.STDOUT, env=environment
      )
    started[name] = process, log, time.perf_counter()
  while started:
    for name, (process, log, start) in list(started.items()):
      if process.poll() is None and run.left() > 5:
        continue
      process.kill()  # Of no effect on one that has ended.
      process.wait()
      del started[name]
      lines = [line.rstrip() for line in log.read_text().splitlines() if line.strip()]
      run.say(
        test='script',
        script=name,
        status=process.returncode,
        seconds=round(time.perf_counter() - start, 1),
        output=lines[-60:],
        **({} if process.returncode == 0 else {'error': 'did not come to its end'}),
      )
    time.sleep(0.2)


def timed(size: str, shapes: Shapes, entries: list[Entry]) -> Callable[[Run], None]:
  """A stage of `times`."""
  return functools.partial(times, size=size, shapes=shapes, entries=entries)


def make_parts(small: bool) -> dict[str, dict[str, Callable[[Run], None]]]:
  """By name, parts of stages, each in order of value."""
  import accelerator_steps

  ours = [Entry(name, 'kernel', {}) for name in ('sgdm', 'adamw', 'lion', 'sgdm without feedback')]
  stock = [Entry(name, 'optax', {}) for name in STOCK]
  flashed = [Entry(name, 'flash', {}) for name in ('sgd', 'adamw', 'lion')]
  loops = [Entry(name, 'loop', {}) for name in ('sgdm', 'adamw')]
  tiles = [(512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8)]
  sweep = [
    Entry(name, 'kernel', {'elements': elements, 'warps': warps})
    for elements, warps in tiles
    for name in ('sgdm', 'adamw', 'lion')
  ]
  eight: Shapes = {f'w{i}': (2048, 2048) for i in range(8)}
  stacked: Shapes = {'w': (16, 2048, 8192)}
  one: Shapes = {'w': (16384, 8192)}
  many = gpt2(12, 768, 50257)
  trained = [
    ('1B', 'lpmm.adamw, kernel'),
    ('8B', 'lpmm.lion without accumulator, kernel'),
    ('8B', 'lpmm.adamw, 4-bit moments without accumulator, kernel'),
    ('8B', 'lpmm.adamw without accumulator, kernel'),
    ('8B', 'lpmm.adamw, kernel'),
    ('8B', 'flash_adamw'),
    ('8B', 'optax.adamw bf16 without accumulator'),
  ]
  main, other = MAIN_CASES, OTHER_CASES
  models = {name: functools.partial(make, is_lean=True) for name, make in accelerator_steps.LLAMAS.items()}
  if small:
    main, other = MAIN_CASES[:1], OTHER_CASES[-1:]
    ours, stock, flashed, loops, sweep = ours[:1], stock[:1], flashed[:1], loops[:1], sweep[:1]
    # Of whole training steps the loop: the kernel would take a minute to compile.
    eight, stacked = {'w0': (128, 256)}, {'w': (4, 64, 128)}
    one, many = {'w': (64, 128)}, {'w': (128, 64), 'bias': (64,)}
    trained = [('1B', 'lpmm.sgdm, loop')]
    models = {'1B': lambda: accelerator_steps.llama(2, 64, 64, 4, 2, tokens=16, vocabulary=256, is_lean=True)}
  return {
    'bits and times': {
      'environment': environment,
      'bits': lambda run: bits(run, main),
      'times': timed(f'{len(eight)} x {eight["w0"]}', eight, stock + ours + loops),
      'times stacked': timed('stacked', stacked, stock + ours + loops[small:]),
    },
    'training': {
      'training': lambda run: training(run, {name: make() for name, make in models.items()}, trained),
    },
    'flashoptim-jax': {
      'times of flashoptim': timed(f'{len(eight)} x {eight["w0"]}', eight, flashed),
      'times of flashoptim stacked': timed('stacked', stacked, flashed),
    },
    'sweep': {'sweep': timed('sweep', one, stock + sweep)},
    SCRIPTS: {'scripts': scripts},
    'other bits': {'other bits': lambda run: bits(run, other)},
    'GPT-2': {'times of GPT-2': timed('GPT-2 small', many, stock + ours)},
  }


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Of a file of results: times of optimizer steps, with their ratios to Optax in float32, and training steps."""
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  timed = [row for row in rows if row['test'] == 'time' and 'best_ms' in row and 'elements' not in row]
  columns = list(dict.fromkeys((row['size'], row['commit']) for row in timed))
  found = {(row['size'], row['commit'], row['by'], row['optimizer']): row['best_ps_per_parameter'] for row in timed}
  yield line(['', *(f'{size}, {commit}' for size, commit in columns)])
  yield '|' + '---|' * (1 + len(columns))
  names = list(dict.fromkeys((row['by'], row['optimizer']) for row in timed))
  for by, name in sorted(names, key=lambda entry: ('optax', 'flash', 'kernel', 'loop').index(entry[0])):
    stock = name if by == 'optax' else f'optax.{name.split()[0].replace("sgdm", "sgd")}'
    cells = []
    for column in columns:
      own, base = found.get((*column, by, name)), found.get((*column, 'optax', stock))
      cells.append(
        '' if own is None else f'{own:.1f}' if by == 'optax' or base is None else f'{own:.1f} ({own / base:.2f})'
      )
    title = name if by == 'optax' else f'flashoptim-jax, {name}' if by == 'flash' else f'lpmm.{name}, {by}'
    yield line([title, *cells])
  yield ''
  yield line(['training step', 'ms a sequence', 'measured peak, GiB', 'compiled peak, GiB', 'B/param'])
  yield '|' + '---|' * 5
  for row in rows:
    if 'measured_peak_bytes' in row:
      peak = row['measured_peak_bytes']
      gib = [f'{x / 2**30:.2f}' for x in (peak, row['compiled_peak_bytes'])]
      title = f'{row["model"]}, {row["method"]}'
      yield line([title, f'{row["best_ms_per_microbatch"]:.0f}', *gib, f'{peak / row["parameters"]:.2f}'])


def run_part(run: Run, stages: dict[str, Callable[[Run], None]]) -> None:
  """The stages, one after the other, as long as there is time; then the process ends."""
  for name, stage in stages.items():
    start = time.perf_counter()
    with run.reporting(test='stage', stage=name):
      if run.has_time(test='stage', stage=name):
        stage(run)
    run.say(test='stage', stage=name, seconds=round(time.perf_counter() - start, 1))
  run.say(test='end')
  os._exit(0)  # What still compiles is dropped.


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  add = parser.add_argument
  add('--results', type=Path, required=True, help='file that lines of JSON are appended to')
  add('--seconds', type=float, default=520, help='time after which nothing more is begun')
  add('--model', type=Path, metavar='DIR', help='to fine-tune; a Llama of 8B random parameters is made there if needed')
  add('--stories', type=Path, metavar='DIR', help='what benchmarks/convert_stories.py has written')
  add('--text', type=Path, metavar='FILE', help='that stories15M is fine-tuned on')
  add('--cifar10', type=Path, metavar='DIR', help='where the archive of CIFAR-10 was unpacked')
  add('--epochs', type=int, default=10, help='of CIFAR-10 (default %(default)s)')
  add('--small', action='store_true', help='rehearse on a CPU')
  add('--write-model', action='store_true', help='write --model, without a device, and stop')
  add('--report', type=Path, metavar='FILE', help='put tables of the results into this document, and stop')
  add('--parts', nargs='+', metavar='PART', help='run these alone')
  add('--part', help='run that alone, in this process')
  args = parser.parse_args()
  start = time.perf_counter()
  if args.write_model:
    write_model(args.model, args.small)
    return
  if args.report:
    lines = tables(read(args.results))
    args.report.write_text(with_lines(args.report.read_text(), BEGIN, END, lines))
    return
  parts = make_parts(args.small)
  if args.part:
    jax.config.update('jax_platforms', 'cpu' if args.small else 'cuda,cpu')
    run_part(Run(args), parts[args.part])
  # Each part leaves a third of what there is to those behind it.
  statuses = []
  names = args.parts or list(parts)
  for i, part in enumerate(names):
    left = args.seconds - (time.perf_counter() - start)
    share = left if i == len(names) - 1 else 2 * left / 3
    own = ['--part', part, '--seconds', str(share)]
    # Scripts have their own shares.
    memory = (
      {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'} if part == SCRIPTS else {'XLA_PYTHON_CLIENT_MEM_FRACTION': '.95'}
    )
    statuses.append(subprocess.run([sys.executable, *sys.argv, *own], env=os.environ | memory).returncode)
  sys.exit(int(any(statuses)))


if __name__ == '__main__':
  main()
