"""Which field of an optimizer's state is a momentum, and how far what is added to it moves the parameter.

A momentum m decays, m' = b m + i, by one factor b for all elements and with an increment i that does not depend on it,
and given the other new fields (as the second moment) the update delta is linear in it. The derivatives b = dm'/dm and
s = d(delta)/dm are those of the traced program. As long as program and gradients stay as they are, a change c of what
is stored moves the parameter in the k-th step after it by b^(k - 1) s c, and by s c / (1 - b) in all.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lpmm_optax.trace import _program


@dataclasses.dataclass(frozen=True)
class Linearized:
  """A leaf's program that tells, after its results, what becomes of a change of one of its fields, a momentum.

  It gives (delta, *fields, move, gain). The first is how far the parameter moves in all per unit that is added to the
  new momentum, s / (1 - b), or zero where it is not known, and where no gradient has come; the second what increments
  like the present one amount to, |i| / (1 - b).

  Attributes:
    program: gives (delta, *fields) from (gradient, parameter, *fields, *rest).
    field: index of the field.
  """

  program: _program.Program
  field: int

  def derivatives(self, *arguments: Any) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The program's results, and the derivatives of delta and of the new field by the old one."""
    at = 2 + self.field
    others = set(self.program.results[1:]) - {self.program.results[1 + self.field]}
    update = lambda x: self.program(*arguments[:at], x, *arguments[at + 1 :], constant=others)
    results, by_field = jax.jvp(update, (arguments[at],), (jnp.ones_like(arguments[at]),))
    return results, by_field[0], by_field[1 + self.field]

  def __call__(self, *arguments: Any) -> list[jax.Array]:
    results, by_field, _ = self.derivatives(*arguments)
    # One for all elements, and so that of an element of zeros, which is a scalar.
    decay = self.derivatives(*(jnp.zeros((), x.dtype) if jnp.ndim(x) else x for x in arguments))[2]
    per_rest = jnp.where((decay > 0) & (decay < 1), 1 / (1 - decay), 0.0)
    increment = results[1 + self.field] - decay * arguments[2 + self.field].astype(decay.dtype)
    move = jnp.where(increment != 0, by_field * per_rest, 0.0)
    return [*results, move, jnp.abs(increment) * per_rest]


@functools.lru_cache(maxsize=1024)
def find(program: _program.Program, templates: Sequence[jax.ShapeDtypeStruct], fields: Sequence[int]) -> int | None:
  """The field that is a momentum, or None.

  Of several the one that decays fastest, whose changes have moved the parameter before the program is another one; the
  first, if their decays are not known.

  Args:
    program: of a leaf.
    templates: of its arguments: scalars, and tiles of any shape.
    fields: indices of those that it may be.
  """
  decays = {field: decay for field in fields if (decay := _decay(program, templates, field)) is not None}
  return min(decays, key=lambda field: decays[field]) if decays else None


def _decay(program: _program.Program, templates: Sequence[jax.ShapeDtypeStruct], field: int) -> float | None:
  """The decay of a field that is a momentum, 1 where it is known only at run time; None for any other field."""
  graph, _ = _program.trace(Linearized(program, field).derivatives, *templates)
  _, *new, by_field, decay = graph.outputs
  others = {*new} - {new[field]}
  is_linear = all(graph.inputs[2 + field] not in op.inputs for op in graph.slice([by_field], others.__contains__))
  if not is_linear or graph.constant(by_field) == 0 or not graph.uniform[decay]:
    return None
  known = graph.constant(decay)
  if known is None:
    return 1.0
  return known if 0 < known < 1 else None
