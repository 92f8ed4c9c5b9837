"""Bytes and seconds to save and to restore parameters and optimizer state, against Optax in float32.

  pip install -e '.[examples]'
  python benchmarks/checkpoint.py --output benchmarks/results/checkpoint_cpu.json

All methods save by Orbax, in one process, in turns, onto the same disk, and wait until all is written. The figures are
medians over rounds, and of the ratio, within a round, to the method's baseline. `StandardSave` is Orbax's own;
`checkpoint.Save` writes a description and checks it when it restores, checksums included.
"""

import argparse
from collections.abc import Callable
import json
import os
from pathlib import Path
import platform
import statistics
import tempfile
import time
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import lpmm_optax as lpmm
from lpmm_optax import checkpoint


class Method(NamedTuple):
  """What is saved.

  Attributes:
    make_tx: the optimizer.
    format: of the parameters; None for float32.
    save: Orbax's arguments for saving.
    restore: and for restoring.
    baseline: the method with which it is compared.
  """

  make_tx: Callable[[], optax.GradientTransformation]
  format: lpmm.Format | None
  save: Callable[[Any], Any]
  restore: Callable[[Any], Any]
  baseline: str


STANDARD = ocp.args.StandardSave, ocp.args.StandardRestore
OURS = checkpoint.Save, checkpoint.Restore
SGD, ADAMW = 'optax.sgd fp32, StandardSave', 'optax.adamw fp32, StandardSave'
METHODS = {
  SGD: Method(lambda: optax.sgd(1e-3, 0.9), None, *STANDARD, SGD),
  'lpmm.sgdm 8/8, StandardSave': Method(lambda: lpmm.sgdm(1e-3), lpmm.INT8, *STANDARD, SGD),
  'lpmm.sgdm 8/8, checkpoint.Save': Method(lambda: lpmm.sgdm(1e-3), lpmm.INT8, *OURS, SGD),
  ADAMW: Method(lambda: optax.adamw(1e-3), None, *STANDARD, ADAMW),
  'lpmm.adamw 8/8/8, StandardSave': Method(lambda: lpmm.adamw(1e-3), lpmm.INT8, *STANDARD, ADAMW),
  'lpmm.adamw 8/8/8, checkpoint.Save': Method(lambda: lpmm.adamw(1e-3), lpmm.INT8, *OURS, ADAMW),
}


def make_state(method: Method, leaves: int, rows: int) -> Any:
  """Parameters and state after two steps, so that no array is of zeros, which would compress to nothing."""
  tx = method.make_tx()

  @jax.jit
  def init():
    dense = {f'w{i}': jax.random.normal(jax.random.key(i), (rows, 1024)) for i in range(leaves)}
    params = dense if method.format is None else lpmm.quantize(dense, method.format)
    return params, tx.init(params)

  @jax.jit
  def step(params, state, key):
    grads = {name: jax.random.normal(jax.random.fold_in(key, i), (rows, 1024)) for i, name in enumerate(params)}
    return lpmm.step(tx, grads, params, state)

  params, state = init()
  for i in range(2):
    params, state = step(params, state, jax.random.key(100 + i))
  return jax.block_until_ready((params, state))


def measure(method: Method, state: Any, folder: Path) -> dict[str, float]:
  """Bytes on disk, and seconds, of one checkpoint."""
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
  with tempfile.TemporaryDirectory(dir=folder) as place, ocp.CheckpointManager(place) as manager:
    start = time.perf_counter()
    manager.save(0, args=method.save(state))
    manager.wait_until_finished()
    saved = time.perf_counter()
    restored = jax.block_until_ready(manager.restore(0, args=method.restore(like)))
    end = time.perf_counter()
    if not jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), restored, state)):
      raise AssertionError('what was restored is not what was saved')
    size = sum(file.stat().st_size for file in Path(place).rglob('*') if file.is_file())
  return {'bytes': size, 'save_seconds': saved - start, 'restore_seconds': end - saved}


def summarize(runs: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
  rows = []
  for name, rounds in runs.items():
    row: dict[str, Any] = {'method': name, 'baseline': METHODS[name].baseline, 'rounds': len(rounds)}
    for figure in rounds[0]:
      ratios = [one[figure] / base[figure] for one, base in zip(rounds, runs[row['baseline']], strict=True)]
      row[figure] = statistics.median(one[figure] for one in rounds)
      row[f'{figure}_ratio'] = statistics.median(ratios)
      row[f'{figure}_ratio_range'] = [min(ratios), max(ratios)]
    rows.append(row)
  return rows


def print_table(results: dict[str, Any]) -> None:
  """In Markdown."""
  print('| method | bytes/param | ratio | save | ratio | restore | ratio |\n|' + '---|' * 7)
  for row in results['results']:
    cells = [row['method'], f'{row["bytes"] / results["settings"]["parameters"]:.2f}', f'{row["bytes_ratio"]:.2f}']
    for figure in ('save_seconds', 'restore_seconds'):
      low, high = row[f'{figure}_ratio_range']
      spread = '' if row['method'] == row['baseline'] else f' ({low:.2f} to {high:.2f})'
      cells += [f'{row[figure]:.2f} s', f'{row[f"{figure}_ratio"]:.2f}{spread}']
    print('| ' + ' | '.join(cells) + ' |')


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  add = parser.add_argument
  add('--millions', type=int, default=100, help='of parameters (default %(default)s)')
  add('--leaves', type=int, default=8, help='(default %(default)s)')
  add('--rounds', type=int, default=5, help='(default %(default)s)')
  add('--folder', type=Path, default=Path(), help='on the disk to measure (default here)')
  add('--output', type=Path, metavar='FILE', help='write the results there, as JSON')
  add('--report', type=Path, metavar='FILE', help='measure nothing, print the table of this file')
  args = parser.parse_args(argv)
  if args.report is not None:
    print_table(json.loads(args.report.read_text()))
    return

  rows = args.millions * 2**20 // args.leaves // 1024
  runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
  for baseline in (SGD, ADAMW):
    methods = {name: method for name, method in METHODS.items() if method.baseline == baseline}
    states = {name: make_state(method, args.leaves, rows) for name, method in methods.items()}
    # One round to warm up: the first compiles.
    for turn in range(1 + args.rounds):
      for name, method in methods.items():
        figures = measure(method, states[name], args.folder.resolve())
        if turn:
          runs[name].append(figures)
  options = {name: getattr(args, name) for name in ('millions', 'leaves', 'rounds')}
  results = {
    'command': ' '.join(['python benchmarks/checkpoint.py', *(f'--{name} {x}' for name, x in options.items())]),
    'settings': options | {'parameters': args.leaves * rows * 1024},
    'device': jax.devices()[0].device_kind,
    'cores': os.cpu_count(),
    'python': platform.python_version(),
    'jax': jax.__version__,
    'orbax': ocp.__version__,
    'lpmm_optax': lpmm.__version__,
    'results': summarize(runs),
  }
  print_table(results)
  if args.output is not None:
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + '\n')


if __name__ == '__main__':
  main()
