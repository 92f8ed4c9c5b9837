"""Runs of the examples, as a user would start them in an empty folder."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache
import pytest


@pytest.fixture(scope='module', autouse=True)
def _compile_once(tmp_path_factory):
  """Runs here differ little, and compiling is nearly all of their time: reuse what one has compiled in the next."""
  changed = {
    'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('compiled')),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }
  before = {name: jax.config.values[name] for name in changed}

  def configure(values):
    for name, value in values.items():
      jax.config.update(name, value)
    # Else it stays what it was at the first program that this process compiled.
    compilation_cache.reset_cache()

  configure(changed)
  yield
  configure(before)


class Outcome(NamedTuple):
  results: dict
  folder: Path
  out: str
  err: str


@pytest.fixture(scope='session')
def outcome_in():
  """A function of a folder, an example's `main` and its arguments: how it ends there."""

  def run(folder, main, *argv):
    out, err = io.StringIO(), io.StringIO()
    with (
      contextlib.chdir(folder),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      pytest.MonkeyPatch.context() as patch,
      # Optax's optimizers, which the runs in float32 use, do not work without.
      jax.numpy_dtype_promotion('standard'),
    ):
      # Rich asks the environment and the terminal behind pytest otherwise.
      patch.setenv('COLUMNS', '80')
      patch.delenv('FORCE_COLOR', raising=False)
      results = main([*argv])
    return Outcome(results, Path(folder), out.getvalue(), err.getvalue())

  return run
