"""The accuracy benchmark repeats no run that it has, and its report holds what the file does."""

import importlib.util
from pathlib import Path
import re

import accuracy
import jax
import jax.numpy as jnp
import methods
import numpy as np
import pytest
import report

import lpmm_optax as lpmm

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
METHODS = ('sgdm-fp32', 'sgdm-fp32-velocity', 'sgdm-8')


def regression(settings):
  """Of a linear function, which the weights reach."""
  settings = {'steps': 20} | settings
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
    steps=settings['steps'],
    rates={'sgdm': 0.5},
    weight_decay={'sgdm': 0.0},
    warmup=2,
    final=0.1,
    clip={},
  )


@pytest.fixture(scope='module')
def file(tmp_path_factory):
  """Results over two seeds: of three methods with one and two microbatches, and of an ablation of the steps."""
  file = tmp_path_factory.mktemp('accuracy') / 'results' / 'lines.jsonl'
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(accuracy.TASKS, 'chars', lambda args, **changed: regression(changed))
    points = {str(n): methods.Point('sgdm-8', 1, {} if n == 20 else {'steps': n}) for n in (10, 20)}
    patch.setitem(methods.ABLATIONS, 'steps', methods.Ablation('chars', 'a test', 'steps', {'ours': points}))
    argv = ('--tasks', 'chars', '--methods', *METHODS, '--seeds', '0', '1', '--results', str(file))
    accuracy.main([*argv, '--microbatches', '1'])
    argv = (*argv, '--microbatches', '1', '2', '--ablations', 'steps')
    accuracy.main([*argv, '--together'])
    with pytest.MonkeyPatch.context() as nothing:
      nothing.setattr(accuracy, 'train', None)  # A run that is made again fails.
      accuracy.main(argv)
    yield file


@pytest.mark.slow
def test_every_run_is_made_once(file):
  configs = [run['config'] for run in accuracy.read(file)]
  assert all(config['task'] == 'chars' for config in configs)
  names = [(config['settings']['steps'], *map(config.get, ('method', 'microbatches', 'seed'))) for config in configs]
  expected = [(20, name, count, seed) for name in METHODS for count in (1, 2) for seed in (0, 1)]
  expected += [(10, name, 1, seed) for name in ('sgdm-8', 'sgdm-fp32-velocity') for seed in (0, 1)]
  assert sorted(names) == sorted(expected)


def test_a_line_that_was_interrupted_is_no_run_and_makes_way(tmp_path):
  file = tmp_path / 'runs.jsonl'
  assert accuracy.read(file) == []
  accuracy.append(file, [{'a': 1}])
  file.write_text(file.read_text() + '{"a": 2, "b')
  assert accuracy.read(file) == [{'a': 1}]
  accuracy.append(file, [{'a': 2}, {'a': 3}])
  assert accuracy.read(file) == [{'a': 1}, {'a': 2}, {'a': 3}]


@pytest.mark.slow
def test_a_run_holds_what_it_takes_to_judge_it(file):
  runs = [run for run in accuracy.read(file) if run['config']['settings']['steps'] == 20]
  hyperparameters = {'rate': 0.5, 'weight_decay': 0.0, 'clip': None, 'steps': 20, 'warmup': 2, 'final': 0.1}
  for run in runs:
    results = run['results']
    assert run['versions']['jax'] == jax.__version__
    assert run['config']['hyperparameters'] == hyperparameters
    assert results['metric'] < 0.5 * results['initial_metric']
    assert results['curve'][-1][0] == 20
    assert results['distance'] > 0
    assert results['runs_together'] == run['config']['microbatches']
  by_name = {(r['config']['method'], r['config']['microbatches']): r['results'] for r in runs}
  assert by_name['sgdm-fp32', 1]['bytes_per_param'] == pytest.approx(8, rel=1e-3)
  assert by_name['sgdm-8', 1]['bytes_per_param'] < by_name['sgdm-8', 2]['bytes_per_param'] < 3.1
  # Microbatches of float32 are the batch.
  assert by_name['sgdm-fp32', 2]['metric'] == pytest.approx(by_name['sgdm-fp32', 1]['metric'], rel=1e-3)
  underflow = by_name['sgdm-8', 1]['underflow']
  assert [point[0] for point in underflow] == list(range(2, 21, 2))
  # As the rate falls, and the gradient, updates fall below the grid.
  assert underflow[-1][1] > underflow[0][1]
  assert underflow[-1][2] < underflow[0][2]


@pytest.mark.slow
def test_every_method_has_formats_that_its_optimizer_takes():
  weights = {'w': jnp.ones((64, 64))}
  for name, method in accuracy.ALL_METHODS.items():
    if name == 'adamw-flash' and importlib.util.find_spec('flashoptim_jax') is None:
      continue  # It comes with the extra 'benchmarks'.
    is_format = isinstance(method.params, lpmm.Format)
    params = lpmm.quantize(weights, method.params) if is_format else {'w': weights['w'].astype(method.params)}
    jax.eval_shape(method.make_tx(lambda step: 0.1, 0.01, jax.random.key(0)).init, params)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'microbatches'), [('sgdm-8', 1), ('sgdm-8-nearest', 2)])
def test_seeds_together_end_as_each_alone(name, microbatches):
  task = regression({'steps': 5})
  train = lambda seeds: accuracy.train(task, methods.METHODS[name], microbatches, seeds, lambda step: None)
  for seed, together in zip((3, 5), train([3, 5]), strict=True):
    (alone,) = train([seed])
    np.testing.assert_allclose(together.weights['w'], alone.weights['w'], rtol=0, atol=1e-5)
    assert together.results['metric'] == pytest.approx(alone.results['metric'], rel=1e-4)
    np.testing.assert_allclose(together.results['underflow'], alone.results['underflow'], rtol=1e-3)


def test_few_random_bits_lose_what_is_under_half_of_their_resolution():
  simulated = methods.Simulated(random_bits=4)
  # The first of each block is its largest; it stays where it is, and so does the grid.
  is_first = jnp.zeros((64, 128), bool).at[:, ::64].set(True)
  params = {'w': lpmm.quantize(jnp.where(is_first, 1.0, 0.5), simulated)}
  step = float(lpmm.dequantize(params['w'])[0, 0]) / int(params['w'].codes[0, 0])
  for update, moves in ((0.45 / 16, False), (0.55 / 16, True), (1 / 3, True)):
    tx = lpmm.sgdm(update * step, 0.0, error_feedback=False, formats=None)
    moved, _ = lpmm.step(tx, {'w': jnp.where(is_first, 0.0, 1.0)}, params, tx.init(params))
    assert bool(jnp.any(moved['w'].codes != params['w'].codes)) == moves


@pytest.mark.slow
def test_the_report_holds_means_spreads_and_differences(file, tmp_path):
  output, summaries = tmp_path / 'docs' / 'results.md', [tmp_path / 'accuracy.md', tmp_path / 'README.md']
  for summary in summaries:
    summary.write_text(f'before\n{report.BEGIN}\nold\n{report.END}\nafter\n')
  files = ['--results', file, '--output', output, '--summary', summaries[0], '--readme', summaries[1]]
  report.main([str(argument) for argument in files])
  text = output.read_text()
  runs = {}
  for run in accuracy.read(file):
    if run['config']['settings']['steps'] == 10:
      continue
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
  # Ablations whose runs are not all there are left out.
  assert len(named) == 4
  assert all((output.parent / name).stat().st_size > 10_000 for name in named)
  # The ablation, beside what it departs from.
  (row,) = [line for line in text.splitlines() if line.startswith('| ours |')]
  base = [line for line in text.splitlines() if line.startswith('| sgdm-8:') and '| 1 | 2 |' in line]
  assert len(base) == 1
  mean = base[0].split('|')[4].split(' ± ')[0].strip()
  assert row.split('|')[3].strip() == f'{mean}: {base[0].split("|")[5].strip()}'
  assert row.split('|')[2].strip() not in ('', row.split('|')[3].strip())
  # The summaries, and nothing else of their pages.
  for summary in summaries:
    lines = summary.read_text().splitlines()
    assert (lines[0], lines[-1]) == ('before', 'after')
    assert 'old' not in lines
    assert [line for line in lines if line.startswith('| sgdm-8:') and base[0].split('|')[5].strip() in line]


def test_documents_hold_what_the_runs_give(tmp_path, monkeypatch):
  root = BENCHMARKS.parent
  monkeypatch.chdir(root)
  monkeypatch.setattr(report, 'save', lambda figure, file: file.name)
  output = tmp_path / 'results.md'
  made = {output: root / 'docs/results.md'}
  made |= {tmp_path / name: root / folder / name for folder, name in (('docs', 'accuracy.md'), ('', 'README.md'))}
  for file, document in made.items():
    file.write_text(document.read_text())
  report.main(['--output', str(output), '--summary', f'{tmp_path}/accuracy.md', '--readme', f'{tmp_path}/README.md'])
  for file, document in made.items():
    assert file.read_text() == document.read_text()
  for name in re.findall(r'\(figures/(.*?)\)', output.read_text()):
    assert (root / 'docs' / 'figures' / name).is_file()
