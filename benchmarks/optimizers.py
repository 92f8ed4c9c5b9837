"""Every optimizer that Optax and optax.contrib export, in low precision by default, against float32.

  python benchmarks/optimizers.py               # appends to benchmarks/results/optimizers.jsonl what is missing there
  python benchmarks/optimizers.py --only report # makes the table in docs/optimizers.md

Three quadratics of one matrix, with noisy gradients: `wide`, in whose blocks curvatures differ by 10^4; `spike`, where
in one step one gradient in every block is 10^5 times too large; and `low-rank`, where all gradients lie in 8 dimensions
and the loss sees all others as well. Optimizers are found by name and keep their own defaults. A learning rate that has
none is the best of four in float32, for each task. The loss is relative to that at the start, in the mean over the last
tenth of the steps, for `spike` over all steps after it. Each has its state in the default formats of `low_precision`,
with parameters in 8 bits ("default") and in float32 ("state alone"); "feedback" is that of this package's own.
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

RESULTS = Path('benchmarks/results/optimizers.jsonl')
DOCUMENT = Path('docs/optimizers.md')
BEGIN, END = '<!-- Begin: made by benchmarks/optimizers.py -->', '<!-- End -->'
SHAPE = (32, 128)
RANK = 8
RATES = (1.0, 1e-1, 1e-2, 1e-3)
# Parameters and state as they are stored.
METHODS: dict[str, tuple[lpmm.Format | None, bool]] = {
  'float32': (None, False),
  'default': (lpmm.INT8, True),
  'feedback': (lpmm.INT8, True),
  'state alone': (None, True),
}
WITH_FEEDBACK = {'adam': lpmm.adam, 'adamw': lpmm.adamw}
LOSES = 1.1


class Task(NamedTuple):
  """A problem.

  Attributes:
    start: the parameters.
    loss: of parameters, without noise.
    gradient: (parameters, step, key, steps) -> noisy gradient.
    first: the share of the steps after which the loss is averaged.
  """

  start: jax.Array
  loss: Callable[[jax.Array], jax.Array]
  gradient: Callable[[jax.Array, jax.Array, jax.Array, int], jax.Array]
  first: float


def quadratic(curvature: jax.Array, target: jax.Array, spike_at: float | None) -> Task:
  """Of independent coordinates; with a spike in the first column, which the loss leaves out."""
  spiked = jnp.zeros(SHAPE).at[:, 0].set(0.0 if spike_at is None else 1e5)
  counts = jnp.ones(SHAPE).at[:, 0].set(1.0 if spike_at is None else 0.0)

  def gradient(params, step, key, steps):
    noise = 0.3 * jnp.sqrt(curvature) * jax.random.normal(key, SHAPE)
    clean = curvature * (params - target) + noise
    return clean if spike_at is None else clean + jnp.where(step == int(spike_at * steps), spiked, 0.0)

  loss = lambda params: jnp.sum(counts * curvature * jnp.square(params - target))
  return Task(jnp.zeros(SHAPE), loss, gradient, 0.9 if spike_at is None else spike_at)


def low_rank(key: jax.Array) -> Task:
  """Regression on inputs from a few dimensions, judged by the distance in all."""
  keys = jax.random.split(key, 3)
  basis = jnp.linalg.qr(jax.random.normal(keys[0], (SHAPE[0], RANK)))[0]
  start = jax.random.normal(keys[1], SHAPE) / SHAPE[0] ** 0.5
  target = start + 0.3 * basis @ jax.random.normal(keys[2], (RANK, SHAPE[1]))

  def gradient(params, step, key, steps):
    del step, steps
    inputs, noise = jax.random.split(key)
    x = jax.random.normal(inputs, (16, RANK)) @ basis.T
    return x.T @ (x @ (params - target) + 0.1 * jax.random.normal(noise, (16, SHAPE[1]))) / 16

  return Task(start, lambda params: jnp.sum(jnp.square(params - target)), gradient, 0.9)


def make_task(name: str, seed: int) -> Task:
  """One of the problems."""
  curvatures, targets = jax.random.split(jax.random.key(seed))
  if name == 'low-rank':
    return low_rank(targets)
  target = jax.random.normal(targets, SHAPE)
  if name == 'spike':
    return quadratic(jnp.ones(SHAPE), target, 0.5)
  return quadratic(10.0 ** jax.random.uniform(curvatures, SHAPE, minval=-3.0, maxval=1.0), target, None)


TASKS = ('wide', 'spike', 'low-rank')


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
  task: Task,
  method: str,
  seed: int,
  steps: int,
  rates: Sequence[float],
) -> list[float]:
  """The mean losses at the end, relative to that of the start, with each learning rate; with the default if none."""
  format, is_ours = METHODS[method]
  start = task.start if format is None else lpmm.quantize(task.start, format)
  key = jax.random.fold_in(jax.random.key(17), seed)
  first = int(task.first * steps)

  def train(*rate):
    if method == 'feedback':
      tx: Any = WITH_FEEDBACK[name](*rate)
    else:
      inner = optax.with_extra_args_support(optimizers()[name](*rate))
      tx = lpmm.low_precision(inner) if is_ours else inner

    def body(i, carry):
      params, state, total = carry
      dense = lpmm.dequantize(params)
      loss = task.loss(dense)
      gradient = task.gradient(dense, i, jax.random.fold_in(key, i), steps)
      if is_ours:
        params, state = lpmm.step(tx, gradient, params, state, value=loss)
      else:
        updates, state = tx.update(gradient, state, params, value=loss)
        params = optax.apply_updates(params, updates)
      return params, state, total + jnp.where(i >= first, loss, 0.0)

    total = jax.lax.fori_loop(0, steps, body, (start, tx.init(start), jnp.float32(0)))[2]
    return total / (steps - first) / task.loss(task.start)

  if not rates:
    return [float(jax.jit(train)())]
  if is_ours:
    return [float(jax.jit(functools.partial(train, rate))()) for rate in rates]
  return jax.jit(jax.vmap(train))(jnp.array(rates)).tolist()


def measure(file: Path, names: list[str], seeds: int, steps: int) -> None:
  """Runs what is missing in the file, the first seed of all first, and float32 before low precision."""
  done = {(r['optimizer'], r['task'], r['seed'], r['method'], r['steps']): r for r in read(file)}
  for seed, (name, make), task, method in itertools.product(range(seeds), optimizers().items(), TASKS, METHODS):
    key = (name, task, seed, method, steps)
    first = done.get((name, task, 0, 'float32', steps), {})
    is_wanted = (not names or name in names) and (method != 'feedback' or name in WITH_FEEDBACK)
    if key in done or 'error' in first or not is_wanted:
      continue
    rates = [first['learning_rate']] if first else list(RATES)
    result = dict(zip(('optimizer', 'task', 'seed', 'method', 'steps'), key, strict=True))
    try:
      losses = run(name, make_task(task, seed), method, seed, steps, rates if needs_rate(make) else [])
      result['loss'] = min(losses, key=lambda loss: loss if math.isfinite(loss) else math.inf)
      result['learning_rate'] = rates[losses.index(result['loss'])] if needs_rate(make) else None
    except Exception as error:
      result['error'] = f'{type(error).__name__}: {error}'.splitlines()[0][:120]
    append(file, [result])
    done[key] = result
    print(result, flush=True)


def ratio(runs: list[dict[str, Any]], name: str, task: str, method: str) -> float | None:
  """Of the losses of a method and of float32, in the geometric mean over the seeds that both have; None without one."""
  of = lambda method: {
    r['seed']: r['loss']
    for r in runs
    if (r['optimizer'], r['task'], r['method']) == (name, task, method) and 'loss' in r
  }
  ours, theirs = of(method), of('float32')
  found = [ours[seed] / theirs[seed] for seed in ours.keys() & theirs.keys() if theirs[seed] > 0]
  if not found:
    return None
  return statistics.geometric_mean(found) if all(math.isfinite(x) and x > 0 for x in found) else math.inf


def cell(value: float | None) -> str:
  """A ratio, bold where low precision loses."""
  if value is None:
    return ''
  text = f'{value:.2f}' if math.isfinite(value) else 'diverged'
  return f'**{text}**' if value > LOSES else text


def table(runs: list[dict[str, Any]]) -> Iterator[str]:
  """In Markdown."""
  columns = [(task, method) for task in TASKS for method in METHODS if method != 'float32']
  yield '| optimizer | ' + ' | '.join(f'{task}, {method}' for task, method in columns) + ' | seeds |'
  yield '|---' * (len(columns) + 2) + '|'
  failed = {}
  for name in dict.fromkeys(r['optimizer'] for r in runs):
    own = [r for r in runs if r['optimizer'] == name]
    failed |= {r['optimizer']: r['error'] for r in own if 'error' in r}
    ratios = [ratio(runs, name, *column) for column in columns]
    if any(x is not None for x in ratios):
      yield f'| `{name}` | ' + ' | '.join(map(cell, ratios)) + f' | {len({r["seed"] for r in own})} |'
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
  add('--seeds', type=int, default=3, help='(default %(default)s)')
  add('--steps', type=int, default=20000, help='(default %(default)s)')
  args = parser.parse_args(argv)
  if args.only != 'report':
    warnings.simplefilter('ignore')  # Of Optax's own.
    measure(args.results, args.optimizers, args.seeds, args.steps)
  if args.only != 'runs':
    args.document.write_text(with_lines(args.document.read_text(), BEGIN, END, table(read(args.results))))


if __name__ == '__main__':
  main()
