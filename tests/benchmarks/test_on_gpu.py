"""What is to run on a GPU, rehearsed on a CPU, where `.ci/accelerators` has all that it imports; and its report."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / 'benchmarks'


def test_the_document_holds_what_the_runs_give(tmp_path):
  document = ROOT / 'docs' / 'performance.md'
  copy = tmp_path / document.name
  copy.write_text(document.read_text())
  results = BENCHMARKS / 'results' / 'gpu_h100.jsonl'
  subprocess.run([sys.executable, BENCHMARKS / 'on_gpu.py', '--results', results, '--report', copy], check=True)
  assert copy.read_text() == document.read_text()


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
