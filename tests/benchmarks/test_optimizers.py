"""`benchmarks/optimizers.py`: it finds Optax's optimizers, and the document holds what the runs gave."""

from pathlib import Path

import optimizers
import pytest

ROOT = Path(__file__).parents[2]


def test_the_document_holds_what_the_runs_give():
  text = (ROOT / optimizers.DOCUMENT).read_text()
  runs = optimizers.read(ROOT / optimizers.RESULTS)
  assert text == optimizers.with_lines(text, optimizers.BEGIN, optimizers.END, optimizers.table(runs))


def test_optimizers_are_found_by_name():
  found = optimizers.optimizers()
  assert {'adamw', 'sgd', 'amsgrad', 'contrib.muon', 'contrib.schedule_free_adamw', 'contrib.cocob'} <= set(found)
  assert not any('scale_by' in name for name in found)
  assert optimizers.needs_rate(found['adam'])
  assert not optimizers.needs_rate(found['contrib.prodigy'])


@pytest.mark.usefixtures('standard_promotion')
@pytest.mark.slow
def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
  file, tasks = tmp_path / 'runs.jsonl', ['wide', 'low-rank']
  measure = lambda: optimizers.measure(file, ['contrib.prodigy', 'lbfgs'], tasks, 2, 20, None)
  measure()
  found = optimizers.read(file)
  assert len(found) == 2 * len(tasks) * len(optimizers.METHODS)
  failed = [run for run in found if 'error' in run]
  assert {run['method'] for run in failed} == {'feedback'}  # They have none.
  assert all(0 < loss < 2 for run in found if run not in failed for loss in run['losses'])
  measure()
  assert optimizers.read(file) == found
  assert '| `contrib.prodigy` |' in '\n'.join(optimizers.table(found))
