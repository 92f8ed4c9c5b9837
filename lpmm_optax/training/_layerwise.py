"""`layerwise`: every leaf, and every slice of a stacked one, is updated by an optimizer of its own."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import optax

from lpmm_optax.kernel import _gradient
from lpmm_optax.kernel import _tiles
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _transformation
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _random
from lpmm_optax.trace import _plan


class LayerwiseState(NamedTuple):
  """State of `layerwise`.

  Attributes:
    states: a tree like the parameters of states of the optimizer, each made for that parameter alone; of a stacked one,
      every array, of step counts and hyperparameters too, has the stack's first axis before its own.
  """

  states: Any


# Static, for it has no arrays, as what has to be known where a gradient goes.
@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
  """The optimizer of one leaf.

  Attributes:
    tx: the optimizer.
    structure: of the parameters.
    index: of the leaf.
    is_stacked: whether its slices are leaves of their own.
  """

  tx: _transformation.InPlaceTransformation
  structure: _plan.Params
  index: int
  is_stacked: bool

  def alone(self, x: Any) -> Any:
    """A tree like the parameters with nothing in it but x, in the leaf's place."""
    leaves: list[Any] = [optax.MaskedNode()] * len(self.structure.keys)
    leaves[self.index] = x
    return self.structure.treedef.unflatten(leaves)

  def init(self, leaf: Any) -> Any:
    """The state before the first step."""
    if not self.is_stacked:
      return self.tx.init(self.alone(leaf))
    if any(axis == 0 for axis, _ in _array.blocks_of(leaf)):
      advice = f'quantize it with block_size={leaf.shape[-1]}, for blocks along the last axis'
      raise ValueError(
        f'{self.structure.paths[self.index]}: its blocks run along the first axis of {leaf.shape}, so its slices are '
        f'no leaves of their own; {advice if len(leaf.shape) > 1 else "keep it dense, by where, or out of stacked"}'
      )
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(leaf)):
      return jax.eval_shape(self._init_slices, leaf)
    return self._init_slices(leaf)

  def _init_slices(self, leaf: Any) -> Any:
    state = jax.vmap(lambda x: self.tx.init(self.alone(x)))(leaf)

    def with_own_keys(x):
      if not isinstance(x, _low_precision.LowPrecisionState):
        return x
      return x._replace(key=jax.vmap(_random.of_use)(x.key, lax.iota(jnp.int32, len(x.key))))

    return jax.tree.map(with_own_keys, state, is_leaf=lambda x: isinstance(x, _low_precision.LowPrecisionState))

  def advance(
    self, gradient: _gradient.Gradient, leaf: Any, state: Any, in_place: bool, extra_args: dict[str, Any]
  ) -> tuple[Any, Any]:
    """(the leaf, or one slice of it, or its delta; its state), after a step."""

    def one(gradient, leaf, state):
      trees = self.alone(gradient), self.alone(leaf)
      if in_place:
        new, state = self.tx.step(*trees, state, **extra_args)
      else:
        deltas, state = self.tx.update(trees[0], state, trees[1], **extra_args)
        new = _array.unseal(deltas)
      return self.structure.treedef.flatten_up_to(new)[self.index], state

    if not self.is_stacked or leaf.ndim < len(self.structure.templates[self.index].shape):
      return one(gradient, leaf, state)

    def body(number, carry):
      at = lambda tree: jax.tree.map(lambda x: _tiles.slice_of(x, [number]), tree)
      new, state = carry
      of_slice = dataclasses.replace(gradient, accumulated=at(gradient.accumulated), recent=at(gradient.recent))
      found = one(of_slice, at(new if in_place else leaf), at(state))
      return jax.tree.map(lambda x, y: _tiles.with_slice(x, y, [number]), carry, found)

    carry = leaf if in_place else jax.tree.map(jnp.zeros_like, leaf), state
    return _tiles.loop(leaf.shape[0], body, _mesh.vary_as_results(lambda carry: body(jnp.int32(0), carry), carry))

  def run(
    self, gradient: _gradient.Gradient, target: Any, fields: list[Any], start: list[jax.Array]
  ) -> tuple[Any, list[Any]]:
    """As a `LeafStep` has it, where the only field is the state."""
    del start
    new, state = self.advance(gradient, target, fields[0], True, {})
    return new, [state]


@dataclasses.dataclass(frozen=True, eq=False)
class Layerwise:
  """What `layerwise` makes a transformation of."""

  tx: _transformation.InPlaceTransformation
  stacked: str | Callable[[str, Any], bool] | None

  def layers(self, structure: _plan.Params, leaves: list[Any]) -> dict[int, Layer]:
    """The optimizers of all leaves that are updated."""

    def is_stacked(i):
      path, leaf = structure.paths[i], leaves[i]
      if isinstance(self.stacked, str):
        found = re.search(self.stacked, path) is not None
      else:
        found = self.stacked is not None and bool(self.stacked(path, leaf))
      if found and not leaf.ndim:
        raise ValueError(f'{path}: `stacked` of layerwise names it, and it has no axis to be sliced along')
      return found

    return {i: Layer(self.tx, structure, i, is_stacked(i)) for i in structure.active}

  def states(self, structure: _plan.Params, state: Any) -> list[Any]:
    """The state of every leaf.

    Raises:
      TypeError, ValueError: for one that `init` did not make for these parameters.
    """
    if not isinstance(state, LayerwiseState):
      raise TypeError(f'layerwise got a state of type {type(state).__name__}, which it did not create')
    try:
      return structure.treedef.flatten_up_to(state.states)
    except (ValueError, TypeError, KeyError) as error:
      raise ValueError(f'layerwise got a state that it did not create for these parameters: {error}') from error

  def with_states(self, structure: _plan.Params, states: list[Any]) -> LayerwiseState:
    return LayerwiseState(structure.treedef.unflatten(states))

  def init(self, params: Any) -> LayerwiseState:
    """The state before the first step."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    layers = self.layers(structure, leaves)
    return LayerwiseState(structure.tree({i: layer.init(leaves[i]) for i, layer in layers.items()}))

  def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
    """Deltas, and the state."""
    return self._advance(updates, params, state, False, extra_args)

  def step(self, gradients: Any, params: Any, state: Any, **extra_args: Any) -> tuple[Any, Any]:
    """Parameters, and the state."""
    return self._advance(gradients, params, state, True, extra_args)

  def _advance(
    self, gradients: Any, params: Any, state: Any, in_place: bool, extra_args: dict[str, Any]
  ) -> tuple[Any, LayerwiseState]:
    structure, leaves = _plan.flatten(params)
    by_leaf, states = _gradient.flatten(structure, gradients), self.states(structure, state)
    out = leaves if in_place else [jax.tree.map(jnp.zeros_like, leaf) for leaf in leaves]
    for i, layer in self.layers(structure, leaves).items():
      out[i], states[i] = layer.advance(by_leaf[i], leaves[i], states[i], in_place, extra_args)
    return structure.treedef.unflatten(out), self.with_states(structure, states)

  def explain(self, params: Any, **extra_args: Any) -> _transformation.Explanation:
    """As in `explain`."""
    structure, leaves = _plan.flatten(_array.unwrap(params))
    obstacles: dict[str, str] = {}
    choices: dict[tuple[str, str], Any] = {}
    for i, layer in self.layers(structure, leaves).items():
      of_slice = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
      leaf = jax.tree.map(of_slice, leaves[i]) if layer.is_stacked else leaves[i]
      found = _transformation.explain(self.tx)(layer.alone(leaf), **extra_args)
      choices |= found.choices
      obstacles |= {
        path: f'{name}, a slice at a time' if layer.is_stacked else name for path, name in found.obstacles.items()
      }
    return _transformation.Explanation(obstacles, choices)


class LayerwiseTransformation(_transformation.InPlaceTransformation):
  """What `layerwise` returns."""

  layerwise: Layerwise


def layerwise(
  tx: _transformation.InPlaceTransformation, stacked: str | Callable[[str, Any], bool] | None = None
) -> LayerwiseTransformation:
  """Updates every leaf, and every slice of a stacked one, by an optimizer of its own, as if there were no others.

  Layers in a scan have their parameters stacked along a first axis. To an optimizer that looks at whole leaves, a stack
  is one: Adafactor factors the two largest axes of it, and takes one norm of all layers. Here each slice along the
  first axis of a leaf that `stacked` names is a leaf, with factors and norms as it had in a model of separate layers.
  The stack is decoded and updated one slice at a time.

  So `lpmm_optax.value_and_step` can move each layer as soon as its gradient is there, whatever `tx` does with it: it
  needs no other. Adafactor without momentum then costs 1.03 bytes per parameter, for the parameters themselves. What
  looks at all gradients looks at those of one leaf: `optax.clip_by_global_norm` in `tx` clips each layer by its own
  norm. In `lpmm_optax.chain` around this, for `lpmm_optax.step`, it clips by the norm of all.

  Args:
    tx: an optimizer of this package, or a `chain` that ends in one.
    stacked: which leaves are stacks: a regular expression that is searched for in the leaf's path
      ('layers/attention/q'), or a function of (path, leaf) that gives a bool; None if none is.

  Returns:
    A transformation for `step`, `value_and_step`, `MultiSteps`, `apply_if_finite` and `optax.apply_updates`, whose
    state is a `LayerwiseState`.

  Raises:
    TypeError: if tx is not an optimizer of this package.
    ValueError: at `init` and later, for a stack that is a number, or whose blocks run across its slices, naming it.

  >>> import jax, jax.numpy as jnp, optax, lpmm_optax as lpmm
  >>> params = {'layers': jax.random.normal(jax.random.key(0), (4, 128, 256)), 'bias': jnp.zeros(128)}
  >>> params = lpmm.quantize(params, lpmm.INT8)
  >>> tx = lpmm.layerwise(lpmm.low_precision(optax.adafactor(0.01)), stacked='layers')
  >>> state = tx.init(params)
  >>> optax.tree.get(state.states['layers'], 'v_row')['layers'].shape
  (4, 128)
  >>> def layer(x, w):
  ...   w = lpmm.dequantize(w)
  ...   return x + jnp.tanh(x @ w) @ w.T / 256, None
  >>> def loss_fn(params, x):
  ...   x, _ = jax.lax.scan(jax.checkpoint(layer), x, params['layers'])
  ...   return jnp.mean(x + params['bias'])
  >>> train_step = jax.jit(lpmm.value_and_step(loss_fn, tx), donate_argnums=(0, 1))
  >>> for i in range(3):
  ...   value, params, state = train_step(params, state, jnp.ones(128))
  ...   print(f'{value:.2f}')
  1.29
  1.25
  1.21
  """
  if _transformation.optimizer_of(tx) is None:
    raise TypeError(
      f'layerwise takes an optimizer of lpmm_optax, alone or last in lpmm_optax.chain, got {type(tx).__name__}; what '
      'wraps one (MultiSteps, apply_if_finite) goes around layerwise, and one of Optax in lpmm_optax.low_precision'
    )
  own = Layerwise(tx, stacked)
  transformation = LayerwiseTransformation('layerwise', own.init, own.update, own.step, explain=own.explain)
  transformation.layerwise = own
  return transformation
