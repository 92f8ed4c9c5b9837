"""What is to run on a GPU, rehearsed on a CPU; `.ci/accelerators` runs it, where all that it imports is installed."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.mark.slow
def test_a_rehearsal_has_a_result_of_every_stage(tmp_path):
  pytest.importorskip('flashoptim_jax')
  import on_gpu

  results = tmp_path / 'results.jsonl'
  subprocess.run([sys.executable, BENCHMARKS / 'on_gpu.py', '--results', results, '--small'], check=True)
  rows = [json.loads(line) for line in results.read_text().splitlines()]
  assert [row for row in rows if 'error' in row or 'skipped' in row] == []
  stages, found = {}, []
  for row in rows:
    if row['test'] == 'stage':
      stages[row['stage']], found = found, []
    elif row['test'] != 'end':
      found.append(row)
  assert list(stages) == [name for part in on_gpu.make_parts(small=True).values() for name in part]
  assert all(stages.values())
  assert all(row['kernel_against_loop'] == {} for name in ('bits', 'other bits') for row in stages[name])
