"""Registers `QuantizedArray` with Flax; imported only where Flax is installed."""

import dataclasses
from typing import Any

from flax import nnx
from flax import serialization

from lpmm_optax._array import QuantizedArray
from lpmm_optax._array import register_wrapper


def _to_state_dict(x: QuantizedArray) -> dict[str, Any]:
  return {'codes': x.codes} | ({} if x.scales is None else {'scales': x.scales})


def _from_state_dict(x: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
  if set(state) != set(_to_state_dict(x)):
    raise ValueError(f'{x!r} cannot be restored from fields {sorted(state)}')
  return dataclasses.replace(x, **state)


serialization.register_serialization_state(QuantizedArray, _to_state_dict, _from_state_dict)
nnx.register_data_type(QuantizedArray)
# `nnx.Optimizer` takes its state apart at every step; a pytree inside a Variable comes back as a dict, while one of
# Variables comes back as it was. So the state is built without the parameters' Variables, and nnx puts its own inside.
register_wrapper(nnx.Variable, lambda variable: variable.get_raw_value())
