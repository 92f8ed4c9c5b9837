"""Trains a character-level language model with low-precision AdamW or Lion and, beside it, in float32.

  python examples/train_char_lm.py
  python examples/train_char_lm.py --text book.txt --runs adamw-fp32 adamw-8bit lion-fp32 lion-8bit
  python examples/train_char_lm.py --layers 12 --width 256 --batch-size 8 --microbatches 2 --low-memory

All runs start from the same weights and see the same batches. They end in one table (losses, model memory per
parameter, peak memory of the compiled step, step time) and one plot. Without `--text`, the text is what Python's own
`help()` says of the language, in English.

With `--microbatches N`, each batch is computed in N parts, whose gradients are accumulated: in 8 bits by low-precision
runs, in float32 by the others. With `--low-memory`, low-precision runs accumulate during the backward pass, and each
layer's weights are decoded where it uses them: neither weights nor gradients ever exist as a dense tree.
"""

import argparse
import contextlib
import dataclasses
from functools import partial
import json
import math
from pathlib import Path
import platform
import statistics
import time
from typing import Any
from typing import NamedTuple

from checkpoints import Checkpoints
from checkpoints import open_checkpoints
from datasets import Text
from datasets import text
import flax.linen as nn
import jax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TaskID
from rich.progress import TextColumn
from rich.table import Table

import lpmm_optax as lpmm

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
  """What a run trains with: Optax's optimizer where the parameters are dense, else ours of the same name."""

  optimizer: str
  params: lpmm.Format | None
  options: dict[str, Any]
  summary: str


RUNS = {
  'adamw-fp32': Run('adamw', None, {}, 'optax.adamw, all in float32'),
  'adamw-8bit': Run('adamw', lpmm.INT8, {}, 'lpmm.adamw, 8-bit parameters and moments (recommended)'),
  'adamw-8bit-plain': Run('adamw', lpmm.INT8, {'error_feedback': False}, 'the same, stochastic rounding alone'),
  'lion-fp32': Run('lion', None, {}, 'optax.lion, all in float32'),
  'lion-8bit': Run('lion', lpmm.INT8, {}, 'lpmm.lion, 8-bit parameters and momentum'),
}

B1, B2 = 0.9, 0.95
# An optimizer's learning rate, as a fraction of AdamW's, because a sign is larger than most of AdamW's updates; its
# weight decay is larger by as much, for a step decays the weights by the product of the two.
RATES = {'adamw': 1.0, 'lion': 1 / 3}
ROTARY_BASE = 10_000.0
CLIP_NORM = 1.0
WARMUP_STEPS = 100
FINAL_RATE = 0.1  # Of the peak, at the last step.
VALIDATE_EVERY = 100
VALIDATION_WINDOWS = 256
VALIDATION_BATCH_SIZE = 64
TRAIN_LOSS_STEPS = 50  # The last ones, over which the training loss that is reported is the mean.
PLOT_SUFFIXES = ('.png', '.pdf', '.svg')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.split('\n')[0],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='runs:\n' + '\n'.join(f'  {name:<18}{run.summary}' for name, run in RUNS.items()),
  )
  add = parser.add_argument
  add('--text', type=Path, metavar='FILE', help="UTF-8 text to learn (default: the topics of Python's help)")
  first = list(RUNS)[:2]
  add('--runs', nargs='+', choices=RUNS, default=first, metavar='RUN', help=f'see below (default {" ".join(first)})')
  add('--layers', type=int, default=4, help='(default %(default)s)')
  add('--width', type=int, default=128, help='(default %(default)s)')
  add('--heads', type=int, default=4, help='of attention, in each layer (default %(default)s)')
  add('--context', type=int, default=128, help='characters that the model sees at once (default %(default)s)')
  add('--batch-size', type=int, default=16, help='(default %(default)s)')
  accumulator = 'gradients are accumulated in 8 bits, or in float32 by float32 runs (default %(default)s)'
  add('--microbatches', type=int, default=1, metavar='N', help=f'split each batch in N; {accumulator}')
  low_memory = 'decode weights, and accumulate gradients, layer by layer (low-precision runs only)'
  add('--low-memory', action='store_true', help=low_memory)
  add('--steps', type=int, default=1000, help='(default %(default)s)')
  add('--learning-rate', type=float, default=3e-3, help='of AdamW after the warm-up (default %(default)s)')
  add('--weight-decay', type=float, default=0.1, help='of AdamW, on matrices (default %(default)s)')
  add('--seed', type=int, default=0)
  add('--plot', type=Path, default=Path('out/train_char_lm.png'), metavar='FILE', help='(default %(default)s)')
  add('--checkpoint-dir', type=Path, metavar='DIR', help='save all runs at every validation there, and resume from it')
  add('--results', type=Path, metavar='FILE', help='append settings and results of all runs there, a line of JSON')
  args = parser.parse_args(argv)

  args.runs = list(dict.fromkeys(args.runs))
  for name in ('layers', 'width', 'heads', 'context', 'batch_size', 'microbatches', 'steps'):
    if getattr(args, name) < 1:
      parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
  # Rotary embedding takes the features of a head in pairs.
  if args.width % (2 * args.heads):
    parser.error(f'--width {args.width} does not divide into {args.heads} heads of even width')
  if args.batch_size % args.microbatches:
    parser.error(f'--batch-size {args.batch_size} does not divide into {args.microbatches} microbatches')
  # NumPy takes no negative seed, and JAX drops the upper half of a longer one.
  if not 0 <= args.seed < 2**32:
    parser.error(f'--seed must be from 0 to 2**32 - 1, got {args.seed}')
  if args.plot.suffix.lower() not in PLOT_SUFFIXES:
    parser.error(f'--plot must end in {", ".join(PLOT_SUFFIXES)}, got {args.plot}')
  return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: (inputs, targets), int32[count, context] each, where a target is the character after its input
# ---------------------------------------------------------------------------------------------------------------------


def windows(tokens: np.ndarray, starts: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
  index = starts[:, None] + np.arange(context)
  return tokens[index], tokens[index + 1]


def train_batch(data: Text, args: argparse.Namespace, step: int) -> tuple[np.ndarray, np.ndarray]:
  """Windows at random places, which depend on (seed, step) alone: every run sees the same ones."""
  starts = np.random.default_rng((args.seed, step)).integers(0, len(data.train) - args.context, args.batch_size)
  return windows(data.train, starts, args.context)


def train_microbatches(data: Text, args: argparse.Namespace, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """The windows of a batch in equal parts."""
  inputs, targets = train_batch(data, args, step)
  return list(zip(np.split(inputs, args.microbatches), np.split(targets, args.microbatches), strict=True))


def validation_batches(data: Text, args: argparse.Namespace) -> list[tuple[np.ndarray, np.ndarray]]:
  """Windows at even distances, the same for every seed; they overlap where the text is short."""
  starts = np.linspace(0, len(data.validation) - args.context - 1, VALIDATION_WINDOWS).astype(np.int64)
  return [windows(data.validation, part, args.context) for part in starts.reshape(-1, VALIDATION_BATCH_SIZE)]


# ---------------------------------------------------------------------------------------------------------------------
# Model: a Transformer that predicts each character from those before it
# ---------------------------------------------------------------------------------------------------------------------


def rotate(x: jax.Array) -> jax.Array:
  """Turns pairs of features by angles that grow with the position: attention then sees how far apart two are.

  On [batch, length, heads, features]; rotary embedding, Su et al., 2021, of the first half of the features paired with
  the second.
  """
  length, half = x.shape[1], x.shape[-1] // 2
  angles = np.arange(length)[:, None, None] * ROTARY_BASE ** (-np.arange(half) / half)
  cos, sin = (jnp.asarray(f(angles)[None], jnp.float32) for f in (np.cos, np.sin))
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


class Block(nn.Module):
  """Attention, then an MLP, each added to what it reads through a norm."""

  heads: int
  length: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
    """From and to float32[batch * length, width]; None is what a layer of a scan leaves behind."""
    width = x.shape[-1]
    dense = partial(nn.Dense, use_bias=False)
    qkv = dense(3 * width, name='qkv')(nn.RMSNorm(name='attention_norm')(x))
    q, k, v = jnp.moveaxis(qkv.reshape(-1, self.length, 3, self.heads, width // self.heads), 2, 0)
    attended = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    x = x + dense(width, name='attention_out')(attended.reshape(x.shape))
    hidden = nn.gelu(dense(4 * width, name='mlp_in')(nn.RMSNorm(name='mlp_norm')(x)))
    return x + dense(width, name='mlp_out')(hidden), None


class Transformer(nn.Module):
  """Layers of one shape, whose parameters are stacked along a first axis: few large arrays, compiled once.

  Parameters may be quantized: each layer decodes its own where it uses them. Dense ones it takes as they are.
  """

  vocabulary: int
  layers: int
  width: int
  heads: int

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Characters, int32[batch, length], to logits of the next ones, float32[batch, length, vocabulary]."""
    # Each module decodes its own parameters when it is called, a layer in the body of the scan; init gives dense ones.
    decoding = partial(
      nn.map_variables, mapped_collections='params', trans_in_fn=lpmm.dequantize, init=self.is_initializing()
    )
    x = decoding(nn.Embed)(self.vocabulary, self.width, name='characters')(tokens)
    # On a CPU, gradients of matrices take half the time where all characters lie along one axis; and layers that
    # compute their activations again in the backward pass take a fifth of the memory, and no longer.
    layer = nn.remat(decoding(Block))
    stack = nn.scan(layer, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.layers)
    x, _ = stack(self.heads, tokens.shape[1], name='layers')(x.reshape(-1, self.width))
    # Not tied to the embedding: with so few characters that would save little, and a block of 8-bit codes would have
    # one scale for two uses.
    x = decoding(nn.RMSNorm)(name='norm')(x)
    logits = decoding(nn.Dense)(self.vocabulary, use_bias=False, name='head')(x)
    return logits.reshape(*tokens.shape, self.vocabulary)


def make_model(data: Text, args: argparse.Namespace) -> Transformer:
  return Transformer(len(data.vocabulary), args.layers, args.width, args.heads)


def mean_loss(model: Transformer, params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
  """In nats per character."""
  logits = model.apply({'params': params}, inputs)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


def make_schedule(args: argparse.Namespace, rate: float) -> optax.Schedule:
  """A linear warm-up, then a cosine to a tenth; of AdamW's learning rate, times `rate`."""
  warmup = max(1, min(WARMUP_STEPS, args.steps // 2))

  # Optax's own cosine mixes the integer count with floats, which strict dtype promotion forbids.
  def schedule(count):
    step = jnp.asarray(count, jnp.float32)
    cosine = 0.5 + 0.5 * jnp.cos(math.pi * (step - warmup) / max(1, args.steps - warmup))
    decayed = FINAL_RATE + (1 - FINAL_RATE) * cosine
    return rate * args.learning_rate * jnp.where(step < warmup, (step + 1) / warmup, decayed)

  return schedule


def is_matrix(params: Any) -> Any:
  """Where weights decay: not in the gains of the norms, which the stack of layers makes two-dimensional."""
  above = lambda ndim, tree: jax.tree.map(lambda p: p.ndim > ndim, tree, is_leaf=lpmm.is_quantized)
  return {name: above(2 if name == 'layers' else 1, tree) for name, tree in params.items()}


def make_optimizer(name: str, args: argparse.Namespace) -> optax.GradientTransformation:
  """Clipping, then AdamW or Lion, by us or by Optax; of the accumulated gradient, where one is accumulated."""
  run = RUNS[name]
  rate = RATES[run.optimizer]
  common = {
    'learning_rate': make_schedule(args, rate),
    'b1': B1,
    'b2': B2,
    'weight_decay': args.weight_decay / rate,
    'mask': is_matrix,
  }
  clip = optax.clip_by_global_norm(CLIP_NORM)
  if run.params is None:
    tx = optax.chain(clip, getattr(optax, run.optimizer)(**common))
    return optax.MultiSteps(tx, args.microbatches).gradient_transformation() if args.microbatches > 1 else tx
  key = jax.random.key(args.seed)
  tx = lpmm.chain(clip, getattr(lpmm, run.optimizer)(**common, **run.options, key=key))
  if args.microbatches > 1 or args.low_memory:
    tx = lpmm.MultiSteps(tx, args.microbatches, accumulator=lpmm.INT8, key=key)
  return tx


# ---------------------------------------------------------------------------------------------------------------------
# State and step: the same for all runs without --low-memory, since `dequantize` passes dense arrays on and `step` takes
# any optimizer
# ---------------------------------------------------------------------------------------------------------------------


# Compiled once for all runs.
@partial(jax.jit, static_argnames='model')
def init_weights(model: Transformer, key: jax.Array):
  return model.init(key, jnp.zeros((1, 1), jnp.int32))['params']


def make_state(name: str, model: Transformer, tx: optax.GradientTransformation, args: argparse.Namespace):
  """The first (params, opt_state); made anew for each run, because the step donates its arguments."""
  format = RUNS[name].params

  @jax.jit
  def store(params):
    if format is not None:
      params = lpmm.quantize(params, format)
    return params, tx.init(params)

  return store(init_weights(model, jax.random.key(args.seed)))


def make_train_step(name: str, model: Transformer, tx: optax.GradientTransformation, args: argparse.Namespace):
  """Takes one microbatch; parameters change at the last one of a batch."""
  loss_fn = partial(mean_loss, model)

  # Donated buffers go to results of the same shape in order, and codes of parameters and of moments have the same
  # shapes: hence arguments and results come in one order.
  @partial(jax.jit, donate_argnames=('params', 'opt_state'))
  def train_step(params, opt_state, inputs, targets):
    if args.low_memory and RUNS[name].params is not None:
      loss, params, opt_state = lpmm.value_and_step(loss_fn, tx)(params, opt_state, inputs, targets)
    else:
      loss, grads = jax.value_and_grad(loss_fn)(lpmm.dequantize(params), inputs, targets)
      params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, loss

  return train_step


def make_validate(model: Transformer, data: Text, args: argparse.Namespace):
  batches = validation_batches(data, args)

  @jax.jit
  def batch_loss(params, inputs, targets):
    return mean_loss(model, params, inputs, targets)

  return lambda params: statistics.fmean(float(batch_loss(params, *batch)) for batch in batches)


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class History:
  """What a run has seen: per step, loss and seconds; now and then, (step, validation loss)."""

  loss: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)
  validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)


def peak_bytes(compiled: jax.stages.Compiled) -> int:
  """What a step takes at most: arguments, results that are not put in their place, temporaries."""
  memory = compiled.memory_analysis()
  results = memory.output_size_in_bytes - memory.alias_size_in_bytes
  return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def settings(args: argparse.Namespace) -> dict[str, Any]:
  """What must not change between a checkpoint and the run that resumes from it."""
  wanted = {
    name: value for name, value in vars(args).items() if name not in ('runs', 'checkpoint_dir', 'plot', 'results')
  }
  return wanted | {'text': args.text and str(args.text)}


def run(
  name: str, args: argparse.Namespace, data: Text, checkpoints: Checkpoints | None, progress: Progress
) -> dict[str, Any]:
  """Trains the model as RUNS has it under that name, from a checkpoint if there is one."""
  bar = progress.add_task(name, total=args.steps, status='compiling')

  model = make_model(data, args)
  tx = make_optimizer(name, args)
  state = make_state(name, model, tx, args)
  history, start_step = History(), 0
  if checkpoints is not None and (restored := checkpoints.restore(state)) is not None:
    start_step, state, seen = restored
    history = History(**seen)
  params, opt_state = state
  report = lpmm.memory_report(params, opt_state)
  train_step = make_train_step(name, model, tx, args)
  # The first step finds the program compiled here.
  peak = peak_bytes(train_step.lower(params, opt_state, *train_microbatches(data, args, 0)[0]).compile())
  validate = make_validate(model, data, args)

  for step in range(start_step, args.steps):
    microbatches, losses = train_microbatches(data, args, step), []
    start = time.perf_counter()
    for microbatch in microbatches:
      params, opt_state, loss = train_step(params, opt_state, *microbatch)
      losses.append(loss)
    # Reading the losses waits for the step.
    history.loss.append(statistics.fmean(map(float, losses)))
    history.seconds.append(time.perf_counter() - start)
    if (step + 1) % VALIDATE_EVERY == 0 or step + 1 == args.steps:
      history.validation.append((step + 1, validate(params)))
      if checkpoints is not None:
        checkpoints.save(step + 1, (params, opt_state), dataclasses.asdict(history))
    show(progress, bar, history)

  # For a run that had ended before it was resumed.
  show(progress, bar, history)
  return {
    'validation_loss': history.validation[-1][1],
    'train_loss': statistics.fmean(history.loss[-TRAIN_LOSS_STEPS:]),
    'bytes_per_param': report.bytes_per_param,
    'peak_bytes': peak,
    'peak_bytes_per_param': peak / report.parameters,
    'step_ms': 1e3 * statistics.median(history.seconds),
    'steps': args.steps,
    'loss': history.loss,
    'validation_curve': [tuple(point) for point in history.validation],
  }


def show(progress: Progress, bar: TaskID, history: History) -> None:
  """Puts the loss and the rate of the last steps, and the last validation, on a progress bar."""
  loss = statistics.fmean(history.loss[-TRAIN_LOSS_STEPS:])
  validation = f'{history.validation[-1][1]:.3f}' if history.validation else '-'
  recent = history.seconds[-50:]
  status = f'loss {loss:.3f}  validation {validation}  {len(recent) / sum(recent):.1f}/s'
  progress.update(bar, completed=len(history.loss), status=status)


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def print_table(console: Console, results: dict[str, dict[str, Any]]) -> None:
  # Broken by hand, so that all of it fits into 80 columns.
  heads = ('run', 'validation\nloss', 'train\nloss', 'model\nB/param', 'peak\nMiB', 'peak\nB/param', 'step\nms')
  table = Table(*heads)
  table.columns[0].no_wrap = True
  for column in table.columns[1:]:
    column.justify = 'right'
  for name, result in results.items():
    table.add_row(
      name,
      f'{result["validation_loss"]:.4f}',
      f'{result["train_loss"]:.4f}',
      f'{result["bytes_per_param"]:.2f}',
      f'{result["peak_bytes"] / 2**20:.1f}',
      f'{result["peak_bytes_per_param"]:.2f}',
      f'{result["step_ms"]:.1f}',
    )
  console.print(table)


def save_plot(file: Path, results: dict[str, dict[str, Any]], title: str) -> None:
  figure = Figure(figsize=(10, 4), layout='constrained')
  FigureCanvasAgg(figure)
  train_axes, validation_axes = figure.subplots(1, 2, sharex=True)
  for name, result in results.items():
    loss = np.asarray(result['loss'])
    # A running mean over a twentieth of the run, in which single batches no longer show.
    window = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.full(window, 1 / window), 'valid')
    train_axes.plot(np.arange(window, len(loss) + 1), mean, marker='.' if len(mean) < 20 else '', label=name)
    validation_axes.plot(*zip(*result['validation_curve'], strict=True), marker='.', label=name)
  smoothing = f', mean of {window} steps' if window > 1 else ''
  train_axes.set(title='training loss', xlabel='step', ylabel=f'nats per character{smoothing}')
  validation_axes.set(title='validation loss', xlabel='step', ylabel='nats per character')
  for axes in (train_axes, validation_axes):
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
  figure.suptitle(title)
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=150)


def save_results(file: Path, args: argparse.Namespace, data: Text, results: dict[str, dict[str, Any]]) -> None:
  """Appends what it takes to reproduce the runs, and their results, without the curves of single steps."""
  line = {
    'settings': settings(args) | {'runs': args.runs, 'characters': len(data.train) + len(data.validation)},
    'device': jax.devices()[0].device_kind,
    # Python's own text differs from version to version.
    'versions': {
      'python': platform.python_version(),
      'jax': jax.__version__,
      'optax': optax.__version__,
      'lpmm_optax': lpmm.__version__,
    },
    'results': {
      name: {key: value for key, value in result.items() if key != 'loss'} for name, result in results.items()
    },
  }
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open('a') as out:
    out.write(json.dumps(line) + '\n')


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
  """Returns by run: losses, bytes_per_param, peak_bytes, peak_bytes_per_param, step_ms, steps, and the curves."""
  args = parse_args(argv)
  try:
    data = text(args.text)
  except (OSError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error
  # A tenth of the text: where a window fits into it, one fits into the rest.
  if len(data.validation) <= args.context:
    name = args.text or 'the default text'
    characters = f'{len(data.validation)} validation characters of {name}'
    raise SystemExit(f'error: --context {args.context} and one more do not fit into the {characters}')

  console = Console()
  columns = (
    TextColumn('{task.description}'),
    BarColumn(bar_width=12),
    MofNCompleteColumn(),
    TextColumn('{task.fields[status]}'),
  )
  with contextlib.ExitStack() as stack:
    # All before any trains, so that a refusal comes at once.
    folders = {name: args.checkpoint_dir and args.checkpoint_dir / name for name in args.runs}
    checkpoints = {name: stack.enter_context(open_checkpoints(folders[name], settings(args))) for name in args.runs}
    progress = stack.enter_context(Progress(*columns, console=console))
    results = {name: run(name, args, data, checkpoints[name], progress) for name in args.runs}
  print_table(console, results)
  size = f'{args.layers} layers of width {args.width}, context {args.context}'
  save_plot(args.plot, results, f'Character-level Transformer, {size}')
  console.print(str(args.plot), highlight=False, soft_wrap=True)
  if args.results is not None:
    save_results(args.results, args, data, results)
  return results


if __name__ == '__main__':
  main()
