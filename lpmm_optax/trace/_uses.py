"""What an inner transformation may do with the entries of its state, and which formats hold them.

A format is chosen by what becomes of its rounding errors. They are absolute on a linear grid, a fraction of the largest
value of a block, and relative in bfloat16. `Use` is the table of all that takes more of a format than the momentum of
an optimizer does; what is used in none of these ways takes eight bits.
"""

from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import enum

from lpmm_optax.storage import _format
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _plan


@dataclasses.dataclass(frozen=True)
class _Demand:
  """What a use takes of a format.

  Attributes:
    text: the use, as `memory_report` and messages have it.
    small_values: values far below the largest of their block must be told from zero, with relative precision.
    low_noise: an error must be far below 1/254 of the largest value of a block.
    is_strict: without that the update is wrong, and not only noisier.
  """

  text: str
  small_values: bool
  low_noise: bool
  is_strict: bool


class Use(enum.Enum):
  """What an inner transformation may do with an entry of its state."""

  DIFFERENCE = _Demand('a root or quotient is taken of its difference from another field', True, True, True)
  # As of L-BFGS's last parameters and gradients, of whose changes it has products.
  CHANGE = _Demand('a root or quotient is taken of what it changes by in a step', True, True, True)
  DECOMPOSITION = _Demand('a matrix of it is decomposed or solved', True, True, True)
  # Errors have full rank, which a matrix need not have. Muon gives each of its directions unit size.
  PRODUCT = _Demand('it is multiplied as a matrix', False, True, True)
  # Which keeps the largest error of all steps.
  MAXIMUM = _Demand('it is, or goes into, a maximum over all steps', True, False, True)
  DIVISOR = _Demand('a root or quotient is taken of it', True, False, True)
  # Else a quotient of two small values is an error of the first, divided by the true second.
  NUMERATOR = _Demand('it is divided by a field of relative precision', True, False, True)
  DEVIATION = _Demand('a root or quotient is taken of a square of it', True, False, False)
  # The least code of `UINT8_SQRT` is never rounded to zero, which is too large for what multiplies.
  FACTOR = _Demand('updates are proportional to it, also where it is small', True, False, False)
  # Errors last as long: with .9999, Adam on a noisy quadratic of wide blocks ends at 1.13 times the loss, ADOPT at 1.9.
  SLOW_DIVISOR = _Demand('it is divided by, and averaged over more than 1000 steps', True, False, False)
  # In 8 bits errors are 22 % of an average of noise with a decay of .999, 53 % with .9998, 83 % with .9999; and in 16
  # bits under .3 % (`tests/optimizers/test_numerics.py`).
  SLOW_AVERAGE = _Demand('it is averaged or summed over more than 1000 steps', False, True, False)


@dataclasses.dataclass(frozen=True)
class Uses:
  """What is known of the entries of an inner state, by index.

  Attributes:
    entries: of the state.
    nonnegative: those that never turn negative.
    copies: those that start as their parameter, a second set of weights.
    uses: of each entry that belongs to a leaf.
    divisors: for each of them, those that it is divided by.
  """

  entries: Sequence[_plan.Entry]
  nonnegative: Collection[int] = frozenset()
  copies: Collection[int] = frozenset()
  uses: Mapping[int, Collection[Use]] = dataclasses.field(default_factory=dict)
  divisors: Mapping[int, Collection[int]] = dataclasses.field(default_factory=dict)

  def uses_with(self, entry: int, chosen: Mapping[int, Format | None]) -> set[Use]:
    """The uses of an entry, given the formats of the others."""
    fine = any(e in chosen and _tells_small_values(chosen[e]) for e in self.divisors.get(entry, ()))
    return {*self.uses.get(entry, ()), *([Use.NUMERATOR] if fine else [])}

  def default_format(self, entry: int, param: Format | None, uses: Collection[Use]) -> Format | None:
    """The smallest format that holds an entry of these uses; `param` is that of its parameter."""
    own = self._eight_bits(entry, param)
    return next((x for x in (own, *_format.WIDE) if holds(x, *uses)), None)

  def reason(self, entry: int, param: Format | None, uses: Collection[Use]) -> str:
    """Why `default_format` is what it is."""
    texts = [use.value.text for use in Use if use in uses and not holds(self._eight_bits(entry, param), use)]
    if texts:
      return '; '.join(texts)
    if entry in self.nonnegative:
      return 'it never turns negative'
    return 'it starts as its parameter' if entry in self.copies else 'nothing that is done with it takes more'

  def _eight_bits(self, entry: int, param: Format | None) -> Format | None:
    """What an entry is stored in where nothing takes more; weights are stored as their parameter is."""
    if entry in self.nonnegative:
      return _format.UINT8_SQRT
    return param if entry in self.copies else _format.INT8


def _tells_small_values(format: Format | None) -> bool:
  return format is None or format.tells_small_values


def holds(format: Format | None, *uses: Use) -> bool:
  """Whether a format has what all of some uses take; None, which is dense, has all."""
  if format is None:
    return True
  divides = lambda use: use in (Use.DIVISOR, Use.DEVIATION) and format.keeps_nonzero
  takes_small = lambda use: not use.value.small_values or format.tells_small_values or divides(use)
  return all(takes_small(use) and (format.has_low_noise or not use.value.low_noise) for use in uses)
