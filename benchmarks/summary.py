"""Accuracy over seeds, from the lines that the examples appended to their `--results FILE`.

  for seed in 0 1 2; do for formats in int8 paper; do
    python examples/train_resnet.py --seed $seed --formats $formats --results benchmarks/results/digits.jsonl
  done; done
  python benchmarks/summary.py benchmarks/results/digits.jsonl

  file=benchmarks/results/char_lm.jsonl
  for seed in 0 1 2; do
    python examples/train_char_lm.py --seed $seed --runs adamw-fp32 adamw-8bit adamw-8bit-plain --results $file
    python examples/train_char_lm.py --seed $seed --runs lion-fp32 lion-8bit --results $file
  done
  python benchmarks/summary.py $file

Lines that differ in the seed alone are summarised together: mean and standard deviation of a run over seeds, and the
mean of the differences within a seed, run - baseline, with its 95 % interval (Student's t). A character-level run is a
row of its own; its lines may also differ in the choice of runs. Of a run that was repeated, the last result counts.
"""

import argparse
from collections.abc import Callable
from collections.abc import Iterator
import json
import math
from pathlib import Path
import statistics
from typing import NamedTuple

# Two-sided 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}

# One run's results by seed, the runs of equal settings by name, and these with their settings.
Results = dict[int, dict]
Runs = dict[str, Results]
Group = tuple[dict, Runs]


def read(file: Path) -> list[Group]:
  groups: dict[str, Group] = {}
  for line in file.read_text().splitlines():
    record = json.loads(line)
    settings = {name: value for name, value in record['settings'].items() if name not in ('seed', 'runs')}
    _, runs = groups.setdefault(json.dumps(settings), (settings, {}))
    for name, result in record['results'].items():
      runs.setdefault(name, {})[record['settings']['seed']] = result
  return list(groups.values())


class Metric(NamedTuple):
  """A result's entry, and how to print it."""

  name: str
  scale: float
  decimals: int
  unit: str

  def spread(self, results: Results) -> str:
    """Mean and standard deviation over seeds."""
    values = [self.scale * result[self.name] for result in results.values()]
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f'{statistics.fmean(values):.{self.decimals}f} ± {deviation:.{self.decimals}f}{self.unit}'

  def difference(self, results: Results, baseline: Results) -> str:
    """The mean of run - baseline over the seeds that both have, and its interval; empty where there are none."""
    seeds = results.keys() & baseline.keys()
    if not seeds:
      return ''
    differences = [self.scale * (results[seed][self.name] - baseline[seed][self.name]) for seed in sorted(seeds)]
    half = math.nan
    if len(seeds) - 1 in STUDENT_T:
      half = STUDENT_T[len(seeds) - 1] * statistics.stdev(differences) / math.sqrt(len(seeds))
    return f'{statistics.fmean(differences):+.{self.decimals}f} ± {half:.{self.decimals}f}'


ACCURACY = Metric('test_accuracy', 100, 2, ' %')
LOSS = Metric('validation_loss', 1, 4, '')


def bytes_per_param(results: Results) -> str:
  return f'{next(iter(results.values()))["bytes_per_param"]:.2f}'


def image_rows(settings: dict, runs: Runs) -> Iterator[list[str]]:
  """One per settings: the low-precision run beside that in float32."""
  fp32, lpmm = runs['fp32'], runs['lpmm']
  label = f'{settings["dataset"]}, {settings["formats"]}'
  accuracies = [ACCURACY.spread(fp32), ACCURACY.spread(lpmm), ACCURACY.difference(lpmm, fp32)]
  yield [label, str(len(lpmm)), *accuracies, bytes_per_param(lpmm)]


def text_rows(settings: dict, runs: Runs) -> Iterator[list[str]]:
  """One per run: against AdamW in float32, and Lion also against its own float32."""
  del settings
  for name, results in runs.items():
    baselines = ('adamw-fp32', 'lion-fp32') if name.startswith('lion-') else ('adamw-fp32', name)
    differences = ['' if name == base else LOSS.difference(results, runs.get(base, {})) for base in baselines]
    yield [name, str(len(results)), LOSS.spread(results), *differences, bytes_per_param(results)]


class Table(NamedTuple):
  """The summary of one example: its columns, its rows, and the settings that a row names anyway."""

  columns: list[str]
  rows: Callable[[dict, Runs], Iterator[list[str]]]
  named: tuple[str, ...]


# By a setting that this example alone has.
TABLES = {
  'dataset': Table(
    ['data, formats', 'seeds', 'fp32 test accuracy', 'lpmm test accuracy', 'difference', 'bytes/param'],
    image_rows,
    named=('dataset', 'formats'),
  ),
  'text': Table(
    ['run', 'seeds', 'validation loss', 'against adamw-fp32', 'against lion-fp32', 'bytes/param'],
    text_rows,
    named=(),
  ),
}


def lines(table: Table, groups: list[Group]) -> Iterator[str]:
  """In Markdown; where groups differ in further settings, their rows name these too."""
  names = dict.fromkeys(name for settings, _ in groups for name in settings if name not in table.named)
  varying = [name for name in names if len({json.dumps(settings.get(name)) for settings, _ in groups}) > 1]
  line = lambda cells: '| ' + ' | '.join(cells) + ' |'
  yield line(table.columns)
  yield '|' + '---|' * len(table.columns)
  for settings, runs in groups:
    for label, *cells in table.rows(settings, runs):
      yield line([', '.join([label, *(f'{name} {settings.get(name)}' for name in varying)]), *cells])


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('file', type=Path)
  groups = read(parser.parse_args(argv).file)
  for key, table in TABLES.items():
    own = [group for group in groups if key in group[0]]
    if own:
      print('\n'.join(lines(table, own)))


if __name__ == '__main__':
  main()
