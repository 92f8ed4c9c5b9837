"""How an array is stored: the `Format` description, its presets, and block geometry.

This module knows nothing of optimizers, of randomness or of JAX arrays: it answers "which integer type, which grid,
which blocks" from static facts (bits, shapes, dtypes).
"""

import dataclasses
import math
from typing import Literal
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

PARAM_BLOCK_SIZE = 64
STATE_BLOCK_SIZE = 128
MIN_BLOCK_SIZE = 8
# A power of two from here on is preferred, for kernels on GPUs take no other blocks: at 2 bytes per 32 elements, its
# scales cost at most .05 bytes per element more than those of the longest blocks.
MIN_PREFERRED_SIZE = 32
MIN_SIZE = 4096
MIN_SIZE_1D = 65536

# By grid and bits, all that there are.
_CODE_DTYPES = {
  ('linear', 4): jnp.int4,
  ('linear', 8): jnp.int8,
  ('linear', 16): jnp.int16,
  ('sqrt', 4): jnp.int4,  # The bits of a uint4, which Orbax does not save, and Pallas does not load.
  ('sqrt', 8): jnp.uint8,
  ('bfloat16', 16): jnp.uint16,
}


@dataclasses.dataclass(frozen=True)
class Format:
  """A static description of how an array is stored.

  Instances are frozen, hashable and not callable, so they can be static pytree metadata and survive
  `optax.inject_hyperparams`, which turns callables into schedules and integers into tracers.

  Attributes:
    bits: bits per code: 4, 8 or 16 on a linear grid, 4 or 8 on a square-root one, 16 of bfloat16.
    block_size: how many neighbours along one axis share a scale: this many if that divides the axis; else the largest
      power of two that does and is smaller, from 32 on; else the largest divisor below. None means 64 for parameters
      and 128 for optimizer state.
    grid: 'linear' stores x = code * scale; 'sqrt' stores x = (code * scale)^2, for second moments, which are never
      negative; 'bfloat16' stores the upper 16 bits of the float32 and needs no scale.
    rounding: 'stochastic' (unbiased: up with probability equal to the fraction) or 'nearest'.

  Raises:
    ValueError: for a combination that has no storage, naming the argument.

  >>> import lpmm_optax as lpmm
  >>> lpmm.INT8.max_code, lpmm.Format(bits=4).max_code
  (127, 7)
  >>> lpmm.Format(bits=3)
  Traceback (most recent call last):
    ...
  ValueError: bits=3 is not supported with grid='linear': choose from [4, 8, 16]
  """

  bits: int = 8
  block_size: int | None = None
  grid: Literal['linear', 'sqrt', 'bfloat16'] = 'linear'
  rounding: Literal['stochastic', 'nearest'] = 'stochastic'

  def __post_init__(self):
    choices = [bits for grid, bits in _CODE_DTYPES if grid == self.grid]
    if not choices:
      raise ValueError(f"grid={self.grid!r} must be 'linear', 'sqrt' or 'bfloat16'")
    if self.bits not in choices:
      raise ValueError(f'bits={self.bits} is not supported with grid={self.grid!r}: choose from {choices}')
    if self.block_size is not None and self.block_size < 1:
      raise ValueError(f'block_size={self.block_size} must be at least 1')
    if self.block_size is not None and not self.has_scales:
      raise ValueError(f'grid={self.grid!r} has no scales: it takes block_size=None')
    if self.rounding not in ('stochastic', 'nearest'):
      raise ValueError(f"rounding={self.rounding!r} must be 'stochastic' or 'nearest'")

  @property
  def has_scales(self) -> bool:
    """Whether arrays of this format carry block scales."""
    return self.grid != 'bfloat16'

  @property
  def signed(self) -> bool:
    """Whether values may be negative."""
    return self.grid != 'sqrt'

  @property
  def keeps_nonzero(self) -> bool:
    """Whether what is not zero is never stored as zero, but as too large where it is small."""
    return self.grid == 'sqrt'

  @property
  def tells_small_values(self) -> bool:
    """Whether values far below the largest of their block are told from zero, with relative precision."""
    return self.grid == 'bfloat16'

  @property
  def has_low_noise(self) -> bool:
    """Whether errors are far below 1/254 of the largest value of a block."""
    return self.grid == 'linear' and self.bits == 16

  @property
  def code_dtype(self) -> np.dtype:
    """The integer dtype of the codes: for bfloat16 and for 4 bits without a sign, one of the same bits."""
    return jnp.dtype(_CODE_DTYPES[self.grid, self.bits])

  @property
  def max_code(self) -> int:
    """The largest code; signed grids are symmetric, so the smallest is its negative."""
    return 2 ** (self.bits - self.signed) - 1

  @property
  def least_largest_code(self) -> int:
    """How small the largest code of a block may become before the block takes a fresh scale.

    Seven eighths of the largest. Of 15 codes that is two, between which a largest second moment does not stay: 7 % of
    the blocks were rounded anew in each step with a decay of .999, and roots strayed by 39 % rather than 31 %.
    """
    return 10 if self.max_code == 15 else self.max_code * 7 // 8

  @property
  def fraction_bits(self) -> int:
    """Random bits per rounding: as many as leave room for a code, twice over, and a sign in an int32.

    22 for 4- and 8-bit codes, 21 for unsigned ones of 8 bits, and 14 for 16-bit ones, where code and fraction together
    already resolve more than the 24 bits of a float32.
    """
    return min(22, 29 - (self.bits - self.signed))

  @property
  def storage(self) -> tuple[str, str]:
    """Names of codes and scales in what is saved: all that one must know to read them, which is not the rounding."""
    if not self.has_scales:
      return 'bfloat16', 'no_scales'
    return f'int{self.bits}' if self.signed else f'uint{self.bits}_sqrt', f'scales_of_{self.block_size}'

  def variants(self, is_nonnegative: bool) -> tuple['Format', ...]:
    """What to store a field in where this is given for all: the first that holds it, or else the last."""
    if self.bits < 16:
      return (dataclasses.replace(self, grid='sqrt') if is_nonnegative else self,)
    size = lambda x: self.block_size if x.has_scales else None
    others = (dataclasses.replace(x, block_size=size(x), rounding=self.rounding) for x in reversed(WIDE))
    return (*others, self) if is_nonnegative else (self, *others, self)

  def with_block_size(self, default: int) -> 'Format':
    """This format with an unset block size replaced by `default`."""
    if self.block_size is None and self.has_scales:
      return dataclasses.replace(self, block_size=default)
    return self

  def __str__(self) -> str:
    return self.storage[0] + ('' if self.rounding == 'stochastic' else '_nearest')


INT4 = Format(bits=4)
INT8 = Format(bits=8)
INT16 = Format(bits=16)
UINT8_SQRT = Format(bits=8, grid='sqrt')
UINT4_SQRT = Format(bits=4, grid='sqrt')
BFLOAT16 = Format(bits=16, grid='bfloat16')
WIDE = (INT16, BFLOAT16)  # For what 8 bits do not hold, the preferred one first.


def largest_divisor(n: int, at_most: int) -> int:
  """The largest divisor of n that is not above at_most."""
  return next(d for d in range(min(n, at_most), 0, -1) if n % d == 0)


def _block_size(n: int, at_most: int) -> int:
  """The size of blocks that cut an axis of n elements."""
  largest, power = largest_divisor(n, at_most), n & -n
  while power > at_most:
    power //= 2
  return power if largest < at_most and power >= MIN_PREFERRED_SIZE else largest


class BlockGeometry(NamedTuple):
  """Which elements of an array share a scale.

  Attributes:
    axis: along which blocks run, counted from the end (-1 is the last), so that it stays true of slices along leading
      axes (`lax.scan` over stacked layers, `vmap`).
    size: elements per block.
  """

  axis: int
  size: int

  def scales_shape(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape of the scales of an array of `shape`; None if it cannot have such blocks."""
    axis = len(shape) + self.axis
    if axis < 0 or shape[axis] % self.size:
      return None
    return (*shape[:axis], shape[axis] // self.size, *shape[axis + 1 :])


def choose_blocks(shape: tuple[int, ...], block_size: int) -> BlockGeometry:
  """The blocks that suit an array.

  They run along the last axis, unless its longest block would be under half the size asked for and the axis before it
  does better; along a leading one, over which parameters are stacked and sliced, only if both fall short of
  `MIN_BLOCK_SIZE`. Blocks never straddle two rows, so one PartitionSpec serves codes and scales alike.
  """
  sizes = [largest_divisor(n, block_size) for n in shape]
  last = len(shape) - 1
  if 2 * sizes[last] >= block_size:
    return BlockGeometry(-1, _block_size(shape[last], block_size))
  best = lambda axes: max(axes, key=lambda d: (sizes[d], d))
  axis = best(range(max(last - 1, 0), last + 1))
  if sizes[axis] < MIN_BLOCK_SIZE:
    axis = best(range(last + 1))
  return BlockGeometry(axis - len(shape), _block_size(shape[axis], block_size))


def exemption(shape: tuple[int, ...], dtype: np.dtype, format: Format) -> str | None:
  """Why an array stays dense by default, or None if it is stored in `format`, whose block size is filled in."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return 'not floating point'
  size = math.prod(shape)
  if size < MIN_SIZE:
    return f'under {MIN_SIZE} elements'
  if len(shape) == 1 and size < MIN_SIZE_1D:
    return f'one-dimensional, under {MIN_SIZE_1D} elements'
  target = format.block_size
  if target is not None and choose_blocks(shape, target).size < min(MIN_BLOCK_SIZE, target):
    return f'no axis has a divisor from {MIN_BLOCK_SIZE} to {target}'
  return None
