"""From an elementwise rule to an Optax transformation whose parameters and state are stored in low precision.

A `Rule` is the mathematics of an optimizer on dense values and knows nothing of bits. `from_rule` supplies the rest:
state, formats, random words, checks, and for every leaf the tiled update that decodes, applies the rule, and encodes.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax import _array
from lpmm_optax import _codec
from lpmm_optax import _deterministic
from lpmm_optax import _format
from lpmm_optax import _random
from lpmm_optax import _sharding
from lpmm_optax import _tiles
from lpmm_optax._format import Format

Formats = Format | Mapping[str, Format | None] | None
Fields = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
  """An elementwise optimizer.

  Attributes:
    name: of the optimizer, for messages.
    fields: names of the per-parameter state arrays, all zero at the start.
    hyperparams: `count -> {name: scalar}`, computed once per step.
    update: `(gradient, parameter, fields, hyperparams) -> (delta, fields)` on dense values of one shape.
    feedback: `(fields, error, hyperparams) -> fields`, run where the parameter is quantized, with error = (parameter +
      delta) - (the value stored); None to let rounding errors go.
  """

  name: str
  fields: tuple[str, ...]
  hyperparams: Callable[[jax.Array], dict[str, Any]]
  update: Callable[[jax.Array, jax.Array, Fields, dict[str, jax.Array]], tuple[jax.Array, Fields]]
  feedback: Callable[[Fields, jax.Array, dict[str, jax.Array]], Fields] | None = None


class LowPrecisionState(NamedTuple):
  """State of an lpmm_optax optimizer.

  Attributes:
    count: steps taken, int32[].
    key: raw key data that all rounding derives from, uint32[2]; it never changes.
    fields: {name: tree like the parameters}, of QuantizedArrays and, for exempt leaves, dense arrays; leaves that are
      never updated (integers, 0-size) hold `optax.MaskedNode()`.
  """

  count: jax.Array  # type: ignore[assignment]  # As in Optax's states; tuples have a method of that name.
  key: jax.Array
  fields: dict[str, Any]


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
  """An Optax transformation that also has the in-place `step`.

  Attributes:
    init: `params -> state`.
    update: `(gradients, state, params, **extra) -> (deltas, state)`, for `optax.apply_updates`.
    step: `(gradients, params, state, **extra) -> (params, state)`, without a tree of deltas.
  """

  step: Callable[..., tuple[Any, Any]]

  def __new__(cls, init, update, step):
    self = super().__new__(cls, init, update)
    self.step = step
    return self


def field_formats(formats: Formats, fields: tuple[str, ...]) -> dict[str, Format | None]:
  """One Format or None per state field."""
  if formats is None or isinstance(formats, Format):
    formats = dict.fromkeys(fields, formats)
  elif not isinstance(formats, Mapping):
    raise TypeError(f'formats must be a Format, a dict of Formats by state field, or None, got {formats!r}')
  unknown = set(formats) - set(fields)
  if unknown:
    raise ValueError(f'formats has no state field for {sorted(unknown)}; the fields are {list(fields)}')
  for name, format in formats.items():
    if not (format is None or isinstance(format, Format)):
      raise TypeError(f'formats[{name!r}] must be a Format or None, got {format!r}')
    if format is not None and not format.signed:
      raise ValueError(f'formats[{name!r}]: {format} stores nonnegative values only')
  return {
    name: format and format.with_block_size(_format.STATE_BLOCK_SIZE)
    for name, format in (dict.fromkeys(fields) | dict(formats)).items()
  }


def _is_passive(leaf: Any) -> bool:
  return not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.size == 0


def _is_node_leaf(x: Any) -> bool:
  return _array.is_quantized(x) or isinstance(x, optax.MaskedNode)


def _flatten(params: Any) -> tuple[list[str], list[Any], Any]:
  leaves, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_array.is_quantized)
  paths = [_array.path_str(path) for path, _ in leaves]
  for path, (_, leaf) in zip(paths, leaves, strict=True):
    if not hasattr(leaf, 'dtype'):
      raise TypeError(f'{path}: a parameter must be an array, got {leaf!r}')
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
      raise TypeError(f'{path}: complex parameters are not supported; split them into real and imaginary parts')
  return paths, [leaf for _, leaf in leaves], treedef


def _flatten_like(treedef: Any, paths: list[str], tree: Any, what: str) -> list[Any]:
  """The leaves of `tree` that belong to the parameters; a ValueError names the first path that differs."""
  try:
    return treedef.flatten_up_to(tree)
  except (ValueError, TypeError, KeyError):
    entries, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node_leaf)
    found = [_array.path_str(path) for path, _ in entries]
    missing = [path for path in paths if path not in found]
    surplus = [path for path in found if path not in paths]
    detail = '; '.join(
      [f'{path} is missing' for path in missing[:1]] + [f'{path} is not a parameter' for path in surplus[:1]]
    )
    raise ValueError(f'{what} and parameters differ in structure: {detail or jax.tree.structure(tree)}') from None


def _check_gradient(path: str, gradient: Any, param: Any) -> jax.Array:
  if not hasattr(gradient, 'dtype'):
    raise TypeError(f'{path}: the gradient must be a dense array, got {gradient!r}')
  if _array.is_quantized(gradient) or not jnp.issubdtype(gradient.dtype, jnp.floating):
    raise TypeError(f'{path}: the gradient must be a dense floating-point array, got {gradient!r}')
  if gradient.shape != param.shape:
    raise ValueError(f'{path}: the gradient has shape {gradient.shape}, the parameter {param.shape}')
  return jnp.asarray(gradient)


def update_leaf(
  rule: Rule,
  gradient: jax.Array,
  param: Any,
  fields: Fields,
  hyperparams: dict[str, jax.Array],
  words: jax.Array,
  zero: jax.Array,
  in_place: bool,
  tile_size: int,
) -> tuple[Any, Fields]:
  """One leaf's update.

  Args:
    rule: the optimizer.
    gradient: dense, in the parameter's shape.
    param: QuantizedArray or dense array.
    fields: {name: QuantizedArray or dense array}, in the parameter's shape.
    hyperparams: scalars.
    words: uint32[1 + len(fields), 2], the random words of the parameter and of each field.
    zero: uint32[], zero at run time.
    in_place: whether to return the new parameter or the delta that leads there.
    tile_size: in elements.

  Returns:
    (new parameter or delta, new fields).
  """
  leaves = {'param': param, **fields}
  blocks = [block for leaf in leaves.values() for block in _array.blocks_of(leaf)]
  is_dense = not any(_array.is_quantized(leaf) for leaf in leaves.values())
  tiling = _tiles.choose_tiling(param.shape, blocks, param.size if is_dense else tile_size)
  cells = _codec.make_cells(tiling.tile_shape, blocks)
  codecs = {name: _array.codec_of(leaf, tiling.tile_shape, cells) for name, leaf in leaves.items()}
  word_of = dict(zip(leaves, words, strict=True))
  dtype = _codec.compute_dtype(param.dtype)
  hyperparams = {name: jnp.asarray(value).astype(dtype) for name, value in hyperparams.items()}

  def bits(name, coordinates):
    format = _array.format_of(leaves[name])
    if format is None or format.rounding == 'nearest':
      return None
    split = []
    for d, coordinate in enumerate(coordinates):
      ones = [1] * len(coordinates)
      ones[d] = coordinate.size
      sizes = [c if e == d else 1 for e, c in enumerate(cells.sizes)]
      split.append(coordinate.reshape(cells.view_shape(ones, sizes)))
    return _random.random_bits(word_of[name], _random.element_index(param.shape, split))

  def first(coordinates, reads, writes):
    old = (reads | writes)['param']
    values = {name: codecs[name].decode(writes[name]) for name in fields}
    value = codecs['param'].decode(old)
    delta, values = rule.update(cells.split(reads['gradient']).astype(dtype), value, values, hyperparams)
    payload = codecs['param'].encode(value + delta, bits('param', coordinates), _codec.Change(old, delta))
    return payload, values

  def second(coordinates, carried):
    payload, values = carried
    _, error = codecs['param'].finish(payload)
    if rule.feedback is not None and error is not None:
      values = rule.feedback(values, error, hyperparams)
    encoded = {name: codecs[name].encode(value, bits(name, coordinates)) for name, value in values.items()}
    return {name: codecs[name].finish(payload)[0] for name, payload in encoded.items()}

  def last(carried, result, reads):
    payload, _ = carried
    new, _ = codecs['param'].finish(payload)
    if in_place:
      return result | {'param': new}
    if _array.is_quantized(param):
      old = reads['param']._replace(codes=cells.split(reads['param'].codes))
      return result | {'delta': _codec.subtract(new, old)}
    return result | {'delta': _codec.Stored(payload.extra)}

  stages = _tiles.Stages(*(_deterministic.uncontracted(stage, zero) for stage in (first, second, last)))
  reads: dict[str, Any] = {'gradient': gradient}
  writes = {name: _array.stored(leaf) for name, leaf in fields.items()}
  if in_place:
    writes['param'] = _array.stored(param)
  else:
    reads['param'] = _array.stored(param)
    writes['delta'] = jax.tree.map(jnp.zeros_like, reads['param'])
  # XLA by itself updates arrays in place that are read and written in one dtype.
  writes = _tiles.update_in_place(stages, tiling, zero, reads, writes, fused=is_dense)
  new = _array.with_stored(param, writes['param' if in_place else 'delta'])
  return new, {name: _array.with_stored(leaf, writes[name]) for name, leaf in fields.items()}


def from_rule(rule: Rule, formats: Formats, key: jax.Array | None, tile_size: int | None) -> InPlaceTransformation:
  """An Optax transformation that applies `rule` to parameters and state as they are stored.

  Args:
    rule: the optimizer.
    formats: a Format for every state field, one per field, or None for dense state.
    key: for stochastic rounding.
    tile_size: elements updated at a time; None chooses by backend. No result depends on it.

  Returns:
    An `InPlaceTransformation`.
  """
  formats = field_formats(formats, rule.fields)
  raw_key = _random.raw_key(key)
  # Traced and, outside jit, compiled once for all leaves of one kind.
  update_one = jax.jit(functools.partial(update_leaf, rule), static_argnames=('in_place', 'tile_size'))

  def init_field(path, leaf, format):
    if _is_passive(leaf):
      return optax.MaskedNode()
    if format is not None and _format.exemption(leaf.shape, leaf.dtype, format):
      format = None
    if format is not None and leaf.dtype == jnp.float64:
      raise TypeError(f'{path}: state of a float64 parameter cannot be kept in {format}; pass formats=None')
    return _array.empty(leaf, format)

  def init(params):
    paths, leaves, treedef = _flatten(_array.unwrap(params))
    fields = {
      name: treedef.unflatten([init_field(*item, format) for item in zip(paths, leaves, strict=True)])
      for name, format in formats.items()
    }
    return LowPrecisionState(jnp.zeros((), jnp.int32), raw_key, fields)

  def advance(gradients, params, state, in_place):
    if params is None:
      raise ValueError(f'{rule.name} needs the parameters: call update(gradients, state, params)')
    if not isinstance(state, LowPrecisionState) or set(state.fields) != set(rule.fields):
      raise TypeError(
        f'{rule.name} got a state of type {type(state).__name__} that it did not create; call its init, and see that '
        'the chain that made the state is the one that uses it'
      )
    paths, leaves, treedef = _flatten(params)
    gradients = _flatten_like(treedef, paths, gradients, 'gradients')
    old_fields = {
      name: _flatten_like(treedef, paths, tree, f'state field {name!r}') for name, tree in state.fields.items()
    }
    hyperparams = rule.hyperparams(state.count)
    words = _random.slot_words(state.key, state.count, paths, 1 + len(rule.fields))
    zero = _deterministic.runtime_zero(state.count)
    size = tile_size or _tiles.default_tile_size(sum(leaf.size for leaf in leaves))
    new_leaves: list[Any] = []
    new_fields: dict[str, list[Any]] = {name: [] for name in rule.fields}
    for i, (path, leaf, gradient) in enumerate(zip(paths, leaves, gradients, strict=True)):
      fields = {name: old_fields[name][i] for name in rule.fields}
      if _is_passive(leaf):
        new = leaf if in_place else jnp.zeros_like(leaf)
      else:
        for name, field in fields.items():
          if getattr(field, 'shape', None) != leaf.shape:
            raise ValueError(f'{path}: state field {name!r} is {field!r}, which does not fit shape {leaf.shape}')
        gradient = _check_gradient(path, gradient, leaf)
        arrays = (gradient, leaf, fields, hyperparams, words[i], zero)
        one = functools.partial(update_one, in_place=in_place, tile_size=size)
        new, fields = _sharding.follow(one, _array.stored(leaf).codes, *arrays)
      new_leaves.append(new)
      for name in rule.fields:
        new_fields[name].append(fields[name])
    new_state = LowPrecisionState(
      optax.safe_increment(state.count),
      state.key,
      {name: treedef.unflatten(values) for name, values in new_fields.items()},
    )
    return treedef.unflatten(new_leaves), new_state

  def update(updates, state, params=None, **extra_args):
    del extra_args
    return advance(updates, params, state, in_place=False)

  def step(gradients, params, state, **extra_args):
    del extra_args
    return advance(gradients, params, state, in_place=True)

  return InPlaceTransformation(init, update, step)
