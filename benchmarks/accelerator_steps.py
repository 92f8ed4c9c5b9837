"""Compiles steps for a target that need not be there; `benchmarks/accelerators.py` runs it in an environment for that.

  python benchmarks/accelerator_steps.py TARGET MODEL METHOD...

It prints one line of JSON per method. Rates are constants.
"""

from collections.abc import Callable
from functools import partial
import json
import math
import os
import sys
import time
from typing import Any
from typing import NamedTuple

from accelerators import EIGHT
from accelerators import EMBEDDING
from accelerators import FINETUNED
from accelerators import LORA
from accelerators import METHODS
from accelerators import RESNET
from accelerators import SPLIT
from accelerators import STACKED
from accelerators import STEP_BOTH
from accelerators import STEP_ROWS
from accelerators import TARGETS
from accelerators import TRAIN_1B
from accelerators import TRAIN_8B
from accelerators import TRAIN_BOTH
from accelerators import TRAIN_RESNET
from accelerators import TRAIN_ROWS
from accelerators import TRAIN_TRANSFORMER
from accelerators import Method
from accelerators import Split
import flashoptim_jax as flashoptim
import hlo
import jax
from jax import lax
from jax.experimental import topologies
import jax.numpy as jnp
import numpy as np
import optax
import peak_memory

import lpmm_optax as lpmm

ONE_DEVICE = Split({'x': 1})
# How many elements the loop takes at once where a GPU is the default device.
GPU_TILE = 2**24
CHUNKS = 8
# Of the queries that attend at once, where scores of all of them are not to exist.
QUERIES = 512
RANK = 16


class Program(NamedTuple):
  """What is compiled.

  Attributes:
    step: `(params, opt_state, *others)` to these two and others.
    args: shapes of what it takes; the first two are donated.
  """

  step: Callable[..., Any]
  args: tuple[Any, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers
# ---------------------------------------------------------------------------------------------------------------------


def stock(optimizer: str) -> Any:
  """Of Optax."""
  return {'sgd': optax.sgd(0.1, 0.9), 'adamw': optax.adamw(1e-3), 'lion': optax.lion(1e-4)}[optimizer]


def flash(optimizer: str, fused: bool) -> Any:
  """Of flashoptim-jax; its fused kernels are for NVIDIA GPUs."""
  if optimizer == 'sgd':
    return flashoptim.flash_sgdw(0.1, momentum=0.9, fused=fused)
  make = {'adamw': flashoptim.flash_adamw, 'lion': flashoptim.flash_lion}[optimizer]
  return make(1e-4, fused=fused)


def ours(method: Method) -> Any:
  """Of this library, without accumulation."""
  if method.optimizer == 'adafactor':
    # Of a head in chunks, each is a leaf of its own, as it moves.
    return lpmm.layerwise(lpmm.low_precision(optax.adafactor(1e-3)), stacked='layers|head')
  make = {'sgd': lpmm.sgdm, 'adamw': lpmm.adamw, 'lion': lpmm.lion}[method.optimizer]
  options: dict[str, Any] = {'error_feedback': False} if method.by == 'lpmm paper' else {}
  if method.by == 'lpmm 4-bit':
    options['formats'] = lpmm.Format(bits=4, block_size=32)
  if method.driver == 'loop in one tile':
    options['tile_size'] = GPU_TILE
  return make(0.1 if method.optimizer == 'sgd' else 1e-4, **options)


# Else in 8 bits.
STORES = {
  'optax fp32': peak_memory.fp32,
  'optax bf16': peak_memory.bf16,
  'flash': peak_memory.bf16,
  'LoRA bf16': peak_memory.bf16,
}


def optimizer_step(method: Method, shapes: Any, platform: str) -> Program:
  """One step, given a gradient in float32."""
  dense = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)
  if method.by == 'flash':
    tx = flash(method.optimizer, fused=platform == 'cuda')
    step = tx.step
  else:
    tx = stock(method.optimizer) if method.by.startswith('optax') else ours(method)

    def step(params, opt_state, grads):
      if method.by == 'optax bf16':  # Else the state would become float32.
        grads = peak_memory.bf16(grads)
      return lpmm.step(tx, grads, params, opt_state)

  params = jax.eval_shape(STORES.get(method.by, peak_memory.int8), dense)
  return Program(step, (params, jax.eval_shape(tx.init, params), dense))


def training_step(method: Method, model: peak_memory.Model) -> Program:
  """Forward pass, backward pass and optimizer, on one of four microbatches, or, without an accumulator, on all."""
  if method.by == 'flash':
    tx = flash(method.optimizer, fused=jax.default_backend() == 'gpu')
    step = peak_memory.flash(tx, model.loss)
  elif method.by.startswith('optax'):
    make = partial(stock, method.optimizer)
    tx = peak_memory.accumulated(make)() if method.accumulates else make()
    step = peak_memory.ordinary(tx, model.loss)
  else:
    tx = ours(method)
    if method.accumulates:
      accumulator = lpmm.INTO_MOMENTUM if method.optimizer == 'sgd' else lpmm.INT8
      tx = lpmm.MultiSteps(tx, peak_memory.MICROBATCHES, accumulator=accumulator)
    step = peak_memory.lean(tx, model.loss)
  store = STORES.get(method.by, peak_memory.int8)
  params = jax.eval_shape(lambda key: store(model.init(key)), jax.random.key(0))
  return Program(step, (params, jax.eval_shape(tx.init, params), *model.batch))


def adapter_step(method: Method, model: peak_memory.Model) -> Program:
  """Forward pass, backward pass and optimizer in float32, of low-rank factors beside matrices that stay."""
  store = STORES.get(method.by, peak_memory.int8)
  base = jax.eval_shape(lambda key: store(model.init(key)), jax.random.key(0))
  matrices = {path: x.shape for path, x in base['layers'].items() if len(x.shape) == 3}
  factor = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  adapters = {k: (factor(layers, rows, RANK), factor(layers, RANK, out)) for k, (layers, rows, out) in matrices.items()}
  tx = stock(method.optimizer)

  def step(params, opt_state, *batch):
    loss = lambda adapters: model.loss(params['base'] | {'adapters': adapters}, *batch)
    value, grads = jax.value_and_grad(loss)(params['adapters'])
    adapters, opt_state = lpmm.step(tx, grads, params['adapters'], opt_state)
    return params | {'adapters': adapters}, opt_state, value

  return Program(step, ({'base': base, 'adapters': adapters}, jax.eval_shape(tx.init, adapters), *model.batch))


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


def rope(x: jax.Array) -> jax.Array:
  """Rotates float[batch, length, heads, size] by position."""
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] / 500000 ** (jnp.arange(half) / half)
  cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
  left, right = x[..., :half], x[..., half:]
  return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1).astype(x.dtype)


def attend_at_once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """Causal attention of [batch, length, heads, size], whose scores exist all at once."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def attend_in_blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
  """The same, a block of queries at a time, whose scores are computed again in the backward pass."""
  size = min(QUERIES, q.shape[1])
  starts = jnp.arange(0, q.shape[1], size)

  def block(start):
    queries = lax.dynamic_slice_in_dim(q, start, size, axis=1)
    mask = start + jnp.arange(size)[:, None] >= jnp.arange(q.shape[1])
    return jax.nn.dot_product_attention(queries, k, v, mask=mask[None, None])

  return jnp.moveaxis(lax.map(jax.checkpoint(block), starts), 0, 1).reshape(q.shape)


def loss_by_tokens(hidden: jax.Array, head: Any, labels: jax.Array) -> jax.Array:
  """Mean cross entropy, a chunk of the tokens at a time, whose logits are computed again in the backward pass."""
  weights = decode(head)

  def chunk(total, rows):
    hidden, labels = rows
    return total + peak_memory.cross_entropy(hidden @ weights, labels) / CHUNKS, None

  chunks = lambda x: jnp.swapaxes(x.reshape(x.shape[0], CHUNKS, -1, *x.shape[2:]), 0, 1)
  return lax.scan(jax.checkpoint(chunk), jnp.zeros(()), (chunks(hidden), chunks(labels)))[0]


def loss_by_vocabulary(hidden: jax.Array, head: Any, labels: jax.Array) -> jax.Array:
  """The same, a chunk of the vocabulary at a time: head is [chunks, width, words of a chunk], and each moves alone."""

  def chunk(_, rows):
    index, weights = rows
    logits = (hidden @ decode(weights)).astype(jnp.float32)
    words = logits.shape[-1]
    here = labels - index * words
    label = jnp.take_along_axis(logits, jnp.clip(here, 0, words - 1)[..., None], axis=-1)[..., 0]
    return None, (jax.nn.logsumexp(logits, axis=-1), jnp.where((here >= 0) & (here < words), label, 0.0))

  _, (sums, found) = lax.scan(jax.checkpoint(chunk), None, (jnp.arange(head.shape[0]), head))
  return jnp.mean(jax.nn.logsumexp(sums, axis=0) - jnp.sum(found, axis=0))


decode = partial(lpmm.dequantize, dtype=jnp.bfloat16)


def llama(
  layers: int,
  width: int,
  hidden: int,
  heads: int,
  kv_heads: int,
  tokens: int = 2048,
  vocabulary: int = 128256,
  batch: int = 1,
  is_lean: bool = False,
) -> peak_memory.Model:
  """Shaped like Llama 3: scanned layers, computed again in the backward pass, in bfloat16, and untied embeddings.

  A lean one has neither the scores of a whole attention at once nor the gradient of the whole head. Adapters are added
  where there are some.
  """
  size = width // heads
  kv = kv_heads * size
  attend, cross_entropy = (attend_in_blocks, loss_by_vocabulary) if is_lean else (attend_at_once, loss_by_tokens)
  shapes = {
    'embedding': (vocabulary, width),
    'layers': {
      'attention_norm': (layers, width),
      'q': (layers, width, width),
      'k': (layers, width, kv),
      'v': (layers, width, kv),
      'out': (layers, width, width),
      'mlp_norm': (layers, width),
      'gate': (layers, width, hidden),
      'up': (layers, width, hidden),
      'down': (layers, hidden, width),
    },
    'norm': (width,),
    'head': (CHUNKS, width, vocabulary // CHUNKS) if is_lean else (width, vocabulary),
  }

  def layer(x, weights):
    weights, adapters = decode(weights)

    def dense(h, name):
      out = h @ weights[name]
      if name in adapters:
        left, right = adapters[name]
        out = out + h @ left @ right
      return out

    split = lambda h, name, count: dense(h, name).reshape(batch, tokens, count, size)
    h = peak_memory.rms_norm(x, weights['attention_norm'])
    attended = attend(rope(split(h, 'q', heads)), rope(split(h, 'k', kv_heads)), split(h, 'v', kv_heads))
    x = x + dense(attended.reshape(x.shape), 'out')
    h = peak_memory.rms_norm(x, weights['mlp_norm'])
    return x + dense(jax.nn.silu(dense(h, 'gate')) * dense(h, 'up'), 'down'), None

  def loss(params, examples):
    x = decode(params['embedding'])[examples[:, :-1]]
    x, _ = lax.scan(jax.checkpoint(layer), x, (params['layers'], params.get('adapters', {})))
    return cross_entropy(peak_memory.rms_norm(x, decode(params['norm'])), params['head'], examples[:, 1:])

  def init(key):
    del key
    return jax.tree.map(jnp.zeros, shapes, is_leaf=lambda x: isinstance(x, tuple))

  return peak_memory.Model(init, loss, (jax.ShapeDtypeStruct((batch, tokens + 1), jnp.int32),), ())


def small(make: Callable[..., peak_memory.Model]) -> peak_memory.Model:
  """A model of benchmarks/peak_memory.py, as it is there."""
  model = make(peak_memory.parse_args([]))
  return model._replace(batch=tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in model.batch))


def resnet_shapes() -> Any:
  return jax.eval_shape(small(peak_memory.make_resnet).init, jax.random.key(0))


def leaves(*shapes: tuple[int, ...]) -> Callable[[], Any]:
  return lambda: {f'w{i}': jax.ShapeDtypeStruct(shape, jnp.float32) for i, shape in enumerate(shapes)}


llama_1b = partial(llama, 16, 2048, 8192, 32, 8)
llama_8b = partial(llama, 32, 4096, 14336, 32, 8)
LLAMAS = {'1B': llama_1b, '3B': partial(llama, 28, 3072, 8192, 24, 8), '8B': llama_8b}


def llama_8b_shapes() -> Any:
  return jax.eval_shape(llama_8b().init, jax.random.key(0))


STEPS = {
  EIGHT: leaves(*[(2048, 2048)] * 8),
  STACKED: leaves((32, 2048, 8192)),
  EMBEDDING: leaves((50257, 768)),
  RESNET: resnet_shapes,
  STEP_ROWS: llama_8b_shapes,
  STEP_BOTH: llama_8b_shapes,
}
TRAINED = {
  TRAIN_TRANSFORMER: partial(small, peak_memory.make_transformer),
  TRAIN_RESNET: partial(small, peak_memory.make_resnet),
  TRAIN_1B: llama_1b,
  TRAIN_8B: llama_8b,
  TRAIN_ROWS: partial(llama_8b, batch=8),
  TRAIN_BOTH: partial(llama_8b, batch=8),
} | {model: partial(LLAMAS[size], tokens=tokens, is_lean=True) for model, (size, tokens) in FINETUNED.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------------------------------


# Smaller ones, norms and counts, are on every chip.
SMALLEST_SPLIT = 2**20


def mesh_on(target: str, model: str) -> jax.sharding.Mesh:
  """Of devices of a target; where optimizer steps are split, types say how, as they must for the kernel of a TPU."""
  split = SPLIT.get(model, ONE_DEVICE)
  count = math.prod(split.mesh.values())
  platform, name, config = TARGETS[target].platform, TARGETS[target].topology, TARGETS[target].config
  options = {'target_config': config.read_text(), 'topology': '1x1x1'} if config is not None else {}
  topology = topologies.get_topology_desc(platform=platform, topology_name=name if count == 1 else 'v5e:2x4', **options)
  devices = np.array(topology.devices[:count]).reshape(tuple(split.mesh.values()))
  kind = jax.sharding.AxisType.Explicit if model in SPLIT and model in STEPS else jax.sharding.AxisType.Auto
  return jax.sharding.Mesh(devices, tuple(split.mesh), axis_types=(kind,) * len(split.mesh))


def place(x: Any, mesh: jax.sharding.Mesh, split: Split, is_batch: bool = False) -> jax.ShapeDtypeStruct:
  """An array of a step as it lies on a mesh."""
  spec: tuple[Any, ...] = ()
  if is_batch:
    spec = (tuple(split.mesh),)
  elif x.size >= SMALLEST_SPLIT and len(x.shape) > 1:
    spec = (*[None] * (len(x.shape) - 2), split.rows, split.columns)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def compile_and_count(program: Program, mesh: jax.sharding.Mesh, split: Split, is_trained: bool) -> dict[str, Any]:
  """What a row says of the program."""
  params, opt_state, *others = program.args
  args = jax.tree.map(partial(place, mesh=mesh, split=split), (params, opt_state))
  args += jax.tree.map(partial(place, mesh=mesh, split=split, is_batch=is_trained), tuple(others))
  start = time.perf_counter()
  # Pallas asks the mesh for which device it compiles.
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = jax.jit(program.step, donate_argnums=(0, 1)).lower(*args)
  middle = time.perf_counter()
  compiled = lowered.compile()
  end = time.perf_counter()
  counts, memory = hlo.count(compiled.as_text()), compiled.memory_analysis()
  tree = jax.tree.leaves(params, is_leaf=lpmm.is_quantized)
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  bytes_of = lambda tree: sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
  return {
    'parameters': sum(x.size for x in tree),
    'leaves': len(tree),
    'quantized_leaves': sum(map(lpmm.is_quantized, tree)),
    'kernels': counts.kernels,
    'large_kernels': counts.large_kernels,
    'bytes_moved': int(counts.bytes),
    'floor_bytes': bytes_of(program.args) + bytes_of((params, opt_state)),
    'copied_bytes': int(counts.copied_bytes),
    'loops': counts.loops,
    'unknown_loops': counts.unknown_loops,
    'conditionals': counts.conditionals,
    'collectives': counts.collectives,
    'collective_bytes': int(counts.collective_bytes),
    'estimated_cycles': counts.cycles,
    'temporary_bytes': memory.temp_size_in_bytes,
    'peak_bytes': held + memory.temp_size_in_bytes,
    'lower_seconds': round(middle - start, 2),
    'compile_seconds': round(end - middle, 2),
  }


def measure(target: str, model: str, name: str, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """A row, or why there is none."""
  method = METHODS[name]
  # Read when a step is traced.
  os.environ['LPMM_KERNEL'] = TARGETS[target].platform if method.driver == 'kernel' else '0'
  try:
    if model in STEPS:
      program = optimizer_step(method, STEPS[model](), TARGETS[target].platform)
    else:
      make = adapter_step if name in LORA else training_step
      program = make(method, TRAINED[model]())
    return compile_and_count(program, mesh, SPLIT.get(model, ONE_DEVICE), model in TRAINED)
  except Exception as error:
    return {'error': f'{type(error).__name__}: {str(error)[:300]}'}


def main(target: str, model: str, *names: str) -> None:
  mesh = mesh_on(target, model)
  # The first compilation of a process takes a second more.
  jax.jit(lambda x: x + 1).lower(place(jnp.zeros((8, 128)), mesh, ONE_DEVICE)).compile()
  for name in names:
    print(json.dumps(measure(target, model, name, mesh)), flush=True)


if __name__ == '__main__':
  main(*sys.argv[1:])
