"""The README's example runs as it stands, and the tests that documents name exist."""

import ast
from pathlib import Path
import re

import jax
import pytest

ROOT = Path(__file__).parents[2]


def test_the_readme_example_runs(capsys):
  readme = (ROOT / 'README.md').read_text()
  example = re.search(r'```python\n(.*?)```', readme, re.DOTALL).group(1)
  # A user's settings are JAX's own, not the strict ones of these tests.
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    names = {}
    exec(compile(example, 'README.md', 'exec'), names)
  assert float(names['loss']) > 0
  assert 'bytes/param' in capsys.readouterr().out


@pytest.mark.parametrize(
  'document', ['README.md', *sorted(f'docs/{file.name}' for file in (ROOT / 'docs').glob('*.md'))]
)
def test_every_test_that_a_document_names_exists(document):
  named = re.findall(r'`(tests/[\w/]+\.py)(?:::(\w+))?`', (ROOT / document).read_text())
  assert named
  for file, name in named:
    functions = {
      node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
    }
    assert not name or name in functions, f'{file}::{name}'
