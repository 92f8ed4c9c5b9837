"""What compiled programs are said to do is right on one that can be counted by hand, and the document says it."""

from pathlib import Path

import accelerators
import hlo
import pytest

ROOT = Path(__file__).parents[2]

PROGRAM = """
HloModule jit_step, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias) }

%tile (p0: s8[64,256], p1: s32[], p2: f32[64,256]) -> s8[64,256] {
  %p0 = s8[64,256]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[64,256]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %old = s8[16,256]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={16,256}
  %flat = f32[16384]{0} bitcast(%p2)
  %gradient = f32[16,256]{1,0} dynamic-slice(%flat, %p1, %zero), dynamic_slice_sizes={16,256}
  %codes = s8[16,256]{1,0} convert(%gradient)
  %new = s8[16,256]{1,0} add(%old, %codes)
  ROOT %put = s8[64,256]{1,0} dynamic-update-slice(%p0, %new, %p1, %zero)
}

%body (carry: (s32[], s8[64,256], f32[64,256])) -> (s32[], s8[64,256], f32[64,256]) {
  %carry = (s32[], s8[64,256]{1,0}, /*index=2*/f32[64,256]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%carry), index=0
  %array = s8[64,256]{1,0} get-tuple-element(%carry), index=1
  %grads = f32[64,256]{1,0} get-tuple-element(%carry), index=2
  %updated = s8[64,256]{1,0} fusion(%array, %step, %grads), kind=kLoop, calls=%tile
  ROOT %next = (s32[], s8[64,256]{1,0}, f32[64,256]{1,0}) tuple(%step, %updated, %grads)
}

%condition (carry.1: (s32[], s8[64,256], f32[64,256])) -> pred[] {
  %carry.1 = (s32[], s8[64,256]{1,0}, f32[64,256]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%few (p: f32[64,256]) -> f32[64,256] {
  ROOT %p = f32[64,256]{1,0} parameter(0)
}

%many (q: f32[64,256]) -> f32[64,256] {
  %q = f32[64,256]{1,0} parameter(0)
  ROOT %negated = f32[64,256]{1,0} negate(%q)
}

ENTRY %main (codes: s8[64,256], grads: f32[64,256], count: s32[], which: pred[]) -> (s8[64,256], f32[64,256]) {
  %codes = s8[64,256]{1,0} parameter(0)
  %grads = f32[64,256]{1,0} parameter(1)
  %count = s32[] parameter(2)
  %which = pred[] parameter(3)
  %counted = s32[] add(%count, %count), backend_config={"estimated_cycles":"7"}
  %init = (s32[], s8[64,256]{1,0}, f32[64,256]{1,0}) tuple(%count, %codes, %grads)
  %while.1 = (s32[], s8[64,256]{1,0}, f32[64,256]{1,0}) WHILE
  %kernel = (s8[64,256]{1,0}, u16[64,4]{1,0}) custom-call(%counted, %codes, %grads), custom_call_target="triton", \
output_to_operand_aliasing={{0}: (1, {})}
  %product = (f32[64,256]{1,0}, s8[4194304]{0}) custom-call(%grads), custom_call_target="__cublas$gemm"
  %either = f32[64,256]{1,0} conditional(%which, %grads, %grads), branch_computations={%few, %many}
  %copied = f32[64,256]{1,0} copy(%either)
  ROOT %out = (s8[64,256]{1,0}, f32[64,256]{1,0}) tuple(%codes, %copied)
}
"""
LOOP = 'while(%init), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"4"}}'
# Of 64 x 256: bytes of float32 and int8, and what one turn reads and writes.
FLOATS, CODES = 65536, 16384
TURN = 4 + (FLOATS + 2 * CODES) // 4


def test_a_program_is_counted():
  counts = hlo.count(PROGRAM.replace('WHILE', LOOP))
  # A sum of numbers, four turns, two custom calls, the branch that moves more, a copy.
  assert counts.kernels == 1 + 4 + 2 + 1 + 1
  assert counts.large_kernels == 8
  kernel = 4 + 2 * CODES + FLOATS + 64 * 4 * 2
  assert counts.bytes == 3 * 4 + 4 * TURN + kernel + 3 * 2 * FLOATS
  assert counts.copied_bytes == 2 * FLOATS
  assert (counts.loops, counts.unknown_loops, counts.conditionals) == (1, 0, 1)
  assert counts.cycles == 7


def test_a_loop_of_unknown_length_counts_once_and_waits():
  known, unknown = (hlo.count(PROGRAM.replace('WHILE', loop)) for loop in (LOOP, LOOP.partition(', backend')[0]))
  assert known.bytes - unknown.bytes == 3 * TURN
  assert unknown.unknown_loops == 1


def test_what_runs_in_the_background_counts_as_well():
  text = PROGRAM.replace('WHILE', LOOP)
  types = '((s8[64,256]{1,0}, s32[], f32[64,256]{1,0}), s8[64,256]{1,0}, u32[])'
  update = '%updated = s8[64,256]{1,0} fusion('
  assert update in text
  started = text.replace(update, f'%started = {types} fusion-start(').replace(
    '  ROOT %next', '  %updated = s8[64,256]{1,0} fusion-done(%started)\n  ROOT %next'
  )
  assert hlo.count(started) == hlo.count(text)


def test_an_array_that_is_also_read_whole_counts_whole():
  text = PROGRAM.replace('WHILE', LOOP).replace('s8[16,256]{1,0} convert(%gradient)', 's8[16,256]{1,0} fold(%p2)')
  assert hlo.count(text).bytes - hlo.count(PROGRAM.replace('WHILE', LOOP)).bytes == 4 * (FLOATS - FLOATS // 4)


def test_operations_between_devices_are_counted():
  text = """
ENTRY %main (codes: s8[64,256]) -> s8[128,256] {
  %codes = s8[64,256]{1,0} parameter(0)
  %started = (s8[64,256]{1,0}, s8[128,256]{1,0}) all-gather-start(%codes), dimensions={0}
  %gathered = s8[128,256]{1,0} all-gather-done(%started)
  ROOT %summed = s8[128,256]{1,0} all-reduce(%gathered), to_apply=%sum
}
"""
  counts = hlo.count(text)
  assert (counts.collectives, counts.collective_bytes) == (2, 4 * CODES)


def test_a_fusion_may_end_in_an_operation_with_several_results():
  pair = '(f32[64]{0}, s32[64]{0})'
  text = f"""
%pairs (p: f32[64,256]) -> (f32[64], s32[64]) {{
  %p = f32[64,256]{{1,0}} parameter(0)
  ROOT %largest = {pair} reduce(%p, %p), dimensions={{1}}
}}

ENTRY %main (grads: f32[64,256]) -> (f32[64], s32[64]) {{
  %grads = f32[64,256]{{1,0}} parameter(0)
  ROOT %found = {pair} fusion(%grads), kind=kInput, calls=%pairs
}}
"""
  assert hlo.count(text).bytes == FLOATS + 2 * 4 * 64


def test_a_kernel_of_many_small_arrays_handles_scalars():
  # A TPU pads each number to a row of 128.
  names = [f'%word.{i}' for i in range(9)]
  words = '\n'.join(f'  {name} = u32[1]{{0:T(128)}} parameter({i})' for i, name in enumerate(names))
  text = f"""
ENTRY %main () -> u32[9] {{
{words}
  ROOT %all = u32[9]{{0:T(128)}} concatenate({', '.join(names)}), dimensions={{0}}
}}
"""
  counts = hlo.count(text)
  assert counts.bytes == 10 * 512 > hlo.SMALL
  assert (counts.kernels, counts.large_kernels) == (1, 0)


@pytest.mark.parametrize(
  ('type', 'size'),
  [
    ('f32[]', 4),
    ('(bf16[3,5]{1,0}, pred[7]{0}, s4[8]{0})', 30 + 7 + 4),
    # In tiles of 8 x 128; transposed; on the chip.
    ('f32[2,9,100]{2,1,0:T(8,128)}', 4 * 2 * 16 * 128),
    ('u16[2048,32]{0,1:T(8,128)(2,1)}', 2 * 2048 * 32),
    ('f32[8,128]{1,0:T(8,128)S(1)}', 0),
    ('token[]', 0),
  ],
)
def test_arrays_have_the_bytes_of_their_layout(type, size):
  assert sum(hlo.array_sizes(type)) == size


def row(target, model, method, **fields):
  zero = dict.fromkeys(('bytes_moved', 'floor_bytes', 'copied_bytes', 'temporary_bytes', 'peak_bytes'), 0)
  counts = {
    'kernels': 8,
    'large_kernels': 8,
    'leaves': 8,
    'loops': 0,
    'unknown_loops': 0,
    'conditionals': 0,
    'collectives': 0,
  }
  times = {'lower_seconds': 1, 'compile_seconds': 1, 'estimated_cycles': 0, 'parameters': 100}
  return {'target': target, 'model': model, 'method': method, 'versions': {}} | zero | counts | times | fields


def test_the_check_names_every_bound_that_is_missed(monkeypatch, capsys):
  changed = {('h100', 'lpmm.sgdm, kernel'): {'bytes_moved': 851}, ('a100', 'lpmm.lion, kernel'): {'kernels': 40}}

  def compile_rows(target, model, names, seconds):
    return [row(target, model, name, **changed.get((target, name), {})) for name in names]

  monkeypatch.setattr(accelerators, 'compile_rows', compile_rows)
  assert accelerators.main(['--check', '--targets', 'h100', 'a100']) == 1
  missed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('MISSED')]
  assert missed == [
    'MISSED: h100 | 8 x 2048 x 2048 | lpmm.sgdm, kernel: moved, B/param 8.51, bound <= 8.5',
    'MISSED: a100 | 8 x 2048 x 2048 | lpmm.lion, kernel: scalar kernels 32, bound <= 16',
  ]
  changed.clear()
  assert accelerators.main(['--check', '--targets', 'h100', 'a100']) == 0


def test_a_lower_bound_of_what_is_moved_meets_no_bound():
  (bound,) = [bound for bound in accelerators.BOUNDS if bound.targets == ('v5e',) and bound.limit == 10.8]
  for unknown, is_met in ((0, True), (8, False)):
    rows = [row('v5e', bound.model, 'lpmm.adamw, kernel', bytes_moved=600, unknown_loops=unknown)]
    (verdict,) = accelerators.judge(accelerators.by_key(rows), (bound,))
    assert verdict.is_met == is_met
  assert '≥ 6.00' in verdict.sentence()


def test_rows_that_are_there_are_not_made_again(monkeypatch, tmp_path):
  made = []

  def compile_rows(target, model, names, seconds):
    made.extend(names)
    return [
      row(target, model, name) if 'adamw' in name else row(target, model, name) | {'error': 'x'} for name in names
    ]

  monkeypatch.setattr(accelerators, 'compile_rows', compile_rows)
  command = ['--targets', 'h100', '--only', '50257', 'optax', '--output', str(tmp_path / 'rows.jsonl')]
  for expected in (['adamw'], ['lion', 'sgd'], [], ['adamw', 'lion', 'sgd']):
    made.clear()
    options = ['--skip', 'sgd', 'lion'] if expected == ['adamw'] else ['--again'] if len(expected) == 3 else []
    accelerators.main([*command, *options])
    assert sorted(made) == [f'optax.{name} {dtype}' for name in expected for dtype in ('bf16', 'fp32')]


def test_a_worker_that_dies_or_hangs_costs_one_row(monkeypatch, tmp_path):
  worker = tmp_path / 'accelerator_steps.py'
  worker.write_text("""
import sys, time
for name in sys.argv[3:]:
  if name == 'hangs':
    time.sleep(60)
  if name == 'dies':
    raise SystemExit('out of memory')
  print('{"kernels": 1}', flush=True)
""")
  monkeypatch.setattr(accelerators, 'HERE', tmp_path)
  rows = accelerators.compile_rows('h100', 'a model', ['a', 'dies', 'b', 'hangs', 'c'], seconds=3)
  found = [row.get('error', row.get('kernels')) for row in rows]
  assert found == [1, 'the process died: out of memory', 1, 'not compiled within 3 s', 1]


def test_documents_hold_what_the_runs_give(tmp_path, monkeypatch):
  monkeypatch.chdir(ROOT)
  copies = {'--document': ROOT / 'docs' / 'performance.md', '--readme': ROOT / 'README.md'}
  args = ['--report']
  for option, original in copies.items():
    args += [option, str(tmp_path / original.name)]
    (tmp_path / original.name).write_text(original.read_text())
  accelerators.main(args)
  for original in copies.values():
    assert (tmp_path / original.name).read_text() == original.read_text()
