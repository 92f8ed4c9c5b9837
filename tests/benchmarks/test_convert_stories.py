"""A checkpoint of llama2.c, converted, computes what it did, and its tokenizer spells what is not in its vocabulary."""

import struct

import convert_stories
import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
import tokenizers

HEADER = (32, 48, 2, 4, 2, 264, 16)  # Width, hidden, layers, heads, heads of keys, vocabulary, length.
EXTRA = (' ', 'a', 'b', ' a', 'ab')  # Of the vocabulary, after three special tokens and the bytes.


@pytest.fixture(scope='module')
def weights():
  """Of the file, in its order."""
  width, hidden, layers, heads, kv_heads, vocabulary, length = HEADER
  kv = kv_heads * width // heads
  shapes = {
    'embed': (vocabulary, width),
    'norm1': (layers, width),
    'q': (layers, width, width),
    'k': (layers, kv, width),
    'v': (layers, kv, width),
    'o': (layers, width, width),
    'norm2': (layers, width),
    'gate': (layers, hidden, width),
    'down': (layers, width, hidden),
    'up': (layers, hidden, width),
    'norm': (width,),
    'rotary': (2, length, width // heads // 2),
  }
  rng = np.random.default_rng(0)
  return {name: 0.3 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope='module')
def folder(weights, tmp_path_factory):
  pieces = ['<unk>', '\n<s>\n', '\n</s>\n', *map(chr, range(256)), *EXTRA]
  spelled = b''.join(struct.pack('<fi', -i, len(x.encode())) + x.encode() for i, x in enumerate(pieces))
  folder = tmp_path_factory.mktemp('stories')
  content = [struct.pack('<7i', *HEADER), *(x.tobytes() for x in weights.values()), struct.pack('<i', 5), spelled]
  (folder / 'llama2.data').write_bytes(b''.join(content))
  convert_stories.main([str(folder / 'llama2.data'), str(folder / 'model')])
  return folder / 'model'


def rotate_neighbours(x, frequencies):
  """As llama2.c does: features 2 i and 2 i + 1 are a pair."""
  angles = np.arange(x.shape[1])[:, None] * np.asarray(frequencies)
  cos, sin = (jnp.asarray(f(angles)[None, :, None], jnp.float32) for f in (np.cos, np.sin))
  a, b = x[..., ::2], x[..., 1::2]
  return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)


@pytest.mark.slow
def test_logits_are_those_of_neighbouring_pairs(folder, weights, monkeypatch):
  config = llama.parse_config(llama.read_config(folder))
  tokens = np.random.default_rng(1).integers(0, 264, (2, 12), np.int32)

  def logits(params):
    # Traced each time, for what it calls changes.
    fn = lambda params: llama.logits(config, params, llama.features(config, params, tokens, jnp.float32))
    return jax.jit(fn)(params)

  found = logits(llama.load(folder, config, None))
  layers = {
    'input_layernorm': 'norm1',
    'self_attn.q_proj': 'q',
    'self_attn.k_proj': 'k',
    'self_attn.v_proj': 'v',
    'self_attn.o_proj': 'o',
    'post_attention_layernorm': 'norm2',
    'mlp.gate_proj': 'gate',
    'mlp.up_proj': 'up',
    'mlp.down_proj': 'down',
  }
  params = {
    'embed_tokens.weight': jnp.asarray(weights['embed'].reshape(config.chunks, -1, config.width)),
    'layers': {f'{name}.weight': jnp.asarray(weights[own]) for name, own in layers.items()},
    'norm.weight': jnp.asarray(weights['norm']),
  }
  monkeypatch.setattr(llama, 'rotate', rotate_neighbours)
  # Logits of about one, of products in another order.
  np.testing.assert_allclose(found, logits(params), rtol=0, atol=1e-4)


def test_the_tokenizer_merges_by_score_and_falls_back_to_bytes(folder):
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  encoded = tokenizer.encode('abé\n')
  assert encoded.tokens == ['<s>', '\u2581a', 'b', '<0xC3>', '<0xA9>', '<0x0A>']
  assert tokenizer.decode(encoded.ids) == 'abé\n'
