"""Files of results, a line of JSON each, and the parts of documents that are made of them."""

from collections.abc import Iterable
import json
import os
from pathlib import Path
from typing import Any


def whole_lines(file: Path) -> str:
  """What a file holds, without the part of a line that an interrupted run may have left; empty if there is none."""
  text = file.read_text() if file.exists() else ''
  return text[: text.rfind('\n') + 1]


def read(file: Path) -> list[dict[str, Any]]:
  """The results in a file; none if there is no file."""
  return [json.loads(line) for line in whole_lines(file).splitlines()]


def append(file: Path, results: list[dict[str, Any]]) -> None:
  """Adds results."""
  if file.exists():
    os.truncate(file, len(whole_lines(file).encode()))
  with file.open('a') as out:
    out.write(''.join(json.dumps(result) + '\n' for result in results))


def with_lines(document: str, begin: str, end: str, lines: Iterable[str]) -> str:
  """The document with what is between the two comments replaced."""
  before, rest = document.split(begin)
  return before + '\n\n'.join([begin, '\n'.join(lines), end]) + rest.split(end, 1)[1]
