"""The accuracy benchmark repeats no run that it has, and its report holds what the file does."""

import importlib.util
import json
from pathlib import Path
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'
METHODS = ('sgdm-fp32', 'sgdm-fp32-velocity', 'sgdm-8-nearest', 'sgdm-8')


def load(name):
  spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f'{name}.py')
  module = sys.modules[name] = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope='module')
def accuracy():
  return load('accuracy')


@pytest.fixture(scope='module')
def report(accuracy):
  return load('report')


def regression(accuracy, settings):
  """Of a linear function, which the weights reach."""
  target = jax.random.normal(jax.random.key(9), (64, 128))

  def batch(seed, step):
    x = np.random.default_rng((seed, step)).standard_normal((8, 64), np.float32)
    return x, np.asarray(x @ target)

  def mean_square(weights, x, y):
    return jnp.mean((x @ weights['w'] - y) ** 2)

  return accuracy.Task(
    settings=settings,
    init=lambda seed: ({'w': 0.1 * jax.random.normal(jax.random.key(seed), (64, 128))}, ()),
    loss=lambda weights, extra, x, y: (mean_square(weights, x, y), extra),
    batch=batch,
    evaluate=lambda weights, extra: float(mean_square(weights, *batch(77, 0))),
    metric='validation loss',
    steps=20,
    rates={'sgdm': 0.5},
    weight_decay={'sgdm': 0.0},
    warmup=2,
    final=0.1,
    clip={},
  )


@pytest.fixture(scope='module')
def file(accuracy, tmp_path_factory):
  """Results of four methods with one and two microbatches, over two seeds."""
  file = tmp_path_factory.mktemp('accuracy') / 'results' / 'lines.jsonl'
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(accuracy.TASKS, 'chars', lambda args: regression(accuracy, {'width': 64}))
    argv = ('--tasks', 'chars', '--methods', *METHODS, '--seeds', '0', '1', '--results', str(file))
    accuracy.main([*argv, '--microbatches', '1'])
    accuracy.main([*argv, '--microbatches', '1', '2'])
    trained = []
    patch.setattr(accuracy, 'train', lambda *args: trained.append(args))
    accuracy.main([*argv, '--microbatches', '1', '2'])
    assert trained == []
  return file


def test_every_run_is_made_once(accuracy, file):
  configs = [run['config'] for run in accuracy.read(file)]
  names = [(config['seed'], config['method'], config['microbatches']) for config in configs]
  assert sorted(names) == sorted((seed, name, count) for seed in (0, 1) for name in METHODS for count in (1, 2))
  assert all(config['settings'] == {'width': 64} and config['task'] == 'chars' for config in configs)


def test_a_run_holds_what_it_takes_to_judge_it(accuracy, file):
  for run in accuracy.read(file):
    results = run['results']
    assert run['versions']['jax'] == jax.__version__
    assert results['metric'] < 0.5 * results['initial_metric']
    assert results['curve'][-1][0] == 20
    assert results['distance'] > 0
  by_name = {(r['config']['method'], r['config']['microbatches']): r['results'] for r in accuracy.read(file)}
  assert by_name['sgdm-fp32', 1]['bytes_per_param'] == pytest.approx(8, rel=1e-3)
  assert by_name['sgdm-8', 1]['bytes_per_param'] < by_name['sgdm-8-nearest', 2]['bytes_per_param'] < 3.1
  # Microbatches of float32 are the batch.
  assert by_name['sgdm-fp32', 2]['metric'] == pytest.approx(by_name['sgdm-fp32', 1]['metric'], rel=1e-3)
  underflow = by_name['sgdm-8', 1]['underflow']
  assert [point[0] for point in underflow] == list(range(2, 21, 2))
  # As the rate falls, and the gradient, updates fall below the grid.
  assert underflow[-1][1] > underflow[0][1]
  assert underflow[-1][2] < underflow[0][2]


def test_the_report_holds_means_spreads_and_differences(accuracy, report, file, tmp_path):
  output = tmp_path / 'docs' / 'results.md'
  report.main(['--results', str(file), '--output', str(output)])
  text = output.read_text()
  runs = {}
  for line in file.read_text().splitlines():
    run = json.loads(line)
    runs.setdefault((run['config']['method'], run['config']['microbatches']), []).append(run['results']['metric'])
  ours, base = np.array(runs['sgdm-8', 2]), np.array(runs['sgdm-fp32-velocity', 2])
  (row,) = [line for line in text.splitlines() if line.startswith('| sgdm-8:') and '| 2 | 2 |' in line]
  cells = [cell.strip() for cell in row.split('|')[1:-1]]
  assert cells[3] == f'{ours.mean():.4f} ± {ours.std(ddof=1):.4f}'
  half = 12.7062 * (ours - base).std(ddof=1) / 2**0.5
  mean, plus_minus = map(float, cells[4].split(' ± '))
  assert mean == pytest.approx((ours - base).mean(), abs=1e-4)
  assert plus_minus == pytest.approx(half, abs=2e-4, rel=1e-3)
  # A baseline is compared with nothing.
  assert all(line.split('|')[5].strip() == '' for line in text.splitlines() if line.startswith('| sgdm-fp32'))
  named = [line[line.index('(') + 1 : -1] for line in text.splitlines() if line.startswith('![')]
  assert len(named) == 3
  assert all((output.parent / name).stat().st_size > 10_000 for name in named)
