"""The short examples, one per way of holding a model."""

import minimal_equinox
import minimal_linen
import minimal_nnx
import minimal_plain
import pytest
from runs import slow


@pytest.mark.parametrize(
  'example', [minimal_plain, *slow(minimal_linen, minimal_nnx, minimal_equinox)], ids=lambda module: module.__name__
)
def test_the_loss_falls_and_the_memory_is_printed(example, capsys):
  losses = example.main(steps=60)
  assert losses[-1] < 0.1 * losses[0]
  assert 'nu ' in capsys.readouterr().out
