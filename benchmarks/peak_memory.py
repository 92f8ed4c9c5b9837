"""Peak memory per parameter of whole training steps at four microbatches, against Optax and flashoptim-jax.

  pip install -e '.[examples,benchmarks]'
  python benchmarks/peak_memory.py --output benchmarks/results/peak_memory_cpu.json
  python benchmarks/peak_memory.py --models transformer --times --output benchmarks/results/peak_memory_cpu.json
  python benchmarks/peak_memory.py --report benchmarks/results/peak_memory_cpu.json --plot

Two models: a deep and thin Transformer, whose layers are scanned and compute their activations again in the backward
pass, under every method; and a ResNet-50 (v1.5, with GroupNorm), which is unrolled and keeps its activations. A step is
forward pass, backward pass and optimizer on one microbatch, jitted with parameters and optimizer state donated.

The first command gives each method a process of its own, and two figures. One is of the compiled step: arguments +
outputs - aliased + temporaries. The other is what happens over one cycle of microbatches: on a CPU, how far the
resident memory of the process rises above what it was before there were arrays; on a GPU, the peak of the allocator. On
a CPU the first knows nothing of the scratch memory of libraries; the second counts it, and the ten megabytes or so that
the first step of any program takes for itself.

The second command times whole cycles, in one process, in which the methods take turns so that a slow moment of the
machine meets them all; the figure is the median over rounds of the ratio, within a round, to Optax's MultiSteps in
float32. The third prints both as tables in Markdown, and draws the first, with measured peaks in parentheses.

`lean` means `lpmm.value_and_step`: weights are decoded where they are used, and gradients accumulated where they arise.
A format such as 8/8/8 is that of parameters, optimizer state and accumulator.

On a CPU the ResNet is compiled, under every method, with XLA's sequential order: see `SEQUENTIAL`.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import ctypes
from functools import partial
import importlib.metadata
import json
import math
import os
from pathlib import Path
import platform
import statistics
import subprocess
import sys
import time
from typing import Any
from typing import NamedTuple

import flashoptim_jax as flashoptim
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
import optax

import lpmm_optax as lpmm

MICROBATCHES = 4
LEARNING_RATE = 1e-3
MOMENTUM = 0.9
VOCABULARY = 256  # Bytes.
CLASSES = 1000
DEFAULT_PLOT = 'benchmarks/results/peak_memory.png'

# By default, XLA on a CPU orders an unrolled program breadth first, so that independent operations can run side by
# side, and keeps what each of them holds. This is the order of other devices, in which memory is freed early. It is
# not used for the Transformer, most of whose program is a loop; there it would cost `optax.MultiSteps` two bytes more.
# (XLA takes this option from the environment alone.)
SEQUENTIAL = '--xla_cpu_enable_concurrency_optimized_scheduler=false'

# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
  """What is trained.

  Attributes:
    init: a key to float32 parameters.
    loss: `(params, *batch)`; decodes what is quantized where it is used.
    batch: one microbatch.
    settings: the options that shape it.
    xla_flags: with which it is compiled.
  """

  init: Callable[[jax.Array], Any]
  loss: Callable[..., jax.Array]
  batch: tuple[np.ndarray, ...]
  settings: tuple[str, ...]
  xla_flags: str = ''


def rms_norm(x: jax.Array, gain: jax.Array) -> jax.Array:
  square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis=-1, keepdims=True)
  return x * lax.rsqrt(square + 1e-6).astype(x.dtype) * gain


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def make_transformer(args: argparse.Namespace) -> Model:
  """Predicts each byte from those before it; its layers' parameters are stacked along a first axis."""
  layers, width = args.layers, args.width
  shapes = {
    'embedding': (VOCABULARY, width),
    'positions': (args.context, width),
    'layers': {
      'attention_norm': (layers, width),
      'qkv': (layers, width, 3 * width),
      'attention_out': (layers, width, width),
      'mlp_norm': (layers, width),
      'mlp_in': (layers, width, 4 * width),
      'mlp_out': (layers, 4 * width, width),
    },
    'norm': (width,),
    'head': (width, VOCABULARY),
  }

  def init(key):
    def one(path, shape):
      name = path[-1].key
      if name.endswith('norm'):
        return jnp.ones(shape)
      return jax.random.normal(jax.random.fold_in(key, names.index(name)), shape) / math.sqrt(shape[-2])

    names = sorted([*shapes, *shapes['layers']])
    return jax.tree.map_with_path(one, shapes, is_leaf=lambda x: isinstance(x, tuple))

  def layer(x, weights):
    """From and to [batch * context, width], in which matrices have the fastest gradients on a CPU."""
    weights = lpmm.dequantize(weights)
    qkv = rms_norm(x, weights['attention_norm']) @ weights['qkv']
    q, k, v = jnp.moveaxis(qkv.reshape(-1, args.context, 3, args.heads, width // args.heads), 2, 0)
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + attended.reshape(x.shape) @ weights['attention_out']
    hidden = jax.nn.gelu(rms_norm(x, weights['mlp_norm']) @ weights['mlp_in'])
    return x + hidden @ weights['mlp_out'], None

  def loss(params, tokens):
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    x = lpmm.dequantize(params['embedding'])[inputs] + lpmm.dequantize(params['positions'])
    x, _ = lax.scan(jax.checkpoint(layer), x.reshape(-1, width), params['layers'])
    logits = rms_norm(x, lpmm.dequantize(params['norm'])) @ lpmm.dequantize(params['head'])
    return cross_entropy(logits, targets.reshape(-1))

  tokens = np.random.default_rng(0).integers(0, VOCABULARY, (args.batch_size, args.context + 1), np.int32)
  return Model(init, loss, (tokens,), ('layers', 'width', 'heads', 'context', 'batch_size'))


class ConvNorm(nn.Module):
  """A convolution, then GroupNorm."""

  features: int
  size: int
  strides: int = 1

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """From and to float[batch, height, width, channels]."""
    x = nn.Conv(self.features, (self.size, self.size), self.strides, use_bias=False)(x)
    return nn.GroupNorm(num_groups=math.gcd(32, self.features))(x)


class ResNet(nn.Module):
  """ResNet-50 of He et al., 2015, in its variant 1.5 (strides in the 3 x 3 convolutions), with GroupNorm.

  Each layer decodes its own parameters if they are quantized.
  """

  width: int
  blocks: tuple[int, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Images, float[batch, height, width, 3], to logits, float[batch, classes]."""

    decoding = partial(
      nn.map_variables, mapped_collections='params', trans_in_fn=lpmm.dequantize, init=self.is_initializing()
    )
    conv = decoding(ConvNorm)
    x = nn.relu(conv(self.width, 7, 2)(x))
    x = nn.max_pool(x, (3, 3), (2, 2), 'SAME')
    for stage, count in enumerate(self.blocks):
      features = self.width * 2**stage
      for block in range(count):
        strides = 2 if stage > 0 and block == 0 else 1
        y = nn.relu(conv(features, 1)(x))
        y = nn.relu(conv(features, 3, strides)(y))
        y = conv(4 * features, 1)(y)
        shortcut = x if x.shape == y.shape else conv(4 * features, 1, strides)(x)
        x = nn.relu(shortcut + y)
    return decoding(nn.Dense)(CLASSES)(jnp.mean(x, axis=(1, 2)))


def make_resnet(args: argparse.Namespace) -> Model:
  """Classifies images; its parameters are some 160 separate arrays."""
  network = ResNet(args.stem_width, tuple(args.blocks))

  def loss(params, images, labels):
    dtype = jax.tree.leaves(params, is_leaf=lpmm.is_quantized)[0].dtype
    return cross_entropy(network.apply({'params': params}, images.astype(dtype)), labels)

  rng = np.random.default_rng(0)
  images = rng.standard_normal((args.images, args.image_size, args.image_size, 3), np.float32)
  labels = rng.integers(0, CLASSES, args.images, np.int32)
  init = lambda key: network.init(key, jnp.zeros((1, *images.shape[1:])))['params']
  return Model(init, loss, (images, labels), ('stem_width', 'blocks', 'image_size', 'images'), SEQUENTIAL)


MODELS = {'transformer': make_transformer, 'resnet50': make_resnet}
TITLES = {'transformer': 'Transformer, scanned and rematerialised', 'resnet50': 'ResNet-50, unrolled'}


def make_model(name: str, args: argparse.Namespace) -> Model:
  """The model of that name, with its flags in the environment, from which XLA reads them once."""
  model = MODELS[name](args)
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {model.xla_flags}'.strip()
  return model


# ---------------------------------------------------------------------------------------------------------------------
# Methods. Donated buffers go to results of the same shape in order, hence (params, opt_state) come first in both.
# ---------------------------------------------------------------------------------------------------------------------


def ordinary(tx: Any, loss: Callable[..., jax.Array], dtype: Any = None) -> Callable[..., Any]:
  """Dense weights, a dense gradient, then the optimizer; for Optax's own, `optax.apply_updates`."""

  def train_step(params, opt_state, *batch):
    value, grads = jax.value_and_grad(loss)(lpmm.dequantize(params, dtype), *batch)
    params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, value

  return train_step


def lean(tx: Any, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Neither weights nor gradients exist as a dense tree."""
  value_and_step = lpmm.value_and_step(loss, tx)

  def train_step(params, opt_state, *batch):
    value, params, opt_state = value_and_step(params, opt_state, *batch)
    return params, opt_state, value

  return train_step


def flash(tx: flashoptim.FlashOptimizer, loss: Callable[..., jax.Array]) -> Callable[..., Any]:
  """It has no accumulation, and no `update` around which `optax.MultiSteps` could go: it steps every time."""

  def train_step(params, opt_state, *batch):
    value, grads = jax.value_and_grad(loss)(params, *batch)
    params, opt_state = tx.step(params, opt_state, grads)
    return params, opt_state, value

  return train_step


def fp32(params: Any) -> Any:
  return params


def bf16(params: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def int8(params: Any) -> Any:
  return lpmm.quantize(params, lpmm.INT8)


class Method(NamedTuple):
  """A way to train.

  Attributes:
    make_tx: the optimizer, which has `init(params)`.
    make_step: the optimizer and a loss to a function `(params, opt_state, *batch) -> (params, opt_state, loss)`.
    store: float32 parameters to what is trained.
    baseline: the method with which it is compared.
  """

  make_tx: Callable[[], Any]
  make_step: Callable[..., Callable[..., Any]]
  store: Callable[[Any], Any]
  baseline: str


def sgd() -> Any:
  return optax.sgd(LEARNING_RATE, MOMENTUM)


def adamw() -> Any:
  return optax.adamw(LEARNING_RATE)


def accumulated(tx: Callable[[], Any]) -> Callable[[], Any]:
  return lambda: optax.MultiSteps(tx(), MICROBATCHES).gradient_transformation()


def our_sgdm(accumulator: Any = lpmm.INT8) -> Any:
  return lpmm.MultiSteps(lpmm.sgdm(LEARNING_RATE, MOMENTUM), MICROBATCHES, accumulator=accumulator)


def our_sgdm_into_momentum() -> Any:
  return our_sgdm(lpmm.INTO_MOMENTUM)


def our_adamw() -> Any:
  return lpmm.MultiSteps(lpmm.adamw(LEARNING_RATE), MICROBATCHES, accumulator=lpmm.INT8)


def flash_sgdw() -> Any:
  # Its fused kernels are Triton's.
  return flashoptim.flash_sgdw(LEARNING_RATE, momentum=MOMENTUM, fused=jax.default_backend() == 'gpu')


def flash_adamw() -> Any:
  return flashoptim.flash_adamw(LEARNING_RATE, fused=jax.default_backend() == 'gpu')


SGD, ADAMW = 'optax.sgd fp32, MultiSteps', 'optax.adamw fp32, MultiSteps'
half_ordinary = partial(ordinary, dtype=jnp.bfloat16)
METHODS = {
  'optax.sgd fp32, no accumulation': Method(sgd, ordinary, fp32, SGD),
  SGD: Method(accumulated(sgd), ordinary, fp32, SGD),
  'optax.sgd bf16, MultiSteps': Method(accumulated(sgd), ordinary, bf16, SGD),
  'flash_sgdw, no accumulation': Method(flash_sgdw, flash, bf16, SGD),
  'lpmm.sgdm 8/8/8': Method(our_sgdm, ordinary, int8, SGD),
  'lpmm.sgdm 8/8/8, bf16 weights': Method(our_sgdm, half_ordinary, int8, SGD),
  'lpmm.sgdm 8/8 into momentum': Method(our_sgdm_into_momentum, ordinary, int8, SGD),
  'lpmm.sgdm 8/8/8, lean': Method(our_sgdm, lean, int8, SGD),
  'lpmm.sgdm 8/8 into momentum, lean': Method(our_sgdm_into_momentum, lean, int8, SGD),
  'optax.adamw fp32, no accumulation': Method(adamw, ordinary, fp32, ADAMW),
  ADAMW: Method(accumulated(adamw), ordinary, fp32, ADAMW),
  'optax.adamw bf16, MultiSteps': Method(accumulated(adamw), ordinary, bf16, ADAMW),
  'flash_adamw, no accumulation': Method(flash_adamw, flash, bf16, ADAMW),
  'lpmm.adamw 8/8/8/8': Method(our_adamw, ordinary, int8, ADAMW),
  'lpmm.adamw 8/8/8/8, bf16 weights': Method(our_adamw, half_ordinary, int8, ADAMW),
  'lpmm.adamw 8/8/8/8, lean': Method(our_adamw, lean, int8, ADAMW),
}
TIMED = [name for name, method in METHODS.items() if name == method.baseline or name.startswith('lpmm.')]


def compile_method(name: str, model: Model) -> tuple[Callable[[], list], Any, Any]:
  """A function that makes (params, opt_state) on the default device, their shapes, and the compiled step."""
  method = METHODS[name]
  tx = method.make_tx()

  def init(key):
    params = method.store(model.init(key))
    return params, tx.init(params)

  key = jax.random.key(0)
  shapes = jax.eval_shape(init, key)
  step = method.make_step(tx, model.loss)
  compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*shapes, *model.batch).compile()
  # On a host, so that making the state leaves no trace in the peak of an accelerator.
  with jax.default_device(jax.devices('cpu')[0]):
    host_key = jax.random.key(0)
    # Folding constants would take XLA seconds for every array of flashoptim-jax, which encodes one of zeros.
    make = jax.jit(init).lower(host_key).compile(compiler_options={'xla_disable_hlo_passes': 'constant_folding'})

  def make_state():
    state = make(host_key)
    return list(state if jax.default_backend() == 'cpu' else jax.device_put(state, jax.devices()[0]))

  return make_state, shapes, compiled


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

# The GNU C library keeps what is freed, in an amount that depends on history, unless this is set, here to its default.
# Then arrays go back to the kernel at once, and the peak is that of what was alive.
MALLOC = {'MALLOC_MMAP_THRESHOLD_': str(128 * 1024)}


def count_bytes(tree: Any) -> int:
  """From shapes and bit widths."""
  size = lambda x: x.nbytes if lpmm.is_quantized(x) else x.size * np.dtype(x.dtype).itemsize
  return sum(map(size, jax.tree.leaves(tree, is_leaf=lpmm.is_quantized)))


def split_bytes(params: Any, opt_state: Any, compiled: Any) -> dict[str, int]:
  """What the compiled step holds at once, in four parts; the last is gradients, activations and all that is brief."""
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  accumulator = count_bytes(getattr(opt_state, 'acc_grads', ()))
  parts = {
    'parameters': count_bytes(params),
    'state': count_bytes(opt_state) - accumulator,
    'accumulator': accumulator,
  }
  return parts | {'rest': held + memory.temp_size_in_bytes - sum(parts.values())}


def resident_bytes(field: str) -> int | None:
  """Of this process, by a field of the kernel's: VmRSS now, VmHWM at its peak. None where there is no such kernel."""
  status = Path('/proc/self/status')
  if not status.exists():
    return None
  return next(1024 * int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(f'{field}:'))


def return_freed_memory() -> None:
  """To the kernel, so that what is freed no longer counts as resident, and does not hide what is taken from it."""
  trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)  # Of the GNU C library.
  if trim is not None:
    trim(0)


def measured_peak(make_state: Callable[[], list], compiled: Any, batch: tuple[np.ndarray, ...]) -> int | None:
  """Bytes at the peak of one cycle of microbatches, parameters and state included; None if it cannot be told."""
  return_freed_memory()
  before = resident_bytes('VmRSS')
  state = make_state()
  batch = jax.block_until_ready(jax.device_put(batch))
  jax.block_until_ready(state)
  stats = jax.devices()[0].memory_stats()
  if stats is None and before is not None:
    return_freed_memory()
    Path('/proc/self/clear_refs').write_text('5')  # The peak starts anew.
  for _ in range(MICROBATCHES):
    *state, loss = compiled(*state, *batch)
    jax.block_until_ready((state, loss))
  if not math.isfinite(loss):
    raise FloatingPointError(f'the loss is {loss}')
  if stats is None:
    return None if before is None else resident_bytes('VmHWM') - before
  # The allocator's peak cannot start anew: one that did not rise dates from compilation, which tries out kernels.
  peak = jax.devices()[0].memory_stats()['peak_bytes_in_use']
  return peak if peak > stats['peak_bytes_in_use'] else None


def measure_memory(name: str, model: Model) -> dict[str, Any]:
  """One method's row; meant for a process in which nothing else has run."""
  start = time.perf_counter()
  make_state, (params, opt_state), compiled = compile_method(name, model)
  seconds = time.perf_counter() - start
  parts = split_bytes(params, opt_state, compiled)
  return {
    'method': name,
    'baseline': METHODS[name].baseline,
    'parameters': sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))),
    'bytes': parts,
    'compiled_peak_bytes': sum(parts.values()),
    'measured_peak_bytes': measured_peak(make_state, compiled, model.batch),
    'compile_seconds': seconds,
  }


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def make_cycle(name: str, model: Model) -> Callable[[], float]:
  """A function that runs one cycle of microbatches and returns its seconds."""
  make_state, _, compiled = compile_method(name, model)
  state = make_state()
  batch = jax.device_put(model.batch)

  def cycle() -> float:
    start = time.perf_counter()
    for _ in range(MICROBATCHES):
      *state[:], _ = compiled(*state, *batch)
    jax.block_until_ready(state)
    return time.perf_counter() - start

  cycle()
  return cycle


def measure_times(names: list[str], model: Model, rounds: int) -> list[dict[str, Any]]:
  """One row per method; all of one baseline, which is among them."""
  cycles = {name: make_cycle(name, model) for name in names}
  times: dict[str, list[float]] = {name: [] for name in names}
  for _ in range(rounds):
    for name, cycle in cycles.items():
      times[name].append(cycle())
  rows = []
  for name in names:
    baseline = METHODS[name].baseline
    ratios = sorted(ours / base for ours, base in zip(times[name], times[baseline], strict=True))
    quartile = len(ratios) // 4
    rows.append(
      {
        'method': name,
        'baseline': baseline,
        'median_seconds': statistics.median(times[name]),
        'ratio': statistics.median(ratios),
        'ratio_quartiles': [ratios[quartile], ratios[-1 - quartile]],
      }
    )
  return rows


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------

PARTS = {'parameters': 'parameters', 'state': 'optimizer state', 'accumulator': 'accumulator', 'rest': 'the rest'}
COLORS = {'parameters': '#0072b2', 'state': '#56b4e9', 'accumulator': '#e69f00', 'rest': '#bbbbbb'}


def memory_cells(row: dict[str, Any], baseline: dict[str, Any] | None) -> list[str]:
  """Bytes per parameter: the parts, the compiled step, that against the baseline, and what was measured."""
  per_param = lambda size: '' if size is None else f'{size / row["parameters"]:.2f}'
  peak = row['compiled_peak_bytes']
  against = '' if baseline is None else f'{100 * (peak / baseline["compiled_peak_bytes"] - 1):+z.1f} %'
  parts = [per_param(row['bytes'][part]) for part in PARTS]
  return [row['method'], *parts, per_param(peak), against, per_param(row['measured_peak_bytes'])]


def time_cells(row: dict[str, Any]) -> list[str]:
  low, high = row['ratio_quartiles']
  ratio = '1' if row['method'] == row['baseline'] else f'{row["ratio"]:.2f} ({low:.2f} to {high:.2f})'
  return [row['method'], f'{row["median_seconds"]:.2f} s', ratio]


MEMORY_COLUMNS = ['method', *PARTS.values(), 'compiled peak', 'against fp32', 'measured peak']
TIME_COLUMNS = ['method', 'cycle', 'ratio']


def print_row(cells: list[str]) -> None:
  name, *others = cells
  print(f'{name:<36}' + ''.join(f'{cell:>{max(15, len(cell) + 2)}}' for cell in others), flush=True)


def by_method(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  return {row['method']: row for row in rows}


def markdown(results: dict[str, Any]) -> Iterator[str]:
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  for name, sections in results.items():
    memory = sections.get('memory', {}).get('results', [])
    count = f', {memory[0]["parameters"] / 1e6:.1f}M parameters' if memory else ''
    yield f'{TITLES[name]}{count}:'
    if memory:
      rows = by_method(memory)
      yield from ('', line(MEMORY_COLUMNS), '|' + '---|' * len(MEMORY_COLUMNS))
      yield from (line(memory_cells(row, rows.get(row['baseline']))) for row in memory)
    if 'times' in sections:
      yield from ('', line(TIME_COLUMNS), '|' + '---|' * len(TIME_COLUMNS))
      yield from (line(time_cells(row)) for row in sections['times']['results'])
    yield ''


def save_plot(file: Path, results: dict[str, Any]) -> None:
  """Stacked bars of the compiled step, a panel per model, with the measured peak as a mark and in parentheses."""
  panels = {name: sections['memory'] for name, sections in results.items() if 'memory' in sections}
  tallest = max(len(section['results']) for section in panels.values())
  figure = Figure(figsize=(7.5 * len(panels), 1.6 + 0.34 * (tallest + 1)), layout='constrained')
  FigureCanvasAgg(figure)
  for axes, (name, section) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
    rows = section['results']
    # The optimizers apart.
    optimizers = list(dict.fromkeys(row['baseline'] for row in rows))
    places = np.array([i + optimizers.index(row['baseline']) for i, row in enumerate(rows)])
    counts = np.array([row['parameters'] for row in rows])
    left = np.zeros(len(rows))
    for part, label in PARTS.items():
      widths = np.array([row['bytes'][part] for row in rows]) / counts
      axes.barh(places, widths, left=left, color=COLORS[part], label=label)
      left += widths
    measured = np.array([row['measured_peak_bytes'] or math.nan for row in rows]) / counts
    axes.plot(measured, places, 'k|', markersize=13, markeredgewidth=2, label='(measured peak)')
    for place, total, mark in zip(places, left, measured, strict=True):
      label = f'{total:.2f}' if math.isnan(mark) else f'{total:.2f} ({mark:.2f})'
      axes.annotate(label, (np.fmax(total, mark), place), (6, 0), textcoords='offset points', va='center')
    axes.set_yticks(places, [row['method'] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * np.nanmax([left, measured]))
    axes.set(xlabel='bytes per parameter', title=f'{TITLES[name]}\n{counts[0] / 1e6:.1f}M parameters')
    axes.grid(axis='x', alpha=0.3)
    axes.set_axisbelow(True)
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside lower center', ncols=len(labels), frameon=False)
  device = next(iter(panels.values()))['about']['device']
  figure.suptitle(f'Peak memory of a training step with {MICROBATCHES} microbatches ({device})')
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=150)


def about(args: argparse.Namespace, name: str, model: Model) -> dict[str, Any]:
  """What it takes to repeat a model's rows."""
  settings = {option: getattr(args, option) for option in model.settings}
  flags = ['--times', f'--rounds {args.rounds}'] if args.times else []
  for option, value in settings.items():
    flags.append(f'--{option.replace("_", "-")} {" ".join(map(str, value if isinstance(value, list) else [value]))}')
  return {
    'command': f'python benchmarks/peak_memory.py --models {name} {" ".join(flags)}',
    'settings': settings,
    'microbatches': MICROBATCHES,
    'device': jax.devices()[0].device_kind,
    'cores': os.cpu_count(),
    'machine': platform.machine(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'optax': optax.__version__,
    'flax': importlib.metadata.version('flax'),
    'flashoptim_jax': importlib.metadata.version('flashoptim-jax'),
    'lpmm_optax': lpmm.__version__,
  }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--models', nargs='+', choices=MODELS, default=list(MODELS), metavar='MODEL', help=f'of {", ".join(MODELS)}')
  add('--methods', nargs='+', choices=METHODS, metavar='METHOD', help='(default all)')
  add('--times', action='store_true', help='measure time instead of memory')
  add('--rounds', type=int, default=7, help='of --times (default %(default)s)')
  add('--output', type=Path, metavar='FILE', help='put the rows there, as JSON, beside those of other models')
  add('--report', type=Path, metavar='FILE', help='measure nothing, print the tables of this file in Markdown')
  add('--plot', type=Path, nargs='?', const=Path(DEFAULT_PLOT), metavar='FILE', help=f'draw (default {DEFAULT_PLOT})')
  for_model = lambda group, name, default, **how: group.add_argument(
    name, type=int, default=default, **how, help='(default %(default)s)'
  )
  transformer = parser.add_argument_group('transformer')
  for_model(transformer, '--layers', 64)
  for_model(transformer, '--width', 512)
  for_model(transformer, '--heads', 8)
  for_model(transformer, '--context', 128)
  for_model(transformer, '--batch-size', 2)
  resnet = parser.add_argument_group('resnet50')
  for_model(resnet, '--stem-width', 64)
  for_model(resnet, '--blocks', [3, 4, 6, 3], nargs='+')
  for_model(resnet, '--image-size', 64)
  for_model(resnet, '--images', 8)
  add('--one', choices=METHODS, help=argparse.SUPPRESS)  # In a process of its own.
  args = parser.parse_args(argv)
  if args.times and len(args.models) > 1:
    parser.error('--times takes one of --models: they differ in flags of XLA, which a process reads once')
  if args.width % args.heads:
    parser.error(f'--width {args.width} does not divide into {args.heads} heads')
  return args


def main(argv: list[str] | None = None) -> None:
  argv = sys.argv[1:] if argv is None else argv
  args = parse_args(argv)
  if args.one is not None:
    # Else a CPU frees the temporaries of a program at some time after its results are ready.
    jax.config.update('jax_cpu_enable_async_dispatch', False)
    (name,) = args.models
    model = make_model(name, args)
    print(json.dumps({'about': about(args, name, model), 'row': measure_memory(args.one, model)}))
    return

  results: dict[str, Any] = {}
  file = args.report or args.output
  if file is not None and (args.report or file.exists()):
    results = json.loads(file.read_text())

  def save(name: str, section: str, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """After every row, so that an interruption costs only the last."""
    results.setdefault(name, {})[section] = {'about': about, 'results': rows}
    if args.output is not None:
      args.output.parent.mkdir(parents=True, exist_ok=True)
      args.output.write_text(json.dumps(results, indent=1) + '\n')

  if args.report is not None:
    print('\n'.join(markdown(results)))
  elif args.times:
    for name in args.models:
      model, rows = make_model(name, args), []
      print_row([name, *TIME_COLUMNS[1:]])
      for baseline in (SGD, ADAMW):
        wanted = [other for other in TIMED if METHODS[other].baseline == baseline]
        if args.methods is not None:
          wanted = [other for other in wanted if other == baseline or other in args.methods]
        if wanted != [baseline]:
          rows += measure_times(wanted, model, args.rounds)
          for row in rows[-len(wanted) :]:
            print_row(time_cells(row))
      save(name, 'times', about(args, name, model), rows)
  else:
    for name in args.models:
      rows = []
      print_row([name, *MEMORY_COLUMNS[1:]])
      for method in args.methods or METHODS:
        # This process touches no device, which on a GPU would take the memory of those that measure.
        command = [sys.executable, __file__, *argv, '--models', name, '--one', method]
        environment = os.environ | MALLOC
        out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout)
        rows.append(out['row'])
        print_row(memory_cells(out['row'], by_method(rows).get(out['row']['baseline'])))
        save(name, 'memory', out['about'], rows)
  if args.plot is not None:
    save_plot(args.plot, results)


if __name__ == '__main__':
  main()
