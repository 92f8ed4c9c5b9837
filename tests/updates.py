"""Updates of one leaf, alone, sharded, mapped and accumulated, for which kernels and the loop have the same bits."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax
from runs import assert_same_bits
from runs import step_by

import lpmm_optax as lpmm

OPTIMIZERS = {
  'sgdm': lambda **formats: lpmm.sgdm(0.1, weight_decay=0.01, **formats),
  'sgdm without feedback': lambda **formats: lpmm.sgdm(0.1, error_feedback=False, **formats),
  'adamw': lambda **formats: lpmm.adamw(0.01, **formats),
  'adamw, int4': lambda: lpmm.adamw(0.01, formats=lpmm.INT4),
  'lion': lambda **formats: lpmm.lion(0.01, **formats),
  'rmsprop': lambda **formats: lpmm.low_precision(optax.rmsprop(0.01, momentum=0.9), **formats),
  'accumulation': lambda **formats: lpmm.MultiSteps(lpmm.adamw(0.01, **formats), 2, accumulator=lpmm.INT8),
}
SHAPE = (64, 128)


def start(format=lpmm.INT8, shape=SHAPE):
  return lpmm.quantize({'w': jax.random.normal(jax.random.key(0), shape)}, format)


def gradient(step, shape=SHAPE):
  """Gradients; the second has blocks with NaN, with infinity, and of zeros."""
  g = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), shape) * 0.3
  if step == 1:
    flat = g.reshape(-1)
    g = flat.at[3].set(jnp.nan).at[300].set(-jnp.inf).at[512:768].set(0).at[800].set(1e-40).reshape(shape)
  return {'w': g}


def run(tx, params, route='step', steps=2, place=lambda x: x):
  state = jax.jit(tx.init)(params)

  one = jax.jit(step_by(tx, route))

  for i in range(steps):
    params, state = one(place(gradient(i, params['w'].shape)), params, state)
  return params, state


def stacked(n):
  """Parameters and gradients of n models."""
  params = lpmm.quantize(jax.random.normal(jax.random.key(0), (n, *SHAPE)), lpmm.INT8)
  return params, jax.random.normal(jax.random.key(1), (n, *SHAPE))


def check_bits(interpreted, name, format, shape, route):
  """An optimizer's steps have the same bits in the loop and, once `interpreted` is called, in the kernel."""
  tx = OPTIMIZERS[name]()
  expected = run(tx, start(format, shape), route)
  interpreted()
  assert_same_bits(run(tx, start(format, shape), route), expected)


def check_bits_of_shards(interpreted, format, spec, axis_type, shape=SHAPE):
  """The same on eight devices, sharded by `spec` and without communication, as on one."""
  tx = OPTIMIZERS['sgdm'](formats=format)
  params = start(format, shape)
  expected = run(tx, params)
  mesh = jax.make_mesh((4, 2), ('x', 'y'), axis_types=(axis_type,) * 2)
  place = functools.partial(jax.device_put, device=NamedSharding(mesh, spec))
  interpreted()
  with jax.set_mesh(mesh):
    new, state = run(tx, place(params), place=place)
    step = jax.jit(functools.partial(lpmm.step, tx)).lower(place(gradient(0, shape)), new, state).compile()
  assert_same_bits((new, state), expected)
  assert not re.search(r'all-gather|all-to-all|all-reduce|collective-permute', step.as_text())
  assert new['w'].codes.sharding.shard_shape(shape) == NamedSharding(mesh, spec).shard_shape(shape)


def check_bits_in_shard_map(interpreted, is_mapped):
  """The same in `jax.shard_map`, and in `jax.vmap` in it."""
  tx = OPTIMIZERS['sgdm']()
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
  params, grads = stacked(4 if is_mapped else 2)

  state = jax.vmap(tx.init)(params)

  def run():
    def one(*args):
      return lpmm.step(tx, *args)

    def first(*args):
      return jax.tree.map(lambda x: x[None], one(*jax.tree.map(lambda x: x[0], args)))

    shard = jax.vmap(one) if is_mapped else first
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=P('x'), out_specs=P('x'), check_vma=False)
    return jax.jit(sharded)(grads, params, state)

  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


def check_bits_in_backward_pass(interpreted):
  """The same of gradients accumulated in the backward pass."""
  tx = lpmm.MultiSteps(lpmm.adamw(0.01), 2, accumulator=lpmm.INT8)
  params = lpmm.quantize({'w': jax.random.normal(jax.random.key(0), (3, 64, 64))}, lpmm.INT8)
  batch = jax.random.normal(jax.random.key(1), (8, 64))

  def loss(params, batch):
    layer = lambda x, w: (jnp.tanh(x @ lpmm.dequantize(w)), None)
    return jnp.mean(jax.lax.scan(jax.checkpoint(layer), batch, params['w'])[0])

  def run():
    step = jax.jit(lambda *args: lpmm.value_and_step(loss, tx)(*args))
    _, new, state = step(params, tx.init(params), batch)
    return step(new, state, batch)

  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


def check_bits_vmapped(interpreted):
  """The same in `jax.vmap` under automatic sharding."""
  tx = OPTIMIZERS['sgdm']()
  run = lambda: jax.jit(jax.vmap(lambda grads, params: lpmm.step(tx, grads, params, tx.init(params))))(
    *stacked(2)[::-1]
  )
  expected = run()
  interpreted()
  assert_same_bits(run(), expected)


def lower_for(name, format, shape, platforms, place=lambda x: x):
  """The text of a step lowered for each platform."""
  tx, params = OPTIMIZERS[name](), place(start(format, shape))
  traced = jax.jit(functools.partial(lpmm.step, tx)).trace(place(gradient(0, shape)), params, tx.init(params))
  return {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in platforms}


def step_in_shard_map(is_sharded):
  """A step of sgdm in `jax.shard_map` with check_vma over the axis 'x' of the current mesh, and its arguments."""
  tx, params = OPTIMIZERS['sgdm'](), start()
  state = tx.init(params)
  whole, rows = P(), P('x') if is_sharded else P()
  specs = (rows, rows, optax.tree.map_params(tx, lambda _: rows, state, transform_non_params=lambda _: whole))
  step = functools.partial(lpmm.step, tx)
  return jax.jit(jax.shard_map(step, in_specs=specs, out_specs=specs[1:], check_vma=True)), (gradient(0), params, state)
