"""The README's example runs as it stands."""

from pathlib import Path
import re

import jax


def test_the_readme_example_runs(capsys):
  readme = (Path(__file__).parents[1] / 'README.md').read_text()
  example = re.search(r'```python\n(.*?)```', readme, re.DOTALL).group(1)
  # A user's settings are JAX's own, not the strict ones of these tests.
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    names = {}
    exec(compile(example, 'README.md', 'exec'), names)
  assert float(names['loss']) > 0
  assert 'bytes/param' in capsys.readouterr().out
