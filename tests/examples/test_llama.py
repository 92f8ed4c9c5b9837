"""The model of the fine-tuning example: its logits, its files, and what of it exists at once."""

from functools import partial
import json
import math
import os
from pathlib import Path
import subprocess
import sys

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from reference_logits import CONFIGS
from reference_logits import DEVIATION
from reference_logits import FILE
from reference_logits import SEED
from reference_logits import TOKENS
from reference_logits import transformers_logits
from runs import slow

import lpmm_optax as lpmm


# Scaled rotary embedding, and normalised heads with an odd vocabulary; the others differ from them in a part each.
@pytest.fixture(scope='module', params=['llama3', *slow('llama2', 'llama-linear-biased', 'smollm', 'qwen2', 'qwen3')])
def name(request):
  return request.param


@pytest.fixture(scope='module')
def raw(name):
  return CONFIGS[name]


@pytest.fixture(scope='module')
def config(raw):
  return llama.parse_config(raw)


@pytest.fixture(scope='module')
def folder(config, raw, tmp_path_factory):
  """A random checkpoint in several files."""
  folder = tmp_path_factory.mktemp('checkpoint')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(llama, 'SHARD_BYTES', 100_000)
    llama.save(folder, raw, partial(llama.random_tensor, config, SEED, DEVIATION), np.float32)
  assert len(list(folder.glob('model-*.safetensors'))) > 2
  return folder


@pytest.fixture(scope='module')
def params(folder, config):
  return llama.load(folder, config, None)


@partial(jax.jit, static_argnums=0)
def compute(config, params):
  """Logits of TOKENS, float32[batch, length, vocabulary], and losses, float32[batch, length - 1]."""
  x = llama.features(config, params, TOKENS, jnp.float32)
  losses = llama.losses(config, params, TOKENS[:, :-1], TOKENS[:, 1:], jnp.float32)
  return llama.logits(config, params, x).reshape(*TOKENS.shape, config.vocabulary), losses


@pytest.fixture(scope='module')
def computed(config, params):
  return jax.tree.map(np.asarray, compute(config, params))


def test_logits_are_those_of_transformers_that_are_kept(name, computed):
  logits, _ = computed
  with np.load(FILE) as kept:
    np.testing.assert_allclose(logits[:, -1], kept[name], rtol=0, atol=1e-4)


def test_losses_are_those_of_the_logits(computed):
  logits, losses = computed
  log_p = jax.nn.log_softmax(logits[:, :-1])
  expected = -np.take_along_axis(np.asarray(log_p), TOKENS[:, 1:, None], axis=-1)[..., 0]
  np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_attention_a_block_of_queries_at_a_time_is_attention(monkeypatch):
  keys = jax.random.split(jax.random.key(0), 3)
  q, k, v = (jax.random.normal(key, (2, 10, heads, 8)) for key, heads in zip(keys, (4, 2, 2), strict=True))
  values_and_gradients = lambda: jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(llama.attend(*x))), (0, 1, 2))(q, k, v)
  whole = values_and_gradients()
  monkeypatch.setattr(llama, 'QUERIES', 4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, values_and_gradients())


def test_logits_are_those_of_transformers(folder, computed):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  np.testing.assert_allclose(computed[0], transformers_logits(folder), rtol=0, atol=1e-4)


def test_what_is_exported_loads_in_transformers_with_the_same_logits(folder, raw, config, tmp_path):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  params = llama.load(folder, config, lpmm.INT8)
  llama.save(tmp_path, raw, partial(llama.get_tensor, config, params), jnp.bfloat16)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), lpmm.dequantize(params))
  # Of the weights in the file, computed in float32 by both.
  np.testing.assert_allclose(compute(config, rounded)[0], transformers_logits(tmp_path), rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

# Loads a model of 65 million parameters in bfloat16 twice, of which the first compiles, and prints its bytes and those
# by which the process grew at most.
LOADING = """
import ctypes, functools, json, pathlib, sys
import jax, ml_dtypes, numpy as np
import llama
import lpmm_optax as lpmm

def resident(field):
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))

folder, raw = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
config = llama.parse_config(raw)
get = lambda name: np.ones(llama.tensors(config)[name][0], ml_dtypes.bfloat16)
llama.save(folder, raw, get, ml_dtypes.bfloat16)
llama.load(folder, config, lpmm.INT8)
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path('/proc/self/clear_refs').write_text('5')  # The peak starts anew.
before = resident('VmRSS')
params = llama.load(folder, config, lpmm.INT8)
print(sum(x.nbytes for x in jax.tree.leaves(params)), resident('VmHWM') - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='asks the Linux kernel for its memory')
def test_the_host_never_holds_the_dense_model(tmp_path):
  raw = CONFIGS['llama2'] | {'vocab_size': 1024, 'hidden_size': 512, 'intermediate_size': 1408, 'num_hidden_layers': 20}
  raw |= {'num_attention_heads': 8, 'num_key_value_heads': 8}
  count = sum(math.prod(shape) for shape, _ in llama.tensors(llama.parse_config(raw)).values())
  # What is freed goes back to the kernel at once.
  paths = os.pathsep.join([str(Path(llama.__file__).parent), str(Path(lpmm.__file__).parents[1])])
  environment = os.environ | {'PYTHONPATH': paths, 'MALLOC_MMAP_THRESHOLD_': str(2**17), 'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, '-c', LOADING, str(tmp_path), json.dumps(raw)]
  out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=240).stdout
  held, peak = map(int, out.split())
  assert held < 1.05 * count
  # On top come 20 MB: one tensor as it is read and the temporaries of rounding it, compiled programs, and what the
  # allocators keep. In bfloat16 the dense model would take another 65 MB beyond the 65 of its codes.
  assert peak < held + 3 / 4 * count


def test_files_that_are_not_what_the_config_says_are_refused(folder, raw, tmp_path):
  config = llama.parse_config(raw)
  with pytest.raises(FileNotFoundError, match='holds no model'):
    llama.load(tmp_path, config, None)
  deeper = llama.parse_config(raw | {'num_hidden_layers': 4})
  with pytest.raises(ValueError, match=r'the first model\.layers\.3\.self_attn\.q_proj\.weight, .* and is absent'):
    llama.load(folder, deeper, None)
  with pytest.raises(ValueError, match=r'first model\.layers\.2\..* should be absent'):
    llama.load(folder, llama.parse_config(raw | {'num_hidden_layers': 2}), None)


@pytest.mark.parametrize(
  ('changed', 'message'),
  [
    ({'model_type': 'gpt2'}, "model_type 'gpt2' is not supported"),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu' is not supported"),
    ({'use_sliding_window': True}, 'use_sliding_window True is not supported'),
    ({'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0}}, "scaling 'yarn' is not supported"),
  ],
)
def test_a_model_of_another_kind_is_refused(changed, message):
  with pytest.raises(ValueError, match=message):
    llama.parse_config(CONFIGS['llama2'] | changed)
