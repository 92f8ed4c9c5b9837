"""A transformation of Optax's that also steps in place, and what it can explain of itself."""

from collections.abc import Callable
import itertools
from typing import Any
from typing import NamedTuple
import warnings

import jax
import optax

from lpmm_optax.storage import _array
from lpmm_optax.trace import _field_formats


class EagerStepWarning(UserWarning):
  """A loop takes its steps outside of `jax.jit`, which traces the optimizer anew each time."""


_eager_steps = itertools.count(1)
_MOST_EAGER_STEPS = 10  # One or two are somebody trying something out.


def _warn_of_eager_steps(*trees: Any) -> None:
  leaves = jax.tree.leaves(trees)
  if not leaves or any(isinstance(x, jax.core.Tracer) for x in leaves):
    return
  if next(_eager_steps) == _MOST_EAGER_STEPS:
    warnings.warn(
      'steps of lpmm_optax outside of jax.jit trace the optimizer anew, and take tens of times as long as a compiled '
      'one; put the step under jax.jit, with parameters and state donated',
      EagerStepWarning,
      stacklevel=4,
    )


class InPlaceTransformation(optax.GradientTransformationExtraArgs):
  """An Optax transformation that also has the in-place `step`.

  Attributes:
    init: `params -> state`.
    update: `(gradients, state, params, **extra) -> (deltas, state)`, for `optax.apply_updates`. Deltas of quantized
      parameters can be added to them and no more, and so are no results of a function that is jitted: jit both.
    step: `(gradients, params, state, **extra) -> (params, state)`, without a tree of deltas.
  """

  step: Callable[..., tuple[Any, Any]]
  # What there is behind it: the optimizer, if it is one and no wrapper, and what is to be known of it.
  _optimizer: Any
  _explain: Callable[..., 'Explanation']

  def __new__(cls, name, init, update, step, *, optimizer=None, explain=None):
    def sealed(updates, state, params=None, **extra_args):
      if params is None:
        raise ValueError(f'{name} needs the parameters: call update(gradients, state, params)')
      _warn_of_eager_steps(updates, params, state)
      deltas, state = update(updates, state, params, **extra_args)
      return _array.seal(deltas, params), state

    def watched(gradients, params, state, **extra_args):
      _warn_of_eager_steps(gradients, params, state)
      return step(gradients, params, state, **extra_args)

    self = super().__new__(cls, init, sealed)
    self.step = watched
    self._optimizer = optimizer
    self._explain = explain or _nothing_to_explain
    return self

  def __copy__(self):
    """Itself: functions are not copied, and nothing else is in it."""
    return self

  def __deepcopy__(self, memo):
    """The same, where a train state is copied."""
    return self

  def _replace(self, **fields):
    """With another `init` it keeps its in-place step; with another `update` it is a transformation without one."""
    replaced = optax.GradientTransformationExtraArgs(self.init, self.update)._replace(**fields)
    return replaced if 'update' in fields else _restore(type(self), replaced.init, replaced.update, vars(self))

  def __reduce__(self):
    """For cloudpickle and its like: `__new__` takes other arguments than a tuple's."""
    return _restore, (type(self), self.init, self.update, vars(self))

  def __init_subclass__(cls):
    """Registers a subclass as a node of pytrees, because `equinox.filter_jit` takes its arguments apart."""
    _register(cls)


def _register(cls: type) -> None:
  flatten = lambda tx: ((tx.init, tx.update), tuple(vars(tx).items()))
  unflatten = lambda attributes, functions: _restore(cls, functions[0], functions[1], dict(attributes))
  jax.tree_util.register_pytree_node(cls, flatten, unflatten)


_register(InPlaceTransformation)


def _restore(cls, init, update, attributes):
  self = optax.GradientTransformationExtraArgs.__new__(cls, init, update)
  vars(self).update(attributes)
  return self


def check_chain(state: Any, count: int) -> None:
  """Raises a ValueError unless it is the state of a chain of so many transformations."""
  found = len(state) if isinstance(state, tuple) else 1
  if found != count:
    raise ValueError(f'a chain of {count} transformations got a state of {found}')


def optimizer_of(tx: Any) -> Any:
  """The optimizer of this package that a transformation is; None if it is a wrapper, or another's."""
  return tx._optimizer if isinstance(tx, InPlaceTransformation) else None


def whole_optimizer_of(tx: Any) -> Any:
  """The same where another may be made of it: None if its `init` is not its own, which the other would lack."""
  optimizer = optimizer_of(tx)
  return optimizer if optimizer is not None and tx.init == optimizer.init else None


class Explanation(NamedTuple):
  """What an optimizer does with a tree of parameters.

  Attributes:
    obstacles: by path of the leaves that it processes whole rather than in tiles, the operation that is not
      elementwise.
    choices: by (field, path), how its state is stored and why.
  """

  obstacles: dict[str, str]
  choices: dict[tuple[str, str], _field_formats.Choice]


def _nothing_to_explain(params: Any, **extra_args: Any) -> Explanation:
  del params, extra_args
  return Explanation({}, {})


def explain(tx: Any) -> Callable[..., Explanation]:
  """`(params, **extra) -> Explanation`, of a transformation of this package."""
  return tx._explain if isinstance(tx, InPlaceTransformation) else _nothing_to_explain
