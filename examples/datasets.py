"""Data sets for the examples: scikit-learn's digits, CIFAR-10 from a folder, and text as characters.

Images stay uint8 on the host; the training step normalises and augments each batch on the device.
"""

from pathlib import Path
import pickle
import pydoc_data.topics
from typing import Any
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

CIFAR10_TRAIN = tuple(f'data_batch_{i}' for i in range(1, 6))
CIFAR10_TEST = ('test_batch',)
CIFAR10_IMAGES_PER_FILE = 10_000
CIFAR10_SHAPE = (3, 32, 32)
CIFAR10_URL = 'https://www.cs.toronto.edu/~kriz/cifar.html'


class Dataset(NamedTuple):
  """Labelled images, split, with how to normalise and augment them.

  Attributes:
    train_images: uint8[train, height, width, channels].
    train_labels: int32[train].
    test_images: uint8[test, height, width, channels].
    test_labels: int32[test].
    mean: float32[1, 1, 1, channels], of the training images, in units of a pixel step.
    std: float32[1, 1, 1, channels].
    classes: number of labels.
    shift: pixels by which a training image is moved at most, along each axis.
    flip: whether a mirrored training image keeps its label.
  """

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray
  mean: np.ndarray
  std: np.ndarray
  classes: int
  shift: int
  flip: bool


class Text(NamedTuple):
  """A text as indices of its characters, split.

  Attributes:
    train: int32[characters], the first nine tenths.
    validation: int32[characters], the rest.
    vocabulary: the characters of the text in order, each once; `vocabulary[i]` is what index i stands for.
  """

  train: np.ndarray
  validation: np.ndarray
  vocabulary: str


def _make_dataset(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], **rest: Any) -> Dataset:
  images = train[0]
  mean = images.mean((0, 1, 2), dtype=np.float64, keepdims=True)
  # Exact, for sums of squared bytes fit float64; `numpy.std` would hold CIFAR-10 in a gigabyte of float64.
  mean_square = np.einsum('nhwc,nhwc->c', images, images, dtype=np.float64) / images[..., 0].size
  std = np.sqrt(mean_square - mean**2)
  # A channel without variation stays zero; dividing by a zero deviation would make it NaN.
  return Dataset(*train, *test, mean.astype(np.float32), np.where(std > 0, std, 1).astype(np.float32), **rest)


def digits() -> Dataset:
  """1797 handwritten digits of 8 x 8 grey pixels, which scikit-learn carries: three quarters to train on."""
  bunch = load_digits()
  images, labels = bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32)
  train_images, test_images, train_labels, test_labels = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
  )
  return _make_dataset((train_images, train_labels), (test_images, test_labels), classes=10, shift=1, flip=False)


def cifar10(data_dir: str | Path) -> Dataset:
  """60000 photographs of 32 x 32 colour pixels in ten classes.

  Args:
    data_dir: a `cifar-10-batches-bin` or `cifar-10-batches-py` folder, or a folder that holds one of them.

  Raises:
    FileNotFoundError: if there is no such folder, or a file is missing from it.
    ValueError: if a file is not what CIFAR-10 has under that name.
  """
  folder, suffix, read = _find_cifar10(Path(data_dir))
  missing = [name + suffix for name in CIFAR10_TRAIN + CIFAR10_TEST if not (folder / (name + suffix)).is_file()]
  if missing:
    raise FileNotFoundError(f'{folder} lacks {", ".join(missing)}; unpack the archive from {CIFAR10_URL} again')

  def split(names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    images, labels = zip(*(read(folder / (name + suffix)) for name in names), strict=True)
    # The files are channel-major, while convolutions here want channels last.
    channels_last = np.concatenate(images).reshape(-1, *CIFAR10_SHAPE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(channels_last), np.concatenate(labels)

  return _make_dataset(split(CIFAR10_TRAIN), split(CIFAR10_TEST), classes=10, shift=4, flip=True)


def text(file: str | Path | None = None) -> Text:
  """A file's characters, or those of what Python's `help` says of the language, some 460 thousand, English and code.

  Args:
    file: UTF-8 text; None for Python's own, the topics in the order of their names.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it is not UTF-8.
  """
  if file is None:
    topics = pydoc_data.topics.topics
    characters = ''.join(topics[name] for name in sorted(topics))
  else:
    path = Path(file)
    if not path.is_file():
      raise FileNotFoundError(f'{path} is not a file')
    try:
      characters = path.read_text(encoding='utf-8')
    except UnicodeDecodeError as error:
      raise ValueError(f'{path} is not UTF-8 text: {error}') from error
  vocabulary = ''.join(sorted(set(characters)))
  # Characters as their code points, whose order is that of the vocabulary.
  points, sorted_points = (np.frombuffer(x.encode('utf-32-le'), np.uint32) for x in (characters, vocabulary))
  tokens = np.searchsorted(sorted_points, points).astype(np.int32)
  split = len(tokens) - len(tokens) // 10
  return Text(tokens[:split], tokens[split:], vocabulary)


def _find_cifar10(data_dir: Path) -> tuple[Path, str, Any]:
  """The folder with the batches, the suffix of its files, and their reader."""
  layouts = {'cifar-10-batches-bin': ('.bin', _read_binary), 'cifar-10-batches-py': ('', _read_pickle)}
  for name, layout in layouts.items():
    if (data_dir / name).is_dir():
      return data_dir / name, *layout
  for suffix, read in layouts.values():
    if any((data_dir / (name + suffix)).is_file() for name in CIFAR10_TRAIN + CIFAR10_TEST):
      return data_dir, suffix, read
  raise FileNotFoundError(
    f'{data_dir} is not a {" or ".join(layouts)} folder and holds none; unpack an archive from {CIFAR10_URL} there'
  )


def _read_binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """Records of one label byte and the pixels."""
  record = 1 + int(np.prod(CIFAR10_SHAPE))
  size, expected = path.stat().st_size, record * CIFAR10_IMAGES_PER_FILE
  if size != expected:
    raise ValueError(f'{path} has {size} bytes, not the {expected} of {CIFAR10_IMAGES_PER_FILE} CIFAR-10 images')
  records = np.fromfile(path, np.uint8).reshape(-1, record)
  return _checked(path, records[:, 1:], records[:, 0])


def _read_pickle(path: Path) -> tuple[np.ndarray, np.ndarray]:
  """A dict, pickled by Python 2, of an array of pixels and a list of labels."""
  try:
    with path.open('rb') as file:
      batch = _ArrayUnpickler(file, encoding='bytes').load()
    images, labels = np.asarray(batch[b'data']), np.asarray(batch[b'labels'])
  # Damaged bytes make an unpickler raise nearly anything.
  except Exception as error:
    raise ValueError(f'{path} is not a CIFAR-10 batch: {error!r}') from error
  return _checked(path, images, labels)


def _checked(path: Path, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  expected = (CIFAR10_IMAGES_PER_FILE, int(np.prod(CIFAR10_SHAPE)))
  if images.dtype != np.uint8 or images.shape != expected:
    raise ValueError(f'{path} holds pixels {images.dtype}{list(images.shape)}, not uint8{list(expected)}')
  if labels.dtype.kind not in 'iu' or labels.shape != expected[:1] or labels.min() < 0 or labels.max() > 9:
    raise ValueError(f'{path} does not hold {expected[0]} labels from 0 to 9')
  return images, labels.astype(np.int32)


def _make_dtype(name: str | bytes, align: int = 0, copy: int = 0) -> np.dtype:
  """`numpy.dtype` as pickles call it, with flags that are integers there and have to be bools for NumPy 2.4."""
  return np.dtype(name.decode('ascii') if isinstance(name, bytes) else name, bool(align), bool(copy))


def _encode(text: str, encoding: str) -> bytes:
  """`_codecs.encode`, by which Python 3 writes bytes in old protocols, kept to the one codec that this takes."""
  if encoding not in ('latin1', b'latin1'):
    raise pickle.UnpicklingError(f'encoding {encoding!r} is not allowed')
  return text.encode('latin-1')


# Asked of NumPy itself, because its module was renamed and importing the old name warns.
_reconstruct = np.empty(0).__reduce__()[0]

_PICKLE_NAMES: dict[tuple[str, str], Any] = {
  ('numpy.core.multiarray', '_reconstruct'): _reconstruct,
  ('numpy._core.multiarray', '_reconstruct'): _reconstruct,
  ('numpy', 'ndarray'): np.ndarray,
  ('numpy', 'dtype'): _make_dtype,
  ('_codecs', 'encode'): _encode,
}


class _ArrayUnpickler(pickle.Unpickler):
  """Unpickles plain containers and NumPy arrays and nothing else: a pickle can otherwise run any code it likes."""

  def find_class(self, module: str, name: str) -> Any:
    """The object that a pickle names, if it is on the list."""
    if (module, name) not in _PICKLE_NAMES:
      raise pickle.UnpicklingError(f'{module}.{name} is not allowed')
    return _PICKLE_NAMES[module, name]
