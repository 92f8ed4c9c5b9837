"""The switch to an interpreted kernel."""

import jax
from jax.experimental import pallas as pl
import pytest


@pytest.fixture
def interpreted(monkeypatch, request):
  """Switches to the kernel from where it is called on, and sees that it is traced; the loop runs before.

  Which kernel that is, a parameter says, or INTERPRETED in a file that is about one: a value of LPMM_KERNEL.
  """
  monkeypatch.delenv('LPMM_KERNEL', raising=False)
  calls = []
  call = pl.pallas_call
  monkeypatch.setattr(pl, 'pallas_call', lambda *args, **kwargs: calls.append(1) or call(*args, **kwargs))

  def switch():
    jax.clear_caches()
    monkeypatch.setenv('LPMM_KERNEL', request.param if hasattr(request, 'param') else request.module.INTERPRETED)

  yield switch
  assert calls
