"""Every optimizer that Optax and optax.contrib export, in low precision by default, against float32.

  python benchmarks/optimizers.py --text tinyshakespeare.txt # appends what the results lack, and makes the table
  python benchmarks/optimizers.py --only report              # only makes the table in docs/optimizers.md

Three quadratics of one matrix, with noisy gradients: `wide`, in whose blocks curvatures differ by 10^4; `spike`, where
in one step one gradient in every block is 10^5 times too large; and `low-rank`, where all gradients lie in 8 dimensions
and the loss sees all others as well. And `chars`, for a fortieth of the steps: the character model of the examples with
one layer, on the text. Optimizers are found by name and keep their own defaults. A learning rate that has none is the
best of four in float32, for each task. The loss is relative to that at the start, in the mean over the last tenth of
the steps, for `spike` over all steps after it. Each has its state in the default formats of `low_precision`: with
parameters in 8 bits that are rounded stochastically ("8 bits"), with error feedback where there is one ("feedback"),
with parameters in 16 bits, and with parameters in float32 ("state alone").
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import inspect
import itertools
import math
from pathlib import Path
import statistics
import sys
from typing import Any
from typing import NamedTuple
import warnings

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from records import append
from records import read
from records import with_lines

import lpmm_optax as lpmm

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

import datasets
import train_char_lm

RESULTS = Path('benchmarks/results/optimizers.jsonl')
DOCUMENT = Path('docs/optimizers.md')
BEGIN, END = '<!-- Begin: made by benchmarks/optimizers.py -->', '<!-- End -->'
SHAPE = (32, 128)
RANK = 8
RATES = (1.0, 1e-1, 1e-2, 1e-3)
BATCH, CONTEXT = 8, 32


class Method(NamedTuple):
  """How parameters are stored, and whether `low_precision` is around the optimizer, with feedback if any."""

  params: lpmm.Format | None
  is_ours: bool
  error_feedback: bool | None = None


METHODS = {
  'float32': Method(None, False),
  '8 bits': Method(lpmm.INT8, True, False),
  'feedback': Method(lpmm.INT8, True, True),
  '16 bits': Method(lpmm.INT16, True),
  'state alone': Method(None, True),
}
# What is passed to an update; a line search takes nothing that it does not know.
ARGUMENTS = {'lbfgs': ('value', 'grad', 'value_fn'), 'contrib.sophia': ('obj_fn',)}
LOSES = 1.1


class Task(NamedTuple):
  """A problem.

  Attributes:
    start: the parameters.
    loss: (parameters, step, key, steps) -> loss, what is measured, and noisy gradient.
    first: the share of the steps after which the loss is averaged.
    steps: of one task per step of the others.
  """

  start: Any
  loss: Callable[[Any, jax.Array, jax.Array, int], tuple[jax.Array, Any]]
  first: float = 0.9
  steps: float = 1.0


def quadratic(curvature: jax.Array, target: jax.Array, spike_at: float | None) -> Task:
  """Of independent coordinates; with a spike in the first column, which the loss leaves out."""
  spiked = jnp.zeros(SHAPE).at[:, 0].set(0.0 if spike_at is None else 1e5)
  counts = jnp.ones(SHAPE).at[:, 0].set(1.0 if spike_at is None else 0.0)

  def loss(params, step, key, steps):
    noise = 0.3 * jnp.sqrt(curvature) * jax.random.normal(key, SHAPE)
    gradient = curvature * (params - target) + noise
    if spike_at is not None:
      gradient += jnp.where(step == int(spike_at * steps), spiked, 0.0)
    return jnp.sum(counts * curvature * jnp.square(params - target)), gradient

  return Task(jnp.zeros(SHAPE), loss, 0.9 if spike_at is None else spike_at)


def low_rank(key: jax.Array) -> Task:
  """Regression on inputs from a few dimensions, judged by the distance in all."""
  keys = jax.random.split(key, 3)
  basis = jnp.linalg.qr(jax.random.normal(keys[0], (SHAPE[0], RANK)))[0]
  start = jax.random.normal(keys[1], SHAPE) / SHAPE[0] ** 0.5
  target = start + 0.3 * basis @ jax.random.normal(keys[2], (RANK, SHAPE[1]))

  def loss(params, step, key, steps):
    del step, steps
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (16, RANK)) @ basis.T
    gradient = x.T @ (x @ (params - target) + 0.1 * jax.random.normal(noise, (16, SHAPE[1]))) / 16
    return jnp.sum(jnp.square(params - target)), gradient

  return Task(start, loss)


def characters(text: Path, key: jax.Array) -> Task:
  """The loss of the batch that the gradient is of."""
  data = datasets.text(text)
  model = train_char_lm.Transformer(len(data.vocabulary), layers=1, width=64, heads=4)
  tokens = jnp.asarray(data.train)

  def loss(params, step, key, steps):
    del step, steps
    starts = jax.random.randint(key, (BATCH, 1), 0, len(data.train) - CONTEXT)
    windows = tokens[starts + jnp.arange(CONTEXT + 1)]
    return jax.value_and_grad(train_char_lm.mean_loss, 1)(model, params, windows[:, :-1], windows[:, 1:])

  return Task(train_char_lm.init_weights(model, key), loss, steps=1 / 40)


def make_task(name: str, seed: jax.Array, text: Path | None) -> Task:
  """One of the problems."""
  curvatures, targets = jax.random.split(jax.random.key(seed))
  if name == 'chars':
    assert text is not None
    return characters(text, targets)
  if name == 'low-rank':
    return low_rank(targets)
  target = jax.random.normal(targets, SHAPE)
  if name == 'spike':
    return quadratic(jnp.ones(SHAPE), target, 0.5)
  return quadratic(10.0 ** jax.random.uniform(curvatures, SHAPE, minval=-3.0, maxval=1.0), target, None)


TASKS = ('wide', 'spike', 'low-rank', 'chars')


def optimizers() -> dict[str, Callable[..., optax.GradientTransformation]]:
  """By name, what can be made of a learning rate, or of nothing."""
  found = {}
  for module, prefix in ((optax, ''), (contrib, 'contrib.')):
    for name, make in sorted(vars(module).items()):
      if not inspect.isfunction(make) or name.startswith(('_', 'scale_by_')):
        continue
      parameters = inspect.signature(make).parameters
      needed = [x.name for x in parameters.values() if x.default is x.empty and x.kind is not x.VAR_KEYWORD]
      is_optimizer = name == 'cocob' or any(x.endswith('learning_rate') for x in parameters)
      if is_optimizer and set(needed) <= {'learning_rate'}:
        found[prefix + name] = make
  return found


def needs_rate(make: Callable[..., Any]) -> bool:
  """Whether there is no default."""
  rate = inspect.signature(make).parameters.get('learning_rate')
  return rate is not None and (rate.default is rate.empty or rate.default is None)


def run(
  name: str,
  make: Callable[[jax.Array], Task],
  method: str,
  seeds: Sequence[int],
  steps: int,
  rates: Sequence[float],
) -> list[list[float]]:
  """The mean losses at the end, relative to that of the start, of all seeds for each learning rate, or the default.

  Raises:
    ValueError: if the optimizer has no error feedback, for the method that asks for it.
  """
  format, is_ours, error_feedback = METHODS[method]

  def train(seed, *rate):
    task = make(seed)
    count = int(task.steps * steps)
    first = int(task.first * count)
    start = task.start if format is None else lpmm.quantize(task.start, format)
    inner = optax.with_extra_args_support(optimizers()[name](*rate))
    tx: Any = lpmm.low_precision(inner, error_feedback=error_feedback) if is_ours else inner
    key = jax.random.fold_in(jax.random.key(17), seed)

    def body(i, carry):
      params, state, total = carry
      drawn = jax.random.fold_in(key, i)
      loss, gradient = task.loss(lpmm.dequantize(params), i, drawn, count)
      value_fn = lambda x: task.loss(x, i, drawn, count)[0]
      known = {'value': loss, 'grad': gradient, 'value_fn': value_fn, 'obj_fn': value_fn}
      extra = {argument: known[argument] for argument in ARGUMENTS.get(name, ('value',))}
      if is_ours:
        params, state = lpmm.step(tx, gradient, params, state, **extra)
      else:
        updates, state = tx.update(gradient, state, params, **extra)
        params = optax.apply_updates(params, updates)
      return params, state, total + jnp.where(i >= first, loss, 0.0)

    total = jax.lax.fori_loop(0, count, body, (start, tx.init(start), jnp.float32(0)))[2]
    return total / (count - first) / task.loss(task.start, jnp.int32(0), key, count)[0]

  of_seeds = jax.jit(jax.vmap(train, in_axes=(0, None) if rates else 0))
  return [of_seeds(jnp.array(seeds), *rate).tolist() for rate in ([(rate,) for rate in rates] or [()])]


def measure(file: Path, names: list[str], tasks: list[str], seeds: int, steps: int, text: Path | None) -> None:
  """Runs what is missing in the file, a method's seeds at once, and float32 before low precision."""
  done = {(r['task'], r['optimizer'], r['method'], r['steps']): r for r in read(file)}
  for task, (name, make), method in itertools.product(tasks, optimizers().items(), METHODS):
    key = (task, name, method, steps)
    first = done.get((task, name, 'float32', steps), {})
    if key in done or 'error' in first or (names and name not in names):
      continue
    rates = [first['learning_rate']] if first else list(RATES)
    result = dict(zip(('task', 'optimizer', 'method', 'steps'), key, strict=True))
    try:
      of = functools.partial(make_task, task, text=text)
      losses = run(name, of, method, range(seeds), steps, rates if needs_rate(make) else [])
      mean = [statistics.fmean(x) for x in losses]
      best = min(range(len(losses)), key=lambda i: mean[i] if math.isfinite(mean[i]) else math.inf)
      result['losses'] = losses[best]
      result['learning_rate'] = rates[best] if needs_rate(make) else None
    except Exception as error:
      result['error'] = f'{type(error).__name__}: {error}'.splitlines()[0][:120]
    append(file, [result])
    done[key] = result
    print(result, flush=True)


def ratio(runs: list[dict[str, Any]], name: str, task: str, method: str) -> float | None:
  """Of the losses of a method and of float32, in the geometric mean over the seeds; None without one."""
  losses = {r['method']: r['losses'] for r in runs if (r['optimizer'], r['task']) == (name, task) and 'losses' in r}
  if not {method, 'float32'} <= set(losses):
    return None
  found = [ours / theirs for ours, theirs in zip(losses[method], losses['float32'], strict=True) if theirs > 0]
  return statistics.geometric_mean(found) if found and all(0 < x < math.inf for x in found) else math.inf


def cell(value: float | None) -> str:
  """A ratio, bold where low precision loses."""
  if value is None:
    return ''
  text = f'{value:.2f}' if math.isfinite(value) else 'diverged'
  return f'**{text}**' if value > LOSES else text


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
  """In Markdown."""
  names = sorted({r['optimizer'] for r in runs})
  columns: dict[str, list[float | None]] = {}
  for task in TASKS:
    plain, feedback, wide, state = (
      [ratio(runs, name, task, method) for name in names] for method in METHODS if method != 'float32'
    )
    columns[f'{task}, default'] = [x if y is None else y for x, y in zip(plain, feedback, strict=True)]
    columns[f'{task}, no feedback'] = [None if y is None else x for x, y in zip(plain, feedback, strict=True)]
    columns[f'{task}, 16 bits'], columns[f'{task}, state alone'] = wide, state
  columns = {title: column for title, column in columns.items() if any(x is not None for x in column)}
  yield '| optimizer | ' + ' | '.join(columns) + ' |'
  yield '|---' * (len(columns) + 1) + '|'
  for name, *values in zip(names, *columns.values(), strict=True):
    if any(x is not None for x in values):
      yield f'| `{name}` | ' + ' | '.join(map(cell, values)) + ' |'
  failed = {r['optimizer']: r['error'] for r in runs if 'error' in r and r['method'] != 'feedback'}
  if failed:
    yield from ('', 'These could not be run as the others are:', '')
    yield from (f'* `{name}`: {error}' for name, error in failed.items())


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--results', type=Path, default=RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--document', type=Path, default=DOCUMENT, metavar='FILE', help='(default %(default)s)')
  add('--only', choices=('runs', 'report'), help='one of the two parts')
  add('--optimizers', nargs='*', default=[], metavar='NAME', help='(default all)')
  add('--tasks', nargs='*', choices=TASKS, help='(default all, chars if there is a text)')
  add('--text', type=Path, metavar='FILE', help='UTF-8, for chars')
  add('--seeds', type=int, default=3, help='(default %(default)s)')
  add('--steps', type=int, default=20000, help='(default %(default)s)')
  args = parser.parse_args(argv)
  tasks = args.tasks or [task for task in TASKS if task != 'chars' or args.text]
  if 'chars' in tasks and args.text is None and args.only != 'report':
    parser.error('the task chars needs --text')
  if args.only != 'report':
    warnings.simplefilter('ignore')  # Of Optax's own.
    measure(args.results, args.optimizers, tasks, args.seeds, args.steps, args.text)
  if args.only != 'runs':
    args.document.write_text(with_lines(args.document.read_text(), BEGIN, END, table(read(args.results))))


if __name__ == '__main__':
  main()
