"""`ema`: a moving average of quantized parameters, in low precision and in place."""

from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.storage import _array
from lpmm_optax.storage import _codec
from lpmm_optax.storage import _format
from lpmm_optax.storage import _random
from lpmm_optax.storage._format import Format
from lpmm_optax.trace import _plan


class EmaState(NamedTuple):
  """State of an `ema`.

  Attributes:
    average: a tree like the parameters, quantized where they are; `dequantize` it to evaluate the model.
    rounding: of the average: its `step` counts updates, and its `key` never changes.
  """

  average: Any
  rounding: _low_precision.LowPrecisionState


class Ema(NamedTuple):
  """What `ema` returns.

  Attributes:
    init: `params -> state`, in which the average is the parameters.
    update: `(params, state) -> state`.
  """

  init: Callable[[Any], EmaState]
  update: Callable[[Any, EmaState], EmaState]


def _check_average(structure: _plan.Params, leaves: list[Any], average: Any) -> None:
  """Raises a ValueError, naming the leaf, unless an average is of parameters like these."""
  averaged, averages = _plan.flatten(average)
  known = dict(zip(averaged.paths, averages, strict=True))
  for path, leaf in zip(structure.paths, leaves, strict=True):
    if path not in known:
      raise ValueError(f'{path}: the average has no such parameter')
    if known[path].shape != leaf.shape:
      raise ValueError(f'{path}: the parameter has shape {leaf.shape}, its average {known[path].shape}')
  missing = [path for path in known if path not in structure.paths]
  if missing:
    raise ValueError(f'{missing[0]}: it is in the average, and no parameter')


def ema(
  decay: float | Callable[[jax.Array], jax.typing.ArrayLike],
  format: Format = _format.INT16,
  *,
  key: jax.Array | None = None,
  tile_size: int | None = None,
  shard_axes: Sequence[str] = (),
) -> Ema:
  r"""The exponential moving average of quantized parameters, :math:`a \leftarrow Q(a + (1 - d)(w - a))`.

  The parameters are decoded and the average is advanced tile by tile, with stochastic rounding: neither exists dense.
  For an average in float32 there is no need of it: inside of `jax.jit`,
  ``optax.incremental_update(lpmm.dequantize(params), average, 1 - decay)`` makes no dense copy of the parameters.

  Args:
    decay: d, or a function of the number of updates so far.
    format: of the average, where parameters are quantized; that of dense ones is in float32. Rounding adds noise of a
      variance of at most :math:`\delta\,E|w - a| / 2` and :math:`\delta^2 / (4 (1 - d^2))`, where :math:`\delta` is the
      average's grid step. In 8 bits that is more than the average takes away, unless parameters move by less than a
      grid step.
    key: a `jax.random` key that all rounding derives from; None is `jax.random.key(0)`.
    tile_size: as for `low_precision`.
    shard_axes: as for `low_precision`.

  Returns:
    An `Ema`: init and update. Donate the state to a jitted update, for it to be in place.

  Raises:
    TypeError: for what is no Format.
    ValueError: for a format that stores no negative values; at `update`, for parameters of another structure or shape
      than the average, naming the leaf.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'w': jnp.zeros((64, 64))}, lpmm.INT8)
  >>> average = lpmm.ema(0.9)
  >>> state = average.init(params)
  >>> for _ in range(3):
  ...   state = average.update(lpmm.quantize({'w': jnp.ones((64, 64))}, lpmm.INT8), state)
  ...   print(f'{jnp.mean(lpmm.dequantize(state.average)["w"]):.3f}')
  0.100
  0.190
  0.271
  """
  if not isinstance(format, Format):
    raise TypeError(f'format must be a Format such as lpmm.INT16, got {format!r}')
  if not format.signed:
    raise ValueError(f'{format} stores nonnegative values only, and parameters have signs')
  stored_as = format.with_block_size(_format.PARAM_BLOCK_SIZE)
  rate = (lambda count: 1 - decay(count)) if callable(decay) else (lambda count: 1 - decay)
  subtract = lambda x, average: x.astype(average.dtype) - average
  difference = optax.stateless(lambda params, average: jax.tree.map(subtract, params, average))
  tx = _low_precision.transform(
    optax.chain(difference, optax.scale_by_schedule(rate)),
    'ema',
    formats='default',
    key=key,
    tile_size=tile_size,
    shard_axes=shard_axes,
    domain=_random.Domain.AVERAGE,
  )

  def init(params):
    params = _array.unwrap(params)

    def copy(x):
      if _array.is_quantized(x):
        return _array.encode(x.dense(), stored_as, x.dtype)
      # An average in bfloat16 stops moving.
      return jnp.array(x, _codec.compute_dtype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else None)

    average = jax.tree.map(copy, params, is_leaf=_array.is_quantized)
    return EmaState(average, tx.init(average))

  def update(params, state):
    structure, leaves = _plan.flatten(_array.unwrap(params))
    _check_average(structure, leaves, state.average)
    gradients = structure.tree({i: _gradient.Gradient(leaves[i]) for i in structure.active})
    average, rounding = tx.step(gradients, state.average, state.rounding)
    # What is never updated (counts) is not averaged either.
    treedef: Any = jax.tree.structure(average, is_leaf=_array.is_quantized)
    averages = treedef.flatten_up_to(average)
    for i in set(range(len(leaves))) - set(structure.active):
      averages[i] = leaves[i]
    return EmaState(treedef.unflatten(averages), rounding)

  return Ema(init, update)
