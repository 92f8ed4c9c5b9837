"""The body of a kernel: the stages of an update, traced for one tile, without what all tiles share.

A kernel is made of the very stages that the loop runs: what is one number for all tiles is computed outside of it, and
everything else inside, operation by operation. So the results are the loop's, bit for bit.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _view
from lpmm_optax.trace import _program

# Pallas counts elements in 32 bits, signed, where an array has at most 2^32 bytes.
_MOST_IN_ARRAY = 2**31
TOO_LARGE = f'more than {_MOST_IN_ARRAY} elements on a device'


def is_too_large(shape: tuple[int, ...]) -> bool:
  """Whether an array has too many elements for a kernel; its shards may have few enough."""
  return math.prod(shape) > _MOST_IN_ARRAY


def unknown_dtype(leaves: Sequence[Any], known: frozenset[str]) -> str | None:
  """Why leaves, QuantizedArrays and dense arrays, have arrays of other dtypes than the known ones; None if not."""
  unknown = {jnp.dtype(x.dtype).name for leaf in leaves for x in jax.tree.leaves(_array.stored(leaf))} - known
  return f'arrays of {min(unknown)}' if unknown else None


def all_blocks(leaves: Sequence[Any]) -> list[tuple[int, int]]:
  """The (axis, block size) of everything stored in the shape of some leaves."""
  return [block for leaf in leaves for block in _array.blocks_of(leaf)]


@dataclasses.dataclass(frozen=True)
class Body:
  """The function of one tile.

  Attributes:
    words: uint32[n], what the kernel is given besides arrays.
    arrays: by value of the graph, what tiles are cut from.
    read: the arrays that a tile is computed from.
    written: the arrays whose tiles it gives, in order.
  """

  words: jax.Array
  arrays: dict[int, jax.Array]
  read: list[int]
  written: list[int]
  _graph: _program.Graph
  _axis_of: dict[int, int]
  _word_of: dict[int, int]

  def evaluate(
    self,
    word: Callable[[int], jax.Array],
    offsets: Sequence[Any],
    tile: Callable[[int], jax.Array],
    rules: Mapping[str, Callable],
  ) -> dict[int, jax.Array]:
    """The new tiles, by value of the array.

    Args:
      word: gives one of the words, within the kernel.
      offsets: per axis, uint32[], where the tile begins in the arrays.
      tile: gives the tile of an array by its value.
      rules: by name of an operation, what stands in for it where the kernel's language lacks it.
    """

    def argument(value):
      if value in self.arrays:
        return tile(value)
      x = _from_word(word(self._word_of[value]), self._graph.avals[value].dtype)
      return x + offsets[self._axis_of[value]] if value in self._axis_of else x

    outputs = self._graph.outputs
    new = self._graph.evaluate(outputs, argument, given=self._word_of, rules={**_program.WITHOUT_MESH, **rules})
    return {value: new[output] for value, output in zip(self.written, outputs, strict=True)}


def trace(task: _tiles.Task, view: _view.View) -> Body:
  """The stages of an update as the body of a kernel, which sees a tile through a view."""
  stages, shape, _, values, zero, reads, writes, origin = task
  origin = [jnp.uint32(0)] * len(shape) if origin is None else origin
  tile_of = lambda x: tuple(t * m // n for t, n, m in zip(view.shape, shape, x.shape, strict=True))
  # All vary along the same manual axes, or none.
  template = lambda x, shape: _mesh.template(x, x.dtype).update(shape=shape)

  def coordinate(axis, start):
    ones = [n if d == axis else 1 for d, n in enumerate(view.shape)]
    if math.prod(ones) == 1:
      return start.reshape(ones)
    return lax.broadcasted_iota(jnp.int32, ones, axis).astype(jnp.uint32) + start

  def one_tile(values, zero, starts, reads, writes):
    """The new tiles of `writes`; starts: uint32[] per axis, the tile's first coordinate."""
    first, second, last = stages(view, values, zero)
    coordinates = [coordinate(axis, start) for axis, start in enumerate(starts)]
    carried = first(coordinates, reads, writes)
    new = last(carried, second(coordinates, carried, writes), reads)
    return jax.tree.map(lambda x, tile: tile.reshape(x.shape), writes, new)

  tiles = jax.tree.map(lambda x: template(x, tile_of(x)), (reads, writes))
  shared = jax.tree.map(lambda x: template(x, x.shape), (values, zero, origin))
  graph, _ = _program.trace(one_tile, *shared, *tiles)

  count, rank = len(jax.tree.leaves((values, zero))), len(shape)
  given = dict(zip(graph.inputs[:count], jax.tree.leaves((values, zero)), strict=True))
  axis_of = {value: axis for axis, value in enumerate(graph.inputs[count : count + rank])}
  arrays = dict(zip(graph.inputs[count + rank :], jax.tree.leaves((reads, writes)), strict=True))

  hoisted, needed = _hoist(graph, given, [*axis_of, *arrays])
  scalars = graph.evaluate(hoisted, given.__getitem__)
  # One array, since each operand that is not there yet is a kernel launch.
  words = jnp.stack([_to_word(x) for x in (*origin, *scalars.values())])
  word_of = {value: i for i, value in enumerate([*axis_of, *hoisted])}
  written = list(arrays)[len(arrays) - len(jax.tree.leaves(writes)) :]
  return Body(words, arrays, [value for value in arrays if value in needed], written, graph, axis_of, word_of)


def _hoist(graph: _program.Graph, shared: Iterable[int], own: Iterable[int]) -> tuple[list[int], set[int]]:
  """What of a graph is the same for all tiles, and can be computed outside of a kernel as far as it is one number.

  Args:
    graph: of one tile's function.
    shared: the inputs that all tiles share.
    own: the inputs that every tile has of its own.

  Returns:
    The values computed outside, and all that the rest of the graph reads.
  """
  outer = graph.dependents(shared) - graph.dependents(own)
  is_hoisted = lambda value: value in outer and graph.uniform[value] and graph.avals[value].dtype.itemsize <= 4
  read = dict.fromkeys(value for op in graph.slice(graph.outputs, stop=is_hoisted) for value in op.inputs)
  return [value for value in dict.fromkeys([*read, *graph.outputs]) if is_hoisted(value)], set(read)


def as_result(x: jax.Array) -> jax.ShapeDtypeStruct:
  """The type of x; in `jax.shard_map` with check_vma, Pallas wants to hear that a result varies along no axis too."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type)


def _to_word(x: jax.Array) -> jax.Array:
  """A scalar of at most 32 bits to uint32[]."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    return lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32).reshape(())
  return x.astype(jnp.uint32).reshape(())


def _from_word(word: jax.Array, dtype: Any) -> jax.Array:
  """The reverse."""
  if jnp.issubdtype(dtype, jnp.floating):
    return lax.bitcast_convert_type(word, jnp.float32).astype(dtype)
  return word.astype(dtype)
