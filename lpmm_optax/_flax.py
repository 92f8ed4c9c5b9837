"""Registers `QuantizedArray` with Flax; imported only where Flax is installed."""

import dataclasses
from typing import Any

from flax import nnx
from flax import serialization

import lpmm_optax
from lpmm_optax.storage._array import QuantizedArray
from lpmm_optax.storage._array import register_wrapper

_VERSION = 'lpmm_optax'  # That wrote it; beside codes and scales, whose names are those of their storage.


def _to_state_dict(x: QuantizedArray) -> dict[str, Any]:
  arrays = zip(x.format.storage, (x.codes, x.scales), strict=True)
  return {name: array for name, array in arrays if array is not None} | {_VERSION: lpmm_optax.__version__}


def _from_state_dict(x: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
  where = serialization.current_path().removeprefix('./') or '<root>'
  stored = {name: array for name, array in state.items() if name != _VERSION} if isinstance(state, dict) else None
  wanted = {name: array.shape for name, array in _to_state_dict(x).items() if name != _VERSION}
  if stored is None or set(stored) != set(wanted):
    found = 'a dense array' if stored is None else f'{", ".join(stored)}, written by lpmm_optax {state.get(_VERSION)}'
    raise ValueError(
      f'{where}: saved as {found}, and to be restored as {", ".join(wanted)}; restore it as it is, then use '
      'lpmm_optax.convert'
    )
  for name, shape in wanted.items():
    if stored[name].shape != shape:
      raise ValueError(f'{where}/{name}: saved with shape {stored[name].shape}, and to be restored with {shape}')
  codes, scales = x.format.storage
  return dataclasses.replace(x, codes=stored[codes], scales=stored.get(scales))


serialization.register_serialization_state(QuantizedArray, _to_state_dict, _from_state_dict)
nnx.register_data_type(QuantizedArray)
# `nnx.Optimizer` takes its state apart at every step; a pytree inside a Variable comes back as a dict, while one of
# Variables comes back as it was. So the state is built without the parameters' Variables, and nnx puts its own inside.
register_wrapper(
  nnx.Variable,
  content=lambda variable: variable.get_raw_value(),
  is_parameter=lambda variable: isinstance(variable, nnx.Param),
)
