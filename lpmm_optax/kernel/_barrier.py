"""Floating-point arithmetic whose result does not depend on how XLA fuses it.

XLA lets LLVM contract a product and a sum into one fused multiply-add, which skips the product's rounding. Whether
that happens depends on what was fused with what, hence on tile size, on sharding and on whether the parameters are
updated in place or through deltas, so results would differ in the last bit and, once rounded stochastically, sometimes
in a whole grid step (`tests/test_determinism.py` shows both). `uncontracted` forbids it: every product passes through
an integer operation that does nothing at run time but that no compiler can see through.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.extend import core as jex
import jax.numpy as jnp

_UINT_OF_BYTES = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}

# What consumes a product without being able to absorb it into a fused multiply-add.
_ABSORBS_NOTHING = (lax.mul_p, lax.round_p, lax.abs_p, lax.convert_element_type_p, lax.bitcast_convert_type_p)


def runtime_zero(count: jax.Array) -> jax.Array:
  """uint32 zero, unknown at compile time: the sign bit of a step count that is never negative."""
  return (count >> 31).astype(jnp.uint32)


def uncontracted(fn: Callable, zero: jax.Array) -> Callable:
  """`fn`, with every floating-point product rounded before it is used.

  Args:
    fn: a traceable function of arrays.
    zero: uint32[], from `runtime_zero`.

  Returns:
    A function with the signature of fn.
  """

  def wrapped(*args):
    closed, out_shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    outputs = _evaluate(closed, jax.tree.leaves(args), zero)
    return jax.tree.unflatten(jax.tree.structure(out_shape), outputs)

  return wrapped


def _evaluate(closed: jex.ClosedJaxpr, args: list[Any], zero: jax.Array) -> list[Any]:
  jaxpr = closed.jaxpr
  absorbable = {v for v in jaxpr.outvars if isinstance(v, jex.Var)}
  for eqn in jaxpr.eqns:
    if eqn.primitive not in _ABSORBS_NOTHING:
      absorbable.update(v for v in eqn.invars if isinstance(v, jex.Var))
  env = dict(zip(jaxpr.constvars + jaxpr.invars, list(closed.consts) + args, strict=True))
  for eqn in jaxpr.eqns:
    inputs = [v.val if isinstance(v, jex.Literal) else env[v] for v in eqn.invars]
    if eqn.primitive is jex.primitives.jit_p:
      outputs = _evaluate(eqn.params['jaxpr'], inputs, zero)
    else:
      outputs = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(eqn.params))
      outputs = outputs if eqn.primitive.multiple_results else [outputs]
      is_product = eqn.primitive is lax.mul_p and jnp.issubdtype(outputs[0].dtype, jnp.floating)
      if is_product and eqn.outvars[0] in absorbable:
        outputs = [_opaque(outputs[0], zero)]
    env.update(zip(eqn.outvars, outputs, strict=True))
  return [v.val if isinstance(v, jex.Literal) else env[v] for v in jaxpr.outvars]


def _opaque(x: jax.Array, zero: jax.Array) -> jax.Array:
  bits = _UINT_OF_BYTES[x.dtype.itemsize]
  mask = zero.astype(bits)
  return lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) ^ mask, x.dtype)
