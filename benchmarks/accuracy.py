"""Trains tasks by methods, in one or several microbatches, over seeds, and appends every run to a file.

  pip install -e '.[examples,benchmarks]'
  python benchmarks/accuracy.py --tasks digits --seeds 0 1 2
  python benchmarks/accuracy.py --tasks chars chars-finetune --text tinyshakespeare.txt --seeds 0 1 2
  python benchmarks/accuracy.py --list

A run is named by task, settings of the task, method, microbatches and seed. One that is in the file already is not
repeated; one that was interrupted is, from its start. `benchmarks/report.py` makes tables and plots of the file.

Seeds differ in the first weights, the batches and the rounding. All methods of a seed start from the same weights and
see the same examples in the same order, however many microbatches they come in.
"""

import argparse
from collections.abc import Callable
import contextlib
import dataclasses
from functools import partial
import importlib.metadata
import itertools
import json
import math
from pathlib import Path
import platform
import sys
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.progress import TimeRemainingColumn

import lpmm_optax as lpmm

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

import datasets
import train_char_lm
import train_resnet

DEFAULT_RESULTS = Path('benchmarks/results/accuracy.jsonl')
CURVE_POINTS = 50
UNDERFLOW_POINTS = 10
MOMENTUM = 0.9
B1, B2 = 0.9, 0.95

# ---------------------------------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------------------------------


class Task(NamedTuple):
  """What is trained.

  Attributes:
    settings: what a run depends on beside method, microbatches and seed.
    init: seed to (weights, extra), in float32; extra is what the model keeps that is not trained.
    loss: `(weights, extra, *microbatch) -> (loss, extra)`.
    batch: `(seed, step)` to the arrays of a batch, examples along their first axis.
    evaluate: `(weights, extra)` to the metric.
    metric: its name; accuracies are percentages.
    steps: of the optimizer.
    rates: peak learning rate of each optimizer that the task is trained by.
    weight_decay: by optimizer; SGD adds it to the gradient, AdamW subtracts it.
    warmup: steps to the peak, from which a cosine falls to `final` of it.
    final: a fraction.
    clip: by optimizer, the largest global norm of a gradient, if any.
  """

  settings: dict[str, Any]
  init: Callable[[int], tuple[Any, Any]]
  loss: Callable[..., tuple[jax.Array, Any]]
  batch: Callable[[int, int], tuple[Any, ...]]
  evaluate: Callable[[Any, Any], float]
  metric: str
  steps: int
  rates: dict[str, float]
  weight_decay: dict[str, float]
  warmup: int
  final: float
  clip: dict[str, float]

  def schedule(self, optimizer: str) -> optax.Schedule:
    """Of the optimizer's step."""

    def schedule(count):
      step = jnp.asarray(count, jnp.float32)
      done = jnp.clip((step - self.warmup) / max(1, self.steps - self.warmup), 0, 1)
      decayed = self.final + (1 - self.final) * (0.5 + 0.5 * jnp.cos(math.pi * done))
      return self.rates[optimizer] * jnp.where(step < self.warmup, (step + 1) / max(1, self.warmup), decayed)

    return schedule


def images(data: datasets.Dataset, settings: dict[str, Any], rate: float) -> Task:
  """A ResNet with BatchNorm, whose statistics are the extra state."""
  model = train_resnet.ResNet(settings['depth'], settings['width'], data.classes)
  size = settings['batch_size']
  per_epoch = len(data.train_labels) // size
  image = jnp.zeros((1, *data.train_images.shape[1:]))
  augment = jax.jit(partial(train_resnet.augment, data))

  @jax.jit
  def variables(key):
    return model.init(key, image, train=False)

  def init(seed):
    made = variables(jax.random.key(seed))
    return made['params'], made['batch_stats']

  def loss(weights, stats, pictures, labels):
    pictures = train_resnet.normalize(data, pictures).astype(jax.tree.leaves(weights)[0].dtype)
    logits, updated = model.apply(
      {'params': weights, 'batch_stats': stats}, pictures, train=True, mutable=['batch_stats']
    )
    values = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.mean(values), updated['batch_stats']

  def batch(seed, step):
    epoch, position = divmod(step, per_epoch)
    index = train_resnet.epoch_order(data, seed, epoch)[position * size : (position + 1) * size]
    return augment(jax.random.fold_in(jax.random.key(seed), step), data.train_images[index]), data.train_labels[index]

  test = train_resnet.make_test(model, data)
  return Task(
    settings=settings,
    init=init,
    loss=loss,
    batch=batch,
    evaluate=lambda weights, stats: 100 * test(weights, stats),
    metric='test accuracy',
    steps=settings['epochs'] * per_epoch,
    rates={'sgdm': rate},
    weight_decay={'sgdm': 1e-4},
    warmup=per_epoch,
    final=0.0,
    clip={},
  )


def digits(args: argparse.Namespace) -> Task:
  settings = {'depth': 8, 'width': 32, 'batch_size': 64, 'epochs': 20}
  return images(datasets.digits(), settings, rate=0.1)


def cifar10(args: argparse.Namespace) -> Task:
  if args.cifar10 is None:
    raise SystemExit('error: the task cifar10 needs --cifar10, the folder of its archive')
  settings = {'depth': 20, 'width': 16, 'batch_size': 128, 'epochs': args.epochs}
  return images(datasets.cifar10(args.cifar10), settings, rate=0.1)


def characters(args: argparse.Namespace, data: datasets.Text, **changed: Any) -> Task:
  """The language model of the examples, on random windows of the text."""
  settings = {'layers': 4, 'width': 64, 'heads': 4, 'context': 64, 'batch_size': 16, 'steps': 1000}
  text = 'Python' if args.text is None else args.text.name
  settings |= {'text': text, 'characters': len(data.train) + len(data.validation)}
  shape = argparse.Namespace(**settings)
  model = train_char_lm.make_model(data, shape)
  windows = train_char_lm.validation_batches(data, shape)
  mean_loss = jax.jit(partial(train_char_lm.mean_loss, model))

  return Task(
    settings=settings,
    init=lambda seed: (train_char_lm.init_weights(model, jax.random.key(seed)), ()),
    loss=lambda weights, extra, *batch: (train_char_lm.mean_loss(model, weights, *batch), extra),
    batch=lambda seed, step: train_char_lm.train_batch(data, argparse.Namespace(**settings, seed=seed), step),
    evaluate=lambda weights, extra: float(np.mean([mean_loss(weights, *window) for window in windows])),
    metric='validation loss',
    steps=settings['steps'],
    rates={'sgdm': 0.3, 'adamw': 3e-3},
    weight_decay={'sgdm': 1e-4, 'adamw': 0.1},
    warmup=50,
    final=0.1,
    clip={'adamw': 1.0},
  )._replace(**changed)


def chars(args: argparse.Namespace) -> Task:
  return characters(args, datasets.text(args.text))


def chars_finetune(args: argparse.Namespace) -> Task:
  """From weights that AdamW in float32 has trained on the first half of the text, on its second half.

  At a thirtieth of the rate, and without a schedule: updates are small against any grid.
  """
  data = datasets.text(args.text)
  middle = len(data.train) // 2
  pretraining = characters(args, data._replace(train=data.train[:middle]))
  weights, _ = train(pretraining, METHODS['adamw-fp32'], 1, 1234, lambda step: None)[:2]
  task = characters(args, data._replace(train=data.train[middle:]))
  return task._replace(
    settings=task.settings | {'pretrained': pretraining.steps},
    init=lambda seed: (jax.tree.map(jnp.copy, weights), ()),
    rates={optimizer: rate / 30 for optimizer, rate in task.rates.items()},
    final=1.0,
  )


TASKS = {'digits': digits, 'cifar10': cifar10, 'chars': chars, 'chars-finetune': chars_finetune}

# ---------------------------------------------------------------------------------------------------------------------
# Methods
# ---------------------------------------------------------------------------------------------------------------------

NEAREST = dataclasses.replace(lpmm.INT8, rounding='nearest')
BFLOAT16_NEAREST = dataclasses.replace(lpmm.BFLOAT16, rounding='nearest')


class Method(NamedTuple):
  """How it is trained.

  Attributes:
    optimizer: 'sgdm' or 'adamw'.
    params: the format of parameters, or their dtype.
    make_tx: of a task's hyperparameters and a key.
    accumulator: ours for microbatches, 'optax' for that of Optax, None for a method that takes no microbatches.
    baseline: in float32, with which it is compared.
    summary: for tables.
  """

  optimizer: str
  params: Any
  make_tx: Callable[..., optax.GradientTransformation]
  accumulator: Any
  baseline: str
  summary: str


def optax_sgd(rate, decay, key):
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, MOMENTUM))


def optax_velocity(rate, decay, key):
  """Each gradient at the rate at which it came, as error feedback has it."""
  return optax.chain(optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate), optax.trace(MOMENTUM))


def optax_adamw(rate, decay, key):
  return optax.adamw(rate, B1, B2, weight_decay=decay)


def our_sgdm(formats=lpmm.INT8, error_feedback=True):
  return lambda rate, decay, key: lpmm.sgdm(
    rate, MOMENTUM, weight_decay=decay, formats=formats, error_feedback=error_feedback, key=key
  )


def our_adamw(error_feedback=True, formats='default'):
  return lambda rate, decay, key: lpmm.adamw(
    rate, B1, B2, weight_decay=decay, error_feedback=error_feedback, formats=formats, key=key
  )


def flash_adamw(rate, decay, key):
  """It has a step of its own, and no updates."""
  import flashoptim_jax as flashoptim  # For this method alone.

  tx = flashoptim.flash_adamw(rate, B1, B2, weight_decay=decay, fused=jax.default_backend() == 'gpu')
  step = lambda grads, params, opt_state: tx.step(params, opt_state, grads)
  return lpmm.InPlaceTransformation(tx.init, None, step, obstacles=lambda params: {})


INTO = lpmm.INTO_MOMENTUM
METHODS = {
  'sgdm-fp32': Method('sgdm', jnp.float32, optax_sgd, 'optax', 'sgdm-fp32', 'optax.sgd, float32'),
  'sgdm-fp32-velocity': Method(
    'sgdm', jnp.float32, optax_velocity, 'optax', 'sgdm-fp32-velocity', 'velocity form, float32'
  ),
  'sgdm-bf16-nearest': Method(
    'sgdm', BFLOAT16_NEAREST, our_sgdm(BFLOAT16_NEAREST, False), BFLOAT16_NEAREST, 'sgdm-fp32', 'bfloat16, nearest'
  ),
  'sgdm-bf16': Method(
    'sgdm', lpmm.BFLOAT16, our_sgdm(lpmm.BFLOAT16, False), lpmm.BFLOAT16, 'sgdm-fp32', 'bfloat16, stochastic'
  ),
  'sgdm-8-nearest': Method('sgdm', NEAREST, our_sgdm(NEAREST, False), NEAREST, 'sgdm-fp32', '8/8/8, nearest'),
  'sgdm-8-paper': Method(
    'sgdm', lpmm.INT8, our_sgdm(lpmm.INT8, False), lpmm.INT8, 'sgdm-fp32', "8/8/8, stochastic (the paper's)"
  ),
  'sgdm-8': Method(
    'sgdm', lpmm.INT8, our_sgdm(), INTO, 'sgdm-fp32-velocity', '8/8 into momentum, feedback (recommended)'
  ),
  'sgdm-16/8': Method(
    'sgdm', lpmm.INT16, our_sgdm(), INTO, 'sgdm-fp32-velocity', '16-bit parameters, 8-bit momentum, feedback'
  ),
  'sgdm-8/4': Method('sgdm', lpmm.INT8, our_sgdm(lpmm.INT4, False), lpmm.INT8, 'sgdm-fp32', '8/4/8, stochastic'),
  'sgdm-4/8': Method(
    'sgdm', lpmm.INT4, our_sgdm(), INTO, 'sgdm-fp32-velocity', '4-bit parameters, 8-bit momentum, feedback'
  ),
  'adamw-fp32': Method('adamw', jnp.float32, optax_adamw, 'optax', 'adamw-fp32', 'optax.adamw, float32'),
  'adamw-8': Method(
    'adamw', lpmm.INT8, our_adamw(), lpmm.INT8, 'adamw-fp32', '8/8/8 and accumulator, feedback (recommended)'
  ),
  'adamw-8-plain': Method(
    'adamw', lpmm.INT8, our_adamw(False), lpmm.INT8, 'adamw-fp32', '8/8/8 and accumulator, stochastic'
  ),
  'adamw-flash': Method('adamw', jnp.bfloat16, flash_adamw, None, 'adamw-fp32', 'flashoptim-jax'),
}

# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(task: Task, method: Method, microbatches: int, key: jax.Array) -> Any:
  """Clipping, then the optimizer, of the accumulated gradient."""
  tx = method.make_tx(task.schedule(method.optimizer), task.weight_decay[method.optimizer], key)
  clip = [optax.clip_by_global_norm(task.clip[method.optimizer])] if method.optimizer in task.clip else []
  if method.accumulator == 'optax':
    tx = optax.chain(*clip, tx)
    return tx if microbatches == 1 else optax.MultiSteps(tx, microbatches).gradient_transformation()
  if clip:
    tx = lpmm.chain(*clip, tx)
  return tx if microbatches == 1 else lpmm.MultiSteps(tx, microbatches, accumulator=method.accumulator, key=key)


def wanted_update(opt_state: Any) -> Any:
  """What SGD adds to the parameters before it is rounded, up to a sign; None where there is no velocity."""
  found = [x for _, x in optax.tree.get_all_with_path(opt_state, 'trace')]
  return lpmm.dequantize(found[0]) if len(found) == 1 else None


def train(
  task: Task, method: Method, microbatches: int, seed: int, report: Callable[[int], None]
) -> tuple[Any, Any, dict[str, Any]]:
  """The last (weights, extra), dense, and what happened on the way."""
  tx = make_optimizer(task, method, microbatches, jax.random.key(seed))
  weights, extra = task.init(seed)
  initial = jax.tree.map(jnp.copy, weights)

  @jax.jit
  def store(weights):
    if isinstance(method.params, lpmm.Format):
      params = lpmm.quantize(weights, method.params)
    else:
      params = jax.tree.map(lambda x: x.astype(method.params), weights)
    return params, tx.init(params)

  @partial(jax.jit, donate_argnums=(0, 1, 2))
  def step(params, opt_state, extra, *batch):
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)
    (loss, extra), grads = grad_fn(lpmm.dequantize(params), extra, *batch)
    params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, extra, loss

  params, opt_state = store(weights)
  state = (params, opt_state, extra)
  bytes_per_param = lpmm.memory_report(params, opt_state).bytes_per_param
  losses, underflow = [], []
  velocity_form = method.baseline.endswith('velocity') and isinstance(method.params, lpmm.Format) and microbatches == 1
  measure = jax.jit(lambda params, opt_state: lpmm.underflow_report(params, wanted_update(opt_state)))
  start = time.perf_counter()
  for i in range(task.steps):
    batch = task.batch(seed, i)
    parts = zip(*(np.split(np.asarray(x), microbatches) for x in batch), strict=True)
    values = []
    for part in parts:
      *state, loss = step(*state, *part)
      values.append(loss)
    losses.append(sum(map(float, values)) / microbatches)
    if velocity_form and (i + 1) % max(1, task.steps // UNDERFLOW_POINTS) == 0:
      by_leaf = measure(state[0], state[1])
      underflow.append([i + 1, *(float(np.mean(x)) for x in zip(*by_leaf.values(), strict=True))])
    report(i + 1)
  params, _, extra = state
  weights = jax.tree.map(lambda x: x.astype(jnp.float32), lpmm.dequantize(params))
  moved = sum(float(jnp.sum((a - b) ** 2)) for a, b in zip(*map(jax.tree.leaves, (weights, initial)), strict=True))
  return (
    weights,
    extra,
    {
      'metric': task.evaluate(weights, extra),
      'initial_metric': task.evaluate(initial, task.init(seed)[1]),
      'train_loss': float(np.mean(losses[-max(1, task.steps // 20) :])),
      'distance': math.sqrt(moved),
      'bytes_per_param': bytes_per_param,
      'seconds': time.perf_counter() - start,
      'curve': thinned(losses),
      'underflow': underflow,
    },
  )


def thinned(losses: list[float]) -> list[tuple[int, float]]:
  """(step, mean loss since the point before)."""
  ends = np.unique(np.linspace(0, len(losses), CURVE_POINTS + 1).astype(int))
  return [(int(b), float(np.mean(losses[a:b]))) for a, b in itertools.pairwise(ends)]


# ---------------------------------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------------------------------


def read(file: Path) -> list[dict[str, Any]]:
  """The runs in a file; none if there is no file."""
  return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def about() -> dict[str, Any]:
  versions = {'python': platform.python_version(), 'lpmm_optax': lpmm.__version__}
  for name in ('jax', 'optax', 'flax', 'numpy', 'flashoptim-jax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  return {'device': jax.devices()[0].device_kind, 'versions': versions}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--tasks', nargs='+', choices=TASKS, default=['digits'], metavar='TASK', help=f'of {", ".join(TASKS)}')
  add('--methods', nargs='+', choices=METHODS, metavar='METHOD', help='(default all that fit the task)')
  add('--microbatches', nargs='+', type=int, default=[1, 8], metavar='N', help='(default 1 8)')
  add('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='SEED', help='(default 0 1 2)')
  add('--text', type=Path, metavar='FILE', help="for the tasks of characters (default: Python's help)")
  add('--cifar10', type=Path, metavar='DIR', help='where the archive of CIFAR-10 was unpacked')
  add('--epochs', type=int, default=200, help='of CIFAR-10 (default %(default)s)')
  add('--results', type=Path, default=DEFAULT_RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--list', action='store_true', help='list the methods, and stop')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  args = parse_args(argv)
  if args.list:
    for name, method in METHODS.items():
      print(f'{name:<20}{method.summary}')
    return
  done = [run['config'] for run in read(args.results)]
  args.results.parent.mkdir(parents=True, exist_ok=True)
  columns = (TextColumn('{task.description}'), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn())
  for task_name in args.tasks:
    task = TASKS[task_name](args)
    configs = [
      {'task': task_name, 'settings': task.settings, 'method': name, 'microbatches': count, 'seed': seed}
      for seed in args.seeds
      for count in args.microbatches
      for name in args.methods or METHODS
      if METHODS[name].optimizer in task.rates and (count == 1 or METHODS[name].accumulator is not None)
    ]
    todo = [config for config in configs if config not in done]
    with Progress(*columns, console=Console(stderr=True)) as progress:
      all_runs = progress.add_task(task_name, total=len(todo))
      for config in todo:
        title = f'{config["method"]} x{config["microbatches"]} seed {config["seed"]}'
        bar = progress.add_task(title, total=task.steps)
        method = METHODS[config['method']]
        with jax.numpy_dtype_promotion('standard'):
          advance = lambda step, bar=bar: progress.update(bar, completed=step)
          *_, results = train(task, method, config['microbatches'], config['seed'], advance)
        with args.results.open('a') as out:
          out.write(json.dumps({'config': config, 'results': results} | about()) + '\n')
        progress.remove_task(bar)
        progress.advance(all_runs)
        progress.console.print(f'{task_name} {title}: {task.metric} {results["metric"]:.4f}', highlight=False)


if __name__ == '__main__':
  main()
