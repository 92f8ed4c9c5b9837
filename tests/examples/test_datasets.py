"""The data of the examples: what is read, and what is refused."""

import io
import os
import pickle

import datasets
import numpy as np
import pytest

IMAGES = 7  # Per file of a synthetic CIFAR-10.
FILES = (*datasets.CIFAR10_TRAIN, *datasets.CIFAR10_TEST)


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
@pytest.mark.parametrize('function', [os.system, np.load], ids=lambda f: f.__name__)
def test_a_pickle_that_calls_anything_else_is_refused_and_calls_nothing(tmp_path, batches, function, protocol):
  folder = write_pickles(tmp_path / 'data', batches)
  witness = tmp_path / 'witness'
  pixels, labels = batches['data_batch_2']
  batch = {b'data': pixels, b'labels': labels.tolist(), b'filenames': Call(function, f'echo > {witness}')}
  (folder / 'data_batch_2').write_bytes(pickle.dumps(batch, protocol=protocol))
  with pytest.raises(ValueError, match=r'data_batch_2 is not a CIFAR-10 batch: .*is not allowed'):
    datasets.cifar10(folder)
  assert not witness.exists()


@pytest.mark.parametrize('size', [3073 * IMAGES - 1, 3073 * (IMAGES + 1)])
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


@pytest.mark.parametrize(
  ('pixels', 'labels', 'message'),
  [
    (np.zeros((IMAGES, 3072), np.uint8), [0] * (IMAGES - 1), 'does not hold'),
    (np.zeros((IMAGES, 3072), np.uint8), [10] * IMAGES, 'does not hold'),
    (np.zeros((IMAGES, 3072), np.float32), [0] * IMAGES, 'holds pixels'),
  ],
)
def test_pickles_of_another_content_are_refused(tmp_path, batches, pixels, labels, message):
  folder = write_pickles(tmp_path / 'data', batches)
  (folder / 'data_batch_1').write_bytes(python2_pickle({b'data': pixels, b'labels': labels}))
  with pytest.raises(ValueError, match=f'data_batch_1 {message}'):
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
# Text
# ---------------------------------------------------------------------------------------------------------------------


def written(data):
  return ''.join(data.vocabulary[token] for part in (data.train, data.validation) for token in part)


def test_a_text_is_split_nine_to_one_into_indices_of_its_sorted_characters(tmp_path):
  file = tmp_path / 'text.txt'
  # One, two, three and four bytes of UTF-8 each.
  file.write_text('zebra é € 🦓\n' * 3, encoding='utf-8')
  data = datasets.text(file)
  assert data.vocabulary == '\n aberzé€🦓'
  assert (len(data.train), len(data.validation)) == (33, 3)
  assert data.train.dtype == data.validation.dtype == np.int32
  assert written(data) == 'zebra é € 🦓\n' * 3


def test_the_default_text_is_what_python_says_of_itself():
  data = datasets.text()
  assert written(data).startswith('The "assert" statement\n')
  # Much the same in every version of Python.
  assert len(data.train) > 300_000
  assert len(data.vocabulary) < 256
  assert set(range(len(data.vocabulary))) == set(data.train) | set(data.validation)


def test_what_is_not_a_text_is_named(tmp_path):
  for path in (tmp_path / 'absent', tmp_path):
    with pytest.raises(FileNotFoundError, match=f'{path.name} is not a file'):
      datasets.text(path)
  file = tmp_path / 'latin1.txt'
  file.write_bytes('Café'.encode('latin-1'))
  with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text: .* can't decode byte 0xe9 in position 3"):
    datasets.text(file)
