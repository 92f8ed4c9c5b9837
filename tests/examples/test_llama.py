"""The model of the fine-tuning example: its logits, its files, and what of it exists at once."""

from functools import partial

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

import lpmm_optax as lpmm


@pytest.fixture(scope='module', params=CONFIGS)
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
def logits_of(config, params):
  """Of TOKENS, float32[batch, length, vocabulary]."""
  x = llama.features(config, params, TOKENS, jnp.float32)
  return llama.logits(config, params, x).reshape(*TOKENS.shape, config.vocabulary)


def test_logits_are_those_of_transformers_that_are_kept(name, config, params):
  found = np.asarray(logits_of(config, params))
  with np.load(FILE) as kept:
    np.testing.assert_allclose(found[:, -1], kept[name], rtol=0, atol=1e-4)


def test_logits_are_those_of_transformers(folder, config, params):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  np.testing.assert_allclose(logits_of(config, params), transformers_logits(folder), rtol=0, atol=1e-4)


def test_what_is_exported_loads_in_transformers_with_the_same_logits(folder, raw, config, tmp_path):
  pytest.importorskip('transformers')
  pytest.importorskip('torch')
  params = llama.load(folder, config, lpmm.INT8)
  llama.save(tmp_path, raw, partial(llama.get_tensor, config, params), jnp.bfloat16)
  theirs = transformers_logits(tmp_path)
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), lpmm.dequantize(params))
  # Of the weights in the file, computed in float32 by both.
  np.testing.assert_allclose(logits_of(config, rounded), theirs, rtol=0, atol=1e-4)


def test_losses_are_those_of_the_logits(config, params):
  tokens, targets = TOKENS[:, :-1], TOKENS[:, 1:]
  found = jax.jit(partial(llama.losses, config, dtype=jnp.float32))(params, tokens, targets)
  log_p = jax.nn.log_softmax(logits_of(config, params)[:, :-1])
  expected = -np.take_along_axis(np.asarray(log_p), targets[..., None], axis=-1)[..., 0]
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
