"""The first state of an inner transformation, each of whose arrays is stored as its use asks."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lpmm_optax.storage import _array
from lpmm_optax.trace import _field_formats
from lpmm_optax.trace import _flows
from lpmm_optax.trace import _plan
from lpmm_optax.trace import _program
from lpmm_optax.trace import _uses


def choose(
  formats: _field_formats.Formats,
  inner: optax.GradientTransformationExtraArgs,
  params: _plan.Params,
  leaves: list[Any],
  graph: _program.Graph,
  first: _plan.InnerState,
) -> tuple[_uses.Uses, dict[int, _field_formats.Choice]]:
  """What is done with the entries of the inner state, and how each is stored; `trace_init` gave graph and state."""
  entries = first.entries
  uses = _uses.Uses(entries)
  try:
    if formats is not None:
      uses = _flows.find(graph, _plan.plan_first_update(inner, params, first))
  except Exception:
    # Only where a default has to be chosen must it be known what a field is for.
    named = formats if isinstance(formats, Mapping) else ()
    guessed = _field_formats.choose(formats, params, leaves, entries, uses)
    if any(choice.format is not None and entries[e].field not in named for e, choice in guessed.items()):
      raise
  return uses, _field_formats.choose(formats, params, leaves, entries, uses)


def make(
  formats: _field_formats.Formats,
  inner: optax.GradientTransformationExtraArgs,
  params: _plan.Params,
  leaves: list[Any],
) -> Any:
  """The inner transformation's first state, each array in its format."""
  graph, first = _plan.trace_init(inner, params)
  arrays = first.arrays
  uses, choices = choose(formats, inner, params, leaves, graph, first)
  chosen = {e: choice.format for e, choice in choices.items()}
  owned = _plan.owned(first.entries)

  def from_params(e, leaves):
    """An entry that is no constant: a copy of the parameters, or a random key."""
    of_input = dict(zip(graph.inputs, params.active, strict=True))
    leaf = leaves[owned[e]] if e in uses.copies else None
    if leaf is not None and _array.is_quantized(leaf) and leaf.format == chosen[e]:
      return jax.tree.map(jnp.copy, dataclasses.replace(leaf, dtype=arrays[e].dtype))

    def argument(value):
      if value in graph.known:
        return graph.known[value]
      return _array.dequantize(leaves[of_input[value]], graph.avals[value].dtype)

    x = jnp.broadcast_to(graph.evaluate([graph.outputs[e]], argument)[graph.outputs[e]], arrays[e].shape)
    x = _array.encode(x, chosen[e], arrays[e].dtype) if e in owned else x
    # A parameter can be donated only once, and what inner holds on to not at all.
    return jnp.copy(x) if any(x is other for other in (*leaves, *graph.known.values())) else x

  is_abstract = any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(leaves))
  out = []
  for e, shape in enumerate(arrays):
    constant = graph.constant(graph.outputs[e])
    if constant is not None and e in owned:
      out.append(_array.full(leaves[owned[e]], constant, chosen[e], shape.dtype))
    elif constant is not None:
      out.append(jnp.full(shape.shape, constant, shape.dtype))
    elif is_abstract:
      out.append(jax.eval_shape(functools.partial(from_params, e), leaves))
    else:
      out.append(from_params(e, leaves))
  return first.treedef.unflatten(out)
