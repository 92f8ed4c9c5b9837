"""Decoders of the Llama family in plain JAX, in the tensors and files of Hugging Face's layout.

Llama 2 and 3, SmolLM, Qwen 2 and 3: grouped-query attention, rotary embedding with or without scaling, gated MLPs,
tied or untied embeddings. Parameters may be quantized or dense. A folder holds config.json and one or more
model*.safetensors, with an index if there are several.

A tensor of every layer is stacked along a first axis, over which `lax.scan` runs, and tables of the vocabulary are
stacks of equal chunks. Whatever is decoded is thus one layer or one chunk, used once, and so is every gradient.
"""

from collections.abc import Callable
from collections.abc import Iterator
import functools
import json
import math
from pathlib import Path
from typing import Any
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import safetensors
import safetensors.numpy

import lpmm_optax as lpmm

MAX_CHUNKS = 16  # Of a vocabulary; its logits and its part of a table are the largest arrays of a step, but for these.
QUERIES = 512  # Of a sequence, whose scores in attention exist at once.
SHARD_BYTES = 4 * 10**9  # Of a file.
INDEX = 'model.safetensors.index.json'

# ---------------------------------------------------------------------------------------------------------------------
# Shapes
# ---------------------------------------------------------------------------------------------------------------------


class Config(NamedTuple):
  """What config.json says, as far as the model depends on it.

  Attributes:
    vocabulary: number of tokens.
    width: of the residual stream.
    hidden: width of the MLPs.
    layers: how many.
    heads: of queries.
    kv_heads: of keys and values, each of which serves `heads // kv_heads` heads of queries.
    head_size: of each.
    norm_eps: added to the mean square.
    tied: whether the embedding is the output projection too.
    qkv_bias: whether queries, keys and values have one.
    out_bias: whether the output of attention has one.
    mlp_bias: whether the MLP's projections have one.
    qk_norm: whether each head's queries and keys are normalised.
    frequencies: of rotary embedding, in radians per position; head_size // 2 of them.
  """

  vocabulary: int
  width: int
  hidden: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  norm_eps: float
  tied: bool
  qkv_bias: bool
  out_bias: bool
  mlp_bias: bool
  qk_norm: bool
  frequencies: tuple[float, ...]

  @property
  def chunks(self) -> int:
    """Into which tables of the vocabulary are divided: the most, up to MAX_CHUNKS, that are equal."""
    return next(n for n in range(MAX_CHUNKS, 0, -1) if self.vocabulary % n == 0)


# What a file may leave out, by its model_type.
DEFAULTS: dict[str, dict[str, Any]] = {'llama': {}, 'qwen2': {}, 'qwen3': {'head_dim': 128}}


def parse_config(raw: dict[str, Any]) -> Config:
  """Of the contents of config.json.

  Raises:
    ValueError: for a model of another kind, or with a part that this file does not have.
  """
  kind = raw.get('model_type')
  if kind not in DEFAULTS:
    raise ValueError(f'model_type {kind!r} is not supported: it must be one of {", ".join(DEFAULTS)}')
  for name, wanted in (('hidden_act', 'silu'), ('use_sliding_window', False)):
    if raw.get(name, wanted) != wanted:
      raise ValueError(f'{name} {raw[name]!r} is not supported, only {wanted!r}')
  get = lambda name, default: next((x for x in (raw.get(name), DEFAULTS[kind].get(name)) if x is not None), default)
  heads, bias = raw['num_attention_heads'], get('attention_bias', False)
  head_size = get('head_dim', raw['hidden_size'] // heads)
  return Config(
    vocabulary=raw['vocab_size'],
    width=raw['hidden_size'],
    hidden=raw['intermediate_size'],
    layers=raw['num_hidden_layers'],
    heads=heads,
    kv_heads=get('num_key_value_heads', heads),
    head_size=head_size,
    norm_eps=get('rms_norm_eps', 1e-6),
    tied=get('tie_word_embeddings', False),
    qkv_bias=kind == 'qwen2' or bias,
    out_bias=kind != 'qwen2' and bias,
    mlp_bias=get('mlp_bias', False),
    qk_norm=kind == 'qwen3',
    frequencies=rope_frequencies(head_size, get('rope_theta', 10_000.0), raw),
  )


def rope_frequencies(head_size: int, theta: float, raw: dict[str, Any]) -> tuple[float, ...]:
  """Radians per position: theta^(-2 i / head_size), scaled as 'rope_scaling' says, or in newer files 'rope_parameters'.

  'linear' divides all by its factor; 'llama3' those of long wavelengths, with a ramp between two bounds.
  """
  scaling = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
  kind = scaling.get('rope_type') or scaling.get('type') or 'default'
  frequencies = scaling.get('rope_theta', theta) ** (-np.arange(0, head_size, 2) / head_size)
  if kind == 'linear':
    frequencies = frequencies / scaling['factor']
  elif kind == 'llama3':
    turns = scaling['original_max_position_embeddings'] * frequencies / (2 * math.pi)
    low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
    kept = np.clip((turns - low) / (high - low), 0, 1)
    frequencies = frequencies * (kept + (1 - kept) / scaling['factor'])
  elif kind != 'default':
    raise ValueError(f'rotary embedding with scaling {kind!r} is not supported, only linear and llama3')
  return tuple(frequencies.tolist())


def layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """Of a layer's tensors, by their names in it. Matrices are [outputs, inputs]."""
  width, hidden = config.width, config.hidden
  queries, keys = config.heads * config.head_size, config.kv_heads * config.head_size
  matrices = {
    'self_attn.q_proj': (queries, width, config.qkv_bias),
    'self_attn.k_proj': (keys, width, config.qkv_bias),
    'self_attn.v_proj': (keys, width, config.qkv_bias),
    'self_attn.o_proj': (width, queries, config.out_bias),
    'mlp.gate_proj': (hidden, width, config.mlp_bias),
    'mlp.up_proj': (hidden, width, config.mlp_bias),
    'mlp.down_proj': (width, hidden, config.mlp_bias),
  }
  norms = {'input_layernorm': width, 'post_attention_layernorm': width}
  if config.qk_norm:
    norms |= {'self_attn.q_norm': config.head_size, 'self_attn.k_norm': config.head_size}
  shapes = {f'{name}.weight': (outputs, inputs) for name, (outputs, inputs, _) in matrices.items()}
  biases = {f'{name}.bias': (outputs,) for name, (outputs, _, bias) in matrices.items() if bias}
  return shapes | biases | {f'{name}.weight': (size,) for name, size in norms.items()}


def dense_shapes(config: Config) -> dict[str, Any]:
  """The tree of parameters, of float32: tables [chunks, rows, width], layers [layers, ...], and the last norm."""
  float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  table = float32(config.chunks, config.vocabulary // config.chunks, config.width)
  tree = {
    'embed_tokens.weight': table,
    'layers': {name: float32(config.layers, *shape) for name, shape in layer_shapes(config).items()},
    'norm.weight': float32(config.width),
  }
  return tree if config.tied else tree | {'lm_head.weight': table}


def is_matrix(path: str) -> bool:
  """Whether a parameter of that path is a matrix: norms and biases are small, stay dense and do not decay."""
  return not path.endswith(('norm.weight', '.bias'))


def quantize(dense: Any, format: lpmm.Format | None) -> Any:
  """Matrices in a format, or all as it is for None; of arrays or under `jax.eval_shape`."""
  if format is None:
    return dense
  return lpmm.quantize(dense, format, where=lambda path, leaf: format if is_matrix(path) else None)


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


def decode(weights: Any, dtype: Any) -> Any:
  """Dense weights; on a mesh, gathered by every device, for what is split there are the examples."""
  weights = lpmm.dequantize(weights, dtype)
  return weights if jax.sharding.get_abstract_mesh().empty else lax.with_sharding_constraint(weights, P())


def rms_norm(x: jax.Array, gain: jax.Array, eps: float) -> jax.Array:
  """Of float[..., size], by its root mean square, in float32."""
  precise = x.astype(jnp.float32)
  normed = precise * lax.rsqrt(jnp.mean(precise * precise, axis=-1, keepdims=True) + eps)
  return normed.astype(x.dtype) * gain.reshape((1,) * (x.ndim - 1) + gain.shape)


def linear(x: jax.Array, weights: dict[str, jax.Array], name: str) -> jax.Array:
  """From float[rows, inputs] to float[rows, outputs]."""
  y = x @ weights[f'{name}.weight'].T
  return y + weights[f'{name}.bias'][None, :] if f'{name}.bias' in weights else y


def rotate(x: jax.Array, frequencies: tuple[float, ...]) -> jax.Array:
  """Turns float[batch, length, heads, size] by position: the first half of the features paired with the second."""
  angles = np.arange(x.shape[1])[:, None] * np.asarray(frequencies)
  cos, sin = (jnp.asarray(f(angles)[None, :, None], jnp.float32).astype(x.dtype) for f in (np.cos, np.sin))
  left, right = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention of float[batch, length, heads, size], whose scores exist for a block of queries at a time.

  The backward pass computes each block's again.
  """
  batch, length, heads, size = q.shape
  if length <= QUERIES:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)
  count = -(-length // QUERIES)
  padded = jnp.pad(q, ((0, 0), (0, count * QUERIES - length), (0, 0), (0, 0)))
  blocks = jnp.moveaxis(padded.reshape(batch, count, QUERIES, heads, size), 1, 0)

  def block(numbered):
    number, queries = numbered
    mask = (number * QUERIES + jnp.arange(QUERIES))[:, None] >= jnp.arange(length)[None, :]
    return jax.nn.dot_product_attention(queries, k, v, mask=mask[None, None])

  out = lax.map(jax.checkpoint(block), (jnp.arange(count), blocks))
  return jnp.moveaxis(out, 0, 1).reshape(padded.shape)[:, :length]


def layer(config: Config, length: int, x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
  """Attention and MLP, from and to float[batch * length, width]; what a scan leaves behind is None."""
  weights = decode(weights, x.dtype)
  norm = lambda x, name: rms_norm(x, weights[f'{name}.weight'], config.norm_eps)
  heads = lambda x, count: x.reshape(-1, length, count, config.head_size)
  h = norm(x, 'input_layernorm')
  q = heads(linear(h, weights, 'self_attn.q_proj'), config.heads)
  k = heads(linear(h, weights, 'self_attn.k_proj'), config.kv_heads)
  v = heads(linear(h, weights, 'self_attn.v_proj'), config.kv_heads)
  if config.qk_norm:
    q, k = norm(q, 'self_attn.q_norm'), norm(k, 'self_attn.k_norm')
  q, k = rotate(q, config.frequencies), rotate(k, config.frequencies)
  attended = attend(q, k, v)
  x = x + linear(attended.reshape(x.shape[0], -1), weights, 'self_attn.o_proj')
  h = norm(x, 'post_attention_layernorm')
  gated = jax.nn.silu(linear(h, weights, 'mlp.gate_proj')) * linear(h, weights, 'mlp.up_proj')
  return x + linear(gated, weights, 'mlp.down_proj'), None


def embed(config: Config, table: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
  """From int32[rows] to float[rows, width]; every token is looked up in every chunk, and found in one."""

  def chunk(x, numbered):
    number, rows = numbered
    rows = decode(rows, dtype)
    place = tokens - number * rows.shape[0]
    found = rows[jnp.clip(place, 0, rows.shape[0] - 1)]
    return x + jnp.where(((place >= 0) & (place < rows.shape[0]))[:, None], found, jnp.zeros((), dtype)), None

  zeros = jnp.zeros((tokens.size, config.width), dtype)
  return lax.scan(jax.checkpoint(chunk), zeros, (jnp.arange(config.chunks), table))[0]


def features(config: Config, params: Any, tokens: jax.Array, dtype: Any) -> jax.Array:
  """What the output projection sees of int32[batch, length]: float[batch * length, width], in dtype."""
  x = embed(config, params['embed_tokens.weight'], tokens.reshape(-1), dtype)
  step = jax.checkpoint(functools.partial(layer, config, tokens.shape[1]))
  x, _ = lax.scan(step, x, params['layers'])
  return rms_norm(x, decode(params['norm.weight'], dtype), config.norm_eps)


def head(config: Config, params: Any) -> Any:
  """The output projection, [chunks, rows, width]."""
  return params['embed_tokens.weight' if config.tied else 'lm_head.weight']


def chunk_logits(x: jax.Array, rows: Any) -> jax.Array:
  """Of a chunk of the vocabulary, float32[rows of x, rows of the chunk]."""
  return jnp.matmul(x, decode(rows, x.dtype).T, preferred_element_type=jnp.float32)


def logits(config: Config, params: Any, x: jax.Array) -> jax.Array:
  """From features, float[rows, width], to float32[rows, vocabulary]."""
  _, parts = lax.scan(lambda _, rows: (None, chunk_logits(x, rows)), None, head(config, params))
  return jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], config.vocabulary)


def losses(config: Config, params: Any, tokens: jax.Array, targets: jax.Array, dtype: Any) -> jax.Array:
  """Of int32[batch, length] each, -log p(target | tokens up to its place): float32[batch, length], in nats.

  Logits exist for a chunk of the vocabulary at a time; sum and maximum of all go from chunk to chunk (as in Milakov and
  Gimelshein, "Online normalizer calculation for softmax", 2018). The backward pass computes each chunk's again.
  """
  x, labels = features(config, params, tokens, dtype), targets.reshape(-1)

  def chunk(seen, numbered):
    (largest, total, wanted), (number, rows) = seen, numbered
    values = chunk_logits(x, rows)
    place = labels - number * values.shape[1]
    is_label = lax.broadcasted_iota(jnp.int32, values.shape, 1) == place[:, None]
    # What is subtracted cancels, so its derivative is left out.
    new_largest = lax.stop_gradient(jnp.maximum(largest, jnp.max(values, axis=1)))
    total = total * jnp.exp(largest - new_largest) + jnp.sum(jnp.exp(values - new_largest[:, None]), axis=1)
    return (new_largest, total, wanted + jnp.sum(jnp.where(is_label, values, 0.0), axis=1)), None

  zeros = jnp.zeros(labels.shape, jnp.float32)
  numbered = jnp.arange(config.chunks), head(config, params)
  (largest, total, wanted), _ = lax.scan(jax.checkpoint(chunk), (zeros - jnp.inf, zeros, zeros), numbered)
  return (largest + jnp.log(total) - wanted).reshape(targets.shape)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class Place(NamedTuple):
  """Where a tensor, or some of its rows, lies in the tree.

  Attributes:
    path: keys of the tree.
    index: along the stack; None for what is no stack.
    rows: of the tensor, start and stop; None for all.
  """

  path: tuple[str, ...]
  index: int | None
  rows: tuple[int, int] | None


def tensors(config: Config) -> dict[str, tuple[tuple[int, ...], list[Place]]]:
  """Shape and places of every tensor, by its name in a file."""
  size = config.vocabulary // config.chunks

  def table(name):
    places = [Place((name,), i, (i * size, (i + 1) * size)) for i in range(config.chunks)]
    return (config.vocabulary, config.width), places

  out = {'model.embed_tokens.weight': table('embed_tokens.weight')}
  for i in range(config.layers):
    for name, shape in layer_shapes(config).items():
      out[f'model.layers.{i}.{name}'] = shape, [Place(('layers', name), i, None)]
  out['model.norm.weight'] = (config.width,), [Place(('norm.weight',), None, None)]
  return out if config.tied else out | {'lm_head.weight': table('lm_head.weight')}


def read_config(folder: Path) -> dict[str, Any]:
  return json.loads((folder / 'config.json').read_text())


def find_tensors(folder: Path, config: Config) -> dict[str, Path]:
  """The file of every tensor.

  Raises:
    FileNotFoundError: if the folder has no safetensors.
    ValueError: if tensors are missing or too many, or of other shapes than the config says, naming one.
  """
  if (folder / INDEX).is_file():
    names = json.loads((folder / INDEX).read_text())['weight_map'].values()
    files = [folder / name for name in dict.fromkeys(names)]
  else:
    files = sorted(folder.glob('model*.safetensors'))
  if not files:
    raise FileNotFoundError(f'{folder} holds no model*.safetensors')
  found, shapes = {}, {}
  for file in files:
    with safetensors.safe_open(file, framework='numpy') as opened:
      for name in opened.keys():  # noqa: SIM118 (it is no dict)
        found[name], shapes[name] = file, tuple(opened.get_slice(name).get_shape())
  expected = {name: shape for name, (shape, _) in tensors(config).items()}
  # Tables that older files carry, and a copy of a tied embedding.
  ignored = {name for name in found if name.endswith('rotary_emb.inv_freq')}
  ignored |= {'lm_head.weight'} if config.tied else set()
  different = [name for name in expected if shapes.get(name) != expected[name]]
  different += sorted(found.keys() - expected.keys() - ignored)
  if different:
    name = different[0]
    raise ValueError(
      f'{folder}: {len(different)} tensors are not what config.json says, the first {name}, which should be '
      f'{expected.get(name, "absent")} and is {shapes.get(name, "absent")}'
    )
  return {name: found[name] for name in expected}


def read_tensor(file: Path, name: str, rows: tuple[int, int] | None) -> np.ndarray:
  """A tensor, or some of its rows. The file is closed again, so that its pages are not held."""
  with safetensors.safe_open(file, framework='numpy') as opened:
    return opened.get_slice(name)[slice(*rows) if rows is not None else slice(None)]


@functools.partial(jax.jit, donate_argnums=0)
def put(leaf: Any, tensor: jax.Array, index: int | None) -> Any:
  """Writes a tensor into its place, in place, rounded to the nearest code where the leaf is quantized."""
  dense = tensor.astype(jnp.float32)
  if lpmm.is_quantized(leaf):
    dense = lpmm.quantize(dense, leaf.format, where=[('', leaf.format)])
  if index is None:
    return dense
  write = lambda whole, part: lax.dynamic_update_index_in_dim(whole, part.astype(whole.dtype), index, 0)
  return jax.tree.map(write, leaf, dense)


@jax.jit
def take(leaf: Any, index: int | None) -> jax.Array:
  """A tensor in bfloat16."""
  if index is not None:
    leaf = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, 0, keepdims=False), leaf)
  return lpmm.dequantize(leaf, jnp.bfloat16)


def load(folder: Path, config: Config, format: lpmm.Format | None, place: Any = None) -> Any:
  """Parameters in a format, read tensor by tensor: no dense copy of more than one of them exists.

  Args:
    folder: of the files.
    config: of them.
    format: of matrices; None keeps all dense, in float32.
    place: a tree of shardings; None for the default device.

  Raises:
    FileNotFoundError, ValueError: if the files are not what config.json says.
  """
  files = find_tensors(folder, config)
  shapes = jax.eval_shape(lambda tree: quantize(tree, format), dense_shapes(config))
  params = jax.jit(lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=place)()
  for name, (_, places) in tensors(config).items():
    for path, index, rows in places:
      tree = params if len(path) == 1 else params[path[0]]
      leaf = put(tree[path[-1]], read_tensor(files[name], name, rows), index)
      tree[path[-1]] = jax.block_until_ready(leaf)  # Else tensors would queue up.
  return params


def get_tensor(config: Config, params: Any, name: str) -> np.ndarray:
  """A tensor of a file, in bfloat16."""
  parts = []
  for path, index, _ in tensors(config)[name][1]:
    leaf = params[path[0]] if len(path) == 1 else params[path[0]][path[1]]
    parts.append(np.asarray(take(leaf, index)))
  return np.concatenate(parts) if len(parts) > 1 else parts[0]


def random_tensor(config: Config, seed: int, deviation: float, name: str) -> np.ndarray:
  """A tensor of an untrained model, in float32: normally distributed around 0, or 1 for a norm."""
  shape, _ = tensors(config)[name]
  rng = np.random.default_rng([seed, *name.encode()])
  return (deviation * rng.standard_normal(shape) + name.endswith('norm.weight')).astype(np.float32)


def save(folder: Path, raw: dict[str, Any], get: Callable[[str], np.ndarray], dtype: Any) -> None:
  """Writes config.json and the tensors that `get` gives of their names, all of one dtype.

  Files are of SHARD_BYTES at most, if no single tensor is larger; the host holds one of them at a time.
  """
  folder.mkdir(parents=True, exist_ok=True)
  sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, _) in tensors(parse_config(raw)).items()}
  shards = list(_groups(sizes))
  files = ['model.safetensors']
  if len(shards) > 1:
    files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n')
  for file, names in zip(files, shards, strict=True):
    safetensors.numpy.save_file({name: get(name) for name in names}, folder / file, metadata={'format': 'pt'})
  (folder / 'config.json').write_text(json.dumps(raw | {'torch_dtype': np.dtype(dtype).name}, indent=2) + '\n')


def _groups(sizes: dict[str, int]) -> Iterator[list[str]]:
  """Names in order, in groups of SHARD_BYTES."""
  group: list[str] = []
  for name in sizes:
    if group and sum(sizes[x] for x in group) + sizes[name] > SHARD_BYTES:
      yield group
      group = []
    group.append(name)
  yield group
