"""The documents' Python runs as it stands, and the tests and functions that they name exist."""

import ast
from pathlib import Path
import re

import jax
import pytest
from runs import slow

import lpmm_optax as lpmm

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(file.relative_to(ROOT)) for file in (ROOT / 'docs').rglob('*.md'))


def blocks(document):
  """Its Python, as one program whose line numbers are the document's."""
  text = (ROOT / document).read_text()
  program = [''] * (text.count('\n') + 1)
  for match in re.finditer(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE):
    first = text.count('\n', 0, match.start(1))
    lines = match.group(1).splitlines()
    program[first : first + len(lines)] = lines
  return '\n'.join(program)


@pytest.mark.parametrize(
  'document',
  ['README.md', 'docs/guides/formats.md', *slow('docs/tour.md', 'docs/guides/frameworks.md')],
)
def test_the_blocks_of_a_page_run(document):
  # A user's settings are JAX's own, not the strict ones of these tests.
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    exec(compile(blocks(document), document, 'exec'), {})


def test_every_test_that_a_document_names_exists():
  named = {
    name
    for page in ['README.md', *PAGES]
    for name in re.findall(r'`(tests/[\w/]+\.py)(?:::(\w+))?`', (ROOT / page).read_text())
  }
  assert len(named) > 50
  for file, name in sorted(named):
    functions = {
      node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)
    }
    assert not name or name in functions, f'{file}::{name}'


def test_the_api_page_has_all_that_is_exported():
  page = (ROOT / 'docs/api.md').read_text()
  assert [name for name in lpmm.__all__ if f'lpmm_optax.{name}\n' not in page and f'`{name}`' not in page] == []
