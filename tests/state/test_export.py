"""What `jax.export` can save; that a step is among it, tests/training/test_loop.py shows."""

import sys

from lpmm_optax.state import _export
from lpmm_optax.trace import _plan


def test_every_state_is_one_that_can_be_exported():
  modules = [module for name, module in sys.modules.items() if name.startswith('lpmm_optax.')]
  classes = {x for module in modules for x in vars(module).values() if isinstance(x, type) and issubclass(x, tuple)}
  own = {x for x in classes if x.__module__.startswith('lpmm_optax.') and x.__name__.endswith('State')}
  assert own - {_plan.InnerState} == set(_export.STATES)
