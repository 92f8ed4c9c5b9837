"""Between dense values and stored codes: blocks, scales, and the one place where values are rounded.

A codec reads and writes one array, in tiles: `decode` gives dense values; `advance` fixes what will be stored in the
place of what is; `finish` gives the arrays to store and the rounding error that was made. That of a `Format` also has
`encode`, which fixes what will be stored where there is nothing yet, `snap`, `step` and `largest`. A codec works in a
*view* of the tile, which the driver of the update has chosen (`_view`).

All products below are of a power of two or of a few-bit integer with an 8-bit scale, hence exact, or are rounded once
on every platform; the quotient of a division is corrected in integers.
"""

import dataclasses
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from lpmm_optax.storage import _format
from lpmm_optax.storage import _view

# Low enough for any gradient; high enough for reciprocal(scale) * 2^24 to be finite.
_MIN_SCALE = 2.0**-100
_SMALLEST_NORMAL = np.int32(0x00800000)


def _bits_of(x: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(x, jnp.uint32)


def _signed_bits_of(x: jax.Array) -> jax.Array:
  """The bits of floats that are not negative, which compare as they do; not every backend compares unsigned ones."""
  return lax.bitcast_convert_type(x, jnp.int32)


def _float_of(bits: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(bits, jnp.float32)


def from_bfloat16_bits(scale: jax.Array) -> jax.Array:
  """bfloat16 bit pattern (uint16) to float32."""
  return _float_of(scale.astype(jnp.uint32) << 16)


def to_bfloat16_bits(scale: jax.Array) -> jax.Array:
  """float32 that is a bfloat16 value to its bit pattern (uint16)."""
  return (_bits_of(scale) >> 16).astype(jnp.uint16)


def fresh_scale(absmax: jax.Array, max_code: int) -> jax.Array:
  """The smallest bfloat16 s, as float32, with max_code * s >= absmax.

  Zero where absmax is zero or denormal, which XLA on CPU takes for zero, and NaN where it is not finite. Nonzero scales
  are at least 2^-100, and low enough for max_code * s to be finite, where values above are clipped by less than one
  grid step.
  """
  largest = np.array(np.finfo(np.float32).max / np.float32(max_code)).view(np.int32) & np.int32(-0x10000)
  # The product is within one ulp of the quotient; four ulps lower it is surely not above it.
  below = jnp.maximum(_signed_bits_of(absmax * np.float32(1 / max_code)), np.int32(4)) - np.int32(4)
  scale = (below + np.int32(0xFFFF)) & np.int32(-0x10000)
  scale = jnp.where(_float_of(scale) * np.float32(max_code) >= absmax, scale, scale + np.int32(0x10000))
  scale = jnp.clip(scale, np.float32(_MIN_SCALE).view(np.int32), largest)
  scale = jnp.where(_signed_bits_of(absmax) < _SMALLEST_NORMAL, np.int32(0), scale)
  return jnp.where(jnp.isfinite(absmax), _float_of(scale), np.float32(np.nan))


def reciprocal(scale: jax.Array) -> jax.Array:
  """1 / s, correctly rounded on every platform, for s a normal bfloat16 value; 0 for s = 0, and normal for NaN.

  The significand is an integer M from 128 to 255, so the quotient 2^31 / M, which has 24 bits, is an integer division:
  of floats, which is approximate on a GPU or TPU, and of what that has left, to the nearest integer.
  """
  bits = _signed_bits_of(scale)
  exponent = (bits >> 23) & np.int32(0xFF)
  significand = ((bits >> 16) & np.int32(0x7F)) | np.int32(0x80)
  inverse = 1 / significand.astype(jnp.float32)
  quotient = (inverse * np.float32(2.0**31)).astype(jnp.int32)
  # 2^31 - quotient * M, a few M at the most, so exact modulo 2^32. No rest is half an M, hence none is rounded wrongly.
  rest = np.int32(-(2**31)) - quotient * significand
  quotient = quotient + jnp.floor(rest.astype(jnp.float32) * inverse + np.float32(0.5)).astype(jnp.int32)
  # No scale of a block has a larger exponent than 252. That of NaN, which times infinity gives a code, must not vanish
  # where denormal numbers do.
  power = _float_of(jnp.clip(np.int32(254) - exponent, 2, 254) << 23)
  inverse = quotient.astype(jnp.float32) * np.float32(2.0**-24) * power
  return jnp.where(exponent == 0, np.float32(0), inverse)


class Stored(NamedTuple):
  """A tile as it lies in memory: codes (or dense values) and, if the format has them, scales."""

  codes: jax.Array
  scales: Any = None


class Payload(NamedTuple):
  """What was decided, ready for `finish`.

  Attributes:
    word: in view: of a linear grid, the code above the rounding error (a sign and fraction_bits); else what is stored.
    scales: of a linear grid, one per block.
    error: of bfloat16, in view.
    delta: of a dense array, in view, as it was added; if one was given.
  """

  word: jax.Array
  scales: Any = None
  error: Any = None
  delta: Any = None


@dataclasses.dataclass(frozen=True)
class LinearCodec:
  """x = code * scale, and for the sqrt grid x = (code * scale)^2, in blocks of `size` along `axis` of a tile."""

  format: _format.Format
  view: _view.View
  axis: int
  size: int

  @property
  def squares(self) -> bool:
    return self.format.grid == 'sqrt'

  def _spread(self, per_block: jax.Array) -> jax.Array:
    """One value per block to an array that broadcasts against the view."""
    return self.view.spread(per_block, self.axis, self.size)

  def _absmax(self, x: jax.Array) -> jax.Array:
    """In view, without NaN, to the largest magnitude in each block."""
    return self.view.absmax(x, self.axis, self.size)

  def decode(self, stored: Stored) -> jax.Array:
    """Stored tile to float32 values in view; exact, and NaN throughout a poisoned block."""
    value = self._codes(stored).astype(jnp.float32) * self._spread(from_bfloat16_bits(stored.scales))
    return value * value if self.squares else value

  def _codes(self, stored: Stored) -> jax.Array:
    """In view, as integers that have their values."""
    codes = self.view.split(stored.codes)
    return codes.astype(jnp.int32) & self.format.max_code if self._lacks_sign else codes

  @property
  def _lacks_sign(self) -> bool:
    """Whether codes are stored as a signed integer of the same bits."""
    return not self.format.signed and jnp.issubdtype(self.format.code_dtype, jnp.signedinteger)

  def step(self, stored: Stored) -> jax.Array:
    """The distance of neighbouring codes, which broadcasts against the cell view; of their roots for squares."""
    return self._spread(from_bfloat16_bits(stored.scales))

  def largest(self, x: jax.Array) -> jax.Array:
    """In view, without NaN, to the largest magnitude in each block, which broadcasts against the view."""
    return self._spread(self._absmax(x))

  def encode(self, value: jax.Array, bits: jax.Array | None, dtype: Any = jnp.float32) -> Payload:
    """Rounds values, float32 in view, to a fresh grid; see `advance` for the rest.

    What was encoded so, and decoded to `dtype`, gets the same grid again.
    """
    storable = self._storable(value)
    value = self._root(storable)
    scale = self._first_scale(value, self._root(self._absmax(storable)), jnp.finfo(dtype))
    return self._round(value, value, jnp.int32(0), to_bfloat16_bits(scale), self._per_unit(scale), bits)

  def advance(self, old: Stored, value: jax.Array, bits: jax.Array | None, delta: jax.Array | None = None) -> Payload:
    """Rounds new values of what is stored already.

    A block whose absmax still fits its stored scale (is at most its largest value and at least 7/8 of that, 6/7 in
    `INT4`, 2/3 in `UINT4_SQRT`, or any less for the least scale) keeps that scale, and there the code is an integer
    base to which only the change is added and rounded. No change then changes nothing, and one far below the
    precision of a float32 sum is still rounded without bias. On the square-root grid, the change is that of the
    root.

    Args:
      old: the tile as it is stored.
      value: what it becomes, float32, in view.
      bits: uint32 random bits in view, or None to round to nearest.
      delta: value - decode(old), where that is known to more than the precision of value; for the linear grid.
    """
    storable = self._storable(value)
    # Of the values as they are, where NaN is found too: XLA on CPU would write to memory what two have to read.
    source = storable if self.squares else value
    scales, per_unit = self.view.with_absmax(self._next_grid, source, self.axis, self.size, old.scales)
    value = self._root(storable)
    codes = self._codes(old)
    if delta is None:
      delta = value - codes.astype(jnp.float32) * self._spread(from_bfloat16_bits(old.scales))
    # A block that stores its scale again has kept it, for a fresh one would be another; NaN, which none keeps, equals
    # nothing. Both ends of a change within the limit lie at most 2 max_code apart, which the fixed point has room for.
    kept = self._spread(from_bfloat16_bits(scales) == from_bfloat16_bits(old.scales))
    base = jnp.where(kept, codes.astype(jnp.int32) << self.format.fraction_bits, jnp.int32(0))
    return self._round(value, jnp.where(kept, delta, value), base, scales, per_unit, bits)

  def snap(self, old: Stored, value: jax.Array) -> jax.Array:
    """New values as they are when rounded to nearest on the stored grid, in blocks that would keep it; in view.

    A value that was decoded from that grid, then cast or multiplied by a factor and its reciprocal, is on it again.
    """
    scale = from_bfloat16_bits(old.scales)
    root = self._root(self._storable(value))
    codes = lax.round(root * self._spread(reciprocal(scale)), lax.RoundingMethod.TO_NEAREST_EVEN)
    if self.squares:
      codes = jnp.where(root > 0, jnp.maximum(codes, 1), codes)
    kept = self._keeps(scale, self._absmax(codes) * scale) & (scale > 0)
    on_grid = codes * self._spread(scale)
    return jnp.where(self._spread(kept), on_grid * on_grid if self.squares else on_grid, value)

  def _keeps(self, scale: jax.Array, absmax: jax.Array) -> jax.Array:
    """Whether blocks keep a stored scale, given their new absmax."""
    # A fresh scale rounds the whole block anew, so it must be rare where the largest element trembles.
    # Under the least there is none, and `_first_scale` may have found one that is two above.
    is_least = scale <= np.float32(_MIN_SCALE * (1 + 2.0**-6))
    is_tight = (absmax >= scale * np.float32(self.format.least_largest_code)) | is_least
    return (absmax <= scale * np.float32(self.format.max_code)) & is_tight

  def _first_scale(self, value: jax.Array, absmax: jax.Array, precision: Any) -> jax.Array:
    """`fresh_scale`, or the one near it on whose grid the values lie already, but for their own precision.

    The largest code that a fresh scale leads to is the largest of all or, as scales are rounded up, a little less. Then
    the smallest scale for what is decoded is another one, at most two below; or one above, if what is decoded is cast.
    (Of four bits, stochastic rounding may leave a largest code that is one less, which is not looked for.)
    """
    fresh = fresh_scale(absmax, self.format.max_code)
    steps = np.array([-1, 2, 1, 0], np.int32).reshape(-1, *(1,) * absmax.ndim) * np.int32(0x10000)

    def choose(grid, scale):
      scale_of_each = self._spread(scale)
      codes = lax.round(value / scale_of_each, lax.RoundingMethod.TO_NEAREST_EVEN)
      decoded = codes * scale_of_each
      if precision.nmant < 23:
        decoded = lax.reduce_precision(decoded, precision.nexp, precision.nmant)
      is_on = (decoded == value) & (jnp.abs(codes) <= np.float32(self.format.max_code))
      is_off = jnp.where(is_on, np.float32(0), np.float32(1))
      is_found = (self._absmax(is_off) == 0) & (fresh > 0)
      return jnp.where(is_found, jnp.maximum(scale, _MIN_SCALE), grid), None

    return lax.scan(choose, fresh, _float_of(_signed_bits_of(fresh)[None] + steps))[0]

  def _storable(self, value: jax.Array) -> jax.Array:
    """The values, where what cannot be stored is infinite, and poisons its block."""
    return jnp.where(value >= 0 if self.squares else value == value, value, np.float32(np.inf))

  def _root(self, value: jax.Array) -> jax.Array:
    """Values as they lie on the grid's axis; the largest has the largest root, so one per block is taken of that."""
    return jnp.sqrt(value) if self.squares else value

  def _next_grid(self, absmax: jax.Array, old_scales: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of blocks' absmax and stored scales: those to store, and `_per_unit` of them."""
    absmax, old_scale = self._root(absmax), from_bfloat16_bits(old_scales)
    scale = jnp.where(self._keeps(old_scale, absmax), old_scale, fresh_scale(absmax, self.format.max_code))
    return to_bfloat16_bits(scale), self._per_unit(scale)

  def _per_unit(self, scale: jax.Array) -> jax.Array:
    """How many units of the fixed point make one of the values."""
    return reciprocal(scale) * np.float32(2.0**self.format.fraction_bits)

  def _round(
    self,
    value: jax.Array,
    change: jax.Array,
    base: jax.Array,
    scales: jax.Array,
    per_unit: jax.Array,
    bits: jax.Array | None,
  ) -> Payload:
    max_code, fraction_bits = self.format.max_code, self.format.fraction_bits
    fixed = lax.round(change * self._spread(per_unit), lax.RoundingMethod.TO_NEAREST_EVEN)
    top = max_code << fraction_bits
    fixed = jnp.clip(fixed.astype(jnp.int32) + base, -top if self.format.signed else 0, top)
    half = jnp.int32(1 << (fraction_bits - 1))
    dither = half if bits is None else (bits >> (32 - fraction_bits)).astype(jnp.int32)
    code = (fixed + dither) >> fraction_bits
    if self.squares:
      # A second moment that rounds to zero divides by epsilon alone.
      code = jnp.where(value > 0, jnp.maximum(code, 1), code)
    code = code << fraction_bits
    error = (fixed - code) & jnp.int32((2 << fraction_bits) - 1)
    return Payload((code << 1) | error, scales)

  def finish(self, payload: Payload) -> tuple[Stored, jax.Array]:
    """What to store, codes in view, and the error (wanted - stored) of the linear grid, float32 in view."""
    fraction_bits = self.format.fraction_bits
    codes = payload.word >> (fraction_bits + 1)
    if self._lacks_sign:
      above = 32 - self.format.bits
      codes = codes << above >> above
    codes = codes.astype(self.format.code_dtype)
    error = (payload.word << (31 - fraction_bits)) >> (31 - fraction_bits)
    error = error.astype(jnp.float32) * np.float32(2.0**-fraction_bits)
    return Stored(codes, payload.scales), error * self._spread(from_bfloat16_bits(payload.scales))


@dataclasses.dataclass(frozen=True)
class BFloat16Codec:
  """The upper half of a float32, rounded on its bits."""

  format: _format.Format
  view: _view.View

  def decode(self, stored: Stored) -> jax.Array:
    return self.view.split(from_bfloat16_bits(stored.codes))

  def step(self, stored: Stored) -> jax.Array:
    """The distance to the next larger magnitude, in view."""
    power = _float_of(_bits_of(self.decode(stored)) & jnp.uint32(0x7F800000))
    return power * np.float32(2.0**-7)

  def largest(self, x: jax.Array) -> jax.Array:
    """The magnitudes, for every element has a step of its own."""
    return jnp.abs(x)

  def encode(self, value: jax.Array, bits: jax.Array | None, dtype: Any = jnp.float32) -> Payload:
    """Rounds values, float32 in view; the error is kept beside them."""
    del dtype
    pattern = _bits_of(value)
    half_to_even = jnp.uint32(0x7FFF) + ((pattern >> 16) & jnp.uint32(1))
    dither = half_to_even if bits is None else bits >> 16
    rounded = (pattern + dither) >> 16
    overflowed = ((rounded & jnp.uint32(0x7FFF)) == 0x7F80) & jnp.isfinite(value)
    rounded = jnp.where(overflowed, rounded - 1, rounded)
    rounded = jnp.where(jnp.isnan(value), jnp.uint32(0x7FC0), rounded)
    return Payload(rounded.astype(jnp.uint16), error=value - _float_of(rounded << 16))

  def snap(self, old: Stored, value: jax.Array) -> jax.Array:
    """As they are: this grid does not move."""
    del old
    return value

  def advance(self, old: Stored, value: jax.Array, bits: jax.Array | None, delta: jax.Array | None = None) -> Payload:
    """The same as `encode`."""
    del old, delta
    return self.encode(value, bits)

  def finish(self, payload: Payload) -> tuple[Stored, jax.Array]:
    return Stored(payload.word), payload.error


@dataclasses.dataclass(frozen=True)
class DenseCodec:
  """Stored as it is; a parameter's delta is cast to its dtype before the sum, as `optax.apply_updates` has it."""

  dtype: np.dtype
  view: _view.View

  def decode(self, stored: Stored) -> jax.Array:
    return self.view.split(stored.codes).astype(compute_dtype(self.dtype))

  def advance(self, old: Stored, value: jax.Array, bits: jax.Array | None, delta: jax.Array | None = None) -> Payload:
    """The values, cast; or the old ones plus a delta, cast, which is kept beside them."""
    del bits
    if delta is None:
      return Payload(value.astype(self.dtype))
    delta = delta.astype(self.dtype)
    return Payload(self.view.split(old.codes) + delta, delta=delta)

  def finish(self, payload: Payload) -> tuple[Stored, None]:
    return Stored(payload.word), None


Codec = LinearCodec | BFloat16Codec | DenseCodec


def compute_dtype(dtype: Any) -> np.dtype:
  """The dtype in which values of a stored dtype are computed: float32, or float64 for float64."""
  return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def subtract(new: Stored, old: Stored) -> Stored:
  """new - old in the codes' own integers, modulo their range, so that old + (new - old) is new bit for bit."""

  def difference(a, b):
    if jnp.issubdtype(a.dtype, jnp.int4):  # Not every backend subtracts int4.
      return (a.astype(jnp.int8) - b.astype(jnp.int8)).astype(jnp.int4)
    return a - b

  return jax.tree.map(difference, new, old)
