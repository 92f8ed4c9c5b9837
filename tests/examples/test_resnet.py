"""The ResNet example: what it promises of its runs, what it refuses."""

from pathlib import Path
import shutil

import jax
import numpy as np
import pytest
import train_resnet

import lpmm_optax as lpmm

# The smallest network: two epochs of ten steps.
SMALL = ('--depth', '8', '--width', '8', '--batch-size', '128', '--epochs', '2')


@pytest.fixture(scope='module')
def main(outcome_in):
  return lambda folder, *argv: outcome_in(folder, train_resnet.main, *SMALL, *argv)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, main):
  """All epochs in one go."""
  return main(tmp_path_factory.mktemp('finished'))


@pytest.fixture(scope='module')
def stopped(tmp_path_factory, main):
  """With checkpoints, stopped three steps after one."""
  return main(tmp_path_factory.mktemp('stopped'), '--checkpoint-dir', 'checkpoints', '--steps', '13')


@pytest.fixture
def epochs(monkeypatch):
  """The epochs that are begun, in either run."""
  begun, epoch_order = [], train_resnet.epoch_order

  def spy(data, seed, epoch):
    begun.append(epoch)
    return epoch_order(data, seed, epoch)

  monkeypatch.setattr(train_resnet, 'epoch_order', spy)
  return begun


def curves(results):
  """What must be equal of two equal runs: all but times."""
  return {name: {key: value for key, value in result.items() if key != 'step_ms'} for name, result in results.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_runs_learn_the_same(finished):
  low, fp32 = finished.results['lpmm'], finished.results['fp32']
  for result in (low, fp32):
    assert result['steps'] == len(result['loss']) == 20
    # By far more than batches differ in.
    assert np.mean(result['loss'][-3:]) < 0.8 * np.mean(result['loss'][:3])
    assert [step for step, _ in result['test_curve']] == [10, 20]
    assert result['test_accuracy'] == result['test_curve'][-1][1]
    assert result['peak_bytes'] > 0
  # Rounding moves the loss by a thousandth here, momentum in the other form by fifteen.
  np.testing.assert_allclose(low['loss'][:8], fp32['loss'][:8], rtol=5e-3)
  assert low['loss'] != fp32['loss']
  assert low['reduction'] == 1 - low['bytes_per_param'] / fp32['bytes_per_param'] > 0


@pytest.mark.slow
def test_a_run_ends_in_a_table_and_a_plot_and_tells_nothing_of_the_disk(finished, stopped):
  rows = [line for line in finished.out.splitlines() if '│' in line]
  for row, (name, result) in zip(rows, finished.results.items(), strict=True):
    assert name in row
    assert f'{100 * result["test_accuracy"]:.2f} %' in row
    assert f'{result["bytes_per_param"]:.2f} B/param' in row
  plot = Path('out/train_resnet.png')
  assert finished.out.splitlines()[-1] == str(plot)
  assert (finished.folder / plot).read_bytes().startswith(b'\x89PNG')
  for outcome in (finished, stopped):
    assert outcome.err == ''
    assert str(outcome.folder) not in outcome.out


@pytest.mark.slow
@pytest.mark.parametrize('argv', [('--formats', 'int16'), ('--formats', 'int4-momentum')], ids=' '.join)
def test_other_recipes_take_the_steps_of_full_precision(tmp_path, main, argv):
  low, fp32 = main(tmp_path, *argv, '--steps', '8').results.values()
  np.testing.assert_allclose(low['loss'], fp32['loss'], rtol=5e-3)
  assert low['loss'] != fp32['loss']


@pytest.mark.slow
def test_microbatches_take_the_steps_of_full_precision(tmp_path, main):
  # With an accumulator.
  low, fp32 = main(tmp_path, '--formats', 'paper', '--microbatches', '2', '--steps', '8').results.values()
  np.testing.assert_allclose(low['loss'], fp32['loss'], rtol=5e-3)
  assert low['loss'] != fp32['loss']


def bytes_per_param(name, *argv):
  """Of a run's state, from shapes alone."""
  args, data = train_resnet.parse_args([*argv]), train_resnet.digits()
  model = train_resnet.ResNet(args.depth, args.width, data.classes)
  tx = train_resnet.make_optimizer(name, args, train_resnet.make_schedule(args, 10))
  params, opt_state, _ = jax.eval_shape(lambda: train_resnet.make_state(name, model, tx, data, args))
  return lpmm.memory_report(params, opt_state).bytes_per_param


@pytest.mark.parametrize(
  ('run', 'formats', 'whole', 'split'),
  [('lpmm', 'int8', 2.08, 2.08), ('lpmm', 'paper', 2.08, 3.11), ('fp32', 'int8', 8.00, 12.00)],
)
def test_bytes_per_parameter_of_the_default_network(run, formats, whole, split):
  figures = [bytes_per_param(run, '--formats', formats, '--microbatches', count) for count in ('1', '4')]
  assert figures == pytest.approx([whole, split], abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, main, stopped, finished, epochs):
  shutil.copytree(stopped.folder / 'checkpoints', tmp_path / 'checkpoints')
  for name, result in stopped.results.items():
    assert result['loss'] == finished.results[name]['loss'][:13]
  # The three steps after the checkpoint are done again; and a run that has ended is only shown.
  for begun in ([1, 1], []):
    epochs.clear()
    assert curves(main(tmp_path, '--checkpoint-dir', 'checkpoints').results) == curves(finished.results)
    assert epochs == begun


@pytest.mark.slow
def test_checkpoints_of_other_settings_are_refused_before_anything_trains(tmp_path, main, stopped, epochs):
  shutil.copytree(stopped.folder / 'checkpoints', tmp_path / 'checkpoints')
  with pytest.raises(SystemExit) as refusal:
    main(tmp_path, '--checkpoint-dir', 'checkpoints', '--seed', '1', '--learning-rate', '0.2')
  assert str(refusal.value) == f'error: {Path("checkpoints/lpmm")} holds a run with --learning-rate 0.1, --seed 0'
  shutil.rmtree(tmp_path / 'checkpoints/lpmm')
  with pytest.raises(SystemExit, match=r'fp32 holds a run with --formats int8$'):
    main(tmp_path, '--checkpoint-dir', 'checkpoints', '--formats', 'paper')
  assert epochs == []


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--depth 21', '--depth must be 6n + 2, such as 20, 32 or 56, got 21'),
    ('--microbatches 3', '--batch-size 64 does not divide into 3 microbatches'),
    ('--batch-size 0', '--batch-size must be at least 1, got 0'),
    ('--steps 0', '--steps must be at least 1, got 0'),
    ('--seed -1', '--seed must be from 0 to 2**32 - 1, got -1'),
    ('--plot curves.txt', '--plot must end in .png, .pdf, .svg, got curves.txt'),
    ('--dataset cifar10', '--dataset cifar10 needs --data-dir'),
    ('--formats int2', "invalid choice: 'int2'"),
  ],
)
def test_a_wrong_argument_ends_in_its_name(argv, message, capsys):
  with pytest.raises(SystemExit) as stop:
    train_resnet.main(argv.split())
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_data_that_is_not_there_ends_without_a_traceback(tmp_path, main):
  with pytest.raises(SystemExit, match='error: data is not a cifar-10-batches-bin or cifar-10-batches-py folder'):
    main(tmp_path, '--dataset', 'cifar10', '--data-dir', 'data')
  with pytest.raises(SystemExit, match='error: --batch-size 1348 exceeds the 1347 training images'):
    main(tmp_path, '--batch-size', '1348')
