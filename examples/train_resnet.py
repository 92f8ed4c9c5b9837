"""Trains a ResNet with LPMM-SGDM and, beside it, the same network in full precision.

  python examples/train_resnet.py
  python examples/train_resnet.py --dataset cifar10 --data-dir ~/data --checkpoint-dir checkpoints

Both runs start from the same weights, see the same batches and differ in precision alone. They end in one table
(accuracy, model memory per parameter, peak memory of the compiled step, step time) and one plot. The digits come with
scikit-learn; for CIFAR-10, `--data-dir` is where its archive was unpacked.
"""

import argparse
import contextlib
import dataclasses
from functools import partial
import json
import math
from pathlib import Path
import statistics
import time
from typing import Any
from typing import NamedTuple

from checkpoints import Checkpoints
from checkpoints import open_checkpoints
from datasets import Dataset
from datasets import cifar10
from datasets import digits
import flax.linen as nn
import jax
from jax import lax
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


class Recipe(NamedTuple):
  """How the low-precision run stores what it trains."""

  params: lpmm.Format
  momentum: lpmm.Format
  error_feedback: bool
  summary: str


RECIPES = {
  'int8': Recipe(lpmm.INT8, lpmm.INT8, True, '8-bit parameters and momentum, error feedback (recommended)'),
  'paper': Recipe(lpmm.INT8, lpmm.INT8, False, '8-bit parameters and momentum, stochastic rounding alone'),
  'int16': Recipe(lpmm.INT16, lpmm.INT8, True, '16-bit parameters, 8-bit momentum, error feedback'),
  'bfloat16': Recipe(lpmm.BFLOAT16, lpmm.BFLOAT16, True, 'bfloat16 parameters and momentum, error feedback'),
  'int4-momentum': Recipe(lpmm.INT8, lpmm.INT4, False, '8-bit parameters, 4-bit momentum, stochastic rounding alone'),
}

# What --width, --epochs and --batch-size are where they are not given. Arrays under 4096 elements stay dense, so the
# digits' network is wide enough for nearly all of its parameters to lie in larger ones, as a large network's do.
DEFAULTS = {
  'digits': {'width': 32, 'epochs': 10, 'batch_size': 64},
  'cifar10': {'width': 16, 'epochs': 200, 'batch_size': 128},
}

RUNS = ('lpmm', 'fp32')
MOMENTUM = 0.9
WARMUP_EPOCHS = 1
TEST_BATCH_SIZE = 500
PLOT_SUFFIXES = ('.png', '.pdf', '.svg')


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.split('\n')[0],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog='formats:\n' + '\n'.join(f'  {name:<15}{recipe.summary}' for name, recipe in RECIPES.items()),
  )
  add = parser.add_argument
  either = lambda name: ', '.join(f'{values[name]} for {dataset}' for dataset, values in DEFAULTS.items())
  add('--dataset', choices=DEFAULTS, default='digits')
  add('--data-dir', type=Path, metavar='DIR', help='where cifar-10-batches-bin or cifar-10-batches-py lies')
  add('--depth', type=int, default=20, help='layers of the ResNet, 6n + 2: 20 (default), 32, 56, ...')
  add('--width', type=int, help=f'channels of its first stage (default {either("width")})')
  add('--formats', choices=RECIPES, default='int8', help='how the low-precision run stores its model, see below')
  accumulated = 'added to the momentum or, without error feedback, to an 8-bit accumulator'
  add('--microbatches', type=int, default=1, metavar='N', help=f'split each batch in N, gradients {accumulated}')
  add('--epochs', type=int, help=f'default {either("epochs")}')
  add('--steps', type=int, help='stop after so many steps, on the schedule of all epochs')
  add('--batch-size', type=int, help=f'default {either("batch_size")}')
  add('--learning-rate', type=float, default=0.1, help='after the warm-up (default 0.1)')
  add('--weight-decay', type=float, default=1e-4, help='added to the gradient, times the weights (default 1e-4)')
  add('--seed', type=int, default=0)
  add('--checkpoint-dir', type=Path, metavar='DIR', help='save both runs after every epoch there, and resume from it')
  add('--plot', type=Path, default=Path('out/train_resnet.png'), metavar='FILE', help='(default %(default)s)')
  add('--results', type=Path, metavar='FILE', help='append settings and results of both runs there, a line of JSON')
  args = parser.parse_args(argv)

  for name, value in DEFAULTS[args.dataset].items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  for name in ('width', 'microbatches', 'epochs', 'batch_size'):
    if getattr(args, name) < 1:
      parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
  if args.steps is not None and args.steps < 1:
    parser.error(f'--steps must be at least 1, got {args.steps}')
  # NumPy takes no negative seed, and JAX drops the upper half of a longer one.
  if not 0 <= args.seed < 2**32:
    parser.error(f'--seed must be from 0 to 2**32 - 1, got {args.seed}')
  if args.depth < 8 or args.depth % 6 != 2:
    parser.error(f'--depth must be 6n + 2, such as 20, 32 or 56, got {args.depth}')
  if args.batch_size % args.microbatches:
    parser.error(f'--batch-size {args.batch_size} does not divide into {args.microbatches} microbatches')
  if args.plot.suffix.lower() not in PLOT_SUFFIXES:
    parser.error(f'--plot must end in {", ".join(PLOT_SUFFIXES)}, got {args.plot}')
  if args.dataset == 'cifar10' and args.data_dir is None:
    parser.error('--dataset cifar10 needs --data-dir')
  return args


# ---------------------------------------------------------------------------------------------------------------------
# Data: batches depend on (seed, epoch) and their augmentation on (seed, step), so that a resumed run sees the same ones
# ---------------------------------------------------------------------------------------------------------------------


def epoch_order(data: Dataset, seed: int, epoch: int) -> np.ndarray:
  return np.random.default_rng((seed, epoch)).permutation(len(data.train_labels))


def normalize(data: Dataset, images: jax.Array) -> jax.Array:
  return (images.astype(jnp.float32) - data.mean) / data.std


def augment(data: Dataset, key: jax.Array, images: jax.Array) -> jax.Array:
  """Shifts each image at random, and mirrors half of them where that keeps the label."""
  shift_key, flip_key = jax.random.split(key)
  count, *shape = images.shape
  border = (data.shift, data.shift)
  padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
  corners = jax.random.randint(shift_key, (count, 2), 0, 2 * data.shift + 1)
  images = jax.vmap(lambda image, corner: lax.dynamic_slice(image, (*corner, jnp.int32(0)), shape))(padded, corners)
  if data.flip:
    mirrored = jax.random.bernoulli(flip_key, shape=(count, 1, 1, 1))
    images = jnp.where(mirrored, images[:, :, ::-1], images)
  return images


# ---------------------------------------------------------------------------------------------------------------------
# Model: the ResNet for small images of He et al., 2015, section 4.2
# ---------------------------------------------------------------------------------------------------------------------


class ResNet(nn.Module):
  """Three stages of residual blocks of two 3 x 3 convolutions, each stage at half the resolution and twice the width.

  Shortcuts have no parameters: where the shape changes they take every other pixel and pad channels with zeros.
  """

  depth: int
  width: int
  classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Normalised images, float32[batch, height, width, channels], to logits, float32[batch, classes]."""
    norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
    conv = partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=nn.initializers.he_normal())
    x = nn.relu(norm()(conv(self.width)(x)))
    for stage in range(3):
      features = self.width * 2**stage
      for block in range((self.depth - 2) // 6):
        stride = 2 if stage > 0 and block == 0 else 1
        y = nn.relu(norm()(conv(features, strides=stride)(x)))
        y = norm()(conv(features)(y))
        shortcut = x[:, ::stride, ::stride]
        shortcut = jnp.pad(shortcut, ((0, 0), (0, 0), (0, 0), (0, features - x.shape[-1])))
        x = nn.relu(shortcut + y)
    return nn.Dense(self.classes)(jnp.mean(x, axis=(1, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> optax.Schedule:
  """A linear warm-up, then a cosine to zero."""
  total = args.epochs * steps_per_epoch
  warmup = max(1, min(WARMUP_EPOCHS * steps_per_epoch, total // 2))

  # Optax's own cosine mixes the integer count with floats, which strict dtype promotion forbids.
  def schedule(count):
    step = jnp.asarray(count, jnp.float32)
    cosine = 0.5 + 0.5 * jnp.cos(math.pi * (step - warmup) / max(1, total - warmup))
    return args.learning_rate * jnp.where(step < warmup, (step + 1) / warmup, cosine)

  return schedule


def make_optimizer(name: str, args: argparse.Namespace, schedule: optax.Schedule) -> optax.GradientTransformation:
  """SGD with momentum and coupled weight decay, by us or by Optax, of the mean gradient of a batch's microbatches."""
  recipe = RECIPES[args.formats]
  if name == 'fp32':
    decay, rate, momentum = (
      optax.add_decayed_weights(args.weight_decay),
      optax.scale_by_learning_rate(schedule),
      optax.trace(MOMENTUM),
    )
    # In the order of the other run, so that the two differ in precision alone: with error feedback, a gradient enters
    # the momentum at the rate at which it came; without, as in `optax.sgd`, the momentum takes the rate of the step.
    tx = optax.chain(decay, rate, momentum) if recipe.error_feedback else optax.chain(decay, momentum, rate)
    return tx if args.microbatches == 1 else optax.MultiSteps(tx, args.microbatches).gradient_transformation()
  key = jax.random.key(args.seed)
  tx = lpmm.sgdm(
    schedule,
    MOMENTUM,
    weight_decay=args.weight_decay,
    formats=recipe.momentum,
    error_feedback=recipe.error_feedback,
    key=key,
  )
  if args.microbatches == 1:
    return tx
  # The paper's optimizer has an accumulator. The recommended one needs none, since momentum is linear in the gradients.
  accumulator = lpmm.INTO_MOMENTUM if recipe.error_feedback else lpmm.INT8
  return lpmm.MultiSteps(tx, args.microbatches, accumulator=accumulator, key=key)


# ---------------------------------------------------------------------------------------------------------------------
# State and step: the same for both runs, since `dequantize` passes dense arrays on and `step` takes any optimizer
# ---------------------------------------------------------------------------------------------------------------------


# Compiled once for both runs; the random bits of many small arrays take a compiler seconds.
@partial(jax.jit, static_argnames='model')
def init_variables(model: ResNet, key: jax.Array, image: jax.Array):
  return model.init(key, image, train=False)


def make_state(name: str, model: ResNet, tx: optax.GradientTransformation, data: Dataset, args: argparse.Namespace):
  """The first (params, opt_state, batch_stats); made anew for each run, because the step donates its arguments."""
  image = jnp.zeros((1, *data.train_images.shape[1:]))
  variables = init_variables(model, jax.random.key(args.seed), image)

  @jax.jit
  def store(params):
    if name == 'lpmm':
      params = lpmm.quantize(params, RECIPES[args.formats].params)
    return params, tx.init(params)

  return *store(variables['params']), variables['batch_stats']


def make_microbatches(data: Dataset, args: argparse.Namespace):
  @jax.jit
  def microbatches(images, labels, step):
    """The (images, labels) of each microbatch: parts of the batch, which is augmented as a whole."""
    key = jax.random.fold_in(jax.random.key(args.seed), step)
    parts = (jnp.split(x, args.microbatches) for x in (augment(data, key, images), labels))
    return list(zip(*parts, strict=True))

  return microbatches


def make_train_step(model: ResNet, tx: optax.GradientTransformation, data: Dataset):
  def loss_fn(weights, batch_stats, images, labels):
    variables = {'params': weights, 'batch_stats': batch_stats}
    logits, updated = model.apply(variables, images, train=True, mutable=['batch_stats'])
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
    accuracy = jnp.mean((jnp.argmax(logits, -1) == labels).astype(jnp.float32))
    return loss, (accuracy, updated['batch_stats'])

  # Donated buffers go to results of the same shape in order, and codes of parameters and of momentum have the same
  # shapes: hence arguments and results come in one order.
  @partial(jax.jit, donate_argnames=('params', 'opt_state', 'batch_stats'))
  def train_step(params, opt_state, batch_stats, images, labels):
    """One microbatch; the parameters change with the last one of a batch."""
    weights = lpmm.dequantize(params)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (accuracy, batch_stats)), grads = grad_fn(weights, batch_stats, normalize(data, images), labels)
    params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, batch_stats, loss, accuracy

  return train_step


def make_test(model: ResNet, data: Dataset):
  @jax.jit
  def count_correct(params, batch_stats, images, labels):
    variables = {'params': lpmm.dequantize(params), 'batch_stats': batch_stats}
    logits: Any = model.apply(variables, normalize(data, images), train=False)
    return jnp.sum(jnp.argmax(logits, -1) == labels)

  def test(params, batch_stats) -> float:
    correct = 0
    for start in range(0, len(data.test_labels), TEST_BATCH_SIZE):
      images, labels = (x[start : start + TEST_BATCH_SIZE] for x in (data.test_images, data.test_labels))
      correct += int(count_correct(params, batch_stats, images, labels))
    return correct / len(data.test_labels)

  return test


# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class History:
  """What a run has seen: per step, loss, accuracy on the batch and seconds; per epoch, (step, test accuracy)."""

  loss: list[float] = dataclasses.field(default_factory=list)
  accuracy: list[float] = dataclasses.field(default_factory=list)
  seconds: list[float] = dataclasses.field(default_factory=list)
  test: list[tuple[int, float]] = dataclasses.field(default_factory=list)


def run(
  name: str,
  args: argparse.Namespace,
  data: Dataset,
  checkpoints: Checkpoints | None,
  progress: Progress,
) -> dict[str, Any]:
  """Trains the network named 'lpmm' or 'fp32', from a checkpoint if there is one."""
  steps_per_epoch = len(data.train_labels) // args.batch_size
  total = min(args.steps or math.inf, args.epochs * steps_per_epoch)
  bar = progress.add_task(name, total=total, status='compiling')

  model = ResNet(args.depth, args.width, data.classes)
  tx = make_optimizer(name, args, make_schedule(args, steps_per_epoch))
  state = make_state(name, model, tx, data, args)
  history, step = History(), 0

  if checkpoints is not None and (restored := checkpoints.restore(state)) is not None:
    step, state, seen = restored
    history = History(**seen)
  params, opt_state, batch_stats = state

  # Model memory, as the paper has it: parameters, optimizer state and gradient accumulator. Batch statistics are in
  # neither run's count: they are no parameters, and no optimizer keeps state for them.
  bytes_per_param = lpmm.memory_report(params, opt_state).bytes_per_param
  microbatches, train_step = make_microbatches(data, args), make_train_step(model, tx, data)
  size = args.batch_size // args.microbatches
  # The first step finds the program compiled here.
  lowered = train_step.lower(params, opt_state, batch_stats, data.train_images[:size], data.train_labels[:size])
  memory = lowered.compile().memory_analysis()
  test = make_test(model, data)

  while step < total:
    epoch, position = divmod(step, steps_per_epoch)
    if position == 0:
      order = epoch_order(data, args.seed, epoch)
    index = order[position * args.batch_size : (position + 1) * args.batch_size]
    batch = (data.train_images[index], data.train_labels[index], np.int32(step))
    losses, accuracies = [], []
    start = time.perf_counter()
    for microbatch in microbatches(*batch):
      params, opt_state, batch_stats, loss, accuracy = train_step(params, opt_state, batch_stats, *microbatch)
      losses.append(loss)
      accuracies.append(accuracy)
    # Reading the losses waits for the step.
    history.loss.append(statistics.fmean(map(float, losses)))
    history.seconds.append(time.perf_counter() - start)
    history.accuracy.append(statistics.fmean(map(float, accuracies)))
    step += 1
    if position + 1 == steps_per_epoch or step == total:
      history.test.append((step, test(params, batch_stats)))
    if position + 1 == steps_per_epoch and checkpoints is not None:
      checkpoints.save(step, (params, opt_state, batch_stats), dataclasses.asdict(history))
    show(progress, bar, history, steps_per_epoch)

  # For a run that had ended before it was resumed.
  show(progress, bar, history, steps_per_epoch)
  peak = (
    memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  )
  return {
    'test_accuracy': history.test[-1][1],
    'bytes_per_param': bytes_per_param,
    'peak_bytes': peak,
    'step_ms': 1e3 * statistics.median(history.seconds),
    'steps': step,
    'loss': history.loss,
    'test_curve': [tuple(point) for point in history.test],
  }


def settings(args: argparse.Namespace) -> dict[str, Any]:
  """What must not change between a checkpoint and the run that resumes from it."""
  return {
    name: value
    for name, value in vars(args).items()
    if name not in ('data_dir', 'steps', 'checkpoint_dir', 'plot', 'results')
  }


def show(progress: Progress, bar: TaskID, history: History, steps_per_epoch: int) -> None:
  """Puts the epoch so far, the last test and the rate of the last steps on a progress bar."""
  window = (len(history.loss) - 1) % steps_per_epoch + 1
  loss, train = (statistics.fmean(values[-window:]) for values in (history.loss, history.accuracy))
  test = f'{100 * history.test[-1][1]:.1f} %' if history.test else '-'
  recent = history.seconds[-50:]
  status = f'loss {loss:.3f}  train {100 * train:.1f} %  test {test}  {len(recent) / sum(recent):.1f}/s'
  progress.update(bar, completed=len(history.loss), status=status)


# ---------------------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------------------


def print_table(console: Console, results: dict[str, dict[str, Any]]) -> None:
  table = Table('run', 'test accuracy', 'model memory', 'against fp32', 'step peak', 'step time')
  for column in table.columns[1:]:
    column.justify = 'right'
  for name, result in results.items():
    table.add_row(
      name,
      f'{100 * result["test_accuracy"]:.2f} %',
      f'{result["bytes_per_param"]:.2f} B/param',
      f'{-100 * result["reduction"]:z.1f} %',
      f'{result["peak_bytes"] / 2**20:.1f} MiB',
      f'{result["step_ms"]:.1f} ms',
    )
  console.print(table)


def save_plot(file: Path, results: dict[str, dict[str, Any]], title: str) -> None:
  figure = Figure(figsize=(10, 4), layout='constrained')
  FigureCanvasAgg(figure)
  loss_axes, test_axes = figure.subplots(1, 2, sharex=True)
  for name, result in results.items():
    loss = np.asarray(result['loss'])
    # A running mean over a twentieth of the run, in which single batches no longer show.
    window = max(1, len(loss) // 20)
    mean = np.convolve(loss, np.full(window, 1 / window), 'valid')
    loss_axes.plot(np.arange(window, len(loss) + 1), mean, marker='.' if len(mean) < 20 else '', label=name)
    steps, accuracy = zip(*result['test_curve'], strict=True)
    test_axes.plot(steps, 100 * np.asarray(accuracy), marker='.', label=name)
  smoothing = f', mean of {window} steps' if window > 1 else ''
  loss_axes.set(xlabel='step', ylabel=f'training loss{smoothing}', yscale='log')
  test_axes.set(xlabel='step', ylabel='test accuracy (%)')
  for axes in (loss_axes, test_axes):
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
  figure.suptitle(title)
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=150)


def save_results(file: Path, args: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
  """Appends what it takes to reproduce both runs, and their results, without the curves of single steps."""
  device = jax.devices()[0].device_kind
  versions = {'jax': jax.__version__, 'optax': optax.__version__, 'lpmm_optax': lpmm.__version__}
  line = {'settings': settings(args), 'device': device, 'versions': versions}
  line['results'] = {
    run: {name: value for name, value in result.items() if name != 'loss'} | {'final_loss': result['loss'][-1]}
    for run, result in results.items()
  }
  file.parent.mkdir(parents=True, exist_ok=True)
  with file.open('a') as out:
    out.write(json.dumps(line) + '\n')


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
  """Runs both and returns, by run: test_accuracy, bytes_per_param, reduction, peak_bytes, step_ms, and the curves."""
  args = parse_args(argv)
  try:
    data = digits() if args.dataset == 'digits' else cifar10(args.data_dir)
  except (FileNotFoundError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error
  if args.batch_size > len(data.train_labels):
    raise SystemExit(f'error: --batch-size {args.batch_size} exceeds the {len(data.train_labels)} training images')

  console = Console()
  columns = (
    TextColumn('{task.description}'),
    BarColumn(bar_width=12),
    MofNCompleteColumn(),
    TextColumn('{task.fields[status]}'),
  )
  with contextlib.ExitStack() as stack:
    # Both before either trains, so that a refusal comes at once.
    folders = {name: args.checkpoint_dir and args.checkpoint_dir / name for name in RUNS}
    checkpoints = {name: stack.enter_context(open_checkpoints(folders[name], settings(args))) for name in RUNS}
    progress = stack.enter_context(Progress(*columns, console=console))
    results = {name: run(name, args, data, checkpoints[name], progress) for name in RUNS}
  for result in results.values():
    result['reduction'] = 1 - result['bytes_per_param'] / results['fp32']['bytes_per_param']
  print_table(console, results)
  save_plot(args.plot, results, f'ResNet-{args.depth} on {args.dataset}, formats={args.formats}')
  console.print(str(args.plot), highlight=False, soft_wrap=True)
  if args.results is not None:
    save_results(args.results, args, results)
  return results


if __name__ == '__main__':
  main()
