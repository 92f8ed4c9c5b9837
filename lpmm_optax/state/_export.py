"""Registers this package's nodes of pytrees with `jax.export`, so that what takes or returns them can be saved."""

import dataclasses
import json
from typing import Any

import jax.export
import jax.numpy as jnp

from lpmm_optax.optimizers import _clipping
from lpmm_optax.optimizers import _low_precision
from lpmm_optax.optimizers import _sgdm
from lpmm_optax.storage import _array
from lpmm_optax.storage import _format
from lpmm_optax.training import _ema
from lpmm_optax.training import _layerwise
from lpmm_optax.training import _multi_steps


def _serialize(static: Any) -> bytes:
  format, dtype, blocks = static
  return json.dumps([dataclasses.asdict(format), jnp.dtype(dtype).name, blocks]).encode()


def _deserialize(data: bytes) -> Any:
  format, dtype, blocks = json.loads(data)
  return _format.Format(**format), jnp.dtype(dtype), None if blocks is None else _format.BlockGeometry(*blocks)


jax.export.register_pytree_node_serialization(
  _array.QuantizedArray,
  serialized_name='lpmm_optax.QuantizedArray',
  serialize_auxdata=_serialize,
  deserialize_auxdata=_deserialize,
)
STATES = (
  _clipping.ClipByPreviousNormState,
  _ema.EmaState,
  _layerwise.LayerwiseState,
  _low_precision.LowPrecisionState,
  _multi_steps.MultiStepsState,
  _sgdm.DecayedMomentumState,
  _sgdm.DecayedVelocityState,
  _sgdm.VelocityState,
)
for _state in STATES:
  jax.export.register_namedtuple_serialization(_state, serialized_name=f'lpmm_optax.{_state.__name__}')
