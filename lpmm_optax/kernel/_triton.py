"""The tile loop as Triton kernels for NVIDIA GPUs, through Pallas: their grid is the loop, and their body its stages.

XLA on GPU does not fuse a block's maximum with what uses it, so there the loop takes a dozen kernels per tile and moves
dense float32 values through memory between them. One kernel moves each array once.

Blocks along the last axis are consecutive elements, so a leaf of whatever shape is a row of tiles, and leaves that
differ in their shapes alone share one kernel, which is compiled once. Triton's arrays have powers of two as sizes: what
the tiles leave of an array is a second lot of smaller ones. `why_not` tells which arrays cannot be cut so.
"""

from collections.abc import Callable
from collections.abc import Sequence
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.kernel import _body
from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _view

# Per tile. On an H100, one leaf of 2^27 elements, in ps per parameter at 1, 2 and 4 warps: sgdm 5.5, 4.2, 4.5; adamw
# 9.9, 8.7, 8.3. With products as instructions of their own, at 2 warps 4.0 and 7.4, and no less with half the tile
# (`benchmarks/results/gpu_h100.jsonl`). Larger tiles were no faster.
ELEMENTS = 1024
WARPS = 2

# Registers hold a tile, and a tile holds whole blocks.
_MOST_ELEMENTS = 8192
_DTYPES = frozenset({'int4', 'int8', 'uint8', 'int16', 'uint16', 'float32', 'bfloat16', 'float16'})


def why_not(leaves: Sequence[Any], shape: tuple[int, ...] | None = None) -> str | None:
  """Why a leaf's arrays are updated by the loop, also on a GPU; None if the kernel can.

  Args:
    leaves: all that is read and written, QuantizedArrays and dense arrays of one shape.
    shape: of a shard of them; None is their own.
  """
  shape = leaves[0].shape if shape is None else shape
  blocks = _body.all_blocks(leaves)
  unknown = _body.unknown_dtype(leaves, _DTYPES)
  if unknown:
    return unknown
  if any(axis != len(shape) - 1 for axis, _ in blocks):
    return 'blocks along another axis than the last'
  odd = [size for _, size in blocks if not _is_power_of_two(size)]
  if odd:
    return f'blocks of {odd[0]}, no power of two'
  if any(shape[-1] % size for _, size in blocks):
    return 'a shard cuts blocks'
  if math.prod(shape) % 2 and any(x.dtype == jnp.int4 for leaf in leaves for x in jax.tree.leaves(_array.stored(leaf))):
    return 'an odd number of 4-bit codes'
  if _unit(blocks) > _MOST_ELEMENTS:
    return f'blocks of more than {_MOST_ELEMENTS} elements'
  return _body.TOO_LARGE if _body.is_too_large(shape) else None


def _is_power_of_two(n: int) -> bool:
  return n & (n - 1) == 0


def _unit(blocks: Sequence[tuple[int, int]]) -> int:
  """The elements that blocks keep together."""
  return max([size for _, size in blocks], default=1)


class Lot(NamedTuple):
  """A row of equal tiles.

  Attributes:
    tile: elements in each, a power of two.
    first: how many tiles of that size lie before the lot.
    tiles: how many it has.
  """

  tile: int
  first: int
  tiles: int


def choose_lots(size: int, tile: int) -> list[Lot]:
  """Cuts an array of `size` elements into tiles of so many, a power of two; what is left, into smaller ones."""
  count, rest = divmod(size, tile)
  small = rest & -rest  # The largest power of two that divides it, and so a multiple of each block's size.
  lots = [Lot(tile, 0, count)] if count else []
  return [*lots, Lot(small, (size - rest) // small, rest // small)] if rest else lots


def update_in_place(task: _tiles.Task, interpret: bool) -> Any:
  """The new `task.writes`, where `why_not` has nothing against it.

  Args:
    task: what is updated.
    interpret: whether JAX runs the kernel, on any platform and slowly, rather than Triton.
  """
  size = math.prod(task.shape)

  def move(origin, coordinates):
    if origin is None:
      return coordinates
    (number,) = coordinates
    own: list[jax.Array] = []
    for n, start in zip(reversed(task.shape), reversed(origin), strict=True):
      own.insert(0, number % jnp.uint32(n) + start)
      number = number // jnp.uint32(n)
    return own

  def of_run(view, shared, zero):
    values, origin = shared
    return task.stages(view, values, zero).moved(functools.partial(move, origin))

  reads, writes = jax.tree.map(lambda x: x.reshape(-1), (task.reads, task.writes))
  blocks = [(0, size) for _, size in task.blocks]
  zero = task.zero if interpret else None
  row = _tiles.Task(of_run, (size,), blocks, (task.values, task.origin), zero, reads, writes)
  lots = choose_lots(size, max(ELEMENTS, _unit(blocks)))
  for lot in lots:
    new = _update_lot(_body.trace(row, _view.run(lot.tile, blocks)), size, lot, len(lots) == 1, interpret)
    row = row._replace(writes=jax.tree.unflatten(jax.tree.structure(writes), new))
  return jax.tree.map(lambda x, new: new.reshape(x.shape), task.writes, row.writes)


def _update_lot(body: _body.Body, size: int, lot: Lot, is_only: bool, interpret: bool) -> list[jax.Array]:
  # Imported where they are needed, for they take a while, and JAX means to drop Triton.
  from jax.experimental import pallas as pl
  from jax.experimental.pallas import triton as plt

  # What this lot does not write is kept in the arrays that it writes.
  passed = body.read if is_only else [*body.read, *(value for value in body.written if value not in body.read)]
  rules = {'convert_element_type': _convert} if interpret else _rules(plt)
  is_packed = {value: x.dtype == jnp.int4 for value, x in body.arrays.items()}
  operands = {value: _bytes_of(x) if is_packed[value] else x for value, x in body.arrays.items()}

  def kernel(words, *refs):
    ref_of = dict(zip(passed, refs[: len(passed)], strict=True))
    number = pl.program_id(0).astype(jnp.uint32) + jnp.uint32(lot.first)
    offsets = [number * jnp.uint32(lot.tile)]
    tile_of = lambda value: _unpacked(ref_of[value][...]) if is_packed[value] else ref_of[value][...]
    new = body.evaluate(lambda i: words[i], offsets, tile_of, rules)
    for ref, (value, tile) in zip(refs[len(passed) :], new.items(), strict=True):
      ref[...] = _packed(tile) if is_packed[value] else jnp.broadcast_to(tile, ref.shape)

  def spec(value):
    return pl.BlockSpec((lot.tile * operands[value].size // size,), lambda step: (step + lot.first,))

  new = pl.pallas_call(
    kernel,
    grid=(lot.tiles,),
    in_specs=[pl.BlockSpec(body.words.shape, lambda step: (0,)), *map(spec, passed)],
    out_specs=list(map(spec, body.written)),
    out_shape=[_body.as_result(operands[value]) for value in body.written],
    input_output_aliases={1 + passed.index(value): i for i, value in enumerate(body.written) if value in passed},
    interpret=interpret,
    compiler_params=None if interpret else plt.CompilerParams(num_warps=WARPS, num_stages=1),
    name='lpmm_update',
  )(body.words, *(operands[value] for value in passed))
  return [_codes_of(x) if is_packed[value] else x for value, x in zip(body.written, new, strict=True)]


# XLA on a GPU keeps two 4-bit codes in a byte, the first in its lower half, so that these two move nothing.
def _bytes_of(codes: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(codes.reshape(-1, 2), jnp.int8)


def _codes_of(packed: jax.Array) -> jax.Array:
  return lax.bitcast_convert_type(packed, jnp.int4).reshape(-1)


# Triton has no type of 4 bits.
def _unpacked(packed: jax.Array) -> jax.Array:
  """int8[n] to the int8[2n] that are in it."""
  shift = 4 * lax.broadcasted_iota(jnp.int32, (packed.size, 2), 1)
  both = jnp.broadcast_to(packed.astype(jnp.int32)[:, None], shift.shape)
  return (both << (28 - shift) >> 28).astype(jnp.int8).reshape(-1)


def _packed(codes: jax.Array) -> jax.Array:
  """The reverse."""
  pairs = codes.astype(jnp.int32).reshape(-1, 2) & 15
  return jnp.sum(pairs << 4 * lax.broadcasted_iota(jnp.int32, pairs.shape, 1), axis=1, dtype=jnp.int32).astype(jnp.int8)


def _convert(x: jax.Array, *, new_dtype: Any, **_: Any) -> jax.Array:
  return x.astype(jnp.int8 if new_dtype == jnp.int4 else new_dtype)


def _rules(plt: Any) -> dict[str, Callable]:
  """What Pallas' Triton does not know, or must not contract; `plt` is its module."""

  def instruction(asm, *operands, dtype=jnp.float32):
    names = ', '.join(f'${i}' for i in range(len(operands) + 1))
    shape = jnp.broadcast_shapes(*(x.shape for x in operands))
    args = [jnp.broadcast_to(x, shape or (1,)) for x in operands]  # Of one block, a number.
    constraints = ','.join(['=r' if dtype == jnp.int32 else '=f', *'f' * len(args)])
    type_of = [jax.ShapeDtypeStruct(args[0].shape, dtype)]
    results = plt.elementwise_inline_asm(
      f'{asm} {names};', args=args, constraints=constraints, pack=1, result_shape_dtypes=type_of
    )
    return results[0].reshape(shape)

  unrounded: dict[int, tuple[jax.Array, jax.Array]] = {}  # By id; and what has it, which keeps it taken.

  def round_to_even(x, *, rounding_method):
    assert rounding_method == lax.RoundingMethod.TO_NEAREST_EVEN
    rounded = instruction('cvt.rni.f32.f32', x)
    unrounded[id(rounded)] = rounded, x
    return rounded

  def convert(x, *, new_dtype, **_):
    if (x.dtype, new_dtype) != (jnp.float32, jnp.int32):
      return _convert(x, new_dtype=new_dtype)
    # One instruction, which clamps, and takes NaN for 0, where JAX has five; or six with a rounding before it.
    if id(x) in unrounded:
      return instruction('cvt.rni.s32.f32', unrounded[id(x)][1], dtype=jnp.int32)
    return instruction('cvt.rzi.s32.f32', x, dtype=jnp.int32)

  def multiply(x, y, **_):
    # LLVM would make a product and a sum one operation; what PTX is told how to round stays as it is.
    return x * y if x.dtype != jnp.float32 else instruction('mul.rn.f32', x, y)

  def power(x, *, y):
    return multiply(x, x) if y == 2 else instruction('mov.f32', lax.integer_pow(x, y))

  return {
    'convert_element_type': convert,
    'integer_pow': power,
    'mul': multiply,
    'round': round_to_even,
    'square': lambda x: multiply(x, x),
  }
