"""Each package imports only those before it, in the order in which data flows."""

import ast
from pathlib import Path
import re

import pytest

import lpmm_optax

ROOT = Path(lpmm_optax.__file__).parent
ORDER = ('storage', 'trace', 'kernel', 'optimizers', 'training', 'state')


def imported(file):
  """What a file imports of lpmm_optax, wherever in it: 'storage' for the package, '' for all of it."""
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{file.name} imports relatively'
      names = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    for name in names:
      first, _, rest = name.partition('.')
      if first == 'lpmm_optax':
        yield rest.partition('.')[0]


def test_the_packages_are_those_in_the_order():
  assert {folder.name for folder in ROOT.iterdir() if any(folder.glob('*.py'))} == set(ORDER)


@pytest.mark.parametrize('package', ORDER)
def test_a_package_imports_only_those_before_it(package):
  allowed = ORDER[: ORDER.index(package) + 1]
  upward = {
    f'{file.name}: {name or "lpmm_optax"}'
    for file in (ROOT / package).rglob('*.py')
    for name in imported(file)
    if name not in allowed
  }
  assert upward == set()


def test_the_page_names_every_module():
  page = (ROOT.parent / 'docs' / 'architecture.md').read_text()
  modules = {file.stem for file in ROOT.rglob('*.py')} - {'__init__'}
  assert {name for name in modules if re.search(rf'\b{name}\b', page) is None} == set()
