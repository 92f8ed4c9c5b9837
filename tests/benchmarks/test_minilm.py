"""The sentence encoder that `benchmarks/accuracy.py` fine-tunes, of random weights and few features."""

import json

import jax
import jax.numpy as jnp
import minilm
import numpy as np
import pytest
from safetensors.numpy import save_file

WIDTH, HIDDEN, WORDS, LENGTH = 24, 48, 60, 16
SHAPES = {
  **{f'attention.self.{name}': (WIDTH, WIDTH) for name in ('query', 'key', 'value')},
  'attention.output.dense': (WIDTH, WIDTH),
  'intermediate.dense': (HIDDEN, WIDTH),
  'output.dense': (WIDTH, HIDDEN),
}


@pytest.fixture(autouse=True)
def as_in_a_script():
  with jax.numpy_rank_promotion('allow'), jax.numpy_dtype_promotion('standard'):
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  rng, tensors = np.random.default_rng(0), {}

  def draw(name, *shape):
    tensors[name] = (0.3 * rng.standard_normal(shape) + name.endswith('LayerNorm.weight')).astype(np.float32)

  for name, rows in zip(minilm.TABLES, (WORDS, LENGTH, 2), strict=True):
    draw(f'embeddings.{name}.weight', rows, WIDTH)
  norms = ['embeddings.LayerNorm']
  for i in range(minilm.LAYERS):
    norms += [f'encoder.layer.{i}.{name}.LayerNorm' for name in ('attention.output', 'output')]
    for name, shape in SHAPES.items():
      draw(f'encoder.layer.{i}.{name}.weight', *shape)
      draw(f'encoder.layer.{i}.{name}.bias', shape[0])
  for name in norms:
    draw(f'{name}.weight', WIDTH)
    draw(f'{name}.bias', WIDTH)
  path = tmp_path_factory.mktemp('minilm')
  save_file(tensors, path / 'model.safetensors')
  config = {'architectures': ['BertModel'], 'model_type': 'bert', 'vocab_size': WORDS, 'hidden_size': WIDTH}
  config |= {'intermediate_size': HIDDEN, 'num_attention_heads': minilm.HEADS, 'num_hidden_layers': minilm.LAYERS}
  config |= {'layer_norm_eps': minilm.EPSILON, 'max_position_embeddings': LENGTH, 'type_vocab_size': 2}
  (path / 'config.json').write_text(json.dumps(config))
  return path


def features(folder, tokens):
  weights = minilm.load(folder)
  return minilm.logits(weights | {'head': {'weight': jnp.eye(WIDTH), 'bias': jnp.zeros(WIDTH)}}, jnp.asarray(tokens))


def test_padding_changes_nothing_and_words_do(folder):
  tokens = np.random.default_rng(1).integers(1, WORDS, (3, 10))
  found = features(folder, tokens)
  np.testing.assert_allclose(features(folder, np.pad(tokens, ((0, 0), (0, 6)))), found, atol=1e-5)
  tokens[0, 4] = tokens[0, 4] % (WORDS - 1) + 1
  changed = jnp.abs(features(folder, tokens) - found).max(axis=1)
  assert changed[0] > 1e-3
  assert changed[1:].max() < 1e-5


def test_a_fresh_head_knows_nothing(folder):
  np.testing.assert_array_equal(minilm.logits(minilm.load(folder), jnp.ones((2, 5), jnp.int32)), jnp.zeros((2, 2)))


def test_features_are_those_of_transformers(folder):
  transformers, torch = pytest.importorskip('transformers'), pytest.importorskip('torch')
  model = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
  tokens = np.random.default_rng(1).integers(1, WORDS, (3, 10))
  with torch.no_grad():
    expected = model(torch.tensor(tokens)).last_hidden_state.mean(1)
  np.testing.assert_allclose(features(folder, tokens), expected, atol=1e-4)
