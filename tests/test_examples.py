"""The example: what it reads, what it promises of its runs, what it refuses."""

import contextlib
import io
import itertools
import math
import os
from pathlib import Path
import pickle
import shutil
from typing import NamedTuple

import datasets
import jax
from jax.experimental.compilation_cache import compilation_cache
import numpy as np
import pytest
import train_resnet

import lpmm_optax as lpmm

IMAGES = 7  # Per file of a synthetic CIFAR-10.
FILES = (*datasets.CIFAR10_TRAIN, *datasets.CIFAR10_TEST)

# The smallest network: two epochs of ten steps.
SMALL = ('--depth', '8', '--width', '8', '--batch-size', '128', '--epochs', '2')


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class Python2Pickler(pickle._Pickler):
  """Pickles as Python 2 did: text and bytes alike as byte strings, and NumPy under its old module name."""

  dispatch = pickle._Pickler.dispatch.copy()

  def save_bytes(self, value):
    text = value if isinstance(value, bytes) else value.encode('ascii')
    short = len(text) < 256
    self.write(
      pickle.SHORT_BINSTRING + bytes([len(text)]) if short else pickle.BINSTRING + len(text).to_bytes(4, 'little')
    )
    self.write(text)
    self.memoize(value)

  dispatch[bytes] = save_bytes
  dispatch[str] = save_bytes

  def save_global(self, value, name=None):
    if value is np.empty(0).__reduce__()[0]:
      self.write(b'cnumpy.core.multiarray\n_reconstruct\n')
      self.memoize(value)
    else:
      super().save_global(value, name)

  for kind in (type, type(len), type(lambda: None)):
    dispatch[kind] = save_global


def python2_pickle(batch):
  file = io.BytesIO()
  Python2Pickler(file, protocol=2).dump(batch)
  return file.getvalue()


def python3_pickle(batch):
  return pickle.dumps(batch, protocol=2)


@pytest.fixture
def batches(monkeypatch):
  """Six small files' worth of pixels and labels, of the size that the loader is told to expect."""
  monkeypatch.setattr(datasets, 'CIFAR10_IMAGES_PER_FILE', IMAGES)
  rng = np.random.default_rng(0)
  return {
    name: (rng.integers(0, 256, (IMAGES, 3072), np.uint8), rng.integers(0, 10, IMAGES, np.uint8)) for name in FILES
  }


def write_binary(folder, batches):
  folder.mkdir(parents=True)
  for name, (pixels, labels) in batches.items():
    (folder / f'{name}.bin').write_bytes(np.concatenate([labels[:, None], pixels], axis=1).tobytes())
  return folder


def write_pickles(folder, batches, dumps=python2_pickle):
  folder.mkdir(parents=True)
  for name, (pixels, labels) in batches.items():
    batch = {
      b'batch_label': name.encode(),
      b'labels': labels.tolist(),
      b'data': pixels,
      b'filenames': [b'a.png'] * IMAGES,
    }
    (folder / name).write_bytes(dumps(batch))
  return folder


def assert_equal_datasets(a, b):
  for field, x, y in zip(a._fields, a, b, strict=True):
    np.testing.assert_array_equal(x, y, err_msg=field, strict=True)


def test_digits_are_split_three_to_one_with_every_digit_in_both():
  data = datasets.digits()
  assert (data.train_images.shape, data.train_images.dtype) == ((1347, 8, 8, 1), np.uint8)
  assert (data.test_images.shape, data.test_images.dtype) == ((450, 8, 8, 1), np.uint8)
  assert (data.train_labels.shape, data.train_labels.dtype) == ((1347,), np.int32)
  assert (data.test_labels.shape, data.test_labels.dtype) == ((450,), np.int32)
  assert set(data.train_labels) == set(data.test_labels) == set(range(data.classes))
  assert_equal_datasets(data, datasets.digits())


def test_training_images_normalise_to_mean_zero_and_deviation_one(tmp_path, batches):
  for data in (datasets.digits(), datasets.cifar10(write_binary(tmp_path / 'data', batches))):
    assert data.mean.shape == data.std.shape == (1, 1, 1, data.train_images.shape[-1])
    normalised = (data.train_images - data.mean.astype(np.float64)) / data.std
    # Mean and deviation are rounded to float32.
    np.testing.assert_allclose(normalised.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(normalised.std((0, 1, 2)), 1, atol=1e-6)


def test_a_channel_without_variation_normalises_to_zero(tmp_path, batches):
  for pixels, _ in batches.values():
    pixels[:, :1024] = 251
  data = datasets.cifar10(write_binary(tmp_path / 'data', batches))
  assert (data.mean[..., 0], data.std[..., 0]) == (251, 1)
  assert not train_resnet.normalize(data, data.train_images)[..., 0].any()


@pytest.mark.parametrize('dumps', [python2_pickle, python3_pickle])
def test_binary_files_and_pickles_give_identical_datasets(tmp_path, batches, dumps):
  from_binary = datasets.cifar10(write_binary(tmp_path / 'cifar-10-batches-bin', batches))
  from_pickles = datasets.cifar10(write_pickles(tmp_path / 'cifar-10-batches-py', batches, dumps))
  assert_equal_datasets(from_binary, from_pickles)


def test_pixels_and_labels_are_those_of_the_files_in_their_order(tmp_path, batches):
  data = datasets.cifar10(write_binary(tmp_path / 'cifar-10-batches-bin', batches))
  assert data.train_images.shape == (5 * IMAGES, 32, 32, 3)
  for i, name in enumerate(FILES):
    pixels, labels = batches[name]
    train = (data.train_images[i * IMAGES :], data.train_labels[i * IMAGES :])
    images, read_labels = (data.test_images, data.test_labels) if name == 'test_batch' else train
    np.testing.assert_array_equal(read_labels[:IMAGES], labels)
    # In the file, pixel (row, column) of a channel lies at 1024 channel + 32 row + column.
    np.testing.assert_array_equal(images[:IMAGES, 5, 11, 2], pixels[:, 1024 * 2 + 32 * 5 + 11])


@pytest.mark.parametrize(
  ('name', 'write'), [('cifar-10-batches-bin', write_binary), ('cifar-10-batches-py', write_pickles)]
)
def test_the_folder_and_its_parent_and_any_other_name_are_accepted(tmp_path, batches, name, write):
  folder = write(tmp_path / name, batches)
  expected = datasets.cifar10(folder)
  assert_equal_datasets(datasets.cifar10(tmp_path), expected)
  assert_equal_datasets(datasets.cifar10(str(folder.rename(tmp_path / 'renamed'))), expected)


class Call:
  """Pickles as a call of a function, which a plain unpickler makes."""

  def __init__(self, function, *args):
    self.call = function, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize('protocol', [2, 4])
@pytest.mark.parametrize('function', [os.system, eval, np.load, np.fromfile], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_anything_else_is_refused_and_calls_nothing(tmp_path, batches, function, protocol):
  folder = write_pickles(tmp_path / 'data', batches)
  witness = tmp_path / 'witness'
  argument = f'open({str(witness)!r}, "w")' if function is eval else f'echo > {witness}'
  pixels, labels = batches['data_batch_2']
  batch = {b'data': pixels, b'labels': labels.tolist(), b'filenames': Call(function, argument)}
  (folder / 'data_batch_2').write_bytes(pickle.dumps(batch, protocol=protocol))
  with pytest.raises(ValueError, match=r'data_batch_2 is not a CIFAR-10 batch: .*is not allowed'):
    datasets.cifar10(folder)
  assert not witness.exists()


@pytest.mark.parametrize('size', [0, 3073, 3073 * IMAGES - 1, 3073 * (IMAGES + 1)])
def test_a_binary_file_of_another_size_is_refused(tmp_path, batches, size):
  folder = write_binary(tmp_path / 'data', batches)
  content = (folder / 'data_batch_4.bin').read_bytes() + bytes(3073)
  (folder / 'data_batch_4.bin').write_bytes(content[:size])
  with pytest.raises(ValueError, match=rf'data_batch_4\.bin has {size} bytes, not the {3073 * IMAGES} of'):
    datasets.cifar10(folder)


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'<html>',
    python2_pickle([1, 2]),
    python2_pickle({b'data': 1}),
    python2_pickle({b'data': np.zeros((IMAGES, 3072), np.uint8), b'labels': [0] * IMAGES})[:-99],
  ],
  ids=['empty', 'other', 'list', 'keys', 'truncated'],
)
def test_a_damaged_pickle_is_refused(tmp_path, batches, content):
  folder = write_pickles(tmp_path / 'data', batches)
  (folder / 'test_batch').write_bytes(content)
  with pytest.raises(ValueError, match='test_batch is not a CIFAR-10 batch'):
    datasets.cifar10(folder)


def test_labels_that_cifar10_does_not_have_are_refused(tmp_path, batches):
  batches['data_batch_3'][1][-1] = 10
  for suffix, write in (('.bin', write_binary), ('', write_pickles)):
    with pytest.raises(ValueError, match=f'data_batch_3{suffix} does not hold {IMAGES} labels from 0 to 9'):
      datasets.cifar10(write(tmp_path / f'data{suffix}', batches))


@pytest.mark.parametrize('labels', [[0] * (IMAGES - 1), [-1] + [0] * (IMAGES - 1), [0.5] * IMAGES, []])
def test_pickled_labels_of_another_kind_are_refused(tmp_path, batches, labels):
  folder = write_pickles(tmp_path / 'data', batches)
  batch = {b'data': batches['data_batch_1'][0], b'labels': labels}
  (folder / 'data_batch_1').write_bytes(python2_pickle(batch))
  with pytest.raises(ValueError, match='data_batch_1 does not hold'):
    datasets.cifar10(folder)


@pytest.mark.parametrize('pixels', [np.zeros((IMAGES, 3071), np.uint8), np.zeros((IMAGES, 3072), np.float32)])
def test_pickled_pixels_of_another_kind_are_refused(tmp_path, batches, pixels):
  folder = write_pickles(tmp_path / 'data', batches)
  (folder / 'data_batch_1').write_bytes(python2_pickle({b'data': pixels, b'labels': [0] * IMAGES}))
  with pytest.raises(ValueError, match='data_batch_1 holds pixels'):
    datasets.cifar10(folder)


def test_a_missing_file_is_named(tmp_path, batches):
  folder = write_binary(tmp_path / 'cifar-10-batches-bin', batches)
  (folder / 'data_batch_5.bin').unlink()
  with pytest.raises(FileNotFoundError, match=r'cifar-10-batches-bin lacks data_batch_5\.bin;'):
    datasets.cifar10(tmp_path)


def test_a_folder_without_cifar10_is_named(tmp_path):
  for folder in (tmp_path, tmp_path / 'absent'):
    with pytest.raises(FileNotFoundError, match=f'{folder.name} is not a cifar-10-batches-bin or'):
      datasets.cifar10(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', autouse=True)
def compiled_once(tmp_path_factory):
  """Runs here differ little, and compiling is nearly all of their time: reuse what one has compiled in the next."""
  changed = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }
  before = {name: jax.config.values[name] for name in changed}

  def configure(values):
    for name, value in values.items():
      jax.config.update(name, value)
    # Else it stays what it was at the first program that this process compiled.
    compilation_cache.reset_cache()

  configure(changed)
  yield
  configure(before)


@pytest.fixture
def main(tmp_path, monkeypatch):
  """The example as called in an empty folder."""
  monkeypatch.chdir(tmp_path)
  return lambda *argv: train_resnet.main([*SMALL, *argv])


class Outcome(NamedTuple):
  results: dict
  folder: Path
  out: str
  err: str


def outcome_in(folder, *argv):
  out, err = io.StringIO(), io.StringIO()
  with (
    contextlib.chdir(folder),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    pytest.MonkeyPatch.context() as patch,
  ):
    # Rich asks the environment and the terminal behind pytest otherwise.
    patch.setenv('COLUMNS', '80')
    patch.delenv('FORCE_COLOR', raising=False)
    results = train_resnet.main([*SMALL, *argv])
  return Outcome(results, folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """All epochs in one go."""
  return outcome_in(tmp_path_factory.mktemp('finished'))


@pytest.fixture(scope='module')
def uninterrupted(finished):
  return finished.results


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
  """With checkpoints, stopped three steps after one."""
  return outcome_in(tmp_path_factory.mktemp('stopped'), '--checkpoint-dir', 'checkpoints', '--steps', '13')


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


def test_both_runs_learn(uninterrupted):
  assert list(uninterrupted) == ['lpmm', 'fp32']
  for result in uninterrupted.values():
    assert result['steps'] == len(result['loss']) == 20
    assert np.isfinite(result['loss']).all()
    # By far more than batches differ in.
    assert np.mean(result['loss'][-3:]) < 0.8 * np.mean(result['loss'][:3])
    assert [step for step, _ in result['test_curve']] == [10, 20]
    assert result['test_accuracy'] == result['test_curve'][-1][1]
    assert 0 <= result['test_accuracy'] <= 1
    assert result['step_ms'] > 0
    assert result['peak_bytes'] > 0
  assert uninterrupted['lpmm']['bytes_per_param'] < uninterrupted['fp32']['bytes_per_param']


def test_a_run_ends_in_a_table_and_a_plot_and_prints_nothing_else(finished):
  rows = [line for line in finished.out.splitlines() if '│' in line]
  for row, (name, result) in zip(rows, finished.results.items(), strict=True):
    assert name in row
    assert f'{100 * result["test_accuracy"]:.2f} %' in row
    assert f'{result["bytes_per_param"]:.2f} B/param' in row
    assert f'{-100 * result["reduction"]:z.1f} %' in row
  # Two bars, the table's three lines and frame, and the plot's name.
  assert len(finished.out.splitlines()) == 2 + 6 + 1
  plot = Path('out/train_resnet.png')
  assert finished.out.splitlines()[-1] == str(plot)
  assert (finished.folder / plot).read_bytes().startswith(b'\x89PNG')


def test_nothing_logs_warns_or_tells_where_on_the_disk_it_ran(finished, stopped):
  for outcome in (finished, stopped):
    assert outcome.err == ''
    for folder in (outcome.folder, Path(__file__).parents[1]):
      assert str(folder) not in outcome.out


def test_the_same_seed_gives_the_same_curves(main, uninterrupted):
  assert curves(main()) == curves(uninterrupted)


def test_another_seed_gives_other_curves(main, uninterrupted):
  for name, result in main('--seed', '1', '--steps', '2').items():
    # The first loss is of other weights on another batch.
    assert result['loss'][0] != uninterrupted[name]['loss'][0]


@pytest.mark.parametrize('formats', ['int16', 'int4-momentum'])
def test_other_recipes_take_the_steps_of_their_full_precision_run(main, uninterrupted, formats):
  low, fp32 = main('--formats', formats, '--steps', '8').values()
  # Rounding moves the loss by a thousandth here, momentum in the other form by fifteen.
  np.testing.assert_allclose(low['loss'], fp32['loss'], rtol=5e-3)
  assert low['loss'] != fp32['loss']
  same_form = train_resnet.RECIPES[formats].error_feedback
  assert (fp32['loss'] == uninterrupted['fp32']['loss'][:8]) == same_form
  less_than_int8 = {'int16': -1, 'int4-momentum': 1}[formats]
  assert np.sign(uninterrupted['lpmm']['bytes_per_param'] - low['bytes_per_param']) == less_than_int8
  assert low['reduction'] == 1 - low['bytes_per_param'] / fp32['bytes_per_param']


def test_the_recommended_recipe_takes_the_steps_of_full_precision(uninterrupted):
  np.testing.assert_allclose(uninterrupted['lpmm']['loss'][:8], uninterrupted['fp32']['loss'][:8], rtol=5e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Microbatches
# ---------------------------------------------------------------------------------------------------------------------


def standard_promotion():
  """For `optax.MultiSteps`, of the full-precision run with microbatches, which divides floats by integer counts."""
  return jax.numpy_dtype_promotion('standard')


@pytest.fixture(scope='module')
def in_microbatches(tmp_path_factory):
  """The arguments of a run in two microbatches, and its results after twelve steps."""
  argv = ('--formats', 'paper', '--microbatches', '2')  # With an accumulator.
  with standard_promotion():
    return argv, outcome_in(tmp_path_factory.mktemp('in_microbatches'), *argv, '--steps', '12').results


def test_microbatches_take_the_steps_of_full_precision(in_microbatches):
  low, fp32 = in_microbatches[1].values()
  np.testing.assert_allclose(low['loss'][:8], fp32['loss'][:8], rtol=5e-3)
  assert low['loss'] != fp32['loss']


def test_two_equal_microbatches_step_as_one_of_them():
  # Where all microbatches are equal, so are their BatchNorm statistics and gradients, and hence those of the batch.
  # In the second step, momentum counts, and the learning rate has risen.
  data = train_resnet.digits()
  microbatches = [(data.train_images[i : i + 64], data.train_labels[i : i + 64]) for i in (0, 64)]

  def stepped(count):
    args = train_resnet.parse_args([*SMALL, '--microbatches', str(count)])
    model = train_resnet.ResNet(args.depth, args.width, data.classes)
    tx = train_resnet.make_optimizer('fp32', args, train_resnet.make_schedule(args, 10))
    params, opt_state, batch_stats = train_resnet.make_state('fp32', model, tx, data, args)
    train_step = train_resnet.make_train_step(model, tx, data)
    seen = [jax.device_get(params)]
    for images, labels in microbatches:
      for _ in range(count):
        params, opt_state, batch_stats, *_ = train_step(params, opt_state, batch_stats, images, labels)
      seen.append(jax.device_get(params))
    return [jax.tree.map(np.subtract, after, before) for before, after in itertools.pairwise(seen)]

  with standard_promotion():
    whole, split = stepped(1), stepped(2)
  # Sums of float32 in another order, through eight layers and back.
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())
  jax.tree.map(close, split, whole)


def test_microbatches_are_the_parts_of_the_batch_in_order():
  data = train_resnet.digits()
  batch = data.train_images[:12], data.train_labels[:12], np.int32(5)
  split_in = lambda count: train_resnet.make_microbatches(
    data, train_resnet.parse_args(['--batch-size', '12', '--microbatches', str(count)])
  )(*batch)
  ((images, labels),) = split_in(1)
  np.testing.assert_array_equal(labels, batch[1])
  parts = split_in(3)
  assert [len(part) for part, _ in parts] == [4, 4, 4]
  np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), images)
  np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), labels)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_of(name, *argv):
  """The report on a run's state, from shapes alone."""
  args = train_resnet.parse_args([*argv])
  data = train_resnet.digits()
  model = train_resnet.ResNet(args.depth, args.width, data.classes)
  tx = train_resnet.make_optimizer(name, args, train_resnet.make_schedule(args, 10))
  params, opt_state, _ = jax.eval_shape(lambda: train_resnet.make_state(name, model, tx, data, args))
  return lpmm.memory_report(params, opt_state)


@pytest.mark.parametrize(
  ('run', 'formats', 'whole', 'split'),
  [
    ('lpmm', 'int8', 2.08, 2.08),
    ('lpmm', 'paper', 2.08, 3.11),
    ('fp32', 'int8', 8.00, 12.00),
  ],
)
def test_bytes_per_parameter_of_the_default_network(run, formats, whole, split):
  figure = lambda count: round(memory_of(run, '--formats', formats, '--microbatches', count).bytes_per_param, 2)
  assert (figure('1'), figure('4')) == (whole, split)


@pytest.mark.parametrize('formats', train_resnet.RECIPES)
def test_microbatches_take_no_accumulator_with_error_feedback_and_one_of_8_bits_without(formats):
  whole, split = (memory_of('lpmm', '--formats', formats, '--microbatches', count) for count in '14')
  accumulator = {}
  if not train_resnet.RECIPES[formats].error_feedback:
    accumulator['acc_grads'] = memory_of('lpmm', '--formats', 'paper').groups['trace']
  assert split.groups == whole.groups | accumulator
  # Two counts and a key.
  assert split.other_bytes == whole.other_bytes + 4 + 4 + 8


def test_microbatches_take_full_precision_a_float32_accumulator():
  whole, split = (memory_of('fp32', '--microbatches', count) for count in '14')
  array = 4 * whole.parameters
  assert whole.groups == {'params': array, 'trace': array}
  assert split.groups == {'params': array, 'trace': array, 'acc_grads': array}
  # Two counts.
  assert split.other_bytes == whole.other_bytes + 4 + 4


def test_a_run_reports_the_bytes_of_its_state(uninterrupted, in_microbatches):
  for argv, results in (((), uninterrupted), in_microbatches):
    for name, result in results.items():
      assert result['bytes_per_param'] == memory_of(name, *SMALL, *argv).bytes_per_param
      assert result['reduction'] == 1 - result['bytes_per_param'] / results['fp32']['bytes_per_param']


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(main, stopped, uninterrupted, epochs):
  shutil.copytree(stopped.folder / 'checkpoints', 'checkpoints')
  for name, result in stopped.results.items():
    assert result['loss'] == uninterrupted[name]['loss'][:13]
  # The three steps after the checkpoint are done again; and a run that has ended is only shown.
  for begun in ([1, 1], []):
    epochs.clear()
    assert curves(main('--checkpoint-dir', 'checkpoints')) == curves(uninterrupted)
    assert epochs == begun


def test_a_run_with_microbatches_resumes_bit_for_bit(main, in_microbatches, epochs):
  argv, expected = in_microbatches
  argv = (*argv, '--checkpoint-dir', 'checkpoints')
  with standard_promotion():
    main(*argv, '--steps', '10')
    assert epochs == [0, 0]
    # From the checkpoint after ten.
    assert curves(main(*argv, '--steps', '12')) == curves(expected)
  assert epochs == [0, 0, 1, 1]


def test_checkpoints_of_other_settings_are_refused_before_anything_trains(main, stopped, epochs):
  shutil.copytree(stopped.folder / 'checkpoints', 'checkpoints')
  with pytest.raises(SystemExit) as refusal:
    main('--checkpoint-dir', 'checkpoints', '--seed', '1', '--learning-rate', '0.2')
  assert str(refusal.value) == f'error: {Path("checkpoints/lpmm")} holds a run with --learning-rate 0.1, --seed 0'
  shutil.rmtree('checkpoints/lpmm')
  with pytest.raises(SystemExit, match=r'fp32 holds a run with --formats int8$'):
    main('--checkpoint-dir', 'checkpoints', '--formats', 'paper')
  assert epochs == []


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--depth 21', '--depth must be 6n + 2, such as 20, 32 or 56, got 21'),
    ('--depth 2', '--depth must be 6n + 2, such as 20, 32 or 56, got 2'),
    ('--microbatches 3', '--batch-size 64 does not divide into 3 microbatches'),
    ('--microbatches 0', '--microbatches must be at least 1, got 0'),
    ('--batch-size 0', '--batch-size must be at least 1, got 0'),
    ('--epochs -1', '--epochs must be at least 1, got -1'),
    ('--width 0', '--width must be at least 1, got 0'),
    ('--steps 0', '--steps must be at least 1, got 0'),
    ('--seed -1', '--seed must be from 0 to 2**32 - 1, got -1'),
    ('--plot curves.txt', '--plot must end in .png, .pdf, .svg, got curves.txt'),
    ('--dataset cifar10', '--dataset cifar10 needs --data-dir'),
    ('--dataset mnist', "invalid choice: 'mnist'"),
    ('--formats int2', "invalid choice: 'int2'"),
  ],
)
def test_a_wrong_argument_ends_in_its_name(argv, message, capsys):
  with pytest.raises(SystemExit) as stop:
    train_resnet.main(argv.split())
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_data_that_is_not_there_ends_without_a_traceback(main):
  with pytest.raises(SystemExit, match='error: data is not a cifar-10-batches-bin or cifar-10-batches-py folder'):
    main('--dataset', 'cifar10', '--data-dir', 'data')
  with pytest.raises(SystemExit, match='error: --batch-size 1348 exceeds the 1347 training images'):
    main('--batch-size', '1348')


@pytest.mark.parametrize(('dataset', 'width'), [('digits', 32), ('cifar10', 16)])
def test_defaults_are_those_of_the_data_set(dataset, width):
  assert train_resnet.parse_args(['--dataset', dataset, '--data-dir', '.']).width == width
  assert train_resnet.parse_args(['--dataset', dataset, '--data-dir', '.', '--width', '24']).width == 24


def test_the_learning_rate_warms_up_and_falls_to_zero():
  args = train_resnet.parse_args(['--epochs', '4', '--learning-rate', '0.5'])
  schedule = train_resnet.make_schedule(args, 10)
  rates = [float(schedule(step)) for step in range(40)]
  np.testing.assert_allclose(rates[:10], np.linspace(0.05, 0.5, 10), rtol=1e-6)
  assert np.argmax(rates) in (9, 10)
  assert rates[10:] == sorted(rates[10:], reverse=True)
  assert math.isclose(rates[25], 0.25, rel_tol=1e-6)
  assert 0 < rates[-1] < 0.01


def test_augmentation_shifts_and_mirrors_whole_images():
  data = train_resnet.digits()._replace(flip=True)
  images = data.train_images[:64]
  augmented = np.asarray(train_resnet.augment(data, jax.random.key(0), images))
  assert augmented.dtype == np.uint8
  padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
  seen = set()
  for image, result in zip(padded, augmented, strict=True):
    windows = {(y, x): image[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
    found = {
      (*corner, flip)
      for corner, window in windows.items()
      for flip in (False, True)
      if np.array_equal(result, window[:, ::-1] if flip else window)
    }
    assert found
    seen |= found
  # Each of the 18 outcomes is missed by 64 draws with probability (17 / 18)**64 < 0.03; most are there.
  assert len(seen) >= 12
