"""Orbax checkpoints that say how they are stored, and that are checked when they are restored.

Orbax saves and restores quantized arrays by itself, with `orbax.checkpoint.args.StandardSave` too: their keys say how
they are stored, so restoring into other formats fails. `Save` and `Restore`, which take the place of `StandardSave` and
`StandardRestore`, put a description beside the arrays, in a file `lpmm_optax.json`: library version, formats, shapes,
and a checksum of each array.

>>> import pathlib, tempfile
>>> import jax.numpy as jnp, lpmm_optax as lpmm, orbax.checkpoint as ocp
>>> from lpmm_optax import checkpoint
>>> folder = tempfile.TemporaryDirectory()
>>> params, tx = lpmm.quantize({'w': jnp.ones((64, 128))}, lpmm.INT8), lpmm.sgdm(0.1)
>>> state = params, tx.init(params)
>>> with ocp.CheckpointManager(pathlib.Path(folder.name)) as manager:
...   _ = manager.save(0, args=checkpoint.Save(state))
...   manager.wait_until_finished()
...   params, opt_state = manager.restore(0, args=checkpoint.Restore(state))
>>> params
{'w': QuantizedArray(float32[64, 128] as int8)}
>>> folder.cleanup()
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
import orbax.checkpoint as ocp

import lpmm_optax
from lpmm_optax.state import _description

FILE_NAME = 'lpmm_optax.json'


class Handler(ocp.AsyncCheckpointHandler):
  """What saves and restores for `Save` and `Restore`.

  `orbax.checkpoint.CheckpointManager` finds it by itself; without a manager, use
  ``orbax.checkpoint.AsyncCheckpointer(checkpoint.Handler())``, or `orbax.checkpoint.Checkpointer`.
  """

  def __init__(self):
    self._arrays = ocp.StandardCheckpointHandler()
    self._description = ocp.JsonCheckpointHandler(FILE_NAME)

  async def async_save(self, directory: Any, args: 'Save') -> list[Any]:
    """Copies the arrays, and starts to write them; Orbax waits for the futures returned."""
    item = jax.tree.map(_as_array, args.item)
    description = _description.describe(item, lpmm_optax.__version__)
    arrays = await self._arrays.async_save(directory, args=ocp.args.StandardSave(item))
    text = await self._description.async_save(directory, args=ocp.args.JsonSave(description))
    return [*(arrays or []), *(text or [])]

  def save(self, directory: Any, args: 'Save') -> None:
    """Writes the arrays and their description."""
    item = jax.tree.map(_as_array, args.item)
    self._arrays.save(directory, args=ocp.args.StandardSave(item))
    description = _description.describe(item, lpmm_optax.__version__)
    self._description.save(directory, args=ocp.args.JsonSave(description))

  def restore(self, directory: Any, args: 'Restore') -> Any:
    """The tree, once its formats and its contents are found to be right."""
    description = read_description(directory)
    item = jax.tree.map(_as_array, args.item)
    _description.check_formats(description, item)
    try:
      tree = self._arrays.restore(directory, args=ocp.args.StandardRestore(jax.tree.map(_placed, item)))
    except Exception as error:
      raise ValueError(
        f'the arrays of the checkpoint {directory} cannot be read; it may be damaged: {str(error)[:200]}'
      ) from error
    _description.check_contents(description, tree)
    return tree

  def metadata(self, directory: Any) -> Any:
    """Orbax's own, of the arrays."""
    return self._arrays.metadata(directory)

  def finalize(self, directory: Any) -> None:
    """Called by Orbax when all is written."""
    self._arrays.finalize(directory)

  def close(self) -> None:
    """Called by Orbax at the end."""
    self._arrays.close()


def _as_array(x: Any) -> Any:
  """A number of Python's, such as the step of a new TrainState, is what JAX makes of it in the first step."""
  return jnp.asarray(x) if isinstance(x, bool | int | float) else x


def _placed(x: Any) -> Any:
  """An abstract array with a sharding, for which Orbax would otherwise look in the checkpoint."""
  if isinstance(x, jax.ShapeDtypeStruct) and x.sharding is None:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))
  return x


def read_description(directory: Any) -> dict[str, Any]:
  """What a checkpoint says of itself.

  Args:
    directory: what `Save` wrote, such as that of a manager's step and item, 'checkpoints/100/default'.

  Returns:
    {'lpmm_optax': the version that wrote it, 'arrays': {path: {'shape', 'stored', 'checksum'}}}.

  Raises:
    FileNotFoundError: if it was not written by `Save`.
    ValueError: if it is damaged.
  """
  try:
    description = ocp.JsonCheckpointHandler(FILE_NAME).restore(directory)
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f'{directory} has no {FILE_NAME}: it was not saved by lpmm_optax.checkpoint.Save; if by StandardSave, restore it '
      'by StandardRestore'
    ) from error
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(f'the checkpoint {directory} is damaged: its {FILE_NAME} cannot be read') from error
  if not _description.is_description(description):
    raise ValueError(f'the checkpoint {directory} is damaged: its {FILE_NAME} is no description')
  return description


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.CheckpointArgs):
  """Saves a tree of parameters, optimizer state, or both.

  Attributes:
    item: a pytree of arrays and QuantizedArrays. Numbers of Python's are saved as JAX arrays.
  """

  item: Any


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.CheckpointArgs):
  """Restores what `Save` saved, bit for bit.

  Attributes:
    item: the tree that it is restored into: of the same structure and formats, its arrays concrete or abstract
      (`jax.ShapeDtypeStruct`). Their shardings are those of the result, whatever they were when it was saved; abstract
      arrays without one come back on the first device of each process.

  Raises (by what restores):
    ValueError: naming leaves, if trees, shapes or formats differ, or if the contents are not those that were saved.
    FileNotFoundError: if there is no such checkpoint, or not by `Save`.
  """

  item: Any
