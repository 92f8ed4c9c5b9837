"""Fine-tunes all parameters of a language model of the Llama family, with parameters and optimizer in 8 bits.

  python examples/finetune_llm.py
  python examples/finetune_llm.py --model DIR --data notes.txt --output tuned
  python examples/finetune_llm.py --model DIR --data chats.jsonl --optimizer lion --microbatches 4 --context 2048
  python examples/finetune_llm.py --model llama-3.1-8b --context 2048 --batch-size 1 --estimate

A model is a folder in Hugging Face's layout: config.json, tokenizer.json, model*.safetensors. Data is a text, or JSON
lines of {"messages": [{"role": ..., "content": ...}, ...]}, which the folder's chat template renders; of these, only
the assistant's answers are learned. What is trained is written to --output in bfloat16, in the same layout. Without a
model, a small one is trained from scratch first, on what Python's `help` says of the language, and fine-tuned on this
project's documentation.

Tensors are read into 8 bits one by one, weights decoded and gradients consumed layer by layer: the dense model exists
neither on the host nor on the device. `--estimate` compiles the training step for the device at hand, needs no weights
(a folder with a config.json, or a name that `--help` lists), and prints what the step takes.
"""

import argparse
import contextlib
import functools
import json
import math
from pathlib import Path
import pydoc_data.topics
import resource
import shutil
import statistics
import time
from typing import Any
from typing import NamedTuple

from checkpoints import open_checkpoints
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import jinja2
import jinja2.sandbox
import llama
import numpy as np
import optax
from rich.console import Console
from rich.progress import BarColumn
from rich.progress import MofNCompleteColumn
from rich.progress import Progress
from rich.progress import TextColumn
from rich.table import Table
import tokenizers
from tokenizers import decoders
from tokenizers import models
from tokenizers import pre_tokenizers
from tokenizers import trainers

import lpmm_optax as lpmm

# ---------------------------------------------------------------------------------------------------------------------
# Configuration
# ---------------------------------------------------------------------------------------------------------------------

# After the warm-up; Lion's updates are signs, larger than most of AdamW's, SGD's as large as gradients are, and
# Adafactor's relative to the weights.
RATES = {'adamw': 2e-5, 'lion': 5e-6, 'sgdm': 1e-2, 'adafactor': 1e-3}
DECAYS = {'adamw': 0.1, 'lion': 0.4, 'sgdm': 0.0, 'adafactor': 0.0}
FINAL_RATE = 0.1  # Of the peak, at the last step.
VALIDATION_SHARE = 0.05  # Of the examples, the last ones.
PROMPT_TOKENS = 16  # Of a text, from which samples go on.
SHOWN_STEPS = 20  # The last ones, over which the loss and the rate that are shown are means.
DTYPES = {'float32': jnp.float32, 'bfloat16': jnp.bfloat16}

# Without a model: the one that is trained from scratch, how, and how it is fine-tuned.
SMALL = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 1024,
  'hidden_size': 128,
  'intermediate_size': 384,
  'num_hidden_layers': 4,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'hidden_act': 'silu',
  'rms_norm_eps': 1e-5,
  'rope_theta': 10000.0,
  'max_position_embeddings': 128,
  'tie_word_embeddings': True,
}
PRETRAINING = {'steps': 300, 'learning_rate': 3e-3, 'microbatches': 1}
FINETUNING = {'steps': 100, 'context': 128, 'batch_size': 8}
SMALL_RATE = 25  # Times the rate of a large model.

_LLAMA_3_ROPE = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def _shape(kind: str, layers: int, width: int, hidden: int, heads: int, kv_heads: int, vocabulary: int, **rest: Any):
  return {
    'model_type': kind,
    'num_hidden_layers': layers,
    'hidden_size': width,
    'intermediate_size': hidden,
    'num_attention_heads': heads,
    'num_key_value_heads': kv_heads,
    'vocab_size': vocabulary,
  } | rest


# For --estimate; only shapes matter there.
SHAPES = {
  'smollm2-135m': _shape('llama', 30, 576, 1536, 9, 3, 49152, tie_word_embeddings=True),
  'smollm2-1.7b': _shape('llama', 24, 2048, 8192, 32, 32, 49152, tie_word_embeddings=True),
  'llama-3.2-1b': _shape('llama', 16, 2048, 8192, 32, 8, 128256, tie_word_embeddings=True, rope_scaling=_LLAMA_3_ROPE),
  'llama-3.2-3b': _shape('llama', 28, 3072, 8192, 24, 8, 128256, tie_word_embeddings=True, rope_scaling=_LLAMA_3_ROPE),
  'llama-2-7b': _shape('llama', 32, 4096, 11008, 32, 32, 32000),
  'llama-3.1-8b': _shape('llama', 32, 4096, 14336, 32, 8, 128256, rope_scaling=_LLAMA_3_ROPE),
  'qwen2.5-7b': _shape('qwen2', 28, 3584, 18944, 28, 4, 152064),
  'qwen3-8b': _shape('qwen3', 36, 4096, 12288, 32, 8, 151936, head_dim=128),
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__.split('\n')[0],
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog=f'shapes for --estimate: {", ".join(SHAPES)}',
  )
  add = parser.add_argument
  add('--model', metavar='DIR', help='folder of the model; to estimate, also a shape (default: a small one)')
  add('--data', type=Path, metavar='FILE', help='UTF-8 text, or .jsonl of chats (default: README.md and docs)')
  add('--output', type=Path, default=Path('out/finetune_llm'), metavar='DIR', help='(default %(default)s)')
  add('--optimizer', choices=RATES, default='adamw', help='(default %(default)s)')
  add('--moment-bits', type=int, choices=(8, 4), default=8, help='of those of adamw (default %(default)s)')
  add('--learning-rate', type=float, help=f'after the warm-up (default {RATES})')
  add('--weight-decay', type=float, help=f'of matrices, with sgdm of all (default {DECAYS})')
  add('--steps', type=int, default=500, help='of the optimizer (default %(default)s)')
  add('--warmup', type=int, metavar='STEPS', help='(default a tenth of the steps)')
  add('--batch-size', type=int, default=8, help='examples per step (default %(default)s)')
  add('--microbatches', type=int, default=1, metavar='N', help='in which they come (default %(default)s)')
  add('--clip-norm', type=float, default=1.0, metavar='NORM', help='see the guide; 0 for none (default %(default)s)')
  add('--context', type=int, default=512, help='tokens of an example (default %(default)s)')
  add('--dtype', choices=DTYPES, help='to compute in (default float32 on a CPU, else bfloat16)')
  add('--mesh', type=int, default=1, metavar='N', help='devices, over which parameters and batches are split')
  add('--checkpoint-dir', type=Path, metavar='DIR', help='save there, and resume from it')
  add('--checkpoint-every', type=int, default=100, metavar='STEPS', help='(default %(default)s)')
  add('--prompt', metavar='TEXT', help='from which samples go on (default: the start of a validation example)')
  add('--sample-tokens', type=int, default=48, metavar='N', help='of each sample (default %(default)s)')
  add('--temperature', type=float, default=0.8, help='of the second sample; the first is greedy (default %(default)s)')
  add('--seed', type=int, default=0)
  add('--estimate', action='store_true', help='compile the step, print what it takes, and stop')
  if parser.parse_args(argv).model is None:
    parser.set_defaults(**FINETUNING)
  args = parser.parse_args(argv)
  for name in ('steps', 'batch_size', 'microbatches', 'context', 'mesh', 'checkpoint_every'):
    if getattr(args, name) < 1:
      parser.error(f'--{name.replace("_", "-")} must be at least 1, got {getattr(args, name)}')
  if args.batch_size % (args.microbatches * args.mesh):
    parser.error(
      f'--batch-size {args.batch_size} does not divide into {args.microbatches} microbatches on {args.mesh} devices'
    )
  if args.moment_bits != 8 and args.optimizer != 'adamw':
    parser.error(f'--moment-bits {args.moment_bits} is for adamw')
  if args.weight_decay and args.optimizer == 'adafactor':
    parser.error('--weight-decay is not for adafactor, whose rate would not scale it')
  if args.mesh > jax.device_count():
    parser.error(f'--mesh {args.mesh} needs as many devices, and there are {jax.device_count()}')
  if args.data is None and args.model is not None and not args.estimate:
    parser.error('--model needs --data')
  # What depends on other arguments.
  defaults = {
    'learning_rate': RATES[args.optimizer] * (SMALL_RATE if args.model is None else 1),
    'weight_decay': DECAYS[args.optimizer],
    'warmup': args.steps // 10,
    'dtype': 'float32' if jax.default_backend() == 'cpu' else 'bfloat16',
  }
  for name, value in defaults.items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  return args


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------


class Examples(NamedTuple):
  """Sequences of one length.

  Attributes:
    tokens: int32[examples, context + 1], of which each but the last is an input and each but the first a target.
    learned: bool, of that shape: which are to be learned as targets. The others are prompts and padding.
  """

  tokens: np.ndarray
  learned: np.ndarray

  def batch(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs, targets and whether these are learned, [batch, context] each."""
    tokens, learned = self.tokens[index], self.learned[index]
    return tokens[:, :-1], tokens[:, 1:], learned[:, 1:].astype(np.float32)


class Data(NamedTuple):
  """What is trained on, what perplexity is of, and the tokens from which samples go on."""

  train: Examples
  validation: Examples
  prompt: list[int]


def text_examples(text: str, tokenizer: tokenizers.Tokenizer, context: int) -> tuple[Examples, list[int]]:
  """The text in consecutive pieces, each after what the tokenizer puts before every text; and how the last begins."""
  start = tokenizer.encode('').ids
  tokens = tokenizer.encode(text, add_special_tokens=False).ids
  size = context + 1 - len(start)
  # The last token of a piece is the first of the next, so that each is predicted.
  count = (len(tokens) - 1) // (size - 1) if size > 1 else 0
  pieces = [start + tokens[i * (size - 1) : i * (size - 1) + size] for i in range(count)]
  rows = np.asarray(pieces, np.int32).reshape(count, -1)
  learned = np.broadcast_to(np.arange(rows.shape[1]) >= len(start), rows.shape)
  return Examples(rows, learned), pieces[-1][: len(start) + PROMPT_TOKENS] if pieces else []


def chat_template(folder: Path) -> jinja2.Template:
  """Of the model: a file of its own, or in tokenizer_config.json.

  Raises:
    ValueError: if it has none.
  """
  file, settings = folder / 'chat_template.jinja', {}
  if (folder / 'tokenizer_config.json').is_file():
    settings = json.loads((folder / 'tokenizer_config.json').read_text())
  source = file.read_text() if file.is_file() else settings.get('chat_template')
  if isinstance(source, list):
    source = next((x['template'] for x in source if x['name'] == 'default'), None)
  if source is None:
    raise ValueError(f'{folder} has no chat template, in chat_template.jinja or tokenizer_config.json')
  # As templates are written for. Without `strftime_now`, those that tell the date tell a fixed one.
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )

  def refuse(message):
    raise ValueError(f'the chat template refuses: {message}')

  environment.globals['raise_exception'] = refuse
  environment.filters['tojson'] = lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)
  content = lambda token: token['content'] if isinstance(token, dict) else token
  special = {name: content(token) for name, token in settings.items() if name.endswith('_token') and token}
  return environment.from_string(source, globals=special)


def chat_examples(
  chats: list[list[dict[str, str]]], template: jinja2.Template, tokenizer: tokenizers.Tokenizer, context: int
) -> tuple[Examples, list[int]]:
  """An example per answer: all that came before as its prompt, and the answer to be learned; and the last's prompt.

  They are cut after `context + 1` tokens, and left out if nothing of the answer is before that.

  Raises:
    ValueError: for a template under which an answer does not begin with its prompt.
  """
  rows, masks, prompts = [], [], []
  for messages in chats:
    for i, message in enumerate(messages):
      if message['role'] != 'assistant':
        continue
      prompt = template.render(messages=messages[:i], add_generation_prompt=True)
      whole = template.render(messages=messages[: i + 1], add_generation_prompt=False)
      if not whole.startswith(prompt):
        raise ValueError(f'the chat template renders an answer otherwise than its prompt: {whole!r}, {prompt!r}')
      encoded = tokenizer.encode(whole, add_special_tokens=False)
      learned = np.array([start >= len(prompt) for start, _ in encoded.offsets], bool)[: context + 1]
      if learned[1:].any():
        padding = context + 1 - len(learned)
        rows.append(np.pad(np.array(encoded.ids[: context + 1], np.int32), (0, padding)))
        masks.append(np.pad(learned, (0, padding)))
        prompts.append(encoded.ids[: int(np.argmax(learned))])
  if not rows:
    return Examples(np.zeros((0, context + 1), np.int32), np.zeros((0, context + 1), bool)), []
  return Examples(np.stack(rows), np.stack(masks)), prompts[-1]


def split(examples: Examples, prompt: list[int]) -> Data:
  """The last examples for validation.

  Raises:
    ValueError: for fewer than two.
  """
  count, context = len(examples.tokens), examples.tokens.shape[1] - 1
  train = count - math.ceil(VALIDATION_SHARE * count)
  if train < 1:
    raise ValueError(f'the data has {count} examples of {context} tokens, and two are needed')
  part = lambda *limits: Examples(*(x[slice(*limits)] for x in examples))
  return Data(part(train), part(train, None), prompt)


def read_data(args: argparse.Namespace, folder: Path, tokenizer: tokenizers.Tokenizer) -> Data:
  """Of the arguments.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if there is not enough in it, or no chat template.
  """
  template = None
  if args.data is None:
    root = Path(__file__).parents[1]
    text = '\n\n'.join(file.read_text() for file in (root / 'README.md', *sorted((root / 'docs').rglob('*.md'))))
    examples, prompt = text_examples(text, tokenizer, args.context)
  elif args.data.suffix == '.jsonl':
    template = chat_template(folder)
    chats = [json.loads(line)['messages'] for line in args.data.read_text().splitlines() if line.strip()]
    examples, prompt = chat_examples(chats, template, tokenizer, args.context)
  else:
    examples, prompt = text_examples(args.data.read_text(encoding='utf-8'), tokenizer, args.context)
  if args.prompt is not None and template is not None:
    rendered = template.render(messages=[{'role': 'user', 'content': args.prompt}], add_generation_prompt=True)
    prompt = tokenizer.encode(rendered, add_special_tokens=False).ids
  elif args.prompt is not None:
    prompt = tokenizer.encode(args.prompt).ids
  return split(examples, prompt)


def microbatches(examples: Examples, args: argparse.Namespace, step: int) -> list[tuple[np.ndarray, ...]]:
  """Inputs, targets and weights of a step; epoch after epoch, in an order that depends on (seed, epoch) alone.

  The weights make the mean over microbatches of their weighted sums the mean over what is learned in all of them.
  """
  count = len(examples.tokens)
  number = np.arange(step * args.batch_size, (step + 1) * args.batch_size)
  orders = {epoch: np.random.default_rng((args.seed, epoch)).permutation(count) for epoch in set(number // count)}
  index = np.array([orders[n // count][n % count] for n in number])
  inputs, targets, learned = examples.batch(index)
  weights = learned * np.float32(args.microbatches / learned.sum())
  return list(zip(*(np.split(x, args.microbatches) for x in (inputs, targets, weights)), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer and step
# ---------------------------------------------------------------------------------------------------------------------


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
  """Of accumulated gradients, or of one microbatch's, layer by layer as they come: then clipped by the norm before."""
  schedule = optax.warmup_cosine_decay_schedule(
    init_value=args.learning_rate / (args.warmup + 1),
    peak_value=args.learning_rate,
    warmup_steps=args.warmup,
    decay_steps=max(args.steps, args.warmup + 1),
    end_value=FINAL_RATE * args.learning_rate,
  )

  def mask(params):
    is_matrix = lambda path, _: llama.is_matrix(jax.tree_util.keystr(path, simple=True, separator='/'))
    return jax.tree_util.tree_map_with_path(is_matrix, params, is_leaf=lpmm.is_quantized)

  key = jax.random.key(args.seed)
  if args.optimizer == 'adafactor':
    # Each matrix has factors of its own, and a clipped update. All leaves but the last norm are stacks.
    tx = lpmm.low_precision(optax.adafactor(schedule), key=key)
    tx = lpmm.layerwise(tx, stacked=lambda path, leaf: leaf.ndim > 1)
  elif args.optimizer == 'sgdm':
    tx = lpmm.sgdm(schedule, weight_decay=args.weight_decay, key=key)
  elif args.optimizer == 'lion':
    tx = lpmm.lion(schedule, weight_decay=args.weight_decay, mask=mask, key=key)
  else:
    formats = lpmm.Format(bits=4, block_size=32) if args.moment_bits == 4 else 'default'
    tx = lpmm.adamw(schedule, weight_decay=args.weight_decay, mask=mask, formats=formats, key=key)
  if args.clip_norm and args.optimizer != 'adafactor':
    clip = optax.clip_by_global_norm if args.microbatches > 1 else lpmm.clip_by_previous_norm
    tx = lpmm.chain(clip(args.clip_norm), tx)
  if args.microbatches == 1:
    return tx
  # SGD's momentum takes gradients one by one, unless they are to be clipped first.
  into_momentum = args.optimizer == 'sgdm' and not args.clip_norm
  accumulator = lpmm.INTO_MOMENTUM if into_momentum else lpmm.INT8
  return lpmm.MultiSteps(tx, args.microbatches, accumulator=accumulator, key=key)


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh:
  """Of one axis, along which parameters and batches are split."""
  automatic = (jax.sharding.AxisType.Auto,)
  return jax.make_mesh((args.mesh,), ('fsdp',), automatic, devices=jax.devices()[: args.mesh])


class Trainer(NamedTuple):
  """A compiled training step and all that belongs to it.

  Attributes:
    config: of the model.
    tx: the optimizer.
    like: (params, opt_state), abstract, with shardings.
    step: `(params, opt_state, inputs, targets, weights) -> (params, opt_state, loss)`, of one microbatch.
    parts: bytes on one device of what the step holds, by what it is.
    dtype: to compute in.
  """

  config: llama.Config
  tx: optax.GradientTransformation
  like: tuple[Any, Any]
  step: Any
  parts: dict[str, int]
  dtype: Any


def make_trainer(config: llama.Config, args: argparse.Namespace, mesh: jax.sharding.Mesh) -> Trainer:
  """From shapes alone."""
  tx, dtype = make_optimizer(args), DTYPES[args.dtype]
  shapes = jax.eval_shape(lambda tree: llama.quantize(tree, lpmm.INT8), llama.dense_shapes(config))
  state = shapes, jax.eval_shape(tx.init, shapes)
  # Stacks of matrices and tables are split by rows, everything else is on every device.
  specs = jax.tree.map(lambda x: P(None, 'fsdp') if x.ndim == 3 else P(), shapes, is_leaf=lpmm.is_quantized)
  place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
  like = jax.tree.map(place, state, lpmm.shardings(state, shapes, specs, mesh))
  split = NamedSharding(mesh, P('fsdp'))
  shape = args.batch_size // args.microbatches, args.context
  batch = [jax.ShapeDtypeStruct(shape, kind, sharding=split) for kind in (jnp.int32, jnp.int32, jnp.float32)]

  def loss_fn(params, inputs, targets, weights):
    return jnp.sum(weights * llama.losses(config, params, inputs, targets, dtype))

  # Donated buffers go to results of the same shape in order, hence parameters and state come in one order.
  def train_step(params, opt_state, *batch):
    loss, params, opt_state = lpmm.value_and_step(loss_fn, tx)(params, opt_state, *batch)
    return params, opt_state, loss

  where = jax.tree.map(lambda x: x.sharding, like)
  jitted = jax.jit(train_step, donate_argnums=(0, 1), out_shardings=(*where, NamedSharding(mesh, P())))
  compiled = jitted.lower(*like, *batch).compile()
  return Trainer(config, tx, like, compiled, memory_parts(*like, compiled), dtype)


def memory_parts(params: Any, opt_state: Any, compiled: jax.stages.Compiled) -> dict[str, int]:
  """Bytes on one device: arguments, results that are not put in their place, temporaries."""
  memory = compiled.memory_analysis()
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
  part = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) // 8
  on_device = lambda tree: sum(map(part, jax.tree.leaves(tree)))
  accumulator = on_device(getattr(opt_state, 'acc_grads', ()))
  parts = {
    'parameters': on_device(params),
    'optimizer state': on_device(opt_state) - accumulator,
    'gradient accumulator': accumulator,
  }
  rest = held + memory.temp_size_in_bytes - sum(parts.values())
  return parts | {'activations, gradients, the rest': rest}


def print_memory(console: Console, trainer: Trainer, args: argparse.Namespace) -> None:
  device, total = jax.devices()[0], sum(trainer.parts.values())
  count = sum(x.size for x in jax.tree.leaves(trainer.like[0], is_leaf=lpmm.is_quantized))
  examples = f'{args.batch_size // args.microbatches} x {args.context} tokens a microbatch'
  table = Table(f'{count / 1e6:.1f}M parameters, {args.optimizer}, {examples}', 'GiB a device', 'bytes/param')
  for column in table.columns[1:]:
    column.justify = 'right'
  for name, size in (*trainer.parts.items(), ('all', total)):
    table.add_row(name, f'{size / 2**30:.3f}', f'{size * args.mesh / count:.2f}')
  console.print(table)
  limit = (device.memory_stats() or {}).get('bytes_limit')
  if limit is not None:
    verdict = 'fits' if total <= limit else 'does not fit'
    console.print(f'It {verdict} into the {limit / 2**30:.1f} GiB that JAX has of one {device.device_kind}.')


def memory_in_use() -> int:
  """At its peak: of the device's allocator, or, on a CPU, of the process."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats.get('peak_bytes_in_use', 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity and samples
# ---------------------------------------------------------------------------------------------------------------------


def make_perplexity(trainer: Trainer, args: argparse.Namespace):
  """A function of parameters and examples: exp of the mean of -log p of what is to be learned."""

  @jax.jit
  def sums(params, *batch):
    inputs, targets, learned = (jax.lax.with_sharding_constraint(x, P('fsdp')) for x in batch)
    return jnp.sum(learned * llama.losses(trainer.config, params, inputs, targets, trainer.dtype)), jnp.sum(learned)

  def perplexity(params, examples):
    size = args.batch_size // args.microbatches
    # Of one shape: the last is filled up with examples that do not count.
    count = len(examples.tokens)
    padded = np.arange(-(-count // size) * size)
    totals = np.zeros(2)
    for index in np.split(padded, len(padded) // size):
      inputs, targets, learned = examples.batch(index % count)
      totals += np.array(sums(params, inputs, targets, learned * (index < count)[:, None].astype(np.float32)))
    return math.exp(totals[0] / totals[1])

  return perplexity


def make_sample(trainer: Trainer, args: argparse.Namespace, stops: set[int]):
  """A function of parameters, a prompt and a temperature to the tokens that follow; 0 takes the most likely ones."""

  @jax.jit
  def next_logits(params, tokens, length):
    x = llama.features(trainer.config, params, tokens, trainer.dtype)
    last = jax.lax.dynamic_slice_in_dim(x, length - 1, 1)
    return llama.logits(trainer.config, params, last)[0]

  def sample(params, prompt, temperature):
    rng, out = np.random.default_rng(args.seed), []
    tokens = np.zeros((1, len(prompt) + args.sample_tokens), np.int32)
    tokens[0, : len(prompt)] = prompt
    while len(out) < args.sample_tokens and not stops & set(out):
      length = len(prompt) + len(out)
      values = np.asarray(next_logits(params, tokens, length), np.float64)
      # The largest of logits with Gumbel noise is a draw from their softmax.
      noise = rng.gumbel(size=values.shape) if temperature else 0.0
      out.append(int(np.argmax(values / (temperature or 1.0) + noise)))
      tokens[0, length] = out[-1]
    return out

  return sample


# ---------------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
  """What must not change between a checkpoint and the run that resumes from it."""
  free = ('output', 'checkpoint_dir', 'checkpoint_every', 'prompt', 'sample_tokens', 'temperature', 'estimate', 'mesh')
  return {name: value for name, value in vars(args).items() if name not in free} | {
    'data': args.data and str(args.data)
  }


def train(folder: Path, args: argparse.Namespace, data: Data, title: str, console: Console) -> dict[str, Any]:
  """Fine-tunes the model of a folder; returns parameters, losses, and perplexity before and after."""
  config = llama.parse_config(llama.read_config(folder))
  mesh = make_mesh(args)
  status = TextColumn('{task.fields[status]}')
  columns = TextColumn('{task.description}'), BarColumn(bar_width=12), MofNCompleteColumn(), status
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(mesh))
    checkpoints = stack.enter_context(open_checkpoints(args.checkpoint_dir, settings(args)))
    trainer = make_trainer(config, args, mesh)
    print_memory(console, trainer, args)
    perplexity = make_perplexity(trainer, args)
    where = jax.tree.map(lambda x: x.sharding, trainer.like)
    restored = None if checkpoints is None else checkpoints.restore(trainer.like)
    if restored is None:
      params = llama.load(folder, config, lpmm.INT8, where[0])
      opt_state = jax.jit(trainer.tx.init, out_shardings=where[1])(params)
      start, history = 0, {'losses': [], 'before': perplexity(params, data.validation)}
    else:
      start, (params, opt_state), history = restored
    console.print(f'{title}: perplexity {history["before"]:.2f} before', highlight=False)
    progress = stack.enter_context(Progress(*columns, console=console))
    bar = progress.add_task(title, total=args.steps, completed=start, status='')
    seconds: list[float] = []
    for step in range(start, args.steps):
      began, losses = time.perf_counter(), []
      for microbatch in microbatches(data.train, args, step):
        params, opt_state, loss = trainer.step(params, opt_state, *microbatch)
        losses.append(loss)
      # Reading the losses waits for the step.
      history['losses'].append(statistics.fmean(map(float, losses)))
      seconds.append(time.perf_counter() - began)
      recent = seconds[-SHOWN_STEPS:]
      rate = args.batch_size * args.context * len(recent) / sum(recent)
      loss = statistics.fmean(history['losses'][-SHOWN_STEPS:])
      status = f'loss {loss:.3f}  {rate:.0f} tokens/s  {memory_in_use() / 2**30:.2f} GiB'
      progress.update(bar, completed=step + 1, status=status)
      if checkpoints is not None and ((step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps):
        checkpoints.save(step + 1, (params, opt_state), history)
    after = perplexity(params, data.validation)
    console.print(f'{title}: perplexity {after:.2f} after', highlight=False)
    return history | {'after': after, 'params': params, 'trainer': trainer}


def export(source: Path, target: Path, trained: dict[str, Any]) -> None:
  """Writes the parameters in bfloat16, with what else belongs to the model."""
  raw, config = llama.read_config(source), trained['trainer'].config
  llama.save(target, raw, functools.partial(llama.get_tensor, config, trained['params']), jnp.bfloat16)
  for pattern in ('tokenizer*', 'special_tokens_map.json', 'generation_config.json', 'chat_template.jinja'):
    for file in source.glob(pattern):
      shutil.copy(file, target / file.name)


def make_small_model(args: argparse.Namespace, console: Console) -> Path:
  """The folder of a model trained from scratch, made unless it is there."""
  untrained, folder = args.output / 'untrained', args.output / 'pretrained'
  if (folder / 'config.json').is_file():
    return folder
  topics = pydoc_data.topics.topics
  text = '\n\n'.join(topics[name] for name in sorted(topics))
  get = functools.partial(llama.random_tensor, llama.parse_config(SMALL), args.seed, 0.02)
  llama.save(untrained, SMALL, get, np.float32)
  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(vocab_size=SMALL['vocab_size'], initial_alphabet=alphabet, show_progress=False)
  tokenizer.train_from_iterator([text], trainer)
  tokenizer.save(str(untrained / 'tokenizer.json'))
  own = vars(args) | {'optimizer': 'adamw', 'checkpoint_dir': None} | PRETRAINING
  own['warmup'] = own['steps'] // 10
  data = split(*text_examples(text, tokenizer, args.context))
  export(untrained, folder, train(untrained, argparse.Namespace(**own), data, 'pretraining', console))
  return folder


def estimate(args: argparse.Namespace, console: Console) -> dict[str, int]:
  """Prints what a step takes; returns bytes on one device, by what they are of."""
  if args.model is None or args.model in SHAPES:
    raw = SHAPES.get(args.model, SMALL)
  else:
    raw = llama.read_config(Path(args.model))
  mesh = make_mesh(args)
  with jax.set_mesh(mesh):
    trainer = make_trainer(llama.parse_config(raw), args, mesh)
  print_memory(console, trainer, args)
  return trainer.parts


def finetune(args: argparse.Namespace, console: Console) -> dict[str, Any]:
  """Trains, samples and exports; returns losses by step, perplexity before and after, and the samples."""
  folder = make_small_model(args, console) if args.model is None else Path(args.model)
  if not (folder / 'tokenizer.json').is_file():
    raise FileNotFoundError(f'{folder} holds no tokenizer.json')
  tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  data = read_data(args, folder, tokenizer)
  trained = train(folder, args, data, 'fine-tuning', console)
  stops = llama.read_config(folder).get('eos_token_id')
  sample = make_sample(trained['trainer'], args, set(stops) if isinstance(stops, list) else {stops})
  samples = [tokenizer.decode(sample(trained['params'], data.prompt, x)) for x in (0.0, args.temperature)]
  for title, text in zip(('greedy', f'temperature {args.temperature}'), samples, strict=True):
    console.rule(title)
    console.print(tokenizer.decode(data.prompt), style='dim', end='', markup=False, highlight=False)
    console.print(text, markup=False, highlight=False)
  export(folder, args.output, trained)
  console.print(str(args.output), highlight=False, soft_wrap=True)
  return {name: trained[name] for name in ('losses', 'before', 'after')} | {'samples': samples}


def main(argv: list[str] | None = None) -> dict[str, Any]:
  """Returns what `finetune` does, or with --estimate, what `estimate` does."""
  args = parse_args(argv)
  try:
    return (estimate if args.estimate else finetune)(args, Console())
  except (OSError, ValueError) as error:
    raise SystemExit(f'error: {error}') from error


if __name__ == '__main__':
  main()
