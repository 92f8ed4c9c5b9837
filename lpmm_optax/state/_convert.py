"""`convert`: parameters and optimizer state as they are, in other formats; to Optax's own state, and from it."""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.optimizers import _sgdm
from lpmm_optax.optimizers._low_precision import LowPrecisionState
from lpmm_optax.storage import _array
from lpmm_optax.storage import _random
from lpmm_optax.training._multi_steps import MultiStepsState

_MULTI_STEPS = (MultiStepsState, optax.MultiStepsState)
# What m, the sum of decayed gradients, is multiplied by in a form of SGD's momentum: names of arguments of `convert`.
_MOMENTA: dict[type, tuple[str, ...]] = {
  optax.TraceState: (),
  _sgdm.VelocityState: ('learning_rate',),
  _sgdm.DecayedMomentumState: ('momentum',),
  _sgdm.DecayedVelocityState: ('learning_rate', 'momentum'),
}


def convert(
  tree: Any,
  like: Any,
  *,
  learning_rate: float | None = None,
  momentum: float | None = None,
  key: jax.Array | None = None,
) -> Any:
  """Stores parameters or optimizer state as another tree is stored: in other formats, or densely.

  The two are of one optimizer. Either may be that of Optax's, `optax.adamw` for `lpmm_optax.adamw` and so on, alone or
  in the same place of a chain, so that a run in float32 can go on in low precision, and back. Leaves whose format does
  not change keep their bits.

  SGD's momentum is kept in several forms: with error feedback as a velocity, times the learning rate; with
  `INTO_MOMENTUM` times its decay. Between such forms convert needs the factor. The velocity is then that of a constant
  learning rate.

  Args:
    tree: what there is, concrete arrays.
    like: a tree of the structure and formats wanted, such as ``tx.init(params)``. Its values matter in two ways alone:
      it gives the keys of optimizers of this package where tree has none; and rounding is to its grid, wherever that
      fits a block, so that what was converted from it, to dense arrays, comes back as it was.
    learning_rate: of the last step; for `sgdm` alone.
    momentum: the decay; for `sgdm` alone.
    key: a `jax.random` key to round stochastically, so that the result is unbiased; None rounds to nearest.

  Returns:
    A tree like `like`.

  Raises:
    ValueError: naming the leaf, if the two are not of one optimizer and one set of parameters; if a factor is missing;
      if microbatches have been accumulated (``mini_step`` is not 0) in a form that the other has not.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> dense = {'w': jax.random.normal(jax.random.key(0), (64, 128))}
  >>> tx = optax.adamw(1e-3)
  >>> opt_state = tx.init(dense)  # And a day later:
  >>> params, tx = lpmm.quantize(dense, lpmm.INT8), lpmm.adamw(1e-3)
  >>> opt_state = lpmm.convert(opt_state, tx.init(params))
  >>> optax.tree.get(opt_state, 'nu')['w']
  QuantizedArray(float32[64, 128] as uint8_sqrt)
  >>> back = lpmm.convert((params, opt_state), (dense, optax.adamw(1e-3).init(dense)))
  >>> back[0]['w'].dtype
  dtype('float32')
  """
  walk = _Walk({'learning_rate': learning_rate, 'momentum': momentum}, None if key is None else _random.raw_key(key))
  return walk.convert((), tree, like)


@dataclasses.dataclass(frozen=True)
class _Walk:
  """Through two trees side by side.

  Attributes:
    factors: between forms of momentum.
    raw_key: to round with, or None.
  """

  factors: dict[str, float | None]
  raw_key: jax.Array | None

  def convert(self, path: Any, source: Any, target: Any, factor: float = 1.0) -> Any:
    """The subtree `source` as `target` is stored, arrays times a factor."""
    if any(_array.is_quantized(x) for x in (source, target)):
      return self._array(path, source, target, factor)
    if any(isinstance(x, _MULTI_STEPS) for x in (source, target)):
      return self._multi_steps(path, source, target)
    if any(isinstance(x, LowPrecisionState) for x in (source, target)):
      return self._optimizer(path, source, target)
    (items, treedef), (wanted, wanted_def) = _level(source), _level(target)
    if treedef != wanted_def:
      raise ValueError(_difference(path, source, target))
    if jax.tree_util.all_leaves([source]):
      return self._array(path, source, target, factor)
    pairs = zip(items, wanted, strict=True)
    return wanted_def.unflatten(self.convert((*path, *keys), x, y, factor) for (keys, x), (_, y) in pairs)

  def _array(self, path: Any, x: Any, target: Any, factor: float) -> Any:
    if not hasattr(x, 'shape') or not hasattr(target, 'shape'):
      raise ValueError(_difference(path, x, target))
    if x.shape != target.shape:
      raise ValueError(f'{_array.path_str(path)}: it has shape {x.shape}, the other tree {target.shape}')
    if jnp.issubdtype(x.dtype, jnp.floating) != jnp.issubdtype(target.dtype, jnp.floating):
      raise ValueError(f'{_array.path_str(path)}: it is {x.dtype}, in the other tree {target.dtype}')
    format = _array.format_of(target)
    if factor == 1.0 and _array.format_of(x) == format and x.dtype == target.dtype:
      return x
    dense = _array.dequantize(x)
    if factor != 1.0:
      dense = dense * factor
    word = None
    if format is not None and format.rounding == 'stochastic' and self.raw_key is not None:
      word = _random.words(self.raw_key, _random.Domain.CONVERT, [], [path], 1)[0, 0]
    return _array.encode_as(dense, target, word)

  def _optimizer(self, path: Any, source: Any, target: Any) -> Any:
    """A LowPrecisionState to another, or to Optax's own state, or from it."""
    inner, wanted = (x.inner_state if isinstance(x, LowPrecisionState) else x for x in (source, target))
    forms = _momentum_of(inner), _momentum_of(wanted)
    is_whole = lambda x: _is_momentum(x) or _array.is_quantized(x)
    around = (jax.tree.structure(state, is_leaf=is_whole) for state in (inner, wanted))
    if None in forms or (type(forms[0]) is type(forms[1]) and operator.eq(*around)):
      new = self.convert(path, inner, wanted)
    else:
      new = self._momentum(path, inner, wanted)
    if not isinstance(target, LowPrecisionState):
      return new
    if isinstance(source, LowPrecisionState):
      return LowPrecisionState(source.step, source.key, new)
    return LowPrecisionState(_count_of(inner), _concrete_key(path, target.key), new)

  def _momentum(self, path: Any, inner: Any, wanted: Any) -> Any:
    """One form of SGD's momentum to another; all that there is beside it are step counts."""
    source = _momentum_of(inner)

    def one(keys: Any, x: Any) -> Any:
      where = (*path, *keys)
      if _is_momentum(x):
        same = type(x) is type(source)
        factor = 1.0 if same else self._factor(where, type(x)) / self._factor(where, type(source))
        x = x._replace(trace=self.convert((*where, _key('trace')), source.trace, x.trace, factor))
        return x._replace(count=_count_of(inner)) if 'count' in x._fields else x
      if getattr(keys[-1], 'name', None) != 'count':
        raise ValueError(_difference(path, inner, wanted))
      return _count_of(inner)

    return jax.tree_util.tree_map_with_path(one, wanted, is_leaf=_is_momentum)

  def _factor(self, path: Any, form: type) -> float:
    if not all(self.factors[name] for name in _MOMENTA[form]):
      names = ' and '.join(_MOMENTA[form])
      raise ValueError(
        f'{_array.path_str(path)}: between these forms of momentum, convert needs {names}, which must not be zero'
      )
    return math.prod(float(self.factors[name] or 0) for name in _MOMENTA[form])

  def _multi_steps(self, path: Any, source: Any, target: Any) -> Any:
    """The state of one MultiSteps to that of another."""
    if not all(isinstance(x, _MULTI_STEPS) for x in (source, target)):
      raise ValueError(f'{_array.path_str(path)}: only one of the two trees has the state of a MultiSteps')
    own: dict[str, Any] = {}
    if isinstance(target, MultiStepsState) and isinstance(source, MultiStepsState):
      own = {'key': source.key, 'microbatches': source.microbatches}
    elif isinstance(target, MultiStepsState):
      own = {'key': _concrete_key(path, target.key), 'microbatches': jnp.zeros((), jnp.int32)}
    stored = lambda tree: [_array.is_quantized(x) for x in jax.tree.leaves(tree, is_leaf=_array.is_quantized)]
    if stored(source.acc_grads) == stored(target.acc_grads):
      acc_grads = self.convert((*path, _key('acc_grads')), source.acc_grads, target.acc_grads)
    elif int(source.mini_step) == 0:
      acc_grads = jax.tree.map(
        lambda x: _array.full(x, 0, _array.format_of(x), x.dtype), target.acc_grads, is_leaf=_array.is_quantized
      )
    else:
      raise ValueError(
        f'{_array.path_str(path)}: {source.mini_step} microbatches have been accumulated, in another way than wanted; '
        'convert when mini_step is 0, after an optimizer step'
      )
    return target._replace(
      mini_step=source.mini_step,
      gradient_step=source.gradient_step,
      inner_opt_state=self.convert((*path, _key('inner_opt_state')), source.inner_opt_state, target.inner_opt_state),
      acc_grads=acc_grads,
      skip_state=self.convert((*path, _key('skip_state')), source.skip_state, target.skip_state),
      **own,
    )


def _level(node: Any) -> tuple[list[Any], Any]:
  """The children of a node, with their keys, and its own structure."""
  return jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)


def _key(name: str) -> Any:
  return jax.tree_util.GetAttrKey(name)


def _difference(path: Any, source: Any, target: Any) -> str:
  def names(tree):
    items, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_array.is_quantized)
    return [_array.path_str((*path, *keys)) for keys, _ in items]

  only = lambda a, b: _array.name_some([name for name in a if name not in b])
  had, wanted = names(source), names(target)
  return (
    f'{_array.path_str(path)}: the trees are not of one optimizer and one set of parameters: what is converted has '
    f'{only(had, wanted)} that the other has not, and the other {only(wanted, had)} that it has not '
    f'({type(source).__name__}, {type(target).__name__})'
  )


def _is_momentum(x: Any) -> bool:
  return type(x) in _MOMENTA


def _momentum_of(state: Any) -> Any:
  """The one momentum of SGD in a state; None if there is none, or more."""
  found = [x for x in jax.tree.leaves(state, is_leaf=_is_momentum) if _is_momentum(x)]
  return found[0] if len(found) == 1 else None


def _count_of(state: Any) -> jax.Array:
  """Steps taken, int32[]; 0 for an optimizer that does not count."""
  counts = [count for _, count in optax.tree.get_all_with_path(state, 'count')]
  # Moments of a parameter of that name are none.
  is_count = lambda x: getattr(x, 'shape', None) == () and jnp.issubdtype(x.dtype, jnp.integer)
  return functools.reduce(jnp.maximum, filter(is_count, counts), jnp.zeros((), jnp.int32))


def _concrete_key(path: Any, key: Any) -> jax.Array:
  if isinstance(key, jax.ShapeDtypeStruct):
    raise ValueError(
      f'{_array.path_str(path)}: the new optimizer has a key; give convert a concrete state, tx.init(params)'
    )
  # A copy, since a step that donates the state deletes it.
  return jnp.array(key)
