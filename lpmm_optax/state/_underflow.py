"""`underflow_report`: how much of an update is too small for the grid that parameters are stored on."""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lpmm_optax.kernel import _tiles
from lpmm_optax.storage import _array
from lpmm_optax.storage import _mesh
from lpmm_optax.storage import _view

_SUMS = 8  # How much smaller.


class Underflow(NamedTuple):
  """Of one leaf's update u, on a grid whose step at each element is delta.

  Attributes:
    below_half: the share of the elements with u != 0 in which ``|u| < delta / 2``, float32[].
    rms_steps: the root mean square of u / delta, float32[]; blocks of zeros, which have no delta, count as 0.
    lost: the share of the sum of ``|u|`` in those elements, which rounding to nearest would lose, float32[].
  """

  below_half: jax.Array
  rms_steps: jax.Array
  lost: jax.Array


def underflow_report(params: Any, updates: Any) -> dict[str, Underflow]:
  """How updates compare with the grid steps of the parameters that they are for.

  A parameter stands on its grid, so rounding the sum to nearest leaves it where it is if the update is under half a
  step: the update is lost, however often it comes. Stochastic rounding moves it by a whole step, with a probability of
  u / delta. It costs one pass over the arrays, and can be jitted with the step.

  Args:
    params: the parameters; dense leaves are left out.
    updates: a tree like params of the dense changes that are wanted, before rounding: those of the optimizer in float32
      (what an optimizer of this package returns has been rounded). After a step of `sgdm`, that is the velocity with
      error feedback, ``optax.tree.get(opt_state, 'trace')``, or the learning rate times the momentum without.

  Returns:
    {path: Underflow} of the quantized leaves.

  Raises:
    ValueError: if the trees or shapes differ, naming the leaf.
    TypeError: if updates are quantized deltas.

  >>> import jax.numpy as jnp, lpmm_optax as lpmm
  >>> params = lpmm.quantize({'w': jnp.ones((64, 64)).at[0].set(0.0)}, lpmm.INT8)  # A step is a little over 1/127.
  >>> report = lpmm.underflow_report(params, {'w': jnp.full((64, 64), 1e-3).at[:16].set(1e-2)})
  >>> {name: round(float(x), 2) for name, x in report['w']._asdict().items()}
  {'below_half': 0.75, 'rms_steps': 0.62, 'lost': 0.23}
  """
  treedef: Any
  items, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=_array.is_quantized)
  try:
    changes = treedef.flatten_up_to(updates)
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f'updates must be a tree like the parameters: {error}') from error
  report = {}
  for (keys, leaf), update in zip(items, changes, strict=True):
    path = _array.path_str(keys)
    if not _array.is_quantized(leaf):
      continue
    if _array.is_quantized(update):
      raise TypeError(f'{path}: updates must be the dense changes that are wanted, before rounding; got {update!r}')
    if jnp.shape(update) != leaf.shape:
      raise ValueError(f'{path}: the parameter has shape {leaf.shape}, its update {jnp.shape(update)}')
    _array.check(path, leaf)
    report[path] = _measure(leaf, update)
  return report


@jax.jit
def _measure(leaf: _array.QuantizedArray, update: jax.Array) -> Underflow:
  def measure(leaf, update):
    stored, blocks = _array.stored(leaf), _array.blocks_of(leaf)

    def body(tiling, i, totals):
      view = _view.cells(tiling.tile_shape, blocks)
      codec: Any = _array.codec_of(leaf, view)
      tile, size = jax.tree.map(lambda x: tiling.take(x, i), (stored, update))
      size = view.split(jnp.abs(size.astype(jnp.float32)))
      step = codec.step(tile)
      # A block of zeros has no grid, and takes any update as it is.
      steps = jnp.where(step > 0, size / jnp.where(step > 0, step, 1.0), 0.0)
      is_lost = (size > 0) & (step > 0) & (steps < 0.5)
      sums = (
        is_lost.astype(jnp.float32),
        (size > 0).astype(jnp.float32),
        steps**2,
        jnp.where(is_lost, size, 0.0),
        size,
      )
      return [total + jnp.sum(x) for total, x in zip(totals, sums, strict=True)]

    # Smaller tiles than those of the update: what is summed up is stored first, by XLA on a CPU.
    tilings = _tiles.choose_tilings(leaf.shape, blocks, _tiles.default_tile_size(leaf.size, 1) // _SUMS)
    lost, changed, squares, lost_size, size = _tiles.fold(body, tilings, [jnp.float32(0)] * 5)
    share = lambda part, whole: part / jnp.where(whole > 0, whole, 1.0)
    return {
      'below_half': share(lost, changed),
      'rms_steps': jnp.sqrt(squares / leaf.size),
      'lost': share(lost_size, size),
    }

  return Underflow(**_mesh.follow_each(measure, {}, leaf, update))
