"""Checkpoints of a run that resumes by itself: its state, its settings, and what it has seen."""

from collections.abc import Iterator
import contextlib
from pathlib import Path
from typing import Any
from typing import NamedTuple

import orbax.checkpoint as ocp

from lpmm_optax import checkpoint


class Checkpoints(NamedTuple):
  """Where a run saves and resumes.

  Attributes:
    manager: keeps the last two, each of a 'state', a pytree of arrays, and a 'log', which is JSON.
    settings: what must not change between a checkpoint and the run that resumes from it.
  """

  manager: ocp.CheckpointManager
  settings: dict[str, Any]

  def save(self, step: int, state: Any, history: dict[str, Any]) -> None:
    """Copies the state, which the next step may overwrite, and writes it while training goes on."""
    log = {'settings': self.settings, 'history': history}
    self.manager.save(step, args=ocp.args.Composite(state=checkpoint.Save(state), log=ocp.args.JsonSave(log)))

  def restore(self, like: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """The last step saved, its state, in arrays placed as those of `like`, and history; None if there is none."""
    step = self.manager.latest_step()
    if step is None:
      return None
    state = self.manager.restore(step, args=ocp.args.Composite(state=checkpoint.Restore(like)))['state']
    return step, state, self._read_log()['history']

  def check(self, folder: Path) -> None:
    """Ends the program if the checkpoints there are of other settings."""
    if self.manager.latest_step() is None:
      return
    saved = self._read_log()['settings']
    changed = [
      f'--{name.replace("_", "-")} {saved.get(name)}'
      for name, value in self.settings.items()
      if saved.get(name) != value
    ]
    if changed:
      raise SystemExit(f'error: {folder} holds a run with {", ".join(changed)}')

  def _read_log(self) -> dict[str, Any]:
    step = self.manager.latest_step()
    return self.manager.restore(step, args=ocp.args.Composite(log=ocp.args.JsonRestore()))['log']


@contextlib.contextmanager
def open_checkpoints(folder: Path | None, settings: dict[str, Any]) -> Iterator[Checkpoints | None]:
  """A run's checkpoints; None without a folder. What is being written is finished at the end."""
  if folder is None:
    yield None
    return
  options = ocp.CheckpointManagerOptions(max_to_keep=2)
  with ocp.CheckpointManager(folder.resolve(), options=options) as manager:
    checkpoints = Checkpoints(manager, settings)
    checkpoints.check(folder)
    yield checkpoints
