"""Logits by transformers of random checkpoints of each family, kept so that tests compare with them without torch.

python tests/examples/reference_logits.py

needs torch and transformers, and writes reference_logits.npz beside it.
"""

from functools import partial
from pathlib import Path
import sys
import tempfile
import warnings

import numpy as np

SEED = 0
DEVIATION = 0.1  # Of weights: large enough for attention to depend on all that a config says.
TOKENS = np.random.default_rng(SEED).integers(0, 320, (2, 24), np.int32)
FILE = Path(__file__).with_name('reference_logits.npz')

_SHARED = {
  'vocab_size': 320,
  'hidden_size': 64,
  'intermediate_size': 160,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-5,
  'max_position_embeddings': 256,
  'rope_theta': 10000.0,
  'tie_word_embeddings': False,
}
_LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  # So that of the eight wavelengths some are kept, some scaled, and some in between.
  'original_max_position_embeddings': 64,
}
CONFIGS = {
  'llama2': _SHARED | {'model_type': 'llama', 'num_key_value_heads': 4},
  'llama3': _SHARED | {'model_type': 'llama', 'rope_theta': 500000.0, 'rope_scaling': _LLAMA3},
  'llama-linear-biased': _SHARED
  | {
    'model_type': 'llama',
    'rope_scaling': {'type': 'linear', 'factor': 2.0},
    'attention_bias': True,
    'mlp_bias': True,
  },
  'smollm': _SHARED
  | {'model_type': 'llama', 'hidden_size': 48, 'num_attention_heads': 3, 'num_key_value_heads': 1}
  | {'tie_word_embeddings': True},
  'qwen2': _SHARED | {'model_type': 'qwen2', 'tie_word_embeddings': True},
  'qwen3': _SHARED | {'model_type': 'qwen3', 'head_dim': 32, 'vocab_size': 321},
}


def transformers_logits(folder: Path) -> np.ndarray:
  """Of TOKENS, float32[batch, length, vocabulary]."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
      return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def main() -> None:
  sys.path.insert(0, str(Path(__file__).parents[2] / 'examples'))
  import llama

  kept = {}
  for name, raw in CONFIGS.items():
    with tempfile.TemporaryDirectory() as folder:
      get = partial(llama.random_tensor, llama.parse_config(raw), SEED, DEVIATION)
      llama.save(Path(folder), raw, get, np.float32)
      kept[name] = transformers_logits(Path(folder))[:, -1]
  np.savez_compressed(FILE, **kept)


if __name__ == '__main__':
  main()
