"""The language model example: its model, its runs, what it refuses."""

from functools import partial
import json
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_char_lm

import lpmm_optax as lpmm

# Large enough for the matrices to be quantized.
SMALL = ('--layers', '2', '--width', '32', '--heads', '2', '--context', '16', '--batch-size', '8', '--steps', '30')
RATE = ('--learning-rate', '0.01')


# ---------------------------------------------------------------------------------------------------------------------
# Batches and model
# ---------------------------------------------------------------------------------------------------------------------


def test_targets_are_the_characters_after_the_inputs():
  args, data = train_char_lm.parse_args([*SMALL]), datasets.text()
  text = ''.join(data.vocabulary[token] for part in (data.train, data.validation) for token in part)
  for inputs, targets in (train_char_lm.train_batch(data, args, 3), *train_char_lm.validation_batches(data, args)):
    assert inputs.shape[1:] == targets.shape[1:] == (16,)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    for window in np.concatenate([inputs, targets[:, -1:]], axis=1):
      assert ''.join(data.vocabulary[token] for token in window) in text


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


def test_quantized_weights_give_the_logits_of_their_dense_values(model, weights):
  # Every leaf: the small ones, which are dense by default, must not be forgotten.
  quantized = jax.jit(partial(lpmm.quantize, format=lpmm.INT8, where=[('', lpmm.INT8)]))(weights)
  tokens = np.arange(8, dtype=np.int32)[None]
  decoded_first = jax.jit(lambda params: model.apply({'params': lpmm.dequantize(params)}, tokens))
  decoded_by_layer = jax.jit(lambda params: model.apply({'params': params}, tokens))
  # Logits of about 1, and sums of at most 256 products, which may round differently beside the decoding.
  np.testing.assert_allclose(decoded_by_layer(quantized), decoded_first(quantized), rtol=0, atol=1e-5)


def test_every_weight_but_the_gains_of_norms_decays(weights):
  for params in (weights, lpmm.quantize(weights, lpmm.INT8)):
    for path, decays in jax.tree_util.tree_leaves_with_path(train_char_lm.is_matrix(params)):
      assert decays == ('norm' not in jax.tree_util.keystr(path))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def main(outcome_in):
  return lambda folder, *argv: outcome_in(folder, train_char_lm.main, *SMALL, *RATE, *argv)


@pytest.fixture(scope='module')
def finished(tmp_path_factory, main):
  """AdamW in both precisions, with a line of results."""
  folder = tmp_path_factory.mktemp('finished')
  return main(folder, '--runs', 'adamw-fp32', 'adamw-8bit', '--results', 'results/lines.jsonl')


@pytest.mark.slow
def test_both_runs_learn_the_same(finished):
  fp32, low = finished.results['adamw-fp32'], finished.results['adamw-8bit']
  for result in (fp32, low):
    assert result['steps'] == len(result['loss']) == 30
    # By far more than batches differ in: the first loss is above that of characters drawn evenly, log(103) = 4.6.
    assert result['loss'][0] > 4.5
    assert np.mean(result['loss'][-5:]) < 3.6
    assert result['validation_curve'] == [(30, result['validation_loss'])]
    # Model memory counts in the peak.
    assert result['peak_bytes_per_param'] > result['bytes_per_param']
  assert low['validation_loss'] == pytest.approx(fp32['validation_loss'], rel=0.02)
  assert low['validation_loss'] != fp32['validation_loss']


@pytest.mark.slow
def test_a_run_ends_in_a_table_a_plot_and_a_line_of_results(finished):
  assert finished.err == ''
  assert str(finished.folder) not in finished.out
  rows = [line for line in finished.out.splitlines() if '│' in line]
  for row, (name, result) in zip(rows, finished.results.items(), strict=True):
    assert name in row
    assert f'{result["validation_loss"]:.4f}' in row
  plot = Path('out/train_char_lm.png')
  assert finished.out.splitlines()[-1] == str(plot)
  assert (finished.folder / plot).read_bytes().startswith(b'\x89PNG')
  (line,) = map(json.loads, (finished.folder / 'results/lines.jsonl').read_text().splitlines())
  assert line['settings']['runs'] == ['adamw-fp32', 'adamw-8bit']
  for name, result in line['results'].items():
    assert result['validation_loss'] == finished.results[name]['validation_loss']


@pytest.mark.slow
def test_lion_follows_its_float32_run(tmp_path, main):
  fp32, low = main(tmp_path, '--runs', 'lion-fp32', 'lion-8bit').results.values()
  assert np.mean(low['loss'][-5:]) < 3.6
  assert low['validation_loss'] == pytest.approx(fp32['validation_loss'], rel=0.02)


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_same_bits(tmp_path, monkeypatch, main, finished):
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
    main(tmp_path, *argv)
  resumed, expected = main(tmp_path, *argv).results['adamw-8bit'], finished.results['adamw-8bit']
  # From the checkpoint after twenty; before each run, a batch to compile for.
  assert steps == [0, *range(26), 0, *range(20, 30)]
  assert resumed['loss'] == expected['loss']
  assert resumed['validation_curve'][-1] == expected['validation_curve'][-1]
  with pytest.raises(SystemExit) as refusal:
    main(tmp_path, *argv, '--microbatches', '2')
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


# ---------------------------------------------------------------------------------------------------------------------
# Microbatches and low memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('count', ['1', '2'])
def test_a_run_in_low_memory_follows_the_ordinary_run(tmp_path, main, finished, count):
  result = main(tmp_path, '--runs', 'adamw-8bit', '--low-memory', '--microbatches', count).results['adamw-8bit']
  ordinary = finished.results['adamw-8bit']
  assert np.mean(result['loss'][-5:]) < 3.6
  # The mean over microbatches, of the same weights on the same windows.
  assert result['loss'][0] == pytest.approx(ordinary['loss'][0], rel=1e-6)
  # As far as a low-precision run may be from its float32 run: gradients are rounded too, to about a hundredth.
  assert result['validation_loss'] == pytest.approx(ordinary['validation_loss'], rel=0.02)
  # The accumulator: a byte and scales per parameter, but four bytes where the parameter is dense, as a quarter are.
  assert 1 < result['bytes_per_param'] - ordinary['bytes_per_param'] < 2


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--layers 0', '--layers must be at least 1, got 0'),
    ('--heads 3', '--width 128 does not divide into 3 heads of even width'),
    ('--microbatches 3', '--batch-size 16 does not divide into 3 microbatches'),
    ('--seed 4294967296', '--seed must be from 0 to 2**32 - 1, got 4294967296'),
    ('--plot curves.txt', '--plot must end in .png, .pdf, .svg, got curves.txt'),
    ('--runs sgd', "invalid choice: 'sgd'"),
  ],
)
def test_a_wrong_argument_ends_in_its_name(argv, message, capsys):
  with pytest.raises(SystemExit) as stop:
    train_char_lm.main(argv.split())
  assert stop.value.code == 2
  assert message in capsys.readouterr().err


def test_a_text_that_does_not_do_ends_without_a_traceback(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit, match='error: absent is not a file'):
    train_char_lm.main(['--text', 'absent'])
  Path('short').write_text('a' * 169)
  with pytest.raises(
    SystemExit, match='--context 16 and one more do not fit into the 16 validation characters of short'
  ):
    train_char_lm.main([*SMALL, '--text', 'short'])
