"""Which parameters are updated, and by what: `partition`, `masked`, `set_to_zero`."""

from collections.abc import Callable
from collections.abc import Hashable
from collections.abc import Mapping
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.training import _step


def set_to_zero() -> _transformation.InPlaceTransformation:
  """`optax.set_to_zero` for quantized parameters: what it is given stays as it is, bit for bit.

  Optax's own returns gradients of zero, which are of another structure than deltas of quantized parameters.

  Returns:
    A transformation without state. Its `update` needs the parameters.

  Raises:
    ValueError: at `update`, if it gets none.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'body': jnp.ones((64, 64)), 'head': jnp.ones((64, 64))}, lpmm.INT8)
  >>> labels = {'body': 'freeze', 'head': 'train'}
  >>> tx = lpmm.partition({'train': lpmm.adamw(0.1), 'freeze': lpmm.set_to_zero()}, labels)
  >>> gradients = {'body': jnp.ones((64, 64)), 'head': jnp.ones((64, 64))}
  >>> params, state = lpmm.step(tx, gradients, params, tx.init(params))
  >>> {name: round(float(jnp.mean(x)), 2) for name, x in lpmm.dequantize(params).items()}
  {'body': 1.0, 'head': 0.9}
  """

  def update(updates, state, params=None, **extra_args):
    del updates, extra_args
    return jax.tree.map(jnp.zeros_like, params), state

  def keep(gradients, params, state, **extra_args):
    del gradients, extra_args
    return params, state

  return _transformation.InPlaceTransformation('set_to_zero', lambda params: optax.EmptyState(), update, keep)


def _labels(param_labels: Any, known: set, params: Any) -> Any:
  """A label per parameter, or per subtree of them.

  Raises:
    ValueError: for a label without a transformation, or a tree of another structure, naming the parameter.
  """
  if callable(param_labels):
    dense = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, 'dtype') else leaf
    labels = param_labels(jax.tree.map(dense, _array.unwrap(params), is_leaf=_array.is_quantized))
  else:
    labels = param_labels
  labels = _array.of_codes(labels)
  for path, label in jax.tree_util.tree_flatten_with_path(labels)[0]:
    if label not in known:
      raise ValueError(
        f'{_array.path_str(path)}: the label {label!r} has no transformation; there are {sorted(map(repr, known))}'
      )
  try:
    jax.tree.map(lambda _, x: None, labels, params)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'labels must be a tree like the parameters, or a prefix of it: {error}') from error
  return labels


def partition(
  transforms: Mapping[Hashable, optax.GradientTransformation],
  param_labels: Any | Callable[[Any], Any],
) -> _transformation.InPlaceTransformation:
  """`optax.partition` that keeps the in-place step: rates, formats and optimizers by group of parameters.

  Args:
    transforms: {label: transformation}; optimizers of this package, `set_to_zero`, or, for dense parameters, any of
      Optax's.
    param_labels: a tree of labels like the parameters, or a prefix of it; or a function that makes one of the
      parameters, which it sees as dense shapes (`jax.ShapeDtypeStruct`), quantized or not.

  Returns:
    A transformation with the state of Optax's (`optax.PartitionState`), for `lpmm_optax.step`, `chain`, `MultiSteps`
    and `apply_if_finite`. Each parameter is updated as by its optimizer alone, bit for bit. What precedes it in a
    `chain` (clipping) is done to the gradients of all groups together: to those of JAX in their own memory, but to
    accumulated ones in a dense tree of them.

  Raises:
    ValueError: at `init` and later, for a label without a transformation or labels of another structure, naming the
      parameter; for a state that was not made by it.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'kernel': jnp.ones((64, 64)), 'bias': jnp.ones(64)}, lpmm.INT8)
  >>> by_rank = lambda params: jax.tree.map(lambda p: 'decay' if p.ndim > 1 else 'no decay', params)
  >>> groups = {'decay': lpmm.adamw(0.1, weight_decay=0.5), 'no decay': lpmm.adamw(0.1, weight_decay=0.0)}
  >>> tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.partition(groups, by_rank))
  >>> gradients = {'kernel': jnp.zeros((64, 64)), 'bias': jnp.zeros(64)}
  >>> params, state = lpmm.step(tx, gradients, params, tx.init(params))
  >>> {name: round(float(jnp.mean(x)), 2) for name, x in lpmm.dequantize(params).items()}
  {'bias': 1.0, 'kernel': 0.95}
  """
  txs = {label: optax.with_extra_args_support(tx) for label, tx in transforms.items()}

  def select(labels, wanted, tree):
    return jax.tree.map(lambda label, x: x if label == wanted else optax.MaskedNode(), labels, tree)

  def init(params):
    # `optax.tree.map_params` gives a placeholder without leaves, which stands for whatever parameters there are.
    labels = _labels(param_labels, set(txs), params) if jax.tree.leaves(params) else None
    own = lambda label: params if labels is None else select(labels, label, params)
    return optax.PartitionState({label: optax.MaskedState(tx.init(own(label))) for label, tx in txs.items()})

  def by_group(advance, start, gradients, params, state):
    """The results of all groups in one tree, and their states."""
    if not isinstance(state, optax.PartitionState) or set(state.inner_states) != set(txs):
      raise ValueError(f'partition got a state that it did not create: {type(state).__name__}, not for {list(txs)}')
    labels, out, states = _labels(param_labels, set(txs), params), start, {}
    for label, tx in txs.items():
      own = [select(labels, label, tree) for tree in (gradients, params)]
      new, inner_state = advance(tx, *own, state.inner_states[label].inner_state)
      out = jax.tree.map(lambda found, new, old, label=label: new if found == label else old, labels, new, out)
      states[label] = optax.MaskedState(inner_state)
    return out, optax.PartitionState(states)

  def update(gradients, state, params=None, **extra_args):
    def advance(tx, gradients, params, inner_state):
      if not isinstance(tx, _transformation.InPlaceTransformation):
        gradients = _gradient.dense(gradients, params)
      return tx.update(gradients, inner_state, params, **extra_args)

    return by_group(advance, gradients, gradients, params, state)

  def step(gradients, params, state, **extra_args):
    advance = lambda tx, *args: _step.step(tx, *args, **extra_args)
    return by_group(advance, params, gradients, params, state)

  def explain(params, **extra_args):
    labels = _labels(param_labels, set(txs), params)
    own = [_transformation.explain(tx)(select(labels, label, params), **extra_args) for label, tx in txs.items()]
    return _transformation.Explanation(*(functools.reduce(operator.or_, parts, {}) for parts in zip(*own, strict=True)))

  return _transformation.InPlaceTransformation('partition', init, update, step, explain=explain)


def masked(
  inner: optax.GradientTransformation, mask: Any | Callable[[Any], Any]
) -> _transformation.InPlaceTransformation:
  """An optimizer for some of the parameters; the others stay as they are, bit for bit.

  Where the mask is False, `optax.masked` passes the gradient on, to be added to the parameter unless something follows;
  this one has nothing follow, and so adds nothing, like `optax.selective_transform`.

  Args:
    inner: an optimizer of this package.
    mask: True for what it updates: a tree of booleans, or a function that makes one, as the labels of `partition`.

  Returns:
    `partition` of the two groups, with the labels 'updated' and 'kept', which raises what that does.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'body': jnp.ones((64, 64)), 'head': jnp.ones((64, 64))}, lpmm.INT8)
  >>> tx = lpmm.masked(lpmm.adamw(0.1), {'body': False, 'head': True})
  >>> gradients = {'body': jnp.ones((64, 64)), 'head': jnp.ones((64, 64))}
  >>> params, state = lpmm.step(tx, gradients, params, tx.init(params))
  >>> {name: round(float(jnp.mean(x)), 2) for name, x in lpmm.dequantize(params).items()}
  {'body': 1.0, 'head': 0.9}
  """
  named = lambda mask: jax.tree.map(lambda m: 'updated' if m else 'kept', mask)
  labels = (lambda params: named(mask(params))) if callable(mask) else named(mask)
  return partition({'updated': inner, 'kept': set_to_zero()}, labels)
