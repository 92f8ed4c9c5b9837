"""`value_and_step`: accumulation in the backward pass, where neither gradients nor weights exist as a dense tree.

The loss gets its parameters still quantized, as `TrackedArray`s. Dequantizing one is a function with a rule of its own
for differentiation: the cotangent that arrives is a layer's gradient, and is added to its accumulator, which lies in a
`jax.Ref`, there and then. What is differentiated are zeros beside the codes, the *anchor*, on which such a function
depends; so where the loss stops the gradient of a parameter, nothing is added.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _update
from lpmm_optax.storage import _array
from lpmm_optax.storage import _random
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program
from lpmm_optax.training import _multi_steps
from lpmm_optax.training import _step


@dataclasses.dataclass(frozen=True, eq=False)
class Sink:
  """Where the gradient of one parameter goes; compared by identity, so that it may be a pytree's static part.

  Attributes:
    path: of the parameter.
    accumulation: the static part.
    block_axis: along which the blocks of the target run; None if it has none.
    dynamic: what a differentiation rule may not close over: the target with a `jax.Ref` in place of each array, one to
      the uses so far of every row, int32, the weight of a gradient, the random word, and a zero at run time.
  """

  path: str
  accumulation: _update.LeafUpdate
  block_axis: int | None
  dynamic: dict[str, Any]

  def check(self, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless an array of this shape can be a slice that leading axes index."""
    whole = self.accumulation.shape
    axes = len(whole) - len(shape)
    if axes < 0 or whole[axes:] != shape:
      raise ValueError(
        f'{self.path}: a parameter of shape {whole} is used in a slice of shape {shape}, but value_and_step adds to '
        'slices along leading axes only (jax.tree.map(lambda x: x[i], p), or lax.scan over them); dequantize it first, '
        'and slice the result'
      )
    if self.block_axis is not None and self.block_axis < axes:
      raise ValueError(
        f'{self.path}: blocks of what accumulates for it run along axis {self.block_axis} of {whole}, which a slice of '
        f'shape {shape} cuts; give that a Format with block_size={whole[-1]}, for blocks along the last axis'
      )

  def add(self, dynamic: dict[str, Any], rows: jax.Array, gradient: jax.Array) -> None:
    """Adds the gradient of a slice, `rows` being the numbers of its rows in the whole parameter."""
    shape = self.accumulation.shape
    axes = len(shape) - gradient.ndim
    first = rows.reshape(-1)[0]
    # A slice along another axis may have the shape of one along a leading axis, but not its rows.
    is_slice = jnp.all(rows.reshape(-1) == first + lax.iota(jnp.int32, rows.size)) & (first % rows.size == 0)
    weight = jnp.where(is_slice, jnp.ones(()) if dynamic['weight'] is None else dynamic['weight'], jnp.nan)
    number = first // rows.size
    start: list[jax.Array] = []
    for n in reversed(shape[:axes]):
      start.insert(0, number % n)
      number = number // n
    whole = jax.tree.map(lambda ref: ref[...], dynamic['target'])
    target = jax.tree.map(lambda x: _slice(x, start), whole)
    # Every use is rounded by itself: with the same bits, errors of many uses would add up.
    uses = dynamic['uses'][...]
    use = jnp.max(_slice(uses, start))
    dynamic['uses'][...] = _with_slice(uses, jnp.full(shape[axes:-1], use + 1), start)
    new = _update.follow(
      _update.accumulate_leaf,
      self.accumulation,
      target.codes,
      _gradient.Gradient(target, gradient, weight),
      _random.of_use(dynamic['word'], use),
      dynamic['zero'],
      start,
    )

    def write(ref, x, slice_of_x):
      ref[...] = _with_slice(x, slice_of_x, start)

    jax.tree.map(write, dynamic['target'], whole, new)


# A `jax.Ref` could be indexed itself, but not on an explicit mesh. Compiled, it is the same: a Ref is an array again by
# then, and updated in place.
def _slice(x: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
  for index in start:
    x = lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
  return x


def _with_slice(x: jax.Array, new: jax.Array, start: Sequence[jax.Array]) -> jax.Array:
  indices = [*start, *[jnp.int32(0)] * new.ndim]
  return lax.dynamic_update_slice(x, new.reshape((1,) * len(start) + new.shape), indices)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class TrackedArray(_array.QuantizedArray):
  """A parameter, or a slice of one, whose gradient goes into a `Sink`.

  Attributes:
    rows: int32, of the array's shape without its last axis: the numbers of its rows in the whole parameter.
    anchor: float32, of the same shape.
    sink: static.
  """

  rows: jax.Array
  anchor: jax.Array
  sink: Sink

  def tree_flatten(self) -> tuple[Any, Any]:
    children, static = super().tree_flatten()
    return (*children, self.rows, self.anchor), (*static, self.sink)

  def tree_flatten_with_keys(self) -> tuple[Any, Any]:
    children, static = super().tree_flatten_with_keys()
    own = [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in ('rows', 'anchor')]
    return (*children, *own), (*static, self.sink)

  @classmethod
  def tree_unflatten(cls, static: Any, children: Any) -> 'TrackedArray':
    (codes, scales, rows, anchor), (format, dtype, blocks, sink) = children, static
    return cls(codes, scales, format, dtype, blocks, rows, anchor, sink)

  def dense(self, dtype: Any = None) -> jax.Array:
    """The values; their cotangent is added to the sink."""
    sink = self.sink
    sink.check(self.shape)
    stored = _array.QuantizedArray(self.codes, self.scales, self.format, self.dtype, self.blocks)

    @jax.custom_vjp
    def read(anchor, dynamic, stored, rows):
      del anchor, dynamic, rows
      return stored.dense(dtype)

    def forward(anchor, dynamic, stored, rows):
      return stored.dense(dtype), (anchor, dynamic, rows)

    def backward(saved, cotangent):
      anchor, dynamic, rows = saved
      sink.add(dynamic, rows, cotangent)
      return jnp.zeros_like(anchor), None, None, None

    read.defvjp(forward, backward)
    return read(self.anchor, sink.dynamic, stored, self.rows)


def _track(leaf: _array.QuantizedArray, anchor: jax.Array, sink: Sink) -> TrackedArray:
  outer = leaf.shape[:-1]
  rows = lax.iota(jnp.int32, math.prod(outer)).reshape(outer)
  return TrackedArray(leaf.codes, leaf.scales, leaf.format, leaf.dtype, leaf.blocks, rows, anchor, sink)


def value_and_step(
  fun: Callable[..., Any], tx: _multi_steps.MultiSteps, has_aux: bool = False
) -> Callable[..., tuple[Any, Any, Any]]:
  """`jax.value_and_grad` and the optimizer's step in one, so that no gradient outlives the layer it belongs to.

  Where ``jax.value_and_grad(fun)(params, *args)`` gives a value and gradients, this gives the value, and parameters and
  optimizer state after the microbatch. `fun` gets the quantized parameters as they are, and calls `dequantize` on each
  where it is used: in the body of the scan over layers, in the layer's function, or, in Flax, through
  ``nn.map_variables(Layer, 'params', lpmm_optax.dequantize)``. In the backward pass each layer's gradient is added to
  the accumulator or the momentum at once, so no tree of gradients exists. Nor does one of dense weights, if layers
  dequantize theirs inside of `jax.checkpoint`, which decodes them again; else they are kept for the backward pass, as
  activations are.

  A parameter may be used any number of times (tied embeddings), under `jax.checkpoint`, in `lax.scan` and its like, and
  sliced along leading axes (``jax.tree.map(lambda x: x[i], p)``). It may not be used under `jax.vmap`, nor, if it is
  quantized, under `lax.cond`. Leaves that are dense, or whose accumulator is dense, are differentiated as usual.

  The result is that of `tx.step` but for one rounding: the last microbatch's gradient is added to the accumulator too,
  before the update. Clipping that `tx` does to accumulated gradients (`MultiSteps(chain(clip, adamw))`) is exact. What
  needs all of one microbatch's gradient at once, a skip function or clipping with `INTO_MOMENTUM`, there cannot be.

  Args:
    fun: `(params, *args, **kwargs) -> loss` or, with has_aux, `(loss, aux)`; it must be differentiable in reverse mode.
    tx: a `MultiSteps`, of one microbatch or more.
    has_aux: whether fun returns a pair.

  Returns:
    `(params, opt_state, *args, **kwargs) -> (value, params, opt_state)`, to be jitted with params and opt_state
    donated; value is what fun returns.

  Raises:
    TypeError: if tx is no `MultiSteps`.
    ValueError: if it has a skip function; and where fun is traced, for a parameter used in a slice that cannot be added
      to, naming it.

  >>> import jax, jax.numpy as jnp, lpmm_optax as lpmm
  >>> def loss_fn(params, x):
  ...   layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None))
  ...   x, _ = jax.lax.scan(layer, x, params)
  ...   return jnp.mean((x - 0.5) ** 2)
  >>> params = lpmm.quantize(jax.random.normal(jax.random.key(0), (4, 64, 64)) / 8, lpmm.INT8)
  >>> tx = lpmm.MultiSteps(lpmm.sgdm(1.0), every_k_schedule=2, accumulator=lpmm.INTO_MOMENTUM)
  >>> state = tx.init(params)
  >>> train_step = jax.jit(lpmm.value_and_step(loss_fn, tx), donate_argnums=(0, 1))
  >>> for i in range(6):
  ...   value, params, state = train_step(params, state, jnp.ones((8, 64)))
  ...   print(f'{value:.2f}')
  0.46
  0.46
  0.20
  0.20
  0.10
  0.10
  """
  if not isinstance(tx, _multi_steps.MultiSteps):
    raise TypeError(
      f'value_and_step accumulates, so it takes an lpmm_optax.MultiSteps, got {type(tx).__name__}; what precedes the '
      'optimizer goes inside, MultiSteps(chain(clip, adamw), k)'
    )
  microbatches = tx.microbatches
  if microbatches.should_skip is not None:
    raise ValueError(
      'value_and_step cannot skip a microbatch: should_skip_update_fn must see all of its gradient, which never exists '
      'at once; use jax.value_and_grad and lpmm_optax.step'
    )

  def wrapped(params, opt_state, *args, **kwargs):
    microbatches.check(opt_state, params)
    structure, leaves = _plan.flatten(params)
    targets = microbatches.targets(structure, opt_state)
    words = microbatches.words(structure, opt_state)
    zero = _program.runtime_zero(_program.hidden(opt_state.mini_step))
    tracked = [i for i in structure.active if _array.is_quantized(leaves[i]) and _array.is_quantized(targets[i])]
    refs = {i: jax.tree.map(jax.new_ref, targets[i]) for i in tracked}
    uses = {i: jax.new_ref(jnp.zeros(leaves[i].shape[:-1], jnp.int32)) for i in tracked}
    dense = {i: _array.dequantize(leaves[i]) for i in structure.active if i not in refs}

    def with_sinks(anchors):
      out = {}
      for i in tracked:
        blocks = _array.blocks_of(targets[i])
        dynamic = {
          'target': refs[i],
          'uses': uses[i],
          'weight': microbatches.gradient(opt_state, targets[i], None).weight,
          'word': words[i],
          'zero': zero,
        }
        accumulation = microbatches.accumulation(structure, i)
        block_axis = blocks[0][0] if blocks else None
        out[i] = _track(leaves[i], anchors[i], Sink(structure.paths[i], accumulation, block_axis, dynamic))
      return out

    def loss(anchors, dense):
      seen = dict(enumerate(leaves)) | dense | with_sinks(anchors)
      return fun(structure.treedef.unflatten([seen[i] for i in range(len(leaves))]), *args, **kwargs)

    anchors = {i: jnp.zeros(leaves[i].shape[:-1], jnp.float32) for i in tracked}
    value, (_, gradients) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=has_aux)(anchors, dense)
    targets |= {i: jax.tree.map(jax.freeze, ref) for i, ref in refs.items()}
    state = microbatches.with_targets(structure, opt_state, targets)
    state = microbatches.with_targets(structure, state, microbatches.accumulate(structure, state, gradients))

    gradients = microbatches.summed(structure, state, {})
    last = microbatches.is_last(opt_state)
    state = state._replace(mini_step=jnp.where(last, state.mini_step, optax.safe_increment(state.mini_step)))
    advance = functools.partial(_step.step, microbatches.tx, gradients)
    params, state = microbatches.take_step(advance, params, last, state)
    return value, params, state

  return wrapped
