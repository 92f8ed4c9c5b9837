"""How often a traced loss dequantizes each of its parameters; and that it does nothing else with them."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from jax.extend import core as jex
import jax.numpy as jnp

from lpmm_optax.trace import _program
from lpmm_optax.training import _tracking

# The results are the operands' values, each once and in order.
_PASSES = _program.IDENTITIES | {'optimization_barrier', 'reshape', 'reshard', 'sharding_constraint', 'squeeze'}


class _Array(NamedTuple):
  """An array of a parameter.

  Attributes:
    path: of the parameter.
    is_whole: whether, over all turns of the loops around, it has every element of the whole parameter once.
    is_stacked: whether it is a result of a scan, which `flax.nnx.scan` returns of all that a layer has; not to be used.
  """

  path: str
  is_whole: bool
  is_stacked: bool = False


def _refused(path: str, name: str) -> TypeError:
  where = {
    'cond': 'is used under lax.cond or lax.switch',
    'while': 'is used in a lax.while_loop or lax.fori_loop',
    'custom_jvp_call': 'is an argument of a jax.custom_jvp function',
    'custom_vjp_call': 'is an argument of a jax.custom_vjp function',
    'shard_map': 'is an argument of a jax.shard_map inside the loss',
  }.get(name, f'goes into {name!r}: what arithmetic sees are its codes')
  return TypeError(f'{path}: in a loss for value_and_step, a quantized parameter {where}; dequantize it first')


def _is_read(eqn: Any) -> bool:
  inner = _inner(eqn)
  return eqn.primitive.name == 'custom_vjp_call' and any(eqn.primitive is _tracking.READ for eqn in inner.eqns)


def _inner(eqn: Any) -> Any:
  inner = eqn.params[_program.CALLS.get(eqn.primitive.name, 'jaxpr')]
  return inner.jaxpr if isinstance(inner, jex.ClosedJaxpr) else inner


def _through_call(eqn: Any, arrays: Sequence[_Array | None], found: dict[str, list[bool]]) -> list[_Array | None]:
  return _walk(_inner(eqn), arrays, found)


def _through_scan(eqn: Any, arrays: Sequence[_Array | None], found: dict[str, list[bool]]) -> list[_Array | None]:
  inner = _inner(eqn)
  turns = [
    array and array._replace(is_whole=array.is_whole and var.aval.ndim < outer.aval.ndim)
    for array, var, outer in zip(arrays, inner.invars, eqn.invars, strict=True)
  ]
  out = _walk(inner, turns, found)
  for array, var, outer in zip(out, inner.outvars, eqn.outvars, strict=True):
    if array and var.aval.ndim == outer.aval.ndim:  # Carried from turn to turn, and not the same in each.
      raise _refused(array.path, 'the results of lax.scan')
  return [array and array._replace(is_stacked=True) for array in out]


def _walk(jaxpr: Any, arrays: Sequence[_Array | None], found: dict[str, list[bool]]) -> list[_Array | None]:
  """What the results of a jaxpr are, given what its arguments are; adds to `found`, by path, a read's `is_whole`."""
  env = {var: array for var, array in zip(jaxpr.invars, arrays, strict=True) if array}

  for eqn in jaxpr.eqns:
    given = [None if isinstance(atom, jex.Literal) else env.get(atom) for atom in eqn.invars]
    first = next((array for array in given if array), None)
    if first is None:
      continue
    if first.is_stacked:
      raise _refused(first.path, 'the results of lax.scan')
    name = eqn.primitive.name
    is_float = jnp.issubdtype(eqn.invars[0].aval.dtype, jnp.floating)
    if _program.CALLS.get(name) and _is_read(eqn):
      found.setdefault(first.path, []).append(first.is_whole)
      results: list[_Array | None] = [None] * len(eqn.outvars)
    elif name in _program.CALLS.keys() - _program.CUSTOM_DERIVATIVES:
      results = _through_call(eqn, given, found)
    elif name == 'scan':
      results = _through_scan(eqn, given, found)
    elif name in _PASSES or (name == 'convert_element_type' and is_float):  # The anchor's, of a cast of all weights.
      results = given
    elif name in _program.TAKES and given[0] and not any(given[1:]):
      results = [first._replace(is_whole=False)]
    else:
      raise _refused(first.path, name)
    env.update((var, array) for var, array in zip(eqn.outvars, results, strict=True) if array)
  return [None if isinstance(atom, jex.Literal) else env.get(atom) for atom in jaxpr.outvars]


def find(jaxpr: Any, paths: Sequence[str | None]) -> Mapping[str, list[bool]]:
  """By parameter's path, for every place where it is dequantized, whether that is all of it, and each element once.

  Args:
    jaxpr: of the loss.
    paths: per argument, of the parameter that it is an array of, or None.

  Raises:
    TypeError: where anything but slicing is done with a parameter before it is dequantized, naming it.
  """
  found: dict[str, list[bool]] = {}
  results = _walk(jaxpr, [None if path is None else _Array(path, True) for path in paths], found)
  escaped = next((array for array in results if array), None)
  if escaped:
    raise _refused(escaped.path, 'the results of the loss')
  return found
