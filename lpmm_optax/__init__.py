"""Training with Optax in a sixth of the model memory: low-precision parameters, optimizer state and accumulators."""

import importlib.util as _importlib_util

from lpmm_optax.optimizers._adam import adam
from lpmm_optax.optimizers._adam import adamw
from lpmm_optax.optimizers._clipping import ClipByPreviousNormState
from lpmm_optax.optimizers._clipping import clip_by_previous_norm
from lpmm_optax.optimizers._lion import lion
from lpmm_optax.optimizers._low_precision import LowPrecisionState
from lpmm_optax.optimizers._low_precision import low_precision
from lpmm_optax.optimizers._sgdm import sgdm
from lpmm_optax.optimizers._transformation import EagerStepWarning
from lpmm_optax.optimizers._transformation import InPlaceTransformation
from lpmm_optax.state import _export as _export
from lpmm_optax.state._convert import convert
from lpmm_optax.state._outliers import OutlierReport
from lpmm_optax.state._outliers import Outliers
from lpmm_optax.state._outliers import outlier_report
from lpmm_optax.state._report import MemoryReport
from lpmm_optax.state._report import MemoryRow
from lpmm_optax.state._report import memory_report
from lpmm_optax.state._self_check import CheckRow
from lpmm_optax.state._self_check import SelfCheck
from lpmm_optax.state._self_check import self_check
from lpmm_optax.state._shardings import shardings
from lpmm_optax.state._underflow import Underflow
from lpmm_optax.state._underflow import underflow_report
from lpmm_optax.storage._array import QuantizedArray
from lpmm_optax.storage._array import dequantize
from lpmm_optax.storage._array import is_quantized
from lpmm_optax.storage._array import quantize
from lpmm_optax.storage._format import BFLOAT16
from lpmm_optax.storage._format import INT4
from lpmm_optax.storage._format import INT8
from lpmm_optax.storage._format import INT16
from lpmm_optax.storage._format import UINT4_SQRT
from lpmm_optax.storage._format import UINT8_SQRT
from lpmm_optax.storage._format import Format
from lpmm_optax.training._backward import value_and_step
from lpmm_optax.training._ema import Ema
from lpmm_optax.training._ema import EmaState
from lpmm_optax.training._ema import ema
from lpmm_optax.training._layerwise import LayerwiseState
from lpmm_optax.training._layerwise import layerwise
from lpmm_optax.training._multi_steps import INTO_MOMENTUM
from lpmm_optax.training._multi_steps import MultiSteps
from lpmm_optax.training._multi_steps import MultiStepsState
from lpmm_optax.training._partition import masked
from lpmm_optax.training._partition import partition
from lpmm_optax.training._partition import set_to_zero
from lpmm_optax.training._step import apply_if_finite
from lpmm_optax.training._step import chain
from lpmm_optax.training._step import step

if _importlib_util.find_spec('flax') is not None:
  from lpmm_optax import _flax as _flax

__version__ = '0.1.0'

__all__ = [
  'BFLOAT16',
  'INT4',
  'INT8',
  'INT16',
  'INTO_MOMENTUM',
  'UINT4_SQRT',
  'UINT8_SQRT',
  'CheckRow',
  'ClipByPreviousNormState',
  'EagerStepWarning',
  'Ema',
  'EmaState',
  'Format',
  'InPlaceTransformation',
  'LayerwiseState',
  'LowPrecisionState',
  'MemoryReport',
  'MemoryRow',
  'MultiSteps',
  'MultiStepsState',
  'OutlierReport',
  'Outliers',
  'QuantizedArray',
  'SelfCheck',
  'Underflow',
  'adam',
  'adamw',
  'apply_if_finite',
  'chain',
  'clip_by_previous_norm',
  'convert',
  'dequantize',
  'ema',
  'is_quantized',
  'layerwise',
  'lion',
  'low_precision',
  'masked',
  'memory_report',
  'outlier_report',
  'partition',
  'quantize',
  'self_check',
  'set_to_zero',
  'sgdm',
  'shardings',
  'step',
  'underflow_report',
  'value_and_step',
]
