"""What `benchmarks/accuracy.py` trains by: the methods of its tables, and those of its ablations.

A method is an optimizer with formats; a new one is an entry of METHODS. An ablation is a figure with one thing varied
along its axis; its variants are methods too, which are in no table.
"""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import types
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

import lpmm_optax as lpmm

MOMENTUM = 0.9
B1, B2 = 0.9, 0.95
LION_B1, LION_B2 = 0.9, 0.99

NEAREST = dataclasses.replace(lpmm.INT8, rounding='nearest')
BFLOAT16_NEAREST = dataclasses.replace(lpmm.BFLOAT16, rounding='nearest')
FOUR_BITS = dataclasses.replace(lpmm.INT4, block_size=32)
# Blocks of 256 save the hundredth of a byte that rows of 64 and biases take more than the rows of a large model.
FOUR_BIT_NU = {'mu': dataclasses.replace(lpmm.INT8, block_size=256), 'nu': lpmm.UINT4_SQRT}
ADAM_NEAREST = {'mu': NEAREST, 'nu': dataclasses.replace(lpmm.UINT8_SQRT, rounding='nearest')}


class Method(NamedTuple):
  """How it is trained.

  Attributes:
    optimizer: 'sgdm', 'adamw' or 'lion'.
    params: the format of parameters, or their dtype.
    make_tx: of a task's hyperparameters and a key.
    accumulator: ours for microbatches, 'optax' for that of Optax, None for a method that takes no microbatches.
    baseline: in float32, with which it is compared.
    summary: for tables.
  """

  optimizer: str
  params: Any
  make_tx: Callable[..., optax.GradientTransformation]
  accumulator: Any
  baseline: str
  summary: str


def optax_sgd(rate, decay, key):
  return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, MOMENTUM))


def optax_velocity(rate, decay, key):
  """Each gradient at the rate at which it came, as error feedback has it."""
  return optax.chain(optax.add_decayed_weights(decay), optax.scale_by_learning_rate(rate), optax.trace(MOMENTUM))


def optax_adamw(rate, decay, key):
  return optax.adamw(rate, B1, B2, weight_decay=decay)


def our_sgdm(formats=lpmm.INT8, error_feedback=True):
  return lambda rate, decay, key: lpmm.sgdm(
    rate, MOMENTUM, weight_decay=decay, formats=formats, error_feedback=error_feedback, key=key
  )


def our_velocity(rate, decay, key):
  """What `our_sgdm` is but for its feedback."""
  return lpmm.low_precision(optax_velocity(rate, decay, key), formats=lpmm.INT8, error_feedback=False, key=key)


def our_adamw(error_feedback=True, formats='default'):
  return lambda rate, decay, key: lpmm.adamw(
    rate, B1, B2, weight_decay=decay, error_feedback=error_feedback, formats=formats, key=key
  )


def traced_adamw(rate, decay, key):
  """As `low_precision` finds it: feedback follows from the derivatives of the traced program."""
  return lpmm.low_precision(optax_adamw(rate, decay, key), key=key)


def optax_lion(rate, decay, key):
  return optax.lion(rate, LION_B1, LION_B2, weight_decay=decay)


def our_lion(formats='default'):
  return lambda rate, decay, key: lpmm.lion(rate, LION_B1, LION_B2, weight_decay=decay, formats=formats, key=key)


def flash_adamw(rate, decay, key):
  """It has a step of its own, and no updates."""
  import flashoptim_jax as flashoptim  # For this method alone.

  tx = flashoptim.flash_adamw(rate, B1, B2, weight_decay=decay, fused=jax.default_backend() == 'gpu')
  step = lambda grads, params, opt_state: tx.step(params, opt_state, grads)
  return lpmm.InPlaceTransformation('flash_adamw', tx.init, None, step)


INTO = lpmm.INTO_MOMENTUM
METHODS = {
  'sgdm-fp32': Method('sgdm', jnp.float32, optax_sgd, 'optax', 'sgdm-fp32', 'optax.sgd, float32'),
  'sgdm-fp32-velocity': Method(
    'sgdm', jnp.float32, optax_velocity, 'optax', 'sgdm-fp32-velocity', 'velocity form, float32'
  ),
  'sgdm-bf16-nearest': Method(
    'sgdm', BFLOAT16_NEAREST, our_sgdm(BFLOAT16_NEAREST, False), BFLOAT16_NEAREST, 'sgdm-fp32', 'bfloat16, nearest'
  ),
  'sgdm-bf16': Method(
    'sgdm', lpmm.BFLOAT16, our_sgdm(lpmm.BFLOAT16, False), lpmm.BFLOAT16, 'sgdm-fp32', 'bfloat16, stochastic'
  ),
  'sgdm-8-nearest': Method('sgdm', NEAREST, our_sgdm(NEAREST, False), NEAREST, 'sgdm-fp32', '8 bits, nearest'),
  'sgdm-8-paper': Method(
    'sgdm', lpmm.INT8, our_sgdm(lpmm.INT8, False), lpmm.INT8, 'sgdm-fp32', "8 bits, stochastic (the paper's)"
  ),
  'sgdm-8-velocity': Method(
    'sgdm', lpmm.INT8, our_velocity, lpmm.INT8, 'sgdm-fp32-velocity', '8 bits, velocity form, stochastic'
  ),
  'sgdm-8': Method('sgdm', lpmm.INT8, our_sgdm(), INTO, 'sgdm-fp32-velocity', '8 bits, feedback (recommended)'),
  'sgdm-16/8': Method(
    'sgdm', lpmm.INT16, our_sgdm(), INTO, 'sgdm-fp32-velocity', '16-bit parameters, 8-bit momentum, feedback'
  ),
  'sgdm-8/4': Method(
    'sgdm',
    lpmm.INT8,
    our_sgdm(lpmm.INT4, False),
    lpmm.INT8,
    'sgdm-fp32',
    '4-bit momentum, stochastic',
  ),
  'sgdm-4/8': Method(
    'sgdm', lpmm.INT4, our_sgdm(), INTO, 'sgdm-fp32-velocity', '4-bit parameters, 8-bit momentum, feedback'
  ),
  'adamw-fp32': Method('adamw', jnp.float32, optax_adamw, 'optax', 'adamw-fp32', 'optax.adamw, float32'),
  'adamw-bf16-nearest': Method(
    'adamw',
    BFLOAT16_NEAREST,
    our_adamw(False, BFLOAT16_NEAREST),
    BFLOAT16_NEAREST,
    'adamw-fp32',
    'bfloat16, nearest',
  ),
  'adamw-bf16': Method(
    'adamw', lpmm.BFLOAT16, our_adamw(False, lpmm.BFLOAT16), lpmm.BFLOAT16, 'adamw-fp32', 'bfloat16, stochastic'
  ),
  'adamw-8': Method('adamw', lpmm.INT8, our_adamw(), lpmm.INT8, 'adamw-fp32', '8 bits, feedback (recommended)'),
  'adamw-8-traced': Method(
    'adamw', lpmm.INT8, traced_adamw, lpmm.INT8, 'adamw-fp32', '8 bits, low_precision(optax.adamw)'
  ),
  'adamw-8-nearest': Method('adamw', NEAREST, our_adamw(False, ADAM_NEAREST), NEAREST, 'adamw-fp32', '8 bits, nearest'),
  'adamw-8-plain': Method('adamw', lpmm.INT8, our_adamw(False), lpmm.INT8, 'adamw-fp32', '8 bits, stochastic'),
  'adamw-8/8/4': Method(
    'adamw', lpmm.INT8, our_adamw(True, FOUR_BIT_NU), lpmm.INT8, 'adamw-fp32', '4-bit second moment, feedback'
  ),
  'adamw-8/4': Method(
    'adamw', lpmm.INT8, our_adamw(True, FOUR_BITS), lpmm.INT8, 'adamw-fp32', '4-bit moments, feedback'
  ),
  'adamw-8/4-plain': Method(
    'adamw', lpmm.INT8, our_adamw(False, FOUR_BITS), lpmm.INT8, 'adamw-fp32', '4-bit moments, stochastic'
  ),
  'adamw-flash': Method('adamw', jnp.bfloat16, flash_adamw, None, 'adamw-fp32', 'flashoptim-jax'),
  'lion-fp32': Method('lion', jnp.float32, optax_lion, 'optax', 'lion-fp32', 'optax.lion, float32'),
  'lion-8': Method('lion', lpmm.INT8, our_lion(), lpmm.INT8, 'lion-fp32', '8 bits, stochastic (as it comes)'),
  'lion-16/8': Method(
    'lion', lpmm.INT16, our_lion(), lpmm.INT8, 'lion-fp32', '16-bit parameters, 8-bit momentum, stochastic'
  ),
  'lion-8-nearest': Method('lion', NEAREST, our_lion(NEAREST), NEAREST, 'lion-fp32', '8 bits, nearest'),
}

# ---------------------------------------------------------------------------------------------------------------------
# Ablations
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Simulated(lpmm.Format):
  """A format as if it had other numbers of bits: what it would do, not what it would take.

  Attributes:
    random_bits: how far the fraction to be rounded is resolved; updates under a step / 2^(random_bits + 1) are lost.
    code_bits: of a code, at most those that it is stored in.
  """

  random_bits: int | None = None
  code_bits: int | None = None

  @property
  def fraction_bits(self) -> int:
    """Random bits per rounding."""
    return self.random_bits or super().fraction_bits

  @property
  def max_code(self) -> int:
    """The largest code."""
    return 2 ** (self.code_bits - 1) - 1 if self.code_bits else super().max_code


class Point(NamedTuple):
  """What is run at one place of the axis: a method, microbatches, and settings in which the task differs."""

  method: str
  microbatches: int = 1
  settings: Mapping[str, int] = types.MappingProxyType({})


class Ablation(NamedTuple):
  """A figure: differences to float32 with everything else equal.

  Attributes:
    task: that is trained.
    title: of the figure.
    axis: what varies.
    lines: by label, a point for each value on the axis.
    ordered: whether values on the axis are more or less of one thing.
  """

  task: str
  title: str
  axis: str
  lines: dict[str, dict[str, Point]]
  ordered: bool = True


FEEDBACK, PLAIN = 'stochastic, feedback', 'stochastic alone'
BASES = {FEEDBACK: 'sgdm-8', PLAIN: 'sgdm-8-paper'}
# Of the ablations; the presets' own among them.
PRESET_BLOCK, PRESET_RANDOM_BITS = 64, lpmm.INT8.fraction_bits
BLOCK_SIZES = (16, PRESET_BLOCK, 256)
RANDOM_BITS = (2, 4, 8, PRESET_RANDOM_BITS)


def block_size(base: str, size: int) -> str:
  """The name of a method with parameters in blocks of this size."""
  return base if size == PRESET_BLOCK else f'{base}/blocks-of-{size}'


def random_bits(base: str, bits: int) -> str:
  """The name of a method whose parameters are rounded with so many random bits."""
  return base if bits == PRESET_RANDOM_BITS else f'{base}/{bits}-random-bits'


def with_params(base: str, fmt: lpmm.Format, what: str) -> Method:
  return METHODS[base]._replace(params=fmt, summary=f'{METHODS[base].summary}, {what}')


def only(what: str, params: Any, formats: dict[str, Any]) -> Method:
  """AdamW with some of its arrays in 8 bits, and feedback if they are the parameters."""
  make_tx = our_adamw(isinstance(params, lpmm.Format), formats)
  return METHODS['adamw-8']._replace(params=params, make_tx=make_tx, summary=f'8 bits for {what} alone')


VARIANTS = {
  'adamw-8/parameters': only('the parameters', lpmm.INT8, {'mu': None, 'nu': None}),
  'adamw-8/nu': only('the second moment', jnp.float32, {'mu': None, 'nu': lpmm.UINT8_SQRT}),
  'adamw-16/8': with_params('adamw-8', lpmm.INT16, '16-bit parameters'),
  'sgdm-4-paper': with_params('sgdm-8-paper', lpmm.INT4, '4-bit parameters'),
  'sgdm-16-paper': with_params('sgdm-8-paper', lpmm.INT16, '16-bit parameters'),
}
for _base in BASES.values():
  for _size in set(BLOCK_SIZES) - {PRESET_BLOCK}:
    _format = dataclasses.replace(lpmm.INT8, block_size=_size)
    VARIANTS[block_size(_base, _size)] = with_params(_base, _format, f'parameters in blocks of {_size}')
  for _bits in set(RANDOM_BITS) - {PRESET_RANDOM_BITS}:
    _format = Simulated(random_bits=_bits)
    VARIANTS[random_bits(_base, _bits)] = with_params(_base, _format, f'parameters rounded with {_bits} random bits')


def split_bits(params: int) -> Method:
  """Lion with so many bits per parameter, and the rest of 16 per momentum."""
  momentum = Simulated(bits=8, code_bits=16 - params, block_size=32 if params == 12 else None)
  summary = f'{params}-bit parameters, {16 - params}-bit momentum, simulated'
  return METHODS['lion-8']._replace(
    params=Simulated(bits=16, code_bits=params), make_tx=our_lion(momentum), summary=summary
  )


SPLITS = (9, 10, 12)
VARIANTS |= {f'lion-{bits}/{16 - bits}': split_bits(bits) for bits in SPLITS}


def fewer_updates(method: str, microbatches: int) -> Point:
  """As many examples in all, four per microbatch."""
  return Point(method, microbatches, {'batch_size': 4 * microbatches, 'steps': 4000 // microbatches})


ABLATIONS = {
  'parameter-bits': Ablation(
    'chars',
    'bits of the parameters',
    'bits',
    {
      FEEDBACK: {'4': Point('sgdm-4/8'), '8': Point('sgdm-8'), '16': Point('sgdm-16/8')},
      PLAIN: {'4': Point('sgdm-4-paper'), '8': Point('sgdm-8-paper'), '16': Point('sgdm-16-paper')},
    },
  ),
  'block-size': Ablation(
    'chars',
    'block size of the parameters',
    'parameters that share a scale, at most (a row may be shorter)',
    {label: {str(n): Point(block_size(base, n)) for n in BLOCK_SIZES} for label, base in BASES.items()},
  ),
  'random-bits': Ablation(
    'chars-finetune',
    'random bits per rounding of a parameter',
    'bits',
    {label: {str(n): Point(random_bits(base, n)) for n in RANDOM_BITS} for label, base in BASES.items()},
  ),
  'rounding': Ablation(
    'chars-finetune',
    'stochastic against nearest',
    'parameters and state',
    {
      'nearest': {
        'SGDM, bfloat16': Point('sgdm-bf16-nearest'),
        'SGDM, 8 bits': Point('sgdm-8-nearest'),
        'AdamW, 8 bits': Point('adamw-8-nearest'),
      },
      'stochastic': {
        'SGDM, bfloat16': Point('sgdm-bf16'),
        'SGDM, 8 bits': Point('sgdm-8-paper'),
        'AdamW, 8 bits': Point('adamw-8-plain'),
      },
    },
    ordered=False,
  ),
  'feedback': Ablation(
    'chars-finetune',
    'error feedback on and off',
    'microbatches',
    {
      'SGDM, on': {'1': Point('sgdm-8'), '8': Point('sgdm-8', 8)},
      'SGDM, off': {'1': Point('sgdm-8-paper'), '8': Point('sgdm-8-paper', 8)},
      'AdamW, on': {'1': Point('adamw-8'), '8': Point('adamw-8', 8)},
      'AdamW, off': {'1': Point('adamw-8-plain'), '8': Point('adamw-8-plain', 8)},
    },
  ),
  'adamw-arrays': Ablation(
    'chars',
    'AdamW with some of its arrays in 8 bits',
    'in 8 bits, the others in float32 (parameters beside 8-bit moments: 16 bits)',
    {
      'feedback where parameters are rounded': {
        'nu': Point('adamw-8/nu'),
        'parameters': Point('adamw-8/parameters'),
        'moments': Point('adamw-16/8'),
        'all': Point('adamw-8'),
      }
    },
    ordered=False,
  ),
  'lion-bits': Ablation(
    'chars-finetune',
    "how 16 bits are split between Lion's parameters and momentum",
    'bits of a parameter and of its momentum',
    {
      'stochastic alone': {'8/8': Point('lion-8')}
      | {f'{bits}/{16 - bits}': Point(f'lion-{bits}/{16 - bits}') for bits in SPLITS}
    },
  ),
  'microbatches': Ablation(
    'chars',
    'microbatches of one batch',
    'microbatches of a batch of 16',
    {
      'into momentum, feedback': {str(n): Point('sgdm-8', n) for n in (1, 4, 8)},
      "8-bit accumulator, stochastic (the paper's)": {str(n): Point('sgdm-8-paper', n) for n in (1, 4, 8)},
    },
  ),
  'fewer-updates': Ablation(
    'chars',
    'microbatches of four, accumulated into fewer, larger updates',
    'microbatches per update, of 16000 examples in all',
    {
      'stochastic': {str(n): fewer_updates('sgdm-8-paper', n) for n in (1, 2, 4, 8)},
      'nearest': {str(n): fewer_updates('sgdm-8-nearest', n) for n in (1, 2, 4, 8)},
    },
  ),
}
