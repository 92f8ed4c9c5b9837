"""Accuracy over seeds, from the lines that `examples/train_resnet.py --results FILE` appended.

  for seed in 0 1 2; do for formats in int8 paper; do
    python examples/train_resnet.py --seed $seed --formats $formats --results benchmarks/results/digits.jsonl
  done; done
  python benchmarks/summary.py benchmarks/results/digits.jsonl

Lines that differ in the seed alone are one row: mean and standard deviation of both runs over seeds, and the mean of
the differences within a seed, lpmm - fp32, with its 95 % interval (Student's t).
"""

import argparse
import json
import math
from pathlib import Path
import statistics

# Two-sided 97.5 % quantiles of Student's t, by degrees of freedom.
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('file', type=Path)
  rows: dict[str, list[dict]] = {}
  for line in parser.parse_args().file.read_text().splitlines():
    record = json.loads(line)
    settings = {name: value for name, value in record['settings'].items() if name != 'seed'}
    rows.setdefault(json.dumps(settings), []).append(record['results'])
  print('| data, formats | seeds | fp32 test accuracy | lpmm test accuracy | difference | bytes/param |')
  print('|---|---|---|---|---|---|')
  for key, runs in rows.items():
    settings = json.loads(key)
    accuracy = {name: [100 * run[name]['test_accuracy'] for run in runs] for name in ('fp32', 'lpmm')}
    cells = [f'{settings["dataset"]}, {settings["formats"]}', str(len(runs))]
    for values in accuracy.values():
      cells.append(
        f'{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else math.nan:.2f} %'
      )
    differences = [ours - base for ours, base in zip(accuracy['lpmm'], accuracy['fp32'], strict=True)]
    half = math.nan
    if len(differences) - 1 in STUDENT_T:
      half = STUDENT_T[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    cells.append(f'{statistics.fmean(differences):+.2f} ± {half:.2f}')
    cells.append(f'{runs[0]["lpmm"]["bytes_per_param"]:.2f}')
    print('| ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
  main()
