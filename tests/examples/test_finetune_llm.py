"""The fine-tuning example: its data, a run from nothing to an exported model, resuming, meshes, memory."""

from functools import partial
import json
import math

import finetune_llm
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from runs import assert_same_bits
import safetensors.numpy
import tokenizers
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import processors

SMALL = finetune_llm.SMALL | {'vocab_size': 320, 'hidden_size': 64, 'intermediate_size': 128, 'num_hidden_layers': 2}
ARGV = ('--context', '32', '--steps', '20', '--batch-size', '8', '--microbatches', '2', '--sample-tokens', '8')

# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def tokenizer():
  """Of single characters, with a token before every text."""
  vocabulary = {'<s>': 0} | {chr(i): i for i in range(10, 127)}
  tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary))
  tokenizer.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
  tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 0)])
  return tokenizer


def spell(tokens):
  return ''.join(chr(token) for token in tokens)


def test_pieces_of_a_text_hold_each_of_its_tokens_as_a_target_once(tokenizer):
  text = ''.join(chr(32 + i % 90) for i in range(50))
  examples, prompt = finetune_llm.text_examples(text, tokenizer, context=8)
  inputs, targets, learned = examples.batch(np.arange(len(examples.tokens)))
  assert inputs.shape == targets.shape == learned.shape == (7, 8)
  assert np.all(inputs[:, 0] == 0)
  np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
  # A piece starts with the last token of the one before, which is learned again after the first token.
  assert learned.all()
  assert ''.join(spell(row[1:]) for row in targets) == text[1:50]
  assert prompt == examples.tokens[-1][: 1 + finetune_llm.PROMPT_TOKENS].tolist()


# Templates are written for an environment that drops the line break after a block.
TEMPLATE = """{{ bos_token }}{% for m in messages %}
[{{ m['role'][0] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}
.{% endif %}
{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"""


@pytest.mark.parametrize('where', ['settings', 'file'])
def test_of_a_chat_the_answers_are_learned_and_nothing_else(where, tokenizer, tmp_path):
  settings = {'bos_token': {'content': '!'}}
  if where == 'file':
    (tmp_path / 'chat_template.jinja').write_text(TEMPLATE)
  else:
    settings['chat_template'] = [{'name': 'tool_use', 'template': '?'}, {'name': 'default', 'template': TEMPLATE}]
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings))
  say = lambda role, content: {'role': role, 'content': content}
  chat = [say('user', 'one'), say('assistant', 'two'), say('user', 'three'), say('assistant', 'four')]
  short, cut = [say('user', '?'), say('assistant', 'x')], [say('user', 20 * 'long'), say('assistant', 'never')]
  template = finetune_llm.chat_template(tmp_path)
  examples, prompt = finetune_llm.chat_examples([chat, cut, short], template, tokenizer, context=40)
  seen = [(spell(row), spell(row[mask])) for row, mask in zip(examples.tokens, examples.learned, strict=True)]
  padded = lambda text: text + (41 - len(text)) * chr(0)
  assert seen == [
    (padded('![u]one[a]two.'), 'two.'),
    (padded('![u]one[a]two.[u]three[a]four.'), 'four.'),
    (padded('![u]?[a]x.'), 'x.'),
  ]
  assert spell(prompt) == '![u]?[a]'


def test_a_template_under_which_an_answer_changes_its_prompt_is_refused(tokenizer, tmp_path):
  (tmp_path / 'chat_template.jinja').write_text('{{ messages | length }}{{ messages[-1].content }}')
  template = finetune_llm.chat_template(tmp_path)
  chat = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
  with pytest.raises(ValueError, match='renders an answer otherwise than its prompt'):
    finetune_llm.chat_examples([chat], template, tokenizer, 8)
  (tmp_path / 'chat_template.jinja').unlink()
  with pytest.raises(ValueError, match='has no chat template'):
    finetune_llm.chat_template(tmp_path)


def test_microbatches_weigh_what_is_learned_in_all_of_them_alike():
  rng = np.random.default_rng(0)
  examples = finetune_llm.Examples(rng.integers(0, 9, (10, 7), np.int32), rng.random((10, 7)) < 0.4)
  args = finetune_llm.parse_args(['--batch-size', '6', '--microbatches', '3', '--context', '6'])
  seen = []
  for step in range(5):
    parts = finetune_llm.microbatches(examples, args, step)
    assert [part[2].shape for part in parts] == 3 * [(2, 6)]
    weights = np.concatenate([part[2] for part in parts])
    # The mean over microbatches of their sums is the mean over what is learned.
    assert np.sum(weights) / 3 == pytest.approx(1, rel=1e-6)
    assert len(np.unique(weights[weights > 0])) == 1
    seen += [part[0] for part in parts]
  # Three epochs, each of all examples.
  rows = np.concatenate(seen)
  for epoch in np.split(rows, 3):
    np.testing.assert_array_equal(sorted(epoch.tolist()), sorted(examples.tokens[:, :-1].tolist()))


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(finetune_llm, 'SMALL', SMALL)
    patch.setitem(finetune_llm.PRETRAINING, 'steps', 60)
    yield


@pytest.fixture(scope='module')
def finished(small, tmp_path_factory, outcome_in):
  folder = tmp_path_factory.mktemp('finished')
  return outcome_in(folder, finetune_llm.main, *ARGV)


@pytest.mark.slow
def test_a_model_is_trained_from_scratch_and_fine_tuned(finished):
  results = finished.results
  assert results['after'] < 0.95 * results['before'] < 0.5 * SMALL['vocab_size']
  assert np.mean(results['losses'][-5:]) < np.mean(results['losses'][:5])
  assert len(results['losses']) == 20
  assert all(len(text) >= 8 for text in results['samples'])
  for expected in ('bytes/param', 'pretraining: perplexity', 'greedy', 'temperature 0.8', 'out/finetune_llm'):
    assert expected in finished.out


@pytest.mark.slow
def test_what_is_exported_is_what_was_trained(finished):
  output = finished.folder / 'out/finetune_llm'
  assert (output / 'tokenizer.json').is_file()
  tensors = safetensors.numpy.load_file(output / 'model.safetensors')
  assert all(x.dtype == jnp.bfloat16 for x in tensors.values())
  args = finetune_llm.parse_args([*ARGV])
  tokenizer = tokenizers.Tokenizer.from_file(str(output / 'tokenizer.json'))
  config = llama.parse_config(llama.read_config(output))
  validation = finetune_llm.read_data(args, output, tokenizer).validation
  inputs, targets, learned = validation.batch(np.arange(len(validation.tokens)))
  params = llama.load(output, config, None)
  losses = jax.jit(partial(llama.losses, config, dtype=jnp.float32))(params, inputs, targets)
  # bfloat16 has 8 bits as codes have, but of each weight: it rounds by less than the quantization that was trained.
  assert math.exp(np.average(losses, weights=learned)) == pytest.approx(finished.results['after'], rel=0.01)


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_the_same_bits(finished, monkeypatch, outcome_in):
  microbatches, steps = finetune_llm.microbatches, []
  file = finished.folder / 'out/finetune_llm/model.safetensors'
  whole = safetensors.numpy.load_file(file)
  file.unlink()

  def interrupted(examples, args, step):
    steps.append(step)
    if step == 15 and steps.count(15) == 1:
      raise KeyboardInterrupt
    return microbatches(examples, args, step)

  # From the same pretrained model, which is there.
  monkeypatch.setattr(finetune_llm, 'microbatches', interrupted)
  argv = (*ARGV, '--checkpoint-dir', 'saved', '--checkpoint-every', '10')
  with pytest.raises(KeyboardInterrupt):
    outcome_in(finished.folder, finetune_llm.main, *argv)
  resumed = outcome_in(finished.folder, finetune_llm.main, *argv)
  assert steps == [*range(16), *range(10, 20)]
  assert resumed.results == finished.results
  assert_same_bits(safetensors.numpy.load_file(file), whole)
  with pytest.raises(SystemExit, match='holds a run with --microbatches 2'):
    outcome_in(finished.folder, finetune_llm.main, *argv, '--microbatches', '1')


@pytest.mark.slow
def test_a_mesh_of_four_trains_as_one_device(finished, outcome_in):
  four = outcome_in(finished.folder, finetune_llm.main, *ARGV, '--mesh', '4').results
  # Sums over a batch are split, so losses differ in their last bits, and codes now and then.
  np.testing.assert_allclose(four['losses'], finished.results['losses'], rtol=1e-3)
  assert four['after'] == pytest.approx(finished.results['after'], rel=2e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
  ('options', 'state'),
  [(['--optimizer', 'sgdm'], 1.02), (['--moment-bits', '4'], 1.13), (['--optimizer', 'adafactor'], 0.03)],
  ids=['sgdm', 'moments of 4 bits', 'adafactor'],
)
def test_neither_weights_nor_gradients_exist_as_a_dense_tree(monkeypatch, outcome_in, tmp_path, options, state):
  shape = SMALL | {'num_hidden_layers': 16, 'hidden_size': 256, 'intermediate_size': 768, 'vocab_size': 4096}
  shape['tie_word_embeddings'] = False  # Tied ones have a gradient of two parts, which are summed.
  monkeypatch.setitem(finetune_llm.SHAPES, 'deep', shape)
  argv = ('--model', 'deep', '--estimate', '--context', '4', '--batch-size', '1')
  parts = outcome_in(tmp_path, finetune_llm.main, *argv, *options).results
  shapes = llama.dense_shapes(llama.parse_config(shape))
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert parts['parameters'] / count == pytest.approx(1.03, abs=0.01)
  assert parts['optimizer state'] / count == pytest.approx(state, abs=0.02)
  assert parts['gradient accumulator'] == 0
  # Either would take four. What there is are tiles, whose size does not grow with the model, and one layer's weights.
  assert parts['activations, gradients, the rest'] / count < 1
