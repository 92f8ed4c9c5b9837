"""What is no array and says so: the errors of quantized arrays, and of the deltas that are added to them."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import jax

# fmt: off
_BINARY = (
  'add', 'sub', 'mul', 'truediv', 'floordiv', 'mod', 'divmod', 'pow', 'matmul', 'and', 'or', 'xor', 'lshift', 'rshift',
)
_WITHOUT_REFLECTION = (
  'neg', 'pos', 'abs', 'invert', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'getitem', 'float', 'int', 'complex',
)
ATTRIBUTES = (
  'T', 'mT', 'at', 'astype', 'reshape', 'ravel', 'flatten', 'transpose', 'squeeze', 'real', 'imag', 'sum', 'mean',
  'std', 'var', 'min', 'max', 'prod', 'dot', 'item', 'tolist', 'copy', 'clip', 'round',
)
# fmt: on


class NotAnArrayError(TypeError, AttributeError):
  """What is no array was used as one. An AttributeError besides, so that `hasattr` says what it lacks."""


class Explained(type):
  """A class whose name, as JAX prints it in errors about trees and types, comes with what to do about them."""

  ADVICE: str

  def __repr__(cls) -> str:
    return f"<class 'lpmm_optax.{cls.__name__}': {cls.ADVICE}>"


def refuse_array_operations(cls: type, attributes: Sequence[str] = ()) -> None:
  """Gives a class the operators that arrays have and it lacks; each raises a `NotAnArrayError` with its `explain`."""

  def refusing(what: str) -> Callable[..., Any]:
    def refuse(self: Any, *_: Any, **__: Any) -> Any:
      raise NotAnArrayError(self.explain(what))

    return refuse

  special = {f'__{name}__' for name in (*_BINARY, *(f'r{name}' for name in _BINARY), *_WITHOUT_REFLECTION)} - set(
    vars(cls)
  )
  for name in special:
    setattr(cls, name, refusing(name))
  for name in attributes:
    setattr(cls, name, property(refusing(f'.{name}')))
  cls.__array__ = refusing('NumPy')  # type: ignore[attr-defined]


class Delta(metaclass=Explained):
  """The change of a quantized parameter's codes or scales: integers that wrap around, to be added to these alone.

  It is a leaf of a pytree and no array, so that whatever else is done to it, by a transformation that follows in a
  chain or by a norm that is logged, is an error: those would take codes for numbers.

  Attributes:
    stored: what they are to be added to.
    change: the integers.
  """

  ADVICE = (
    'the change of a quantized parameter, which optax.apply_updates takes and nothing else. To log it, '
    'lpmm_optax.dequantize(updates) is by what the values change. Where more is to be done, there are lpmm_optax.step, '
    'its chain, partition, masked, MultiSteps and apply_if_finite, and low_precision to put transformations of Optax '
    'inside of'
  )
  __array_ufunc__ = None  # NumPy leaves the sum to this class.

  def __init__(self, path: str, change: jax.Array, stored: jax.Array):
    self._path = path
    self.stored = stored
    self.change = change

  @property
  def shape(self) -> tuple[int, ...]:
    return self.change.shape

  @property
  def dtype(self) -> Any:
    return self.change.dtype

  def explain(self, what: str) -> str:
    """A message for who uses it as an array."""
    return f'{what} needs an array, and {self!r} is none: it is {self.ADVICE}'

  def __add__(self, stored: Any) -> jax.Array:
    # What an average or an accumulator holds has the same shape and dtype.
    if stored is not self.stored:
      raise NotAnArrayError(f'{self.explain("A sum")}. It can be added to the arrays that `update` was given alone')
    return stored + self.change

  __radd__ = __add__

  def __getattr__(self, name: str) -> Any:
    raise NotAnArrayError(self.explain(f'.{name}'))

  def __repr__(self) -> str:
    return f'Delta({self._path}, {self.dtype}{list(self.shape)}, for lpmm_optax.step or optax.apply_updates alone)'


refuse_array_operations(Delta)
