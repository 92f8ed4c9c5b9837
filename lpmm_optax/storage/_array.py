"""`QuantizedArray`, the pytree node that holds codes and scales, and `quantize` / `dequantize`."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any
from typing import ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from lpmm_optax.storage import _codec
from lpmm_optax.storage import _format
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.storage import _refusal
from lpmm_optax.storage import _targets
from lpmm_optax.storage import _view
from lpmm_optax.storage._format import Format

_MOST_NAMED = 3  # Leaves in one message.

Where = Callable[[str, Any], Format | None] | Sequence[tuple[str, Format | None]]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedArray(metaclass=_refusal.Explained):
  """An array stored as integer codes and block scales.

  For a linear grid with blocks along the last axis, `dequantize(x)[..., i] == codes[..., i] * scale[..., i // size]`,
  where the scale's bfloat16 value is kept as its bit pattern; `blocks` may name another axis. The children are plain
  integer arrays, so `optax.apply_updates` adds a tree of integer deltas to a tree of parameters exactly, modulo the
  codes' range. Their keys say how they are stored ('kernel/int8', 'kernel/scales_of_64'), and so does whatever saves a
  tree by its keys: it cannot be read as anything else.

  Attributes:
    codes: integers of the array's own shape.
    scales: uint16, of the array's rank, one per block; None for a format without scales.
    format: how the codes are to be read (static).
    dtype: the floating-point dtype that `dequantize` returns by default (static).
    blocks: which elements share a scale (static); None for a format without scales.
  """

  ADVICE: ClassVar[str] = (
    'a quantized parameter, whose leaves are integer codes and scales. Averages and all else that is computed of '
    'parameters take lpmm_optax.dequantize(params), see docs/guides/loop.md. Updates are those of an lpmm_optax '
    'optimizer; docs/guides/wrappers.md says which wrappers of Optax go around one, and what there is for the others'
  )

  codes: jax.Array
  scales: jax.Array | None
  format: Format
  dtype: Any
  blocks: _format.BlockGeometry | None

  def tree_flatten(self) -> tuple[Any, Any]:
    """Children and static data."""
    return (self.codes, self.scales), (self.format, self.dtype, self.blocks)

  def tree_flatten_with_keys(self) -> tuple[Any, Any]:
    """The same, with the keys of the children."""
    keys = map(jax.tree_util.GetAttrKey, self.format.storage)
    return tuple(zip(keys, (self.codes, self.scales), strict=True)), (self.format, self.dtype, self.blocks)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> 'QuantizedArray':
    """The reverse; the children may be anything."""
    return cls(*children, *static)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  @property
  def ndim(self) -> int:
    return len(self.codes.shape)

  @property
  def size(self) -> int:
    return self.codes.size

  @property
  def nbytes(self) -> int:
    """Bytes of codes and scales, counted from bit widths (an int4 array's own `nbytes` counts a byte per element)."""
    return (self.size * self.format.bits + 7) // 8 + (0 if self.scales is None else 2 * self.scales.size)

  @property
  def sharding(self) -> jax.sharding.Sharding:
    return self.codes.sharding

  def dense(self, dtype: Any = None, path: str = '<root>') -> jax.Array:
    """The values, in `dtype` or that of the array, or their change; messages call it by `path`."""
    if isinstance(self.codes, _refusal.Delta):
      before = jax.tree.map(lambda delta: delta.stored, self)
      after = jax.tree.map(lambda delta: delta.stored + delta.change, self)
      change = after.dense(jnp.float32, path) - before.dense(jnp.float32, path)
      return change.astype(self.dtype if dtype is None else dtype)
    check(path, self)
    platforms = _targets.chosen().get('tpu', ()) if _view.suits_products(self.shape, blocks_of(self)) else ()
    decode = functools.partial(_decode, platforms)
    return _cast(_mesh.follow(decode, self.codes, self), self.dtype if dtype is None else dtype)

  def explain(self, what: str) -> str:
    """A message for who uses it as an array."""
    return (
      f'{what} needs an array, and {self!r} is none: call lpmm_optax.dequantize(params) before the model uses them, in '
      'evaluation too; a transformation of gradients that looks at parameters goes into lpmm_optax.chain, and an '
      'optimizer of Optax into lpmm_optax.low_precision'
    )

  def __eq__(self, other: object) -> bool:
    """Of what has been mapped over it (dtypes, shardings); arrays have no equality that is one truth value."""
    if hasattr(self.codes, '__array__'):
      raise _refusal.NotAnArrayError(self.explain('=='))
    parts = lambda x: (x.codes, x.scales, x.format, x.dtype, x.blocks)
    return isinstance(other, QuantizedArray) and parts(self) == parts(other)

  def __jax_array__(self) -> Any:
    raise _refusal.NotAnArrayError(self.explain('jax.numpy'))

  def __repr__(self) -> str:
    shape = getattr(self.codes, 'shape', None)
    content = f'of {self.codes!r}' if shape is None else f'{jnp.dtype(self.dtype).name}{list(shape)}'
    return f'QuantizedArray({content} as {self.format})'


_refusal.refuse_array_operations(QuantizedArray, _refusal.ATTRIBUTES)


@dataclasses.dataclass(frozen=True)
class _Wrapper:
  """A framework's mutable object around an array, such as `flax.nnx.Variable`.

  Attributes:
    content: gives what it holds.
    is_parameter: whether it is what gradients are taken of.
  """

  content: Callable[[Any], Any]
  is_parameter: Callable[[Any], bool]


_WRAPPERS: dict[type, _Wrapper] = {}


def register_wrapper(wrapper: type, content: Callable[[Any], Any], is_parameter: Callable[[Any], bool]) -> None:
  """Makes `unwrap`, `quantize` and `dequantize` know a type of wrapper, which is itself a node of pytrees."""
  _WRAPPERS[wrapper] = _Wrapper(content, is_parameter)


def _wrapper_of(x: Any) -> _Wrapper | None:
  return next((wrapper for kind, wrapper in _WRAPPERS.items() if isinstance(x, kind)), None)


def unwrap(tree: Any) -> Any:
  """The tree without framework objects that wrap single arrays, such as `flax.nnx.Variable`."""

  def content(x):
    wrapper = _wrapper_of(x)
    return x if wrapper is None else wrapper.content(x)

  return jax.tree.map(content, tree, is_leaf=lambda x: _wrapper_of(x) is not None)


def of_codes(tree: Any) -> Any:
  """What a map over quantized parameters that knows nothing of them has given their codes, for both of their arrays."""
  return jax.tree.map(lambda x: x.codes if is_quantized(x) else x, tree, is_leaf=is_quantized)


def _map_leaves(one: Callable[[Any, Any], Any], tree: Any, *, shares_state: bool) -> Any:
  """`one(path, leaf)` of every leaf, where a wrapper that stands in several places stays one.

  Args:
    one: of a key path and a leaf, quantized or not.
    tree: a pytree.
    shares_state: whether wrappers of what is neither a parameter nor quantized (statistics, counters) stay the tree's
      own, so that who changes them changes them there.
  """
  made: dict[int, Any] = {}

  def at(path, x):
    wrapper = _wrapper_of(x)
    if wrapper is None:
      return one(path, x)
    if shares_state and not wrapper.is_parameter(x) and not is_quantized(wrapper.content(x)):
      return x
    if id(x) not in made:
      below = lambda inner, leaf: one((*path, *inner), leaf)
      made[id(x)] = jax.tree_util.tree_map_with_path(below, x, is_leaf=is_quantized)
    return made[id(x)]

  is_leaf = lambda x: is_quantized(x) or _wrapper_of(x) is not None
  return jax.tree_util.tree_map_with_path(at, tree, is_leaf=is_leaf)


def is_quantized(leaf: Any) -> bool:
  """Whether a leaf is a `QuantizedArray`.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> lpmm.is_quantized(lpmm.quantize(jnp.ones((64, 64)), lpmm.INT8)), lpmm.is_quantized(jnp.ones(3))
  (True, False)
  """
  return isinstance(leaf, QuantizedArray)


def check(path: str, leaf: Any) -> None:
  """Raises unless codes and scales of a quantized leaf are what its format and its blocks say.

  Raises:
    TypeError: if something else stands in their place, which a map over the leaves of a tree has put there.
    ValueError: if a slice or a transposition has taken codes and scales apart.
  """
  if not is_quantized(leaf):
    return
  children = {'codes': (leaf.codes, leaf.format.code_dtype), 'scales': (leaf.scales, jnp.uint16)}
  for name, (x, dtype) in children.items():
    if name == 'scales' and not leaf.format.has_scales:
      continue
    if isinstance(x, _refusal.Delta):
      raise TypeError(f'{path}: {leaf!r} is {x.ADVICE}')
    if not hasattr(x, 'dtype'):
      raise TypeError(
        f'{path}: the {name} of an array stored as {leaf.format} have become {x!r}. What maps or filters a tree must '
        'take a quantized array for one leaf (is_leaf=lpmm_optax.is_quantized), or take integers for arrays '
        '(equinox.is_array, where is_inexact_array does not)'
      )
    if x.dtype != dtype:
      raise TypeError(
        f'{path}: the {name} of an array stored as {leaf.format} have become {x.dtype}, by arithmetic on a tree of '
        'quantized arrays (optax.incremental_update, say); dequantize it first, and keep averages dense or with '
        'lpmm_optax.ema'
      )
  if leaf.blocks is not None and leaf.blocks.scales_shape(leaf.codes.shape) != leaf.scales.shape:
    raise ValueError(
      f'{path}: codes of shape {leaf.codes.shape} and scales of shape {leaf.scales.shape} do not belong together: '
      f'blocks of {leaf.blocks.size} run along axis {leaf.blocks.axis}; only slices along axes before it can be taken '
      'of codes and scales alike, else call lpmm_optax.dequantize first'
    )


def seal(updates: Any, params: Any) -> Any:
  """A tree of deltas, those of quantized leaves as `Delta`s."""

  def one(path, update, leaf):
    if not is_quantized(update) or isinstance(update.codes, _refusal.Delta):
      return update
    delta: Any = functools.partial(_refusal.Delta, path_str(path))
    scales = None if update.scales is None else delta(update.scales, leaf.scales)
    return dataclasses.replace(update, codes=delta(update.codes, leaf.codes), scales=scales)

  return jax.tree_util.tree_map_with_path(one, updates, params, is_leaf=is_quantized)


def unseal(updates: Any) -> Any:
  """The same with the arrays themselves, for what selects between whole trees of deltas."""
  return jax.tree.map(lambda x: x.change if isinstance(x, _refusal.Delta) else x, updates)


def path_str(path: Any) -> str:
  """A key path as users write it, 'Dense_0/kernel'; '<root>' for a bare leaf."""
  return jax.tree_util.keystr(path, simple=True, separator='/') or '<root>'


def name_some(paths: Sequence[str]) -> str:
  """Paths for a message: the first three, and how many more there are."""
  more = f' and {len(paths) - _MOST_NAMED} more' if len(paths) > _MOST_NAMED else ''
  return ('; '.join(paths[:_MOST_NAMED]) or 'nothing') + more


def codec_of(leaf: Any, view: _view.View) -> _codec.Codec:
  """The codec for tiles cut from a leaf (a QuantizedArray or a dense array), in a view of them."""
  if not is_quantized(leaf):
    return _codec.DenseCodec(jnp.dtype(leaf.dtype), view)
  if not leaf.format.has_scales:
    return _codec.BFloat16Codec(leaf.format, view)
  return _codec.LinearCodec(leaf.format, view, len(view.shape) + leaf.blocks.axis, leaf.blocks.size)


def blocks_of(leaf: Any) -> list[tuple[int, int]]:
  """The (axis, block size) of a leaf, the axis counted from the start: one pair, or none without scales."""
  if is_quantized(leaf) and leaf.blocks is not None:
    return [(leaf.ndim + leaf.blocks.axis, leaf.blocks.size)]
  return []


def stored(leaf: Any) -> _codec.Stored:
  """A leaf's arrays."""
  return _codec.Stored(leaf.codes, leaf.scales) if is_quantized(leaf) else _codec.Stored(leaf)


def with_stored(leaf: Any, arrays: _codec.Stored) -> Any:
  """The leaf with other arrays."""
  if is_quantized(leaf):
    return dataclasses.replace(leaf, codes=arrays.codes, scales=arrays.scales)
  return arrays.codes


def random_bits(
  leaf: Any,
  word: jax.Array,
  view: _view.View,
  shape: tuple[int, ...],
  coordinates: Sequence[jax.Array],
  start: Sequence[jax.Array] = (),
) -> jax.Array | None:
  """What a tile of a leaf is rounded with; None if the leaf is dense or rounds to nearest.

  Args:
    leaf: QuantizedArray or dense array.
    word: uint32[2], the leaf's random word.
    view: of the tile.
    shape: of the whole array that elements are numbered in, of which the leaf may be a slice.
    coordinates: per axis of the leaf, the tile's coordinates: uint32, in any shape; or of the flattened leaf.
    start: per leading axis that the leaf lacks, its index there.

  Returns:
    uint32 in view.
  """
  format = format_of(leaf)
  if format is None or format.rounding == 'nearest':
    return None
  own = [view.split_coordinate(coordinate, d) for d, coordinate in enumerate(coordinates)]
  leading = [jnp.asarray(x, jnp.uint32).reshape((1,) * own[0].ndim) for x in start]
  own_shape = leaf.shape if len(own) == leaf.ndim else (leaf.size,)
  index = _random.element_index((*shape[: len(leading)], *own_shape), [*leading, *own])
  return _random.random_bits(word, index)


def full(like: Any, value: float, format: Format | None, dtype: Any) -> Any:
  """An array of the shape of `like`, filled with one value and stored in `format`, or dense if None.

  Concrete or traced arrays give one sharded as `like` is, also under jit, where a constant would be replicated.
  Abstract leaves (ShapeDtypeStruct) give a plain one.
  """
  template = like.codes if is_quantized(like) else like
  shape = tuple(template.shape)

  def fill(value, dtype, step=None):
    wanted = shape if step is None else tuple(n // s for n, s in zip(shape, step, strict=True))
    if not isinstance(template, jax.Array):
      return jnp.full(wanted, value, dtype)

    def from_template(x):
      x = x if step is None else x[tuple(slice(None, None, s) for s in step)]
      # Zero throughout, but the partitioner sees what depends on the template. Of integers, MLIR would know.
      as_float = x.astype(jnp.float32)
      return jnp.full(wanted, value, dtype) + (as_float < as_float).astype(dtype)

    return _mesh.follow(from_template, template, template)

  if format is None:
    return fill(value, dtype)
  if value != 0:
    return encode(fill(value, jnp.float32), format, dtype)
  if not format.has_scales:
    return QuantizedArray(fill(0, format.code_dtype), None, format, dtype, None)
  assert format.block_size is not None  # Callers have filled in their default.
  blocks = _format.choose_blocks(shape, format.block_size)
  step = [blocks.size if d == blocks.axis else 1 for d in range(-len(shape), 0)]
  return QuantizedArray(fill(0, format.code_dtype), fill(0, jnp.uint16, step), format, dtype, blocks)


def encode(x: jax.Array, format: Format | None, dtype: Any = None, word: jax.Array | None = None) -> Any:
  """A dense array as it is stored in a format, or as it is if None.

  Args:
    x: dense.
    format: with its block size filled in.
    dtype: that the result stands for; None is that of x.
    word: a random word, uint32[2], to round stochastically.
  """
  dtype = jnp.dtype(x.dtype if dtype is None else dtype)
  if format is None:
    return x.astype(dtype)
  return _mesh.follow(lambda x, word: _encode(x, format=format, dtype=dtype, word=word), x, x, word)


def encode_as(x: jax.Array, like: Any, word: jax.Array | None = None) -> Any:
  """A dense array as another is stored, on its grid where that fits; `word` as for `encode`.

  What was decoded from `like` gets its codes.
  """
  if is_quantized(like) and isinstance(like.codes, jax.Array):
    return _mesh.follow(_encode_as, x, x, like, word)
  return encode(x, format_of(like), like.dtype, word)


def pick_format(path: str, leaf: Any, format: Format | None, where: Where | None, block_size: int) -> Format | None:
  """The format for one leaf: what `where` says, or `format` with its exemptions; the block size is filled in."""
  chosen: Any = ...
  if callable(where):
    chosen = where(path, leaf)
  elif where is not None:
    chosen = next((f for pattern, f in where if re.search(pattern, path)), ...)
  if chosen is ...:
    exempt = format is None or _format.exemption(leaf.shape, leaf.dtype, format.with_block_size(block_size))
    chosen = None if exempt else format
  if chosen is None:
    return None
  if not isinstance(chosen, Format):
    raise TypeError(f'{path}: where must give a Format or None, got {chosen!r}')
  if leaf.ndim == 0 or leaf.size == 0:
    raise ValueError(f'{path}: an array of shape {leaf.shape} cannot be quantized; keep it dense through `where`')
  return chosen.with_block_size(block_size)


def _check_param_format(path: str, leaf: Any, format: Format) -> None:
  if not format.signed:
    raise ValueError(f'{path}: {format} stores nonnegative values only, so it cannot hold parameters')
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise TypeError(f'{path}: cannot quantize {leaf.dtype}, only floating-point arrays')
  if leaf.dtype == jnp.float64:
    raise TypeError(f'{path}: float64 cannot be quantized; cast it to float32 or keep it dense through `where`')


def _whole_view(leaf: Any) -> _view.View:
  """The view of a leaf as one tile."""
  return _view.cells(leaf.shape, blocks_of(leaf))


# Jitted, as is every computation on one leaf: called outside jit, one program per shape instead of one per operation.
@functools.partial(jax.jit, static_argnames=('format', 'dtype'))
def _encode(x: jax.Array, format: Format, dtype: Any, word: jax.Array | None) -> QuantizedArray:
  return _rounded(x, full(x, 0, format, dtype), word, is_fresh=True)


@jax.jit
def _encode_as(x: jax.Array, target: QuantizedArray, word: jax.Array | None) -> QuantizedArray:
  return _rounded(x, target, word, is_fresh=False)


def _rounded(x: jax.Array, target: QuantizedArray, word: jax.Array | None, is_fresh: bool) -> QuantizedArray:
  """x in the place of what is stored in the target; or of nothing, if it is fresh."""
  view = _whole_view(target)
  codec: Any = codec_of(target, view)
  bits = None
  if word is not None:
    bits = random_bits(target, word, view, x.shape, [jax.lax.iota(jnp.uint32, n) for n in x.shape])
  value = view.split(x.astype(jnp.float32))
  if is_fresh:
    payload = codec.encode(value, bits, x.dtype)
  else:
    payload = codec.advance(stored(target), codec.snap(stored(target), value) if bits is None else value, bits)
  rounded, _ = codec.finish(payload)
  return with_stored(target, rounded._replace(codes=view.merge(rounded.codes)))


@functools.partial(jax.jit, static_argnums=0)
def _decode(platforms: tuple[str, ...], x: QuantizedArray) -> jax.Array:
  """The values, float32; platforms: those that decode as a TPU does."""
  decode = lambda view, x: view.merge(codec_of(x, view).decode(stored(x)))
  of_tpu = dict.fromkeys(platforms, functools.partial(decode, _view.Products(x.shape)))
  default = functools.partial(decode, _whole_view(x))
  return lax.platform_dependent(x, default=default, **of_tpu) if of_tpu else default(x)


def _cast(value: jax.Array, dtype: Any) -> jax.Array:
  """float32 to a floating-point dtype; the grid may lie a little beyond what that holds, and finite stays finite."""
  largest = float(jnp.finfo(dtype).max)
  if largest < jnp.finfo(value.dtype).max:
    value = jnp.where(jnp.isfinite(value), jnp.clip(value, -largest, largest), value)
  return value.astype(dtype)


def quantize(tree: Any, format: Format, *, key: jax.Array | None = None, where: Where | None = None) -> Any:
  """Stores the large floating-point leaves of a tree in a low-precision format.

  Leaves under 4096 elements, one-dimensional ones under 65536, those that no axis cuts into blocks (none has a divisor
  from 8 to the block size, as of 1021 x 1021), and leaves that are not floating point stay as they are, unless `where`
  names them. Quantized leaves stay too.

  Args:
    tree: an array or a pytree of arrays (float32, bfloat16 or float16).
    format: the Format; an unset block size means 64.
    key: a `jax.random` key to round stochastically, so that the result is unbiased; None rounds to nearest.
    where: exceptions, either a list of (regular expression, Format or None) of which the first that matches the leaf's
      path ('block_0/Conv_0/kernel') decides, or a function of (path, leaf) that gives a Format or None for every leaf.

  Returns:
    The tree, with a QuantizedArray for every leaf that was stored.

  Raises:
    TypeError, ValueError: for a leaf that the format chosen for it cannot hold, naming its path; for what is no
      Format, or no `where`.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = {'kernel': jnp.ones((128, 64)), 'bias': jnp.zeros(64)}
  >>> jax.tree.map(jnp.shape, lpmm.quantize(params, lpmm.INT8), is_leaf=lpmm.is_quantized)
  {'bias': (64,), 'kernel': (128, 64)}
  >>> lpmm.quantize(params, lpmm.INT8)['kernel']
  QuantizedArray(float32[128, 64] as int8)
  >>> lpmm.quantize(params, lpmm.INT8, where=[('kernel', None)])['kernel'].dtype
  dtype('float32')
  """
  if not isinstance(format, Format):
    raise TypeError(f'format must be a Format such as lpmm.INT8, got {format!r}')
  if not (where is None or callable(where) or isinstance(where, list | tuple)):
    raise TypeError(f'where must be a list of (regex, Format or None), or a function of path and leaf, got {where!r}')
  format = format.with_block_size(_format.PARAM_BLOCK_SIZE)
  words: dict[Any, jax.Array] = {}
  if key is not None:
    keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_quantized)[0]]
    drawn = _random.words(_random.raw_key(key), _random.Domain.QUANTIZE, [], keys, 1)[:, 0]
    words = dict(zip(keys, drawn, strict=True))

  def one(path: Any, leaf: Any) -> Any:
    if is_quantized(leaf) or not hasattr(leaf, 'dtype'):
      return leaf
    name = path_str(path)
    chosen = pick_format(name, leaf, format, where, _format.PARAM_BLOCK_SIZE)
    if chosen is None:
      return leaf
    _check_param_format(name, leaf, chosen)
    return encode(jnp.asarray(leaf), chosen, word=words.get(path))

  return _map_leaves(one, tree, shares_state=False)


def dequantize(tree: Any, dtype: Any = None) -> Any:
  """The dense values of a tree; leaves that are not quantized are passed through.

  Args:
    tree: an array or a pytree; also a Flax nnx Module, or a State of Variables. Of what an optimizer's `update`
      returned, the values are those that the parameters change by.
    dtype: a floating-point dtype for every floating-point leaf, dense ones included, as the model computes in one
      dtype; None keeps each leaf's own (a quantized leaf's is that of the array it was made from).

  Returns:
    The tree with arrays of the original shapes. A Module is a new one with parameters of its own, and shares all else
    with the one it was made of: statistics of BatchNorm and keys of Dropout advance in both.

  Raises:
    TypeError: for a dtype that is not floating point; for a quantized leaf that arithmetic made of the tree has turned
      into floats, naming it.
    ValueError: for one whose codes and scales a slice or a transposition has taken apart, naming it.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> x = jnp.linspace(-1, 1, 4096).reshape(64, 64)
  >>> y = lpmm.dequantize(lpmm.quantize(x, lpmm.INT8))
  >>> bool(jnp.max(jnp.abs(x - y)) <= 0.5 / 126)
  True
  >>> lpmm.dequantize(lpmm.quantize(x, lpmm.INT8), jnp.bfloat16).dtype
  dtype(bfloat16)
  """
  if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f'dtype must be a floating-point dtype, got {dtype!r}')

  def one(path, leaf):
    if is_quantized(leaf):
      return leaf.dense(dtype, path_str(path))
    if dtype is not None and hasattr(leaf, 'dtype') and jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf.astype(dtype)
    return leaf

  return _map_leaves(one, tree, shares_state=True)


def format_of(leaf: Any) -> Format | None:
  """A leaf's format; None if it is dense."""
  return leaf.format if is_quantized(leaf) else None


def count_bytes(leaf: Any) -> int:
  """Bytes of a leaf, counted from bit widths."""
  return leaf.nbytes if is_quantized(leaf) else leaf.size * leaf.dtype.itemsize
