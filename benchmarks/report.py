"""Tables and plots of the runs that `benchmarks/accuracy.py` has made: docs/results.md, its figures, and summaries.

  python benchmarks/report.py

The summaries are in README.md and docs/accuracy.md. Nothing is in any that the file does not hold.
"""

import argparse
from collections.abc import Iterable
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
from methods import ABLATIONS
from methods import METHODS
from methods import Ablation
from methods import Point
import numpy as np
from records import with_lines
from scipy import stats

TITLES = {
  'digits': "ResNet on scikit-learn's digits",
  'cifar10': 'ResNet on CIFAR-10',
  'chars': 'Character-level Transformer',
  'chars-finetune': 'Character-level Transformer, fine-tuned at a thirtieth of the rate',
  'stories': 'Llama of 15.2M parameters, pretrained (stories15M) and fine-tuned',
  'polarity': 'BERT of 22.7M parameters, pretrained (all-MiniLM-L6-v2) and fine-tuned',
}
METRICS = {
  'digits': ('test accuracy, %', 2),
  'cifar10': ('test accuracy, %', 2),
  'chars': ('validation loss, nats', 4),
  'chars-finetune': ('validation loss, nats', 4),
  'stories': ('validation loss, nats', 4),
  'polarity': ('test accuracy, %', 2),
}
# Rows and tasks of the summaries in docs/accuracy.md and in README.md, and the comments between which they stand.
SUMMARY = (
  'sgdm-fp32-velocity',
  'sgdm-8',
  'sgdm-fp32',
  'sgdm-8-paper',
  'sgdm-8-nearest',
  'adamw-fp32',
  'adamw-8',
  'adamw-8/8/4',
  'adamw-8/4',
  'adamw-8-nearest',
  'lion-fp32',
  'lion-8',
)
SHORT_SUMMARY = (
  'adamw-fp32',
  'adamw-8',
  'adamw-8/8/4',
  'adamw-8/4',
  'adamw-flash',
  'sgdm-fp32-velocity',
  'sgdm-8',
  'sgdm-fp32',
  'sgdm-bf16-nearest',
  'sgdm-8-nearest',
)
SHORT_SUMMARY_TASKS = ('chars', 'chars-finetune', 'stories')
BEGIN, END = '<!-- Begin: made by benchmarks/report.py -->', '<!-- End -->'
INTRODUCTION = """# Results

Made by `python benchmarks/report.py` from the runs in `{results}`, which `benchmarks/accuracy.py` appends to. All
methods of a seed start from the same weights and see the same examples in the same order. Means and standard deviations
are over seeds; differences are to the float32 method of the same form, within a seed and for the same number of
microbatches, with 95 % intervals of Student's t; three seeds give wide ones. With several microbatches, SGD with
feedback adds gradients into the momentum, methods in bfloat16 accumulate in bfloat16, other low-precision ones in 8
bits, float32 ones in float32; the batch statistics of a ResNet are then those of a microbatch. This page is checked
against the file (`tests/benchmarks/test_accuracy.py::test_documents_hold_what_the_runs_give`).
"""


class Row(NamedTuple):
  """One method, with so many microbatches.

  Attributes:
    method: its name.
    microbatches: in a batch.
    hyperparameters: of the optimizer.
    runs: results by seed.
  """

  method: str
  microbatches: int
  hyperparameters: dict[str, Any]
  runs: dict[int, dict[str, Any]]

  def metric(self, name: str = 'metric') -> list[float]:
    """An entry of the results, of every seed."""
    return [run[name] for run in self.runs.values()]


class Group(NamedTuple):
  """All rows of one task with one setting, on one kind of device."""

  task: str
  settings: dict[str, Any]
  device: str
  rows: dict[tuple[str, int], Row]

  def differences(self, row: Row) -> list[float]:
    """To the baseline, of the seeds that both have; none for the baseline itself."""
    baseline = self.rows.get((accuracy.ALL_METHODS[row.method].baseline, row.microbatches))
    if baseline is None or baseline is row:
      return []
    return [row.runs[seed]['metric'] - baseline.runs[seed]['metric'] for seed in row.runs.keys() & baseline.runs.keys()]

  def table_rows(self) -> list[Row]:
    """Without those of ablations alone."""
    return [row for row in self.rows.values() if row.method in METHODS]


def group(runs: list[dict[str, Any]]) -> list[Group]:
  """In the order of tasks and of methods as they are listed.

  Raises:
    ValueError: if there are two runs of a seed, or runs of a method with different hyperparameters.
  """
  groups: dict[str, Group] = {}
  order = lambda run: (
    list(accuracy.TASKS).index(run['config']['task']),
    list(accuracy.ALL_METHODS).index(run['config']['method']),
    run['config']['microbatches'],
    run['config']['seed'],
  )
  for run in sorted(runs, key=order):
    config = run['config']
    key = json.dumps([config['task'], config['settings'], run['device']])
    found = groups.setdefault(key, Group(config['task'], config['settings'], run['device'], {}))
    name = config['method'], config['microbatches']
    row = found.rows.setdefault(name, Row(*name, config['hyperparameters'], {}))
    if row.hyperparameters != config['hyperparameters'] or config['seed'] in row.runs:
      raise ValueError(f'{config}: the file holds another run of this seed, or one with other hyperparameters')
    row.runs[config['seed']] = run['results']
  return list(groups.values())


def base_of(groups: list[Group], task: str) -> Group | None:
  """Of the settings of a task, those with the most methods, from which ablations depart."""
  return max((found for found in groups if found.task == task), key=lambda found: len(found.rows), default=None)


def departed(base: Group, point: Point) -> dict[str, Any]:
  """The settings of a point of an ablation."""
  return base.settings | dict(point.settings)


def of_point(groups: list[Group], ablation: Ablation, point: Point) -> list[Group]:
  """The group that holds a point, if there is one."""
  base = base_of(groups, ablation.task)
  if base is None:
    return []
  wanted = base.task, departed(base, point), base.device
  holds = lambda found: (found.task, found.settings, found.device) == wanted
  return [found for found in groups if holds(found) and (point.method, point.microbatches) in found.rows]


def point_differences(groups: list[Group], ablation: Ablation, point: Point) -> list[float]:
  """To float32, of every seed; none where there are no runs."""
  return [
    difference
    for found in of_point(groups, ablation, point)
    for difference in found.differences(found.rows[point.method, point.microbatches])
  ]


def is_of_an_ablation(groups: list[Group], found: Group) -> bool:
  """Whether a group is there for an ablation alone."""
  base = base_of(groups, found.task)
  points = [
    point
    for ablation in ABLATIONS.values()
    if ablation.task == found.task
    for line in ablation.lines.values()
    for point in line.values()
  ]
  return found is not base and any(found.settings == departed(base, point) for point in points)


def interval(values: list[float]) -> float:
  """Half the width of the 95 % interval of a mean; NaN for fewer than two values."""
  if len(values) < 2:
    return math.nan
  return float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def spread(values: list[float], decimals: int) -> str:
  """Mean and standard deviation, if there is one."""
  mean = f'{statistics.fmean(values):.{decimals}f}'
  return f'{mean} ± {statistics.stdev(values):.{decimals}f}' if len(values) > 1 else mean


def with_interval(differences: list[float], decimals: int) -> str:
  """Empty if there are none, and without an interval if there is one."""
  if not differences:
    return ''
  mean = f'{statistics.fmean(differences):+.{decimals}f}'
  return f'{mean} ± {interval(differences):.{decimals}f}' if len(differences) > 1 else mean


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def table(found: Group) -> Iterator[str]:
  """In Markdown."""
  metric, decimals = METRICS[found.task]
  head = ['method', 'microbatches', 'seeds', metric, 'against float32', 'bytes/param']
  yield '| ' + ' | '.join(head) + ' |'
  yield '|' + '---|' * len(head)
  for row in found.table_rows():
    method = METHODS[row.method]
    cells = [
      f'{row.method}: {method.summary}',
      str(row.microbatches),
      str(len(row.runs)),
      spread(row.metric(), decimals),
      with_interval(found.differences(row), decimals),
      f'{row.metric("bytes_per_param")[0]:.2f}',
    ]
    yield '| ' + ' | '.join(cells) + ' |'


def summary(groups: list[Group], methods: Iterable[str], tasks: Iterable[str]) -> Iterator[str]:
  """One microbatch, in Markdown: the float32 methods' means, and the others' differences to them.

  The bytes are those of the task that needs most.
  """
  bases = [found for task in tasks if (found := base_of(groups, task)) is not None]
  yield '| method | bytes/param | ' + ' | '.join(f'{found.task}: {METRICS[found.task][0]}' for found in bases) + ' |'
  yield '|' + '---|' * (2 + len(bases))
  for name in methods:
    rows = [found.rows.get((name, 1)) for found in bases]
    known = [row for row in rows if row is not None]
    if not known:
      continue
    size = max(x for row in known for x in row.metric('bytes_per_param'))
    cells = [f'{name}: {METHODS[name].summary}', f'{size:.2f}']
    for found, row in zip(bases, rows, strict=True):
      if row is None:
        cells.append('')
        continue
      decimals = METRICS[found.task][1]
      text = with_interval(found.differences(row), decimals) or spread(row.metric(), decimals)
      cells.append(f'{text} ({len(row.runs)})')
    yield '| ' + ' | '.join(cells) + ' |'


def axis_of(ablation: Ablation) -> list[str]:
  """What varies, in order."""
  return list(dict.fromkeys(x for line in ablation.lines.values() for x in line))


def point_cell(groups: list[Group], ablation: Ablation, point: Point) -> str:
  """The mean, and the difference to float32."""
  (row,) = (found.rows[point.method, point.microbatches] for found in of_point(groups, ablation, point))
  decimals = METRICS[ablation.task][1]
  mean = f'{statistics.fmean(row.metric()):.{decimals}f}'
  return f'{mean}: {with_interval(point_differences(groups, ablation, point), decimals)}'


def ablation_table(groups: list[Group], ablation: Ablation) -> Iterator[str]:
  """In Markdown."""
  axis = axis_of(ablation)
  yield f'| {ablation.axis} | ' + ' | '.join(axis) + ' |'
  yield '|' + '---|' * (1 + len(axis))
  for label, line in ablation.lines.items():
    cells = [point_cell(groups, ablation, line[x]) if x in line else '' for x in axis]
    yield f'| {label} | ' + ' | '.join(cells) + ' |'


def document(groups: list[Group], results: Path, figures: dict[int, list[str]], ablations: dict[str, str]) -> str:
  """All sections.

  Args:
    groups: of runs.
    results: the file they are from.
    figures: of every group that is a section, by its place.
    ablations: figures by name.
  """
  parts = [INTRODUCTION.format(results=results)]
  for i, names in figures.items():
    found = groups[i]
    parts.append(f'## {TITLES[found.task]}\n')
    settings = ', '.join(f'{name} {value}' for name, value in found.settings.items())
    metric, decimals = METRICS[found.task]
    initial = statistics.fmean(x for row in found.table_rows() for x in row.metric('initial_metric'))
    parts.append(f'On {found.device}; {settings}. At the start, {metric}: {initial:.{decimals}f}.\n')
    parts.append('\n'.join(table(found)) + '\n')
    parts += [f'![{name}](figures/{name})\n' for name in names]
  if ablations:
    parts.append('## Ablations\n\nMeans over the seeds there are, and differences to float32 with all else equal.\n')
  for name, figure in ablations.items():
    ablation = ABLATIONS[name]
    parts.append(
      f'### {ablation.title[0].upper()}{ablation.title[1:]}\n\n{TITLES[ablation.task]}: {METRICS[ablation.task][0]}.\n'
    )
    parts.append('\n'.join(ablation_table(groups, ablation)) + '\n')
    parts.append(f'![{figure}](figures/{figure})\n')
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
  rows = [(row, found.differences(row)) for row in found.table_rows()]
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
  axes.set_yticks(range(len(rows)), [f'{row.method} x{row.microbatches}' for row, _ in rows])
  axes.invert_yaxis()
  axes.set(xlabel=f'{METRICS[found.task][0]}: difference to float32', title=TITLES[found.task])
  axes.grid(axis='x', alpha=0.3)
  return save(figure, file)


def plot_curves(found: Group, file: Path) -> str:
  """Training losses with one microbatch, means over seeds."""
  rows = [row for row in found.table_rows() if row.microbatches == 1]
  optimizers = sorted({METHODS[row.method].optimizer for row in rows})
  figure = Figure(figsize=(6 * len(optimizers), 4), layout='constrained')
  for axes, optimizer in zip(figure.subplots(1, len(optimizers), squeeze=False)[0], optimizers, strict=True):
    for row in rows:
      if METHODS[row.method].optimizer == optimizer:
        curves = np.array([run['curve'] for run in row.runs.values()])
        axes.plot(curves[0, :, 0], curves[:, :, 1].mean(0), label=row.method, linewidth=1.2)
    axes.set(xlabel='step', ylabel='training loss', title=optimizer)
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  figure.suptitle(TITLES[found.task])
  return save(figure, file)


def plot_underflow(found: Group, file: Path) -> str | None:
  """What share of the updates rounding to nearest would lose, over training, of the runs that measured it."""
  rows = found.table_rows()
  measured = [(row, runs) for row in rows if (runs := [points for points in row.metric('underflow') if points])]
  if not measured:
    return None
  figure = Figure(figsize=(10, 3.6), layout='constrained')
  shares, sizes = figure.subplots(1, 2)
  for row, runs in measured:
    values = np.array(runs).mean(0)
    (line,) = shares.plot(values[:, 0], 100 * values[:, 1], marker='.', label=f'{row.method}, below half a step')
    shares.plot(values[:, 0], 100 * values[:, 3], '--', color=line.get_color(), label=f'{row.method}, of their sum')
    sizes.plot(values[:, 0], values[:, 2], marker='.', color=line.get_color(), label=row.method)
  shares.set(xlabel='step', ylabel='% of the velocity', title='what rounding to nearest would lose', ylim=(-2, 102))
  sizes.set(xlabel='step', ylabel='rms of velocity / grid step', title='size of updates', yscale='log')
  for axes in (shares, sizes):
    axes.grid(alpha=0.3)
    axes.legend(fontsize='small')
  figure.suptitle(TITLES[found.task])
  return save(figure, file)


def plot_ablation(groups: list[Group], ablation: Ablation, file: Path) -> str | None:
  """Differences over what varies, each with its interval; None if some of its runs are not there yet."""
  axis = axis_of(ablation)
  lines = {
    label: [(axis.index(x), point_differences(groups, ablation, point)) for x, point in line.items()]
    for label, line in ablation.lines.items()
  }
  if any(len(differences) < 2 for points in lines.values() for _, differences in points):
    return None
  figure = Figure(figsize=(7, 3.6), layout='constrained')
  axes = figure.subplots()
  for i, (label, points) in enumerate(lines.items()):
    shift = 0.06 * (i - (len(lines) - 1) / 2)
    axes.errorbar(
      [place + shift for place, _ in points],
      [statistics.fmean(differences) for _, differences in points],
      yerr=[interval(differences) for _, differences in points],
      marker='o',
      capsize=3,
      linestyle='-' if ablation.ordered else '',
      linewidth=1.2,
      label=label,
    )
  axes.axhline(0, color='black', linewidth=0.8)
  axes.set_xticks(range(len(axis)), axis)
  axes.set(xlabel=ablation.axis, ylabel=f'{METRICS[ablation.task][0]}\ndifference to float32', title=ablation.title)
  axes.grid(alpha=0.3)
  axes.legend(fontsize='small')
  return save(figure, file)


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--results', type=Path, default=accuracy.DEFAULT_RESULTS, metavar='FILE', help='(default %(default)s)')
  add('--output', type=Path, default=Path('docs/results.md'), metavar='FILE', help='(default %(default)s)')
  add('--summary', type=Path, default=Path('docs/accuracy.md'), metavar='FILE', help='(default %(default)s)')
  add('--readme', type=Path, default=Path('README.md'), metavar='FILE', help='(default %(default)s)')
  args = parser.parse_args(argv)
  groups, folder = group(accuracy.read(args.results)), args.output.parent / 'figures'
  figures = {}
  for i, found in enumerate(groups):
    if is_of_an_ablation(groups, found):
      continue
    name = found.task if base_of(groups, found.task) is found else f'{found.task}-{i}'
    made = [
      plot_differences(found, folder / f'{name}-differences.png'),
      plot_curves(found, folder / f'{name}-curves.png'),
      plot_underflow(found, folder / f'{name}-underflow.png'),
    ]
    figures[i] = [file for file in made if file is not None]
  made = {name: plot_ablation(groups, ablation, folder / f'{name}.png') for name, ablation in ABLATIONS.items()}
  ablations = {name: file for name, file in made.items() if file is not None}
  args.output.write_text(document(groups, args.results, figures, ablations))
  summaries = ((args.summary, SUMMARY, TITLES), (args.readme, SHORT_SUMMARY, SHORT_SUMMARY_TASKS))
  for file, methods, tasks in summaries:
    file.write_text(with_lines(file.read_text(), BEGIN, END, summary(groups, methods, tasks)))
  print(args.output, args.summary, args.readme)


if __name__ == '__main__':
  main()
