"""The language model example and the summary of its results: text, batches, model, runs, what it refuses."""

import contextlib
from functools import partial
import importlib.util
import io
import json
import math
from pathlib import Path
from typing import NamedTuple

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train_char_lm

import lpmm_optax as lpmm

# Large enough for the matrices to be quantized.
SMALL = ('--layers', '2', '--width', '32', '--heads', '2', '--context', '16', '--batch-size', '8', '--steps', '30')
RUNS = ('adamw-fp32', 'lion-fp32')


# ---------------------------------------------------------------------------------------------------------------------
# Text and batches
# ---------------------------------------------------------------------------------------------------------------------


def written(data):
  return ''.join(data.vocabulary[token] for part in (data.train, data.validation) for token in part)


def test_a_text_is_split_nine_to_one_into_indices_of_its_sorted_characters(tmp_path):
  file = tmp_path / 'text.txt'
  # One, two, three and four bytes of UTF-8 each.
  file.write_text('zebra é € 🦓\n' * 3, encoding='utf-8')
  data = datasets.text(file)
  assert data.vocabulary == '\n aberzé€🦓'
  assert (len(data.train), len(data.validation)) == (33, 3)
  assert data.train.dtype == data.validation.dtype == np.int32
  assert written(data) == 'zebra é € 🦓\n' * 3


def test_the_default_text_is_what_python_says_of_itself():
  data = datasets.text()
  assert written(data).startswith('The "assert" statement\n')
  # Much the same in every version of Python.
  assert len(data.train) > 300_000
  assert len(data.vocabulary) < 256
  assert set(range(len(data.vocabulary))) == set(data.train) | set(data.validation)


def test_what_is_not_a_text_is_named(tmp_path):
  for path in (tmp_path / 'absent', tmp_path):
    with pytest.raises(FileNotFoundError, match=f'{path.name} is not a file'):
      datasets.text(path)
  file = tmp_path / 'latin1.txt'
  file.write_bytes('Café'.encode('latin-1'))
  with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text: .* can't decode byte 0xe9 in position 3"):
    datasets.text(file)


def test_targets_are_the_characters_after_the_inputs():
  args, data = train_char_lm.parse_args([*SMALL]), datasets.text()
  text = written(data)
  for inputs, targets in (train_char_lm.train_batch(data, args, 3), *train_char_lm.validation_batches(data, args)):
    assert inputs.shape[1:] == targets.shape[1:] == (16,)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for window in np.concatenate([inputs, targets[:, -1:]], axis=1):
      assert ''.join(data.vocabulary[token] for token in window) in text


def test_a_batch_depends_on_seed_and_step_alone():
  data = datasets.text()
  batch = lambda seed, step: train_char_lm.train_batch(data, train_char_lm.parse_args([*SMALL, '--seed', seed]), step)
  first, *others = batch('0', 0), batch('0', 1), batch('1', 0)
  np.testing.assert_array_equal(first, batch('0', 0))
  for other in others:
    assert (first[0] != other[0]).any()


@pytest.mark.parametrize('count', [1, 2, 8])
def test_microbatches_are_the_windows_of_the_batch_in_equal_parts(count):
  args, data = train_char_lm.parse_args([*SMALL, '--microbatches', str(count)]), datasets.text()
  parts = train_char_lm.train_microbatches(data, args, 3)
  assert [inputs.shape for inputs, _ in parts] == [(8 // count, 16)] * count
  joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
  np.testing.assert_array_equal(joined, train_char_lm.train_batch(data, args, 3))


def test_the_shortest_text_that_is_taken_has_windows_in_both_parts(tmp_path):
  file = tmp_path / 'short'
  file.write_text('ab' * 85)
  args, data = train_char_lm.parse_args([*SMALL]), datasets.text(file)
  assert len(data.validation) == args.context + 1
  for inputs, targets in (train_char_lm.train_batch(data, args, 0), *train_char_lm.validation_batches(data, args)):
    np.testing.assert_array_equal(inputs, 1 - targets)


def test_windows_reach_both_ends_of_their_part_of_the_text():
  args = train_char_lm.parse_args([*SMALL])
  # Every character is another; no validation character is ever trained on.
  data = datasets.Text(np.arange(19, dtype=np.int32), np.arange(19, 59, dtype=np.int32), '')
  train = [train_char_lm.train_batch(data, args, step) for step in range(20)]
  # Three places to start at, and 160 draws: one is missed with a probability under 1e-27.
  assert {int(x) for inputs, _ in train for x in inputs[:, 0]} == {0, 1, 2}
  assert {int(x) for _, targets in train for x in targets[:, -1]} == {16, 17, 18}
  validation = train_char_lm.validation_batches(data, args)
  assert sum(len(inputs) for inputs, _ in validation) == train_char_lm.VALIDATION_WINDOWS
  assert validation[0][0][0, 0] == 19
  assert validation[-1][1][-1, -1] == 58


# ---------------------------------------------------------------------------------------------------------------------
# Model and optimizers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def model():
  return train_char_lm.Transformer(vocabulary=11, layers=3, width=64, heads=2)


@pytest.fixture(scope='module')
def weights(model):
  return train_char_lm.init_weights(model, jax.random.key(0))


def test_a_later_character_does_not_change_earlier_logits(model, weights):
  apply = jax.jit(lambda tokens: model.apply({'params': weights}, tokens))
  tokens = np.arange(8, dtype=np.int32)[None]
  before = apply(tokens)
  assert (before.shape, before.dtype) == ((1, 8, 11), jnp.float32)
  for position in range(8):
    changed = tokens.copy()
    changed[0, position] = 10
    differs = np.asarray(apply(changed) != before).any((0, 2))
    # Each sees itself and all before it.
    assert differs.tolist() == [False] * position + [True] * (8 - position)


def test_the_order_of_earlier_characters_changes_later_logits(model, weights):
  logits = model.apply({'params': weights}, jnp.array([[1, 2, 3], [2, 1, 3]]))
  assert (logits[0, 2] != logits[1, 2]).any()


def test_rotated_features_depend_on_distances_alone():
  query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 2, 8))
  everywhere = lambda x: train_char_lm.rotate(jnp.tile(x, (1, 6, 1, 1)))[0]
  products = np.einsum('ihd,jhd->hij', everywhere(query), everywhere(key))
  for distance in range(-5, 6):
    # Sums of eight products in float32.
    assert np.ptp(np.diagonal(products, distance, 1, 2), axis=-1).max() < 1e-5
  assert np.ptp(products[:, 0], axis=-1).min() > 0.1
  # What stands at the start is not turned.
  np.testing.assert_array_equal(everywhere(query)[0], query[0, 0])


def test_parameters_of_layers_are_stacked_on_the_first_axis(weights):
  for leaf in jax.tree.leaves(weights['layers']):
    assert leaf.shape[0] == 3
    if leaf.ndim > 2:
      # Each layer has a start of its own.
      assert (leaf[0] != leaf[1]).any()
  assert jax.tree.map(jnp.shape, weights['layers']['qkv']) == {'kernel': (3, 64, 192)}


def test_quantized_weights_give_the_logits_of_their_dense_values(model, weights):
  # Every leaf: the small ones, which are dense by default, must not be forgotten.
  quantized = jax.jit(partial(lpmm.quantize, format=lpmm.INT8, where=[('', lpmm.INT8)]))(weights)
  assert all(map(lpmm.is_quantized, jax.tree.leaves(quantized, is_leaf=lpmm.is_quantized)))
  tokens = np.arange(8, dtype=np.int32)[None]
  decoded_first = jax.jit(lambda params: model.apply({'params': lpmm.dequantize(params)}, tokens))
  decoded_by_layer = jax.jit(lambda params: model.apply({'params': params}, tokens))
  # Logits of about 1, and sums of at most 256 products, which may round differently beside the decoding.
  np.testing.assert_allclose(decoded_by_layer(quantized), decoded_first(quantized), rtol=0, atol=1e-5)


def test_every_weight_but_the_gains_of_norms_decays(weights):
  quantized = lpmm.quantize(weights, lpmm.INT8)
  assert sum(map(lpmm.is_quantized, jax.tree.leaves(quantized, is_leaf=lpmm.is_quantized))) == 4
  for params in (weights, quantized):
    mask = train_char_lm.is_matrix(params)
    assert jax.tree.structure(mask) == jax.tree.structure(weights)
    for path, decays in jax.tree_util.tree_leaves_with_path(mask):
      assert decays == ('norm' not in jax.tree_util.keystr(path))


def test_the_learning_rate_warms_up_and_falls_to_a_tenth():
  args = train_char_lm.parse_args(['--steps', '300', '--learning-rate', '0.5'])
  rates = np.array([train_char_lm.make_schedule(args, 0.5)(step) for step in range(300)])
  np.testing.assert_allclose(rates[:100], np.linspace(0.0025, 0.25, 100), rtol=1e-6)
  assert (np.diff(rates[100:]) < 0).all()
  assert math.isclose(rates[200], 0.25 * 0.55, rel_tol=1e-6)
  assert math.isclose(rates[-1], 0.025, rel_tol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', autouse=True)
def promoting():
  """Optax's optimizers under JAX's own dtype promotion, without which they do not run; all else stays strict."""
  make_optimizer = train_char_lm.make_optimizer

  def promoted(name, args):
    tx = make_optimizer(name, args)
    if train_char_lm.RUNS[name].params is not None:
      return tx

    def update(*args):
      with jax.numpy_dtype_promotion('standard'):
        return tx.update(*args)

    return optax.GradientTransformation(tx.init, update)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_char_lm, 'make_optimizer', promoted)
    yield


class Outcome(NamedTuple):
  results: dict
  folder: Path
  out: str
  err: str


def outcome_in(folder, *argv):
  out, err = io.StringIO(), io.StringIO()
  with (
    contextlib.chdir(folder),
    contextlib.redirect_stdout(out),
    contextlib.redirect_stderr(err),
    pytest.MonkeyPatch.context() as patch,
  ):
    # Rich asks the environment and the terminal behind pytest otherwise.
    patch.setenv('COLUMNS', '80')
    patch.delenv('FORCE_COLOR', raising=False)
    results = train_char_lm.main([*SMALL, '--learning-rate', '0.01', *argv])
  return Outcome(results, folder, out.getvalue(), err.getvalue())


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """Both float32 runs, with a line of results."""
  return outcome_in(tmp_path_factory.mktemp('finished'), '--runs', *RUNS, '--results', 'results/lines.jsonl')


def test_both_optimizers_learn(finished):
  assert tuple(finished.results) == RUNS
  for result in finished.results.values():
    assert result['steps'] == len(result['loss']) == 30
    # By far more than batches differ in: the first loss is above that of characters drawn evenly, log(103) = 4.6.
    assert result['loss'][0] > 4.5
    assert np.mean(result['loss'][-5:]) < 3.6
    assert result['validation_loss'] < 3.6
    assert result['train_loss'] == pytest.approx(np.mean(result['loss']))
    assert result['validation_curve'] == [(30, result['validation_loss'])]
    assert result['step_ms'] > 0
    assert result['peak_bytes'] > 0
    # Model memory counts in the peak.
    assert result['peak_bytes_per_param'] > result['bytes_per_param']
  # Parameter and moments, and a few scalars.
  for result, expected in zip(finished.results.values(), (12, 8), strict=True):
    assert result['bytes_per_param'] == pytest.approx(expected, abs=1e-3)


def test_all_runs_start_from_the_same_weights_on_the_same_batch(finished):
  adamw, lion = (result['loss'] for result in finished.results.values())
  assert adamw[0] == lion[0]
  assert adamw[1] != lion[1]


def test_a_run_ends_in_a_table_a_plot_and_a_line_of_results(finished):
  assert finished.err == ''
  for folder in (finished.folder, Path(__file__).parents[1]):
    assert str(folder) not in finished.out
  rows = [line for line in finished.out.splitlines() if '│' in line]
  for row, (name, result) in zip(rows, finished.results.items(), strict=True):
    assert name in row
    assert f'{result["validation_loss"]:.4f}' in row
    assert f'{result["bytes_per_param"]:.2f}' in row
    assert f'{result["peak_bytes_per_param"]:.2f}' in row
  # Two bars; the table's frame, head of two lines, and rows; and the plot's name.
  assert len(finished.out.splitlines()) == 2 + 7 + 1
  plot = Path('out/train_char_lm.png')
  assert finished.out.splitlines()[-1] == str(plot)
  assert (finished.folder / plot).read_bytes().startswith(b'\x89PNG')

  (line,) = map(json.loads, (finished.folder / 'results/lines.jsonl').read_text().splitlines())
  assert set(line) == {'settings', 'device', 'versions', 'results'}
  assert line['settings']['text'] is None
  assert line['settings']['runs'] == [*RUNS]
  assert line['settings']['width'] == 32
  assert (line['settings']['microbatches'], line['settings']['low_memory']) == (1, False)
  for name, result in line['results'].items():
    kept = {key: value for key, value in finished.results[name].items() if key != 'loss'}
    assert result == json.loads(json.dumps(kept))


@pytest.fixture(scope='module')
def quantized(tmp_path_factory):
  """Both low-precision runs."""
  return outcome_in(tmp_path_factory.mktemp('quantized'), '--runs', 'adamw-8bit', 'lion-8bit')


@pytest.mark.parametrize('name', ['adamw-8bit', 'lion-8bit'])
def test_a_low_precision_run_follows_its_float32_run(finished, quantized, name):
  result, fp32 = quantized.results[name], finished.results[name.replace('8bit', 'fp32')]
  assert result['validation_loss'] == pytest.approx(fp32['validation_loss'], rel=0.02)
  assert result['validation_loss'] != fp32['validation_loss']


def test_an_interrupted_run_resumes_with_the_same_bits(tmp_path, monkeypatch, quantized):
  monkeypatch.setattr(train_char_lm, 'VALIDATE_EVERY', 10)
  argv = ('--runs', 'adamw-8bit', '--checkpoint-dir', 'checkpoints')
  steps, train_microbatches = [], train_char_lm.train_microbatches

  def spy(data, args, step):
    steps.append(step)
    if step == 25 and steps.count(25) == 1:
      raise KeyboardInterrupt
    return train_microbatches(data, args, step)

  monkeypatch.setattr(train_char_lm, 'train_microbatches', spy)
  with pytest.raises(KeyboardInterrupt):
    outcome_in(tmp_path, *argv)
  resumed, expected = outcome_in(tmp_path, *argv).results['adamw-8bit'], quantized.results['adamw-8bit']
  # From the checkpoint after twenty; before each run, a batch to compile for.
  assert steps == [0, *range(26), 0, *range(20, 30)]
  assert resumed['loss'] == expected['loss']
  assert resumed['validation_curve'][-1] == expected['validation_curve'][-1]
  with pytest.raises(SystemExit) as refusal:
    outcome_in(tmp_path, *argv, '--microbatches', '2')
  assert str(refusal.value) == f'error: {Path("checkpoints/adamw-8bit")} holds a run with --microbatches 1'


def state_of(name, args, data):
  """The shapes of a run's model, optimizer, parameters and state."""
  model, tx = train_char_lm.make_model(data, args), train_char_lm.make_optimizer(name, args)
  return model, tx, *jax.eval_shape(lambda: train_char_lm.make_state(name, model, tx, args))


@pytest.mark.parametrize('name', train_char_lm.RUNS)
def test_the_default_model_takes_the_bytes_of_a_large_one(name):
  _, _, params, opt_state = state_of(name, train_char_lm.parse_args([]), datasets.text())
  # A parameter and its moments, and the scales of blocks.
  expected = {'adamw-fp32': 12, 'lion-fp32': 8, 'lion-8bit': 2}.get(name, 3)
  bytes_per_param = lpmm.memory_report(params, opt_state).bytes_per_param
  assert expected <= bytes_per_param < 1.05 * expected


def test_the_run_without_feedback_differs_in_its_step_alone():
  args, data = train_char_lm.parse_args([*SMALL]), datasets.text()
  lowered, states = [], []
  for name in ('adamw-8bit', 'adamw-8bit-plain'):
    model, tx, *state = state_of(name, args, data)
    step = train_char_lm.make_train_step(name, model, tx, args)
    lowered.append(step.lower(*state, *train_char_lm.train_batch(data, args, 0)).as_text())
    states.append(state)
  assert jax.tree.leaves(states[0]) == jax.tree.leaves(states[1])
  assert lowered[0] != lowered[1]


# ---------------------------------------------------------------------------------------------------------------------
# Microbatches and low memory
# ---------------------------------------------------------------------------------------------------------------------


def test_microbatches_give_the_step_of_the_whole_batch():
  data = datasets.text()
  outcomes = []
  for count in ('1', '4'):
    args = train_char_lm.parse_args([*SMALL, '--microbatches', count])
    model, tx = train_char_lm.make_model(data, args), train_char_lm.make_optimizer('adamw-fp32', args)
    params, opt_state = train_char_lm.make_state('adamw-fp32', model, tx, args)
    step = train_char_lm.make_train_step('adamw-fp32', model, tx, args)
    losses = []
    for microbatch in train_char_lm.train_microbatches(data, args, 0):
      params, opt_state, loss = step(params, opt_state, *microbatch)
      losses.append(float(loss))
    outcomes.append((np.mean(losses), params, optax.tree.get(opt_state, 'mu')))
  (loss, params, mu), (loss_of_parts, params_of_parts, mu_of_parts) = outcomes
  assert loss_of_parts == pytest.approx(loss, rel=1e-6)

  def compare(mu, mu_of_parts, p, p_of_parts):
    # A tenth of the clipped gradient, of which no element exceeds 1: sums over 128 characters in another order.
    np.testing.assert_allclose(mu_of_parts, mu, rtol=0, atol=1e-7)
    # Adam's first step, of 2e-4 here, is the sign of a gradient that is larger than its own error and Adam's epsilon.
    large = np.abs(mu) > 1e-4
    np.testing.assert_allclose(p_of_parts[large], p[large], rtol=1e-6, atol=1e-9)
    assert large.mean() > 0.1

  jax.tree.map(compare, mu, mu_of_parts, params, params_of_parts)


@pytest.fixture(
  scope='module', params=[('adamw-8bit', 1), ('lion-8bit', 2)], ids=lambda param: '-'.join(map(str, param))
)
def low_memory(request, tmp_path_factory):
  """Name and microbatches of a run with --low-memory, and how it ended."""
  name, count = request.param
  argv = ('--runs', name, '--low-memory', '--microbatches', str(count), '--results', 'lines.jsonl')
  return name, count, outcome_in(tmp_path_factory.mktemp('low_memory'), *argv)


def test_a_run_in_low_memory_follows_the_ordinary_run(low_memory, quantized):
  name, _, outcome = low_memory
  result, ordinary = outcome.results[name], quantized.results[name]
  assert np.mean(result['loss'][-5:]) < 3.6
  # The mean over microbatches, of the same weights on the same windows.
  assert result['loss'][0] == pytest.approx(ordinary['loss'][0], rel=1e-6)
  # As far as a low-precision run may be from its float32 run: gradients are rounded too, to about a hundredth.
  assert result['validation_loss'] == pytest.approx(ordinary['validation_loss'], rel=0.02)
  assert result['validation_loss'] != ordinary['validation_loss']


def test_results_tell_how_gradients_were_accumulated(low_memory, quantized):
  name, count, outcome = low_memory
  (line,) = map(json.loads, (outcome.folder / 'lines.jsonl').read_text().splitlines())
  assert line['settings']['low_memory'] is True
  assert line['settings']['microbatches'] == count
  result = line['results'][name]
  # The accumulator: a byte and scales per parameter, but four bytes where the parameter is dense, as a quarter are.
  accumulator = result['bytes_per_param'] - quantized.results[name]['bytes_per_param']
  assert 1 < accumulator < 2
  assert result['peak_bytes_per_param'] > result['bytes_per_param']


def test_low_memory_takes_less_by_more_than_the_dense_weights():
  # 1.6 million parameters, and 16 characters.
  argv = ('--layers', '8', '--width', '128', '--context', '8', '--batch-size', '2')
  data, peaks = datasets.text(), []
  for flags in ((), ('--low-memory',)):
    args = train_char_lm.parse_args([*argv, *flags])
    model, tx, *state = state_of('lion-8bit', args, data)
    step = train_char_lm.make_train_step('lion-8bit', model, tx, args)
    compiled = step.lower(*state, *train_char_lm.train_batch(data, args, 0)).compile()
    peaks.append(train_char_lm.peak_bytes(compiled) / lpmm.memory_report(*state).parameters)
  ordinary, low = peaks
  # Parameters and momentum, dense weights and gradients.
  assert ordinary > 2 + 4 + 4
  # The accumulator is one byte more; without it, neither weights nor gradients are there.
  assert low < ordinary - 4


@pytest.mark.parametrize('name', RUNS)
def test_low_memory_leaves_a_float32_run_as_it_is(name):
  data, lowered = datasets.text(), []
  for flags in ((), ('--low-memory',)):
    args = train_char_lm.parse_args([*SMALL, *flags])
    model, tx, *state = state_of(name, args, data)
    step = train_char_lm.make_train_step(name, model, tx, args)
    lowered.append(step.lower(*state, *train_char_lm.train_batch(data, args, 0)).as_text())
  assert lowered[0] == lowered[1]


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--layers 0', '--layers must be at least 1, got 0'),
    ('--width -1', '--width must be at least 1, got -1'),
    ('--heads 0', '--heads must be at least 1, got 0'),
    ('--heads 3', '--width 128 does not divide into 3 heads of even width'),
    ('--width 4 --heads 4', '--width 4 does not divide into 4 heads of even width'),
    ('--context 0', '--context must be at least 1, got 0'),
    ('--batch-size 0', '--batch-size must be at least 1, got 0'),
    ('--microbatches 0', '--microbatches must be at least 1, got 0'),
    ('--microbatches 3', '--batch-size 16 does not divide into 3 microbatches'),
    ('--batch-size 2 --microbatches 4', '--batch-size 2 does not divide into 4 microbatches'),
    ('--steps 0', '--steps must be at least 1, got 0'),
    ('--seed 4294967296', '--seed must be from 0 to 2**32 - 1, got 4294967296'),
    ('--plot curves.txt', '--plot must end in .png, .pdf, .svg, got curves.txt'),
    ('--runs sgd', "invalid choice: 'sgd'"),
    ('--runs', 'expected at least one argument'),
  ],
)
def test_a_wrong_argument_ends_in_its_name(argv, message, capsys):
  with pytest.raises(SystemExit) as stop:
    train_char_lm.main(argv.split())
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_runs_are_the_first_two_by_default_and_each_comes_once():
  assert train_char_lm.parse_args([]).runs == ['adamw-fp32', 'adamw-8bit']
  assert train_char_lm.parse_args(['--runs', 'lion-fp32', 'adamw-fp32', 'lion-fp32']).runs == [
    'lion-fp32',
    'adamw-fp32',
  ]


def test_a_text_that_does_not_do_ends_without_a_traceback(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match='error: absent is not a file'):
    train_char_lm.main(['--text', 'absent'])
  for characters in ('', 'a' * 169):
    Path('short').write_text(characters)
    message = f'--context 16 and one more do not fit into the {len(characters) // 10} validation characters of short'
    with pytest.raises(SystemExit, match=message):
      train_char_lm.main([*SMALL, '--text', 'short'])


# ---------------------------------------------------------------------------------------------------------------------
# Summary
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def summary():
  spec = importlib.util.spec_from_file_location('summary', Path(__file__).parents[1] / 'benchmarks' / 'summary.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture
def summarize(summary, tmp_path, capsys):
  """The rows that a file with these lines, (settings, results), is summarised in."""

  def rows(*records):
    file = tmp_path / 'lines.jsonl'
    lines = [json.dumps({'settings': settings, 'results': results}) for settings, results in records]
    file.write_text(''.join(f'{line}\n' for line in lines))
    summary.main([str(file)])
    head, rule, *body = capsys.readouterr().out.splitlines()
    assert rule == '|' + '---|' * (head.count('|') - 1)
    return [[cell.strip() for cell in row.strip('|').split('|')] for row in body]

  return rows


def losses(seed, steps=1000, **by_run):
  results = {
    name.replace('_', '-'): {'validation_loss': loss, 'bytes_per_param': 12 if name.endswith('fp32') else 3.0517}
    for name, loss in by_run.items()
  }
  return {'text': None, 'steps': steps, 'runs': list(results), 'seed': seed}, results


def test_each_run_is_summarised_against_its_baselines(summarize):
  # Losses at 1 and 3 deviate by sqrt(2); differences of 0.1 and 0.3 by sqrt(0.02), and 12.706 sqrt(0.02 / 2) = 1.2706.
  assert summarize(
    losses(0, adamw_fp32=1.0, adamw_8bit=1.1),
    losses(1, adamw_fp32=3.0, adamw_8bit=3.3),
    # In lines of their own, in another order, one of them repeated.
    losses(1, lion_fp32=9.0),
    losses(1, lion_fp32=2.5, lion_8bit=3.5),
    losses(0, lion_fp32=1.5, lion_8bit=2.5),
  ) == [
    ['adamw-fp32', '2', '2.0000 ± 1.4142', '', '', '12.00'],
    ['adamw-8bit', '2', '2.2000 ± 1.5556', '+0.2000 ± 1.2706', '', '3.05'],
    ['lion-fp32', '2', '2.0000 ± 0.7071', '+0.0000 ± 6.3530', '', '12.00'],
    ['lion-8bit', '2', '3.0000 ± 0.7071', '+1.0000 ± 6.3530', '+1.0000 ± 0.0000', '3.05'],
  ]


def test_only_seeds_that_have_both_are_compared(summarize):
  assert summarize(losses(0, adamw_fp32=1.0), losses(1, adamw_8bit=2.0), losses(2, lion_8bit=2.0)) == [
    ['adamw-fp32', '1', '1.0000 ± nan', '', '', '12.00'],
    ['adamw-8bit', '1', '2.0000 ± nan', '', '', '3.05'],
    ['lion-8bit', '1', '2.0000 ± nan', '', '', '3.05'],
  ]
  assert summarize(losses(0, adamw_fp32=1.0, adamw_8bit=1.5), losses(1, adamw_fp32=1.0))[1][1:4] == [
    '1',
    '1.5000 ± nan',
    '+0.5000 ± nan',
  ]


def test_rows_name_the_settings_in_which_they_differ(summarize):
  rows = summarize(losses(0, adamw_fp32=1.0), losses(1, steps=500, adamw_fp32=2.0))
  assert [row[0] for row in rows] == ['adamw-fp32, steps 1000', 'adamw-fp32, steps 500']


def test_the_low_precision_network_is_summarised_beside_its_float32_one(summarize):
  def accuracies(seed, fp32, ours):
    results = {'lpmm': (ours, 2.078), 'fp32': (fp32, 8.0)}
    return {'dataset': 'digits', 'formats': 'int8', 'seed': seed}, {
      name: {'test_accuracy': accuracy, 'bytes_per_param': size} for name, (accuracy, size) in results.items()
    }

  # Deviations of 1, 2 and 1 over three seeds: 4.303 / sqrt(3) = 2.48.
  assert summarize(accuracies(0, 0.95, 0.94), accuracies(1, 0.96, 0.96), accuracies(2, 0.97, 0.98)) == [
    ['digits, int8', '3', '96.00 ± 1.00 %', '96.00 ± 2.00 %', '+0.00 ± 2.48', '2.08']
  ]
