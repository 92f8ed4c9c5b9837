"""Trains tasks by methods, in one or several microbatches, over seeds, and appends every run to a file.

  pip install -e '.[examples,benchmarks]'
  python benchmarks/accuracy.py --tasks digits --seeds 0 1 2
  python benchmarks/accuracy.py --tasks chars chars-finetune --text tinyshakespeare.txt --seeds 0 1 2
  python benchmarks/accuracy.py --tasks stories --stories stories15M --text tinyshakespeare.txt --microbatches 1
  python benchmarks/accuracy.py --tasks polarity --minilm DIR --polarity DIR --microbatches 1
  python benchmarks/accuracy.py --ablations block-size random-bits --text tinyshakespeare.txt
  python benchmarks/accuracy.py --list

A run is named by task, settings of the task, method, hyperparameters, microbatches and seed. One that is in the file
already is not repeated; one that was interrupted is, from its start. `benchmarks/report.py` makes tables and plots of
the file.

Seeds differ in the batches, the rounding, and the first weights unless these are pretrained. All methods of a seed
start from the same weights and see the same examples in the same order, however many microbatches they come in. With
`--together`, all seeds of a configuration run at once under vmap: faster where a run alone leaves the device idle, not
on a CPU.
"""

import argparse
from collections.abc import Callable
from collections.abc import Collection
import contextlib
from functools import partial
import importlib.metadata
import itertools
import math
from pathlib import Path
import platform
import subprocess
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
import tokenizers

import lpmm_optax as lpmm

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

import datasets
import llama
from methods import ABLATIONS
from methods import METHODS
from methods import VARIANTS
from methods import Ablation
from methods import Method
from methods import Point
import minilm
from records import append
from records import read
import train_char_lm
import train_resnet

DEFAULT_RESULTS = Path('benchmarks/results/accuracy.jsonl')
ALL_METHODS = METHODS | VARIANTS
CURVE_POINTS = 50
UNDERFLOW_POINTS = 10

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
    weight_decay: by optimizer; SGD adds it to the gradient, the others subtract it.
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

  def hyperparameters(self, optimizer: str) -> dict[str, Any]:
    """All that an optimizer is told."""
    return {
      'rate': self.rates[optimizer],
      'weight_decay': self.weight_decay[optimizer],
      'clip': self.clip.get(optimizer),
      'steps': self.steps,
      'warmup': self.warmup,
      'final': self.final,
    }

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
  steps = settings['epochs'] * per_epoch
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
    steps=steps,
    rates={'sgdm': rate},
    weight_decay={'sgdm': 1e-4},
    warmup=min(per_epoch, steps // 10),
    final=0.0,
    clip={},
  )


def digits(args: argparse.Namespace, **changed: int) -> Task:
  settings = {'depth': 8, 'width': 32, 'batch_size': 64, 'epochs': 20} | changed
  return images(datasets.digits(), settings, rate=0.1)


def cifar10(args: argparse.Namespace, **changed: int) -> Task:
  if args.cifar10 is None:
    raise SystemExit('error: the task cifar10 needs --cifar10, the folder of its archive')
  settings = {'depth': 20, 'width': 16, 'batch_size': 128, 'epochs': args.epochs} | changed
  return images(datasets.cifar10(args.cifar10), settings, rate=0.1)


def characters(args: argparse.Namespace, data: datasets.Text, **changed: int) -> Task:
  """The language model of the examples, on random windows of the text; SGD's rate is in proportion to the batch."""
  settings = {'layers': 4, 'width': 64, 'heads': 4, 'context': 64, 'batch_size': 16, 'steps': 1000} | changed
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
    rates={'sgdm': 0.3 * settings['batch_size'] / 16, 'adamw': 3e-3, 'lion': 1e-3},
    weight_decay={'sgdm': 1e-4, 'adamw': 0.1, 'lion': 0.3},
    warmup=settings['steps'] // 20,
    final=0.1,
    clip={'adamw': 1.0, 'lion': 1.0},
  )


def chars(args: argparse.Namespace, **changed: int) -> Task:
  return characters(args, datasets.text(args.text), **changed)


def chars_finetune(args: argparse.Namespace, **changed: int) -> Task:
  """From weights that AdamW in float32 has trained on the first half of the text, on its second half.

  At a thirtieth of the rate, constant after the warm-up: updates are small against any grid. All seeds start from the
  same weights.
  """
  data = datasets.text(args.text)
  middle = len(data.train) // 2
  pretraining = characters(args, data._replace(train=data.train[:middle]))
  (pretrained,) = train(pretraining, METHODS['adamw-fp32'], 1, [1234], lambda step: None)
  task = characters(args, data._replace(train=data.train[middle:]), **changed)
  return task._replace(
    settings=task.settings | {'pretrained': pretraining.steps},
    init=lambda seed: (pretrained.weights, ()),
    rates={optimizer: rate / 30 for optimizer, rate in task.rates.items()},
    final=1.0,
  )


def stories(args: argparse.Namespace, **changed: int) -> Task:
  """A real pretrained Llama, stories15M as `benchmarks/convert_stories.py` writes it, fine-tuned on the text.

  For two and a half epochs: on a GPU, under a minute a method, five seeds at once; on a CPU, some hours.
  """
  if args.stories is None or args.text is None:
    raise SystemExit('error: the task stories needs --stories, the folder of its model, and --text')
  config = llama.parse_config(llama.read_config(args.stories))
  tokenizer = tokenizers.Tokenizer.from_file(str(args.stories / 'tokenizer.json'))
  tokens = np.asarray(tokenizer.encode(args.text.read_text(encoding='utf-8'), add_special_tokens=False).ids, np.int32)
  settings = {'batch_size': 16, 'context': 256, 'steps': 200} | changed
  context = settings['context']
  settings |= {'model': 'stories15M', 'text': args.text.name, 'tokens': len(tokens)}
  pretrained = llama.load(args.stories, config, None)
  train, validation = np.split(tokens, [len(tokens) - len(tokens) // 10])
  held_out = np.linspace(0, len(validation) - context - 1, 32).astype(np.int64).reshape(2, -1)

  def mean_loss(weights, inputs, targets):
    return jnp.mean(llama.losses(config, weights, inputs, targets, jnp.float32))

  def batch(seed, step):
    starts = np.random.default_rng((seed, step)).integers(0, len(train) - context, settings['batch_size'])
    return train_char_lm.windows(train, starts, context)

  compiled = jax.jit(mean_loss)
  windows = [train_char_lm.windows(validation, starts, context) for starts in held_out]
  return Task(
    settings=settings,
    init=lambda seed: (pretrained, ()),
    loss=lambda weights, extra, *batch: (mean_loss(weights, *batch), extra),
    batch=batch,
    evaluate=lambda weights, extra: float(np.mean([compiled(weights, *window) for window in windows])),
    metric='validation loss',
    steps=settings['steps'],
    rates={'adamw': 1e-4, 'lion': 3e-5},
    weight_decay={'adamw': 0.1, 'lion': 0.3},
    warmup=settings['steps'] // 10,
    final=0.1,
    clip={'adamw': 1.0, 'lion': 1.0},
  )


def polarity(args: argparse.Namespace, **changed: int) -> Task:
  """A pretrained sentence encoder, all-MiniLM-L6-v2, and a head, fine-tuned whole to tell praise from blame."""
  if args.minilm is None or args.polarity is None:
    raise SystemExit(
      'error: the task polarity needs --minilm, the folder of its model, and --polarity, of its sentences'
    )
  settings = {'batch_size': 16, 'length': 32, 'steps': 100} | changed
  tokens, labels = minilm.sentences(args.polarity, args.minilm, settings['length'])
  pretrained = minilm.load(args.minilm)
  order = np.random.default_rng(0).permutation(len(labels))
  train, test = np.split(order, [len(order) - len(order) // 10])

  def loss(weights, extra, tokens, labels):
    values = optax.softmax_cross_entropy_with_integer_labels(minilm.logits(weights, tokens), labels)
    return jnp.mean(values), extra

  def batch(seed, step):
    per_epoch = len(train) // settings['batch_size']
    shuffled = np.random.default_rng((seed, step // per_epoch)).permutation(train)
    index = shuffled[step % per_epoch * settings['batch_size'] :][: settings['batch_size']]
    return tokens[index], labels[index]

  predict = jax.jit(lambda weights, tokens: jnp.argmax(minilm.logits(weights, tokens), axis=1))

  def accuracy(weights, extra):
    del extra
    correct = [predict(weights, tokens[part]) == labels[part] for part in np.array_split(test, 5)]
    return 100 * float(np.mean(np.concatenate(correct)))

  return Task(
    settings=settings,
    init=lambda seed: (pretrained, ()),
    loss=loss,
    batch=batch,
    evaluate=accuracy,
    metric='test accuracy',
    steps=settings['steps'],
    rates={'adamw': 1e-4, 'lion': 3e-5},
    weight_decay={'adamw': 0.01, 'lion': 0.03},
    warmup=settings['steps'] // 10,
    final=0.0,
    clip={'adamw': 1.0, 'lion': 1.0},
  )


TASKS = {
  'digits': digits,
  'cifar10': cifar10,
  'chars': chars,
  'chars-finetune': chars_finetune,
  'stories': stories,
  'polarity': polarity,
}

# ---------------------------------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
  """Of one run: the last weights and extra, dense, and what is written down of it."""

  weights: Any
  extra: Any
  results: dict[str, Any]


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


def to_float32(params: Any) -> Any:
  return jax.tree.map(lambda x: x.astype(jnp.float32), lpmm.dequantize(params))


def first(tree: Any) -> Any:
  return jax.tree.map(lambda x: x[0], tree)


def over_seeds(fn: Callable, count: int) -> Callable:
  """Over the first axis of all arrays: under vmap, or, for one seed, as it is, for vmap turns every cond into both."""
  if count > 1:
    return jax.vmap(fn)
  return lambda *args: jax.tree.map(lambda x: x[None], fn(*first(args)))


def train(
  task: Task, method: Method, microbatches: int, seeds: list[int], report: Callable[[int], None]
) -> list[Outcome]:
  """One run per seed, all at once.

  Args:
    task: what is trained.
    method: how.
    microbatches: into which each batch is split.
    seeds: of the first weights, the batches and the rounding.
    report: called with the number of steps done.

  Returns:
    The runs in the order of their seeds. Everything in between has a first axis of seeds.
  """
  tx = make_optimizer(task, method, microbatches, jax.random.key(0))

  def store(seed, weights):
    if isinstance(method.params, lpmm.Format):
      params = lpmm.quantize(weights, method.params)
    else:
      params = jax.tree.map(lambda x: x.astype(method.params), weights)
    return params, make_optimizer(task, method, microbatches, jax.random.key(seed)).init(params)

  def step(params, opt_state, extra, *batch):
    # Computed in float32 whatever is stored.
    grad_fn = jax.value_and_grad(task.loss, has_aux=True)
    (loss, extra), grads = grad_fn(to_float32(params), extra, *batch)
    params, opt_state = lpmm.step(tx, grads, params, opt_state)
    return params, opt_state, extra, loss

  def measure(params, opt_state):
    """Of all quantized parameters: shares as means over leaves, weighted by their sizes."""
    report = lpmm.underflow_report(params, wanted_update(opt_state))
    below_half, rms_steps, lost = zip(*report.values(), strict=True)
    sizes = [x.size for x in jax.tree.leaves(params, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x)]
    mean = lambda values: jnp.average(jnp.stack(values), weights=jnp.array(sizes, jnp.float32))
    return jnp.stack([mean(below_half), jnp.sqrt(mean([x**2 for x in rms_steps])), mean(lost)])

  store, measure = (jax.jit(over_seeds(fn, len(seeds))) for fn in (store, measure))
  step = jax.jit(over_seeds(step, len(seeds)), donate_argnums=(0, 1, 2))
  initial = [task.init(seed) for seed in seeds]
  weights, extra = jax.tree.map(lambda *x: jnp.stack(x), *initial)
  params, opt_state = store(jnp.asarray(seeds, jnp.uint32), weights)
  bytes_per_param = lpmm.memory_report(*first((params, opt_state))).bytes_per_param
  has_velocity = method.baseline.endswith('velocity') and isinstance(method.params, lpmm.Format) and microbatches == 1

  state, losses, underflow = (params, opt_state, extra), [], []
  start = time.perf_counter()
  for i in range(task.steps):
    batch = [np.stack(x) for x in zip(*(task.batch(seed, i) for seed in seeds), strict=True)]
    parts = zip(*(np.split(x, microbatches, axis=1) for x in batch), strict=True)
    values = []
    for part in parts:
      *state, loss = step(*state, *part)
      values.append(loss)
    losses.append(np.mean(values, axis=0))
    if has_velocity and (i + 1) % max(1, task.steps // UNDERFLOW_POINTS) == 0:
      underflow.append((i + 1, np.asarray(measure(state[0], state[1]))))
    report(i + 1)
  seconds = time.perf_counter() - start

  outcomes = []
  for i, (first_weights, first_extra) in enumerate(initial):
    weights, extra = jax.tree.map(lambda x, i=i: x[i], (to_float32(state[0]), state[2]))
    moved = jax.tree.map(lambda a, b: a - b, weights, first_weights)
    curve = [float(x[i]) for x in losses]
    results = {
      'metric': task.evaluate(weights, extra),
      'initial_metric': task.evaluate(first_weights, first_extra),
      'train_loss': float(np.mean(curve[-max(1, task.steps // 20) :])),
      'distance': float(optax.tree.norm(moved)),
      'bytes_per_param': bytes_per_param,
      'seconds': seconds,
      'runs_together': len(seeds),
      'curve': thinned(curve),
      'underflow': [[step, *map(float, shares[i])] for step, shares in underflow],
    }
    outcomes.append(Outcome(weights, extra, results))
  return outcomes


def thinned(losses: list[float]) -> list[tuple[int, float]]:
  """(step, mean loss since the point before)."""
  ends = np.unique(np.linspace(0, len(losses), CURVE_POINTS + 1).astype(int))
  return [(int(b), float(np.mean(losses[a:b]))) for a, b in itertools.pairwise(ends)]


# ---------------------------------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
  versions = {'python': platform.python_version(), 'lpmm_optax': lpmm.__version__}
  for name in ('jax', 'optax', 'flax', 'numpy', 'flashoptim-jax'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[name] = importlib.metadata.version(name)
  # Of this file's repository; empty outside of one.
  commit = subprocess.run(['git', 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True)
  return {'device': jax.devices()[0].device_kind, 'versions': versions, 'commit': commit.stdout.strip()}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--tasks', nargs='+', choices=TASKS, default=[], metavar='TASK', help=f'of {", ".join(TASKS)}')
  add('--methods', nargs='+', choices=METHODS, metavar='METHOD', help='(default all that fit the task)')
  add('--microbatches', nargs='+', type=int, default=[1, 8], metavar='N', help='(default 1 8)')
  add('--ablations', nargs='+', choices=ABLATIONS, default=[], metavar='NAME', help=f'of {", ".join(ABLATIONS)}')
  add('--seeds', nargs='+', type=int, default=[0, 1, 2], metavar='SEED', help='(default 0 1 2)')
  add('--together', action='store_true', help='all seeds of a configuration at once, under vmap')
  add('--text', type=Path, metavar='FILE', help="for the tasks of language (default for characters: Python's help)")
  add('--stories', type=Path, metavar='DIR', help='what benchmarks/convert_stories.py has written')
  add('--minilm', type=Path, metavar='DIR', help='of all-MiniLM-L6-v2, see benchmarks/minilm.py')
  add('--polarity', type=Path, metavar='DIR', help='of rt-polarity.neg and rt-polarity.pos')
  add('--cifar10', type=Path, metavar='DIR', help='where the archive of CIFAR-10 was unpacked')
  add('--epochs', type=int, default=200, help='of CIFAR-10 (default %(default)s)')
  add('--steps', type=int, help='stop after so many, for a rehearsal')
  add('--results', type=Path, default=DEFAULT_RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--list', action='store_true', help='list methods and ablations, and stop')
  args = parser.parse_args(argv)
  if not (args.tasks or args.ablations or args.list):
    parser.error('nothing to do: name --tasks or --ablations')
  return args


def table_points(args: argparse.Namespace, optimizers: Collection[str]) -> list[Point]:
  """Methods x microbatches, as far as they fit."""
  return [
    Point(name, count)
    for count in args.microbatches
    for name in args.methods or METHODS
    if METHODS[name].optimizer in optimizers and (count == 1 or METHODS[name].accumulator is not None)
  ]


def ablation_points(ablation: Ablation) -> list[Point]:
  """Each preceded by its baseline."""
  points = [point for line in ablation.lines.values() for point in line.values()]
  return [x for point in points for x in (point._replace(method=ALL_METHODS[point.method].baseline), point)]


def run(args: argparse.Namespace, task_name: str, task: Task, points: list[Point]) -> None:
  """What the file lacks of points x seeds, appended to it."""
  done = [run['config'] for run in read(args.results)]
  todo: dict[tuple[str, int, int | None], list[dict[str, Any]]] = {}
  for seed in args.seeds:
    for method, count, _ in points:
      config = {
        'task': task_name,
        'settings': task.settings,
        'method': method,
        'hyperparameters': task.hyperparameters(ALL_METHODS[method].optimizer),
        'microbatches': count,
        'seed': seed,
      }
      if config not in done:
        done.append(config)
        todo.setdefault((method, count, None if args.together else seed), []).append(config)
  columns = (TextColumn('{task.description}'), BarColumn(bar_width=12), MofNCompleteColumn(), TimeRemainingColumn())
  with Progress(*columns, console=Console(stderr=True)) as progress:
    all_runs = progress.add_task(task_name, total=len(todo))
    for (method, count, _), configs in todo.items():
      seeds = [config['seed'] for config in configs]
      title = f'{task_name} {method} x{count} seed {" ".join(map(str, seeds))}'
      bar = progress.add_task(title, total=task.steps)
      advance = lambda step, bar=bar: progress.update(bar, completed=step)
      with jax.numpy_dtype_promotion('standard'):
        outcomes = train(task, ALL_METHODS[method], count, seeds, advance)
      made = about()
      runs = [{'config': c, 'results': outcome.results} | made for c, outcome in zip(configs, outcomes, strict=True)]
      append(args.results, runs)
      progress.remove_task(bar)
      progress.advance(all_runs)
      metrics = ' '.join(f'{outcome.results["metric"]:.4f}' for outcome in outcomes)
      progress.console.print(f'{title}: {task.metric} {metrics}', highlight=False)


def main(argv: list[str] | None = None) -> None:
  args = parse_args(argv)
  if args.list:
    for name, method in METHODS.items():
      print(f'{name:<20}{method.summary}')
    for name, ablation in ABLATIONS.items():
      print(f'{name:<20}{ablation.title} ({ablation.task})')
    return
  args.results.parent.mkdir(parents=True, exist_ok=True)
  for name in args.tasks:
    task = TASKS[name](args)
    if args.steps is not None:
      task = task._replace(settings=task.settings | {'steps': args.steps}, steps=args.steps, warmup=1)
    run(args, name, task, table_points(args, task.rates))
  for ablation in map(ABLATIONS.get, args.ablations):
    by_settings: dict[tuple, list[Point]] = {}
    for point in ablation_points(ablation):
      by_settings.setdefault(tuple(point.settings.items()), []).append(point)
    for settings, points in by_settings.items():
      run(args, ablation.task, TASKS[ablation.task](args, **dict(settings)), points)


if __name__ == '__main__':
  main()
