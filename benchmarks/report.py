"""Tables and plots of the runs that `benchmarks/accuracy.py` has made: docs/results.md and its figures.

  python benchmarks/report.py

Nothing is in them that the file does not hold.
"""

import argparse
from collections.abc import Iterator
import json
import math
from pathlib import Path
import statistics
from typing import Any
from typing import NamedTuple

import accuracy
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

TITLES = {
  'digits': "ResNet on scikit-learn's digits",
  'cifar10': 'ResNet on CIFAR-10',
  'chars': 'Character-level Transformer',
  'chars-finetune': 'Character-level Transformer, fine-tuned at a thirtieth of the rate',
}
METRICS = {
  'digits': ('test accuracy, %', 2),
  'cifar10': ('test accuracy, %', 2),
  'chars': ('validation loss, nats', 4),
  'chars-finetune': ('validation loss, nats', 4),
}
INTRODUCTION = """# Results

Made by `python benchmarks/report.py` from the runs in `{results}`, which `benchmarks/accuracy.py` appends to. All
methods of a seed start from the same weights and see the same examples in the same order. Means and standard deviations
are over seeds; differences are to the float32 method of the same form, within a seed and for the same number of
microbatches, with 95 % intervals of Student's t. Three seeds give wide ones.
"""


class Row(NamedTuple):
  """One method, with so many microbatches.

  Attributes:
    method: its name.
    microbatches: in a batch.
    runs: results by seed.
  """

  method: str
  microbatches: int
  runs: dict[int, dict[str, Any]]

  def metric(self, name: str = 'metric') -> list[float]:
    """An entry of the results, of every seed."""
    return [run[name] for run in self.runs.values()]


class Group(NamedTuple):
  """All rows of one task with one setting."""

  task: str
  settings: dict[str, Any]
  rows: dict[tuple[str, int], Row]

  def differences(self, row: Row) -> list[float]:
    """To the baseline, of the seeds that both have; none for the baseline itself."""
    baseline = self.rows.get((accuracy.METHODS[row.method].baseline, row.microbatches))
    if baseline is None or baseline is row:
      return []
    return [row.runs[seed]['metric'] - baseline.runs[seed]['metric'] for seed in row.runs.keys() & baseline.runs.keys()]


def group(runs: list[dict[str, Any]]) -> list[Group]:
  """In the order of tasks and of methods as they are listed."""
  groups: dict[str, Group] = {}
  order = lambda run: (
    list(accuracy.TASKS).index(run['config']['task']),
    list(accuracy.METHODS).index(run['config']['method']),
    run['config']['microbatches'],
    run['config']['seed'],
  )
  for run in sorted(runs, key=order):
    config = run['config']
    key = json.dumps([config['task'], config['settings']])
    found = groups.setdefault(key, Group(config['task'], config['settings'], {}))
    name = config['method'], config['microbatches']
    found.rows.setdefault(name, Row(*name, {})).runs[config['seed']] = run['results']
  return list(groups.values())


def interval(values: list[float]) -> float:
  """Half the width of the 95 % interval of a mean; NaN for fewer than two values."""
  if len(values) < 2:
    return math.nan
  return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float], decimals: int) -> str:
  deviation = statistics.stdev(values) if len(values) > 1 else math.nan
  return f'{statistics.fmean(values):.{decimals}f} ± {deviation:.{decimals}f}'


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(found: Group) -> Iterator[str]:
  """In Markdown."""
  metric, decimals = METRICS[found.task]
  head = ['method', 'microbatches', 'seeds', metric, 'against float32', 'bytes/param']
  yield '| ' + ' | '.join(head) + ' |'
  yield '|' + '---|' * len(head)
  for row in found.rows.values():
    method, differences = accuracy.METHODS[row.method], found.differences(row)
    against = ''
    if differences:
      against = f'{statistics.fmean(differences):+.{decimals}f} ± {interval(differences):.{decimals}f}'
    cells = [
      f'{row.method}: {method.summary}',
      str(row.microbatches),
      str(len(row.runs)),
      spread(row.metric(), decimals),
      against,
      f'{row.metric("bytes_per_param")[0]:.2f}',
    ]
    yield '| ' + ' | '.join(cells) + ' |'


def document(groups: list[Group], results: Path, figures: dict[int, list[str]]) -> str:
  parts = [INTRODUCTION.format(results=results)]
  for i, found in enumerate(groups):
    parts.append(f'## {TITLES[found.task]}\n')
    settings = ', '.join(f'{name} {value}' for name, value in found.settings.items())
    metric, decimals = METRICS[found.task]
    initial = statistics.fmean(x for row in found.rows.values() for x in row.metric('initial_metric'))
    parts.append(f'Settings: {settings}. At the start, {metric}: {initial:.{decimals}f}.\n')
    parts.append('\n'.join(table(found)) + '\n')
    parts += [f'![{name}](figures/{name})\n' for name in figures.get(i, [])]
  return '\n'.join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def save(figure: Figure, file: Path) -> str:
  FigureCanvasAgg(figure)
  file.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(file, dpi=130)
  return file.name


def plot_differences(found: Group, file: Path) -> str | None:
  """Every method against float32, with its interval."""
  rows = [(row, found.differences(row)) for row in found.rows.values()]
  rows = [(row, differences) for row, differences in rows if len(differences) > 1]
  if not rows:
    return None
  figure = Figure(figsize=(8, 1.4 + 0.28 * len(rows)), layout='constrained')
  axes = figure.subplots()
  for place, (row, differences) in enumerate(rows):
    color = 'C0' if row.microbatches == 1 else 'C1'
    mean = statistics.fmean(differences)
    axes.errorbar(mean, place, xerr=interval(differences), fmt='o', color=color, capsize=3)
  axes.axvline(0, color='black', linewidth=0.8)
  axes.set_yticks(range(len(rows)), [f'{row.method}, {row.microbatches} microbatches' for row, _ in rows])
  axes.invert_yaxis()
  axes.set(xlabel=f'{METRICS[found.task][0]}: difference to float32', title=TITLES[found.task])
  axes.grid(axis='x', alpha=0.3)
  return save(figure, file)


def plot_curves(found: Group, file: Path) -> str:
  """Training losses with one microbatch, means over seeds."""
  rows = [row for row in found.rows.values() if row.microbatches == 1]
  optimizers = sorted({accuracy.METHODS[row.method].optimizer for row in rows})
  figure = Figure(figsize=(6 * len(optimizers), 4), layout='constrained')
  for axes, optimizer in zip(figure.subplots(1, len(optimizers), squeeze=False)[0], optimizers, strict=True):
    for row in rows:
      if accuracy.METHODS[row.method].optimizer == optimizer:
        curves = np.array([run['curve'] for run in row.runs.values()])
        axes.plot(curves[0, :, 0], curves[:, :, 1].mean(0), label=row.method, linewidth=1.2)
    axes.set(xlabel='step', ylabel='training loss', title=optimizer)
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  figure.suptitle(TITLES[found.task])
  return save(figure, file)


def plot_underflow(found: Group, file: Path) -> str | None:
  """What share of the updates rounding to nearest would lose, over training."""
  rows = [row for row in found.rows.values() if any(row.metric('underflow'))]
  if not rows:
    return None
  figure = Figure(figsize=(10, 3.6), layout='constrained')
  shares, sizes = figure.subplots(1, 2)
  for row in rows:
    values = np.array(row.metric('underflow')).mean(0)
    (line,) = shares.plot(values[:, 0], 100 * values[:, 1], marker='.', label=f'{row.method}, below half a step')
    shares.plot(values[:, 0], 100 * values[:, 3], '--', color=line.get_color(), label=f'{row.method}, of their sum')
    sizes.plot(values[:, 0], values[:, 2], marker='.', color=line.get_color(), label=row.method)
  shares.set(xlabel='step', ylabel='% of updates', title='what rounding to nearest would lose', ylim=(-2, 102))
  sizes.set(xlabel='step', ylabel='rms of update / grid step', title='size of updates', yscale='log')
  for axes in (shares, sizes):
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  figure.suptitle(TITLES[found.task])
  return save(figure, file)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--results', type=Path, default=accuracy.DEFAULT_RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--output', type=Path, default=Path('docs/results.md'), metavar='FILE', help='(default %(default)s)')
  args = parser.parse_args(argv)
  groups = group(accuracy.read(args.results))
  figures = {}
  for i, found in enumerate(groups):
    name = found.task if [other.task for other in groups].count(found.task) == 1 else f'{found.task}-{i}'
    folder = args.output.parent / 'figures'
    made = [
      plot_differences(found, folder / f'{name}-differences.png'),
      plot_curves(found, folder / f'{name}-curves.png'),
      plot_underflow(found, folder / f'{name}-underflow.png'),
    ]
    figures[i] = [file for file in made if file is not None]
  args.output.write_text(document(groups, args.results, figures))
  print(args.output)


if __name__ == '__main__':
  main()
