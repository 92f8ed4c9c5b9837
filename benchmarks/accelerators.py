"""What compiling for a GPU or a TPU that is not there shows: kernels, bytes moved, host synchronisations, memory.

For H100 and A100, with Python 3.12 or newer in an environment of its own (no GPU is needed, nor its driver):

  pip install -e '.[benchmarks]' flax matplotlib jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc

where jax-cuda13-plugin and jax-cuda13-pjrt must have jax's own version; and for TPU v5e, in another:

  pip install -e '.[benchmarks]' flax matplotlib 'jax[tpu]'

  python benchmarks/accelerators.py --output benchmarks/results/accelerators.jsonl
  python benchmarks/accelerators.py --report --plot
  python benchmarks/accelerators.py --check

The first command compiles all rows for the targets whose compiler is installed, and appends each to the file as soon as
it is there; one that is in the file is not made again. An error, or a row that takes too long, is a row as well. The
second makes tables, in docs/performance.md and README.md too, and needs neither environment; the third judges a few
quick rows by BOUNDS and exits with 1 if one is missed.

A step is compiled for one device, or for the eight chips of a TPU v5e-8 over which its arrays are split and the
figures then are of one chip, with parameters and optimizer state donated. An optimizer step is given a gradient in
float32; a training step is forward pass, backward pass and optimizer on one of four microbatches, or, without an
accumulator, on all there is, where each layer moves as its gradient comes. Memory is the compiler's: peak = arguments
+ outputs - aliased + temporaries. Kernels and bytes are counted in the scheduled program by the rules of
`benchmarks/hlo.py`. A loop whose number of turns the compiler does not know counts as one turn, so that kernels,
bytes and cycles are then lower bounds. The floor is every argument read once and every new parameter and state
written once; a leaf that two kernels update, each a part of it, is counted twice, and so looks as if it moved more.
Cycles are those that a TPU's compiler estimates for its fusions, which leaves out copies in the background; steps
with kernels have none. Seconds of compilation are of a machine that others use.

Of ours, `kernel` is the kernel that a target has for the update of a leaf, where there is one, and `loop` the loop of
XLA operations. Compiling where there is no accelerator, the library chooses tiles for a CPU; `loop in one tile` takes
what it would choose beside one.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import contextlib
import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import os
from pathlib import Path
import platform
import subprocess
import sys
import threading
import time
from typing import Any
from typing import NamedTuple

from records import append
from records import read
from records import with_lines

HERE = Path(__file__).parent
DEFAULT_RESULTS = Path('benchmarks/results/accelerators.jsonl')
MEASURED = Path('benchmarks/results/gpu_h100.jsonl')
DEFAULT_PLOT = Path('benchmarks/results/accelerators.png')
DOCUMENT = Path('docs/performance.md')
BEGIN, END = '<!-- Begin: made by benchmarks/accelerators.py -->', '<!-- End: made by benchmarks/accelerators.py -->'


class Target(NamedTuple):
  """A device to compile for.

  Attributes:
    platform: as `topologies.get_topology_desc` has it.
    topology: a name, empty for a GPU.
    config: a description of a GPU.
    plugin: the module that compiles for it.
    packages: whose versions matter.
    environment: what must be set before JAX is imported.
    title: for a reader.
  """

  platform: str
  topology: str
  config: Path | None
  plugin: str
  packages: tuple[str, ...]
  environment: dict[str, str]
  title: str


def gpu(name: str, title: str) -> Target:
  packages = ('jax-cuda13-plugin', 'jax-cuda13-pjrt', 'nvidia-cuda-nvcc')
  environment = {'JAX_PLATFORMS': 'cpu', 'JAX_SKIP_CUDA_CONSTRAINTS_CHECK': '1'}
  return Target('cuda', '', HERE / 'targets' / f'{name}.txtpb', 'jax_cuda13_plugin', packages, environment, title)


# Nothing touches a TPU, so others may have libtpu loaded meanwhile.
TPU_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'JAX_PLATFORMS': 'cpu',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}
TARGETS = {
  'h100': gpu('h100', 'H100'),
  'a100': gpu('a100', 'A100'),
  'rtx4090': gpu('rtx4090', 'RTX 4090'),
  'v5e': Target('tpu', 'v5e:2x2', None, 'libtpu', ('libtpu',), TPU_ENVIRONMENT, 'TPU v5e'),
}


class Method(NamedTuple):
  """A way to update.

  Attributes:
    optimizer: 'sgd', 'adamw', 'lion' or 'adafactor'.
    by: whose, and in which form.
    driver: of ours, who updates a leaf.
    accumulates: whether a training step takes one of four microbatches, where both are possible; ours then moves each
      layer as its gradient comes.
  """

  optimizer: str
  by: str
  driver: str = ''
  accumulates: bool = True


WITHOUT = ' without accumulator'
ADAFACTOR = f'lpmm.layerwise(adafactor){WITHOUT}, kernel'
# Adapters of rank 16 beside matrices that stay as they are.
LORA = {'LoRA, bf16 base': Method('adamw', 'LoRA bf16'), 'LoRA, int8 base': Method('adamw', 'LoRA int8')}


def make_methods() -> dict[str, Method]:
  """By name, those of an optimizer together and its float32 first."""
  methods = {}
  for optimizer in ('sgd', 'adamw', 'lion'):
    methods[f'optax.{optimizer} fp32'] = Method(optimizer, 'optax fp32')
    methods[f'optax.{optimizer} bf16'] = Method(optimizer, 'optax bf16')
    methods[f'flash_{optimizer}'] = Method(optimizer, 'flash')
    name = {'sgd': 'lpmm.sgdm'}.get(optimizer, f'lpmm.{optimizer}')
    for driver in ('kernel', 'loop', 'loop in one tile'):
      methods[f'{name}, {driver}'] = Method(optimizer, 'lpmm', driver)
      if optimizer == 'sgd':
        methods[f'{name} paper, {driver}'] = Method(optimizer, 'lpmm paper', driver)
    methods[f'{name}{WITHOUT}, kernel'] = Method(optimizer, 'lpmm', 'kernel', accumulates=False)
  methods[f'lpmm.adamw, 4-bit moments{WITHOUT}, kernel'] = Method('adamw', 'lpmm 4-bit', 'kernel', accumulates=False)
  methods[ADAFACTOR] = Method('adafactor', 'lpmm', 'kernel', accumulates=False)
  for dtype in ('fp32', 'bf16'):
    methods[f'optax.adamw {dtype}{WITHOUT}'] = Method('adamw', f'optax {dtype}', accumulates=False)
  return methods | LORA


METHODS = make_methods()
SGDM, ADAMW, LION = 'lpmm.sgdm, kernel', 'lpmm.adamw, kernel', 'lpmm.lion, kernel'
EIGHT, STACKED, EMBEDDING, RESNET = '8 x 2048 x 2048', '32 x 2048 x 8192', '50257 x 768', 'ResNet-50, its leaves'
TRAIN_TRANSFORMER, TRAIN_RESNET = 'train Transformer', 'train ResNet-50'
TRAIN_1B, TRAIN_8B = 'train Llama 1B', 'train Llama 8B'
STEPS = (EIGHT, STACKED, EMBEDDING, RESNET)
TRAINED = (TRAIN_TRANSFORMER, TRAIN_RESNET, TRAIN_1B, TRAIN_8B)
# GiB of memory, and what of it a program gets.
CARDS, USABLE = {'24 GB': 24.0, '80 GB': 79.6}, 0.95
# Parameters, and tokens of a sequence.
LLAMAS = ('1B', 2048), ('3B', 2048), ('8B', 2048), ('8B', 8192)
FINETUNED = {f'fine-tune Llama {size}, {tokens} tokens': (size, tokens) for size, tokens in LLAMAS}
FINE_TUNE_8B = 'fine-tune Llama 8B, 2048 tokens'
FINETUNING = (
  'optax.adamw fp32',
  f'optax.adamw fp32{WITHOUT}',
  f'optax.adamw bf16{WITHOUT}',
  'flash_adamw',
  ADAMW,
  f'lpmm.adamw{WITHOUT}, kernel',
  f'lpmm.adamw, 4-bit moments{WITHOUT}, kernel',
  f'lpmm.lion{WITHOUT}, kernel',
  ADAFACTOR,
  *LORA,
)


class Split(NamedTuple):
  """How matrices, stacked or not, are split over devices, and batches with them: names of mesh axes.

  Attributes:
    mesh: devices along each axis of the mesh.
    rows: along which rows are split.
    columns: along which columns are.
  """

  mesh: dict[str, int]
  rows: str | None = None
  columns: str | None = None


BY_ROWS, BY_BOTH = Split({'x': 8}, 'x'), Split({'x': 4, 'y': 2}, 'x', 'y')
STEP_ROWS, STEP_BOTH = 'leaves of Llama 8B on 8 chips by rows', 'leaves of Llama 8B on 8 chips by rows and columns'
TRAIN_ROWS, TRAIN_BOTH = 'train Llama 8B on 8 chips by rows', 'train Llama 8B on 8 chips by rows and columns'
SPLIT = {STEP_ROWS: BY_ROWS, STEP_BOTH: BY_BOTH, TRAIN_ROWS: BY_ROWS, TRAIN_BOTH: BY_BOTH}
MODELS = (*STEPS, *TRAINED, *FINETUNED, *SPLIT)


def fits(model: str, name: str) -> bool:
  """Whether a method is of interest for a model."""
  method = METHODS[name]
  if name in (*LORA, ADAFACTOR) or model in FINETUNED:
    return model in FINETUNED and name in FINETUNING
  if method.driver == 'loop in one tile':
    return model == EIGHT
  if not method.accumulates:
    return model in TRAINED and method.by == 'lpmm'
  if model in SPLIT:
    return method.optimizer != 'lion' and (method.by == 'optax fp32' or name in (SGDM, ADAMW))
  return model in STEPS or (method.optimizer != 'lion' and method.by in ('optax fp32', 'optax bf16', 'lpmm'))


def baseline(name: str) -> str:
  """What a method is compared with: the same optimizer in float32."""
  return f'optax.{METHODS[name].optimizer} fp32'


Row = dict[str, Any]
Key = tuple[str, str, str]

# ---------------------------------------------------------------------------------------------------------------------
# Figures and bounds
# ---------------------------------------------------------------------------------------------------------------------


class Figure(NamedTuple):
  """A column.

  Attributes:
    title: of the column.
    of: a row and the row of its baseline to a number.
    decimals: to print.
  """

  title: str
  of: Callable[[Row, Row], float]
  decimals: int


def per_param(field: str) -> Callable[[Row, Row], float]:
  return lambda row, base: row[field] / row['parameters']


def seconds(row: Row) -> float:
  return row['lower_seconds'] + row['compile_seconds']


FIGURES = {
  'kernels': Figure('kernels', lambda row, base: row['kernels'], 0),
  'kernels per leaf': Figure('large kernels/leaf', lambda row, base: row['large_kernels'] / row['leaves'], 2),
  'scalar kernels': Figure('scalar kernels', lambda row, base: row['kernels'] - row['large_kernels'], 0),
  'loops': Figure('loops', lambda row, base: row['loops'], 0),
  'syncs': Figure('host syncs', lambda row, base: row['unknown_loops'] + row['conditionals'], 0),
  'moved': Figure('moved, B/param', per_param('bytes_moved'), 2),
  'floor': Figure('floor', per_param('floor_bytes'), 2),
  'collectives': Figure('collectives', lambda row, base: row['collectives'], 0),
  'collected': Figure('collected, GiB', lambda row, base: row['collective_bytes'] / 2**30, 2),
  'copied': Figure('copied', per_param('copied_bytes'), 2),
  'temporaries': Figure('temporaries, B/param', per_param('temporary_bytes'), 3),
  'temporaries GiB': Figure('temporaries, GiB', lambda row, base: row['temporary_bytes'] / 2**30, 2),
  'peak': Figure('peak, B/param', per_param('peak_bytes'), 2),
  'peak GiB': Figure('peak, GiB', lambda row, base: row['peak_bytes'] / 2**30, 2),
  'seconds': Figure('compile, s', lambda row, base: seconds(row), 1),
  'compile ratio': Figure('compile, to Optax', lambda row, base: seconds(row) / seconds(base), 1),
  'cycles': Figure('cycles to Optax', lambda row, base: row['estimated_cycles'] / base['estimated_cycles'], 2),
}
# What is multiplied by turns of loops.
COUNTED = ('collectives', 'collected', 'kernels', 'kernels per leaf', 'scalar kernels', 'moved', 'copied', 'cycles')
COLUMNS = {
  STEPS: ('kernels', 'kernels per leaf', 'syncs', 'moved', 'floor', 'temporaries', 'peak', 'seconds', 'compile ratio'),
  TRAINED: ('kernels', 'syncs', 'moved', 'copied', 'temporaries', 'peak', 'peak GiB', 'seconds', 'compile ratio'),
  tuple(SPLIT): ('collectives', 'collected', 'kernels', 'syncs', 'temporaries GiB', 'peak GiB', 'seconds'),
}


class Bound(NamedTuple):
  """What a figure must not exceed, or be.

  Attributes:
    targets: for which.
    model: of which rows.
    methods: of which rows.
    figure: which.
    limit: the most it may be.
    exactly: whether it must be just that.
    holds: whether `--check` insists on it; else it is an aim.
  """

  targets: tuple[str, ...]
  model: str
  methods: tuple[str, ...]
  figure: str
  limit: float
  exactly: bool = False
  holds: bool = True


GPUS = ('h100', 'a100')
KERNELS = (SGDM, 'lpmm.sgdm paper, kernel', ADAMW, LION)
LOOP_SGDM, LOOP_ADAMW = 'lpmm.sgdm, loop in one tile', 'lpmm.adamw, loop in one tile'
BOUNDS = (
  Bound(GPUS, EIGHT, (SGDM, 'lpmm.sgdm paper, kernel', LION), 'moved', 8.5),
  Bound(GPUS, EIGHT, (ADAMW,), 'moved', 10.5),
  Bound(GPUS, EIGHT, KERNELS, 'kernels per leaf', 1, exactly=True),
  Bound(GPUS, EIGHT, KERNELS, 'scalar kernels', 16),
  Bound(GPUS, EIGHT, KERNELS, 'temporaries', 0.05),
  Bound(GPUS, EIGHT, KERNELS, 'syncs', 0),
  Bound(GPUS, EIGHT, (LOOP_SGDM,), 'moved', 23.2, holds=False),
  Bound(GPUS, EIGHT, (LOOP_ADAMW,), 'moved', 36.7, holds=False),
  Bound(GPUS, EIGHT, (LOOP_SGDM, LOOP_ADAMW), 'loops', 0, holds=False),
  Bound(GPUS, EIGHT, KERNELS, 'compile ratio', 2, holds=False),
  Bound(('v5e',), EIGHT, (SGDM, LION), 'moved', 8.8),
  Bound(('v5e',), EIGHT, (ADAMW,), 'moved', 10.8),
  Bound(('v5e',), EIGHT, (SGDM, ADAMW, LION), 'kernels per leaf', 1, exactly=True),
  Bound(('v5e',), EIGHT, (SGDM, ADAMW, LION), 'temporaries', 0.1),
  Bound(('v5e',), EIGHT, (SGDM, ADAMW, LION), 'syncs', 0),
  Bound(('v5e',), STEP_BOTH, (SGDM,), 'collectives', 0),
  Bound(('v5e',), EIGHT, (SGDM, ADAMW, LION), 'scalar kernels', 16, holds=False),
  Bound(('v5e',), EIGHT, (SGDM, ADAMW, LION), 'compile ratio', 2, holds=False),
  Bound(GPUS, TRAIN_8B, (ADAMW,), 'peak', 4.6, holds=False),
  Bound(GPUS, TRAIN_8B, (SGDM,), 'peak', 2.6, holds=False),
  Bound(('h100',), FINE_TUNE_8B, (f'lpmm.adamw{WITHOUT}, kernel',), 'peak', 3.6, holds=False),
  Bound(('h100',), FINE_TUNE_8B, (f'lpmm.adamw, 4-bit moments{WITHOUT}, kernel',), 'peak', 2.6, holds=False),
  Bound(('h100',), FINE_TUNE_8B, (f'lpmm.lion{WITHOUT}, kernel',), 'peak', 2.4, holds=False),
  Bound(('h100',), FINE_TUNE_8B, (ADAFACTOR,), 'peak', 1.5, holds=False),
  Bound(GPUS, TRAIN_8B, (SGDM, ADAMW), 'compile ratio', 2, holds=False),
  Bound(('v5e',), TRAIN_1B, (ADAMW,), 'peak', 5.5, holds=False),
  Bound(('v5e',), STEP_ROWS, (SGDM, ADAMW), 'collectives', 0, holds=False),
  Bound(('v5e',), STEP_BOTH, (ADAMW,), 'collectives', 0, holds=False),
)


class Verdict(NamedTuple):
  """A bound and a row that it is about; what the row gives, or None and why it gives nothing."""

  bound: Bound
  key: Key
  value: float | None
  reason: str

  @property
  def is_met(self) -> bool:
    """Not, where there is no value."""
    if self.value is None:
      return False
    return self.value == self.bound.limit if self.bound.exactly else self.value <= self.bound.limit

  def sentence(self) -> str:
    """Which row, what it gives, and the bound."""
    figure = FIGURES[self.bound.figure]
    sign = '=' if self.bound.exactly else '<='
    found = self.reason if self.value is None else f'{self.value:.{figure.decimals}f}'
    return f'{" | ".join(self.key)}: {figure.title} {found}, bound {sign} {self.bound.limit:g}'


def figure_of(rows: dict[Key, Row], key: Key, name: str) -> float | None:
  """None if the row, or what it is compared with, is not there or has nothing to say."""
  target, model, method = key
  if name == 'cycles' and METHODS[method].driver == 'kernel':
    return None  # They are estimated for XLA's operations alone.
  with contextlib.suppress(KeyError, ZeroDivisionError):
    return FIGURES[name].of(rows[key], rows.get((target, model, baseline(method)), {}))
  return None


def text_of(rows: dict[Key, Row], key: Key, name: str) -> str:
  """A figure as it is printed, with a sign where it is a lower bound, for loops turn more often than is known."""
  value = figure_of(rows, key, name)
  if value is None:
    return ''
  return f'{"≥ " if is_lower_bound(rows[key], name) else ""}{value:.{FIGURES[name].decimals}f}'


def is_lower_bound(row: Row, name: str) -> bool:
  turns_once = METHODS[row['method']].driver == 'loop in one tile'
  return name in COUNTED and row['unknown_loops'] > 0 and not turns_once


def judge(rows: dict[Key, Row], bounds: tuple[Bound, ...] = BOUNDS) -> Iterator[Verdict]:
  for bound in bounds:
    for target in bound.targets:
      for method in bound.methods:
        key = target, bound.model, method
        value = figure_of(rows, key, bound.figure)
        reason = rows.get(key, {}).get('error', 'not measured')
        if value is not None and is_lower_bound(rows[key], bound.figure):
          # It may be more.
          value, reason = None, text_of(rows, key, bound.figure)
        yield Verdict(bound, key, value, reason)


# ---------------------------------------------------------------------------------------------------------------------
# Compiling, in processes of their own
# ---------------------------------------------------------------------------------------------------------------------


def versions(target: str) -> dict[str, str]:
  found = {'python': platform.python_version()}
  for name in ('jax', 'jaxlib', *TARGETS[target].packages, 'optax', 'flax', 'flashoptim-jax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=HERE, capture_output=True, text=True)
  return found | {'commit': commit.stdout.strip()}


def compile_rows(target: str, model: str, names: list[str], seconds: float) -> Iterator[Row]:
  """A row per method. One process makes them in turn; another takes over if it dies or a row takes too long."""
  environment = os.environ | TARGETS[target].environment
  if model in SPLIT:
    environment |= {'TPU_ACCELERATOR_TYPE': 'v5litepod-8', 'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}
  while names:
    command = [sys.executable, str(HERE / 'accelerator_steps.py'), target, model, *names]
    with subprocess.Popen(
      command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as worker:
      log: list[str] = []
      reader = threading.Thread(target=lambda lines=worker.stderr, log=log: log.extend(lines))
      reader.start()
      while names:
        start = time.monotonic()
        timer = threading.Timer(seconds, worker.kill)
        timer.start()
        line = worker.stdout.readline()
        is_late = time.monotonic() - start >= seconds
        timer.cancel()
        if not line:
          worker.kill()
          reader.join()
          last = log[-1].strip() if log else ''
          result = {'error': f'not compiled within {seconds:g} s' if is_late else f'the process died: {last[:300]}'}
        else:
          result = json.loads(line)
        yield {'target': target, 'model': model, 'method': names.pop(0), 'versions': versions(target)} | result
        if not line:
          break


def run(wanted: dict[tuple[str, str], list[str]], seconds: float) -> Iterator[Row]:
  for (target, model), names in wanted.items():
    for row in compile_rows(target, model, names, seconds):
      print(describe(row), flush=True)
      yield row


def describe(row: Row) -> str:
  key = f'{row["target"]} | {row["model"]} | {row["method"]}'
  if 'error' in row:
    return f'{key}: {row["error"]}'
  names = ('kernels', 'syncs', 'moved', 'temporaries', 'peak', 'collectives', 'seconds')
  texts = (f'{FIGURES[name].title} {FIGURES[name].of(row, row):.{FIGURES[name].decimals}f}' for name in names)
  return f'{key}: {", ".join(texts)}'


def by_key(rows: list[Row]) -> dict[Key, Row]:
  """The last of each."""
  return {(row['target'], row['model'], row['method']): row for row in rows}


def select(
  targets: list[str], only: list[str], skip: list[str], done: dict[Key, Row]
) -> dict[tuple[str, str], list[str]]:
  """What is to be made: methods by target and model."""
  wanted: dict[tuple[str, str], list[str]] = {}
  for target in targets:
    for model in MODELS:
      if model in SPLIT and target != 'v5e':
        continue
      for name in METHODS:
        key = target, model, name
        matches = lambda pattern, key=key: fnmatch.fnmatch(' | '.join(key), f'*{pattern}*')
        if fits(model, name) and all(map(matches, only)) and not any(map(matches, skip)) and key not in done:
          wanted.setdefault((target, model), []).append(name)
  return wanted


def check(targets: list[str], seconds: float) -> int:
  """Compiles what the bounds of quick rows are about, says what it found, and gives the exit status."""
  bounds = tuple(bound for bound in BOUNDS if bound.model in (*STEPS, STEP_BOTH))
  wanted: dict[tuple[str, str], list[str]] = {}
  for bound in bounds:
    for target in set(bound.targets) & set(targets):
      names = wanted.setdefault((target, bound.model), [])
      for name in bound.methods:
        names += [other for other in (baseline(name), name) if other not in names]
  rows = by_key(list(run(wanted, seconds)))
  verdicts = [verdict for verdict in judge(rows, bounds) if verdict.key[0] in targets]
  missed = [verdict for verdict in verdicts if verdict.bound.holds and not verdict.is_met]
  for verdict in verdicts:
    if not verdict.bound.holds:
      print(f'{"aim, met" if verdict.is_met else "aim, not met"}: {verdict.sentence()}')
  for verdict in missed:
    print(f'MISSED: {verdict.sentence()}')
  print(f'{sum(verdict.bound.holds for verdict in verdicts) - len(missed)} bounds hold, {len(missed)} do not')
  return 1 if missed else 0


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def line(cells: list[str]) -> str:
  return '| ' + ' | '.join(cells) + ' |'


def model_table(rows: dict[Key, Row], target: str, model: str) -> Iterator[str]:
  (names,) = (names for models, names in COLUMNS.items() if model in models)
  if target == 'v5e':
    names = (*names, 'cycles')
  yield line(['', *(FIGURES[name].title for name in names)])
  yield '|' + '---|' * (1 + len(names))
  for method in METHODS:
    key = target, model, method
    if 'error' in rows.get(key, {}):
      yield line([method, short(rows[key]['error']), *[''] * (len(names) - 1)])
    elif key in rows:
      yield line([method, *(text_of(rows, key, name) for name in names)])


def memory_table(rows: dict[Key, Row], target: str) -> Iterator[str]:
  """Peaks of fine-tuning, and on which cards they fit."""
  yield line(['', *(f'{size}, {tokens}' for size, tokens in FINETUNED.values())])
  yield '|' + '---|' * (1 + len(FINETUNED))
  for method in FINETUNING:
    cells = [fitting(rows, (target, model, method)) for model in FINETUNED]
    if any(cells):
      yield line([method, *cells])


def fitting(rows: dict[Key, Row], key: Key) -> str:
  """A peak in GiB as a cell of `memory_table`."""
  gib = figure_of(rows, key, 'peak GiB')
  if gib is None:
    return short(rows[key]['error']) if key in rows else ''
  if gib <= USABLE * CARDS['24 GB']:
    return f'**{gib:.1f}**'
  return f'{gib:.1f}' if gib <= USABLE * CARDS['80 GB'] else f'({gib:.1f})'


def headline(rows: dict[Key, Row], measured: list[Row]) -> Iterator[str]:
  """What an 8B model takes, for the README: compiled, and measured by `benchmarks/on_gpu.py`."""
  yield line(['one step of fine-tuning, on an H100', 'peak, GiB', 'B/param', 'measured peak, GiB', 'ms a sequence'])
  yield '|' + '---|' * 5
  ran = {row['method']: row for row in measured if row.get('model') == '8B' and 'measured_peak_bytes' in row}
  for method in FINETUNING:
    key = 'h100', FINE_TUNE_8B, method
    found = ['', '']
    if method in ran:
      found = [f'{ran[method]["measured_peak_bytes"] / 2**30:.1f}', f'{ran[method]["best_ms_per_microbatch"]:.0f}']
    yield line([method.removesuffix(', kernel'), fitting(rows, key), text_of(rows, key, 'peak'), *found])


def tables(rows: dict[Key, Row]) -> Iterator[str]:
  for target in TARGETS:
    of_target = [row for key, row in rows.items() if key[0] == target]
    if of_target:
      texts = dict.fromkeys(', '.join(f'{k} {v}' for k, v in r['versions'].items() if k != 'commit') for r in of_target)
      yield f'### {TARGETS[target].title}\n\nWith {"; and ".join(texts)}.\n'
    if any((target, model, method) in rows for model in FINETUNED for method in FINETUNING):
      yield (
        'Peak of one step of fine-tuning a Llama shape, in GiB, by parameters and tokens of a sequence; bold fits a '
        f'card of 24 GB, in parentheses does not fit one of 80 GB ({USABLE:.0%} of each are taken as usable).\n'
      )
      yield from memory_table(rows, target)
      yield ''
    for model in (model for model in MODELS if model not in FINETUNED):
      row = next((row for key, row in rows.items() if key[:2] == (target, model) and 'error' not in row), None)
      if row is not None:
        yield f'{model[0].upper()}{model[1:]}: {row["parameters"] / 1e6:.1f}M parameters in {row["leaves"]} arrays.\n'
        yield from model_table(rows, target, model)
        yield ''
  yield '### Bounds\n'
  held = sum(len(bound.targets) for bound in BOUNDS if bound.holds)
  yield f'`python benchmarks/accelerators.py --check` asserts the first {held}; the others are aims.\n'
  yield line(['target', 'step', 'figure', 'bound', 'found', 'hold'])
  yield '|' + '---|' * 6
  for bound in sorted(BOUNDS, key=lambda bound: not bound.holds):
    for target in bound.targets:
      yield line(bound_cells(rows, bound._replace(targets=(target,))))


def bound_cells(rows: dict[Key, Row], bound: Bound) -> list[str]:
  """Of one target, all methods together."""
  verdicts = list(judge(rows, (bound,)))
  figure = FIGURES[bound.figure]
  found = [
    f'{verdict.key[2]}: {short(verdict.reason) if verdict.value is None else f"{verdict.value:.{figure.decimals}f}"}'
    for verdict in verdicts
  ]
  known = [verdict for verdict in verdicts if verdict.value is not None]
  result = f'{sum(verdict.is_met for verdict in known)} of {len(verdicts)}' if known else ''
  limit = f'{"=" if bound.exactly else "≤"} {bound.limit:g}'
  return [*bound.targets, bound.model, figure.title, limit, '; '.join(found), result]


def short(reason: str) -> str:
  """The beginning of an error, for a cell."""
  return reason.split('\n')[0][:80].replace('|', '/')


def save_plot(file: Path, rows: dict[Key, Row], target: str = 'h100') -> None:
  """Bytes moved by optimizer steps, and peaks of training steps."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure as Canvas

  wanted = [
    ('moved', EIGHT, 'bytes moved by an optimizer step, per parameter'),
    ('peak', TRAIN_1B, 'peak of a training step, bytes per parameter'),
    ('peak', TRAIN_8B, 'peak of a training step, bytes per parameter'),
  ]
  canvas = Canvas(figsize=(17, 5.6), layout='constrained')
  FigureCanvasAgg(canvas)
  for axes, (name, model, label) in zip(canvas.subplots(1, len(wanted)), wanted, strict=True):
    values = {method: figure_of(rows, (target, model, method), name) for method in METHODS}
    values = {method: value for method, value in values.items() if value is not None}
    colors = [
      {'optax': '#bbbbbb', 'flash': '#e69f00'}.get(METHODS[method].by.split()[0])
      or {'kernel': '#0072b2'}.get(METHODS[method].driver, '#56b4e9')
      for method in values
    ]
    bars = axes.barh(range(len(values)), list(values.values()), color=colors)
    axes.bar_label(bars, fmt='%.2f', padding=4)
    if name == 'moved':
      floors = [figure_of(rows, (target, model, method), 'floor') or math.nan for method in values]
      axes.plot(floors, range(len(values)), 'k|', markersize=11, markeredgewidth=2, label='every array once')
      axes.legend(loc='lower right')
    axes.set_yticks(range(len(values)), list(values))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.2 * max(values.values(), default=1))
    axes.set(xlabel=label, title=model)
    axes.grid(axis='x', alpha=0.3)
    axes.set_axisbelow(True)
  canvas.suptitle(f'Compiled for an {TARGETS[target].title}')
  file.parent.mkdir(parents=True, exist_ok=True)
  canvas.savefig(file, dpi=110)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--targets', nargs='+', choices=TARGETS, metavar='TARGET', help=f'of {", ".join(TARGETS)} (default: installed)')
  add('--only', nargs='+', default=[], metavar='PATTERN', help='rows whose "target | model | method" has all of these')
  add('--skip', nargs='+', default=[], metavar='PATTERN', help='not rows that have one of these')
  add('--output', type=Path, default=DEFAULT_RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--again', action='store_true', help='make rows that are in the file, too')
  add('--seconds', type=float, default=600, help='for one row (default %(default)s)')
  add('--check', action='store_true', help='make the quick rows with bounds, write nothing, judge')
  add('--report', action='store_true', help='print tables of the file, and put them into the document')
  add('--measured', type=Path, default=MEASURED, metavar='FILE', help='of an H100 (default %(default)s)')
  add('--document', type=Path, default=DOCUMENT, metavar='FILE', help='(default %(default)s)')
  add('--readme', type=Path, default=Path('README.md'), metavar='FILE', help='(default %(default)s)')
  add(
    '--plot', type=Path, nargs='?', const=DEFAULT_PLOT, metavar='FILE', help=f'draw the file (default {DEFAULT_PLOT})'
  )
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  args = parse_args(argv)
  targets = args.targets or [name for name, target in TARGETS.items() if importlib.util.find_spec(target.plugin)]
  if args.check:
    return check(targets, args.seconds)
  if args.report or args.plot:
    rows = by_key(read(args.output))
    if args.report:
      lines = list(tables(rows))
      print('\n'.join(lines))
      for file, part in ((args.document, lines), (args.readme, headline(rows, read(args.measured)))):
        file.write_text(with_lines(file.read_text(), BEGIN, END, part))
    if args.plot:
      save_plot(args.plot, rows)
    return 0
  done = {} if args.again else by_key(read(args.output))
  for row in run(select(targets, args.only, args.skip, done), args.seconds):
    append(args.output, [row])
  return 0


if __name__ == '__main__':
  sys.exit(main())
