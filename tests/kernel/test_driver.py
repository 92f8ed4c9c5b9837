"""Which kernels may update a leaf."""

import jax
import pytest

from lpmm_optax.kernel import _driver


def platforms():
  return [kernel.platform for kernel in _driver.chosen()]


def test_the_switch_is_an_environment_variable(monkeypatch):
  monkeypatch.delenv('LPMM_KERNEL', raising=False)
  assert platforms() == []  # There is a CPU here.
  for backend, platform in [('gpu', 'cuda'), ('tpu', 'tpu')]:
    monkeypatch.setattr(jax, 'default_backend', lambda backend=backend: backend)
    assert platforms() == [platform]
  for value, expected in {'0': [], '1': ['cuda', 'tpu'], 'cuda': ['cuda'], 'tpu': ['tpu']}.items():
    monkeypatch.setenv('LPMM_KERNEL', value)
    assert platforms() == expected
  monkeypatch.setenv('LPMM_KERNEL', 'yes')
  with pytest.raises(ValueError, match="LPMM_KERNEL='yes' must be one of 0, 1, cuda, tpu, interpret, interpret_tpu"):
    _driver.chosen()
