"""What an update does with a field, read off transformations that are none of Optax's, and the formats that follow."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax
import pytest
from transformations import field_formats

import lpmm_optax as lpmm

pytestmark = pytest.mark.usefixtures('standard_promotion', 'compile_fast')
PARAMS = lpmm.quantize({'w': jax.random.normal(jax.random.key(0), (96, 96))}, lpmm.INT8)
DENSE = 'float32'


def each(fields, update):
  """A transformation with fields that start at zero, from (g, *fields) -> (delta, *fields) of one array."""

  def init(params):
    return {name: jax.tree.map(jnp.zeros_like, params) for name in fields} | {'count': jnp.zeros((), jnp.int32)}

  def step(grads, state, params=None):
    one = lambda g, *old: update(state['count'], g, *old)
    out = jax.tree.map(one, grads, *(state[name] for name in fields))
    delta, *new = jax.tree.transpose(jax.tree.structure(grads), None, out)
    return delta, dict(zip(fields, new, strict=True)) | {'count': state['count'] + 1}

  return optax.GradientTransformation(init, step)


def average(m, g, decay=0.9):
  return decay * m + (1 - decay) * g


def variance(_, g, m, v):
  m, v = average(m, g), average(v, g * g)
  return g / jnp.sqrt(jnp.maximum(v - m * m, 1e-8)), m, v


def gap(_, g, fast, slow):
  fast, slow = average(fast, g), average(slow, g, 0.99)
  return g / (jnp.abs(fast - slow) + 1e-3), fast, slow


def least(_, g, v, low):
  v = average(v, jnp.square(g))
  low = jnp.where(low > 0, jnp.minimum(v, low), v)
  return g * jax.lax.rsqrt(low + 1e-8), v, low


def signed_divisor(_, g, m, v):
  v = v - 0.01 * jnp.sign(v - g * g) * g * g
  m = average(m, g)
  return m * (v + 1e-8) ** -0.5, m, v


def towards(decay):
  """An average written as a step towards the new value, with a decay that may follow from the step."""
  return lambda count, g, m: (m, m + (1 - decay(count)) * (g - m))


def warmed_up(count):
  return jnp.minimum(0.9999, count / (count + 10.0))


def every_eighth(count, g, total):
  total = jnp.where(count % 8 == 0, jnp.zeros_like(total), total) + g
  return total, total


def whitened(_, g, left):
  left = average(left, g @ g.T)
  values, vectors = jnp.linalg.eigh(left)
  return vectors @ ((vectors.T @ g) / jnp.sqrt(jnp.abs(values)[:, None] + 1e-6)), left


def rotated(_, g, m, v):
  m, basis = average(m, g), jnp.linalg.qr(jax.random.normal(jax.random.key(1), g.shape))[0]
  v = average(v, (basis.T @ g) ** 2)
  return basis @ ((basis.T @ m) / (jnp.sqrt(v) + 1e-8)), m, v


def scaled(decay):
  def update(_, g, m, v):
    m, v = average(m, g), average(v, g * g, decay)
    return m / (jnp.sqrt(v) + 1e-8), m, v

  return update


def orthogonal(_, g, m):
  m = average(m, g)
  step = lambda x, _: (1.5 * x - 0.5 * x @ (x.T @ x), None)
  return jax.lax.scan(step, m / jnp.linalg.norm(m), length=5)[0], m


def normalized(_, g, m):
  m = average(m, g)
  return m / jnp.sqrt(jnp.vdot(m, m) + 1e-8), m


def secant(_, g, last):
  change = g - last
  return g * jnp.vdot(change, g) / jnp.sum(change * change), g


def foreseen(_, g, last):
  return 2 * g - last, g


def multiplied(_, g, rate, m):
  rate = jnp.clip(rate * jnp.where(g * m > 0, 1.2, 0.5), 1e-6, 1.0)
  m = average(m, g)
  return -rate * jnp.sign(g), rate, m


KINDS = {
  'difference': (variance, ('m', 'v'), {'m': DENSE, 'v': DENSE}, 'difference'),
  'difference of two averages': (gap, ('fast', 'slow'), {'fast': DENSE, 'slow': DENSE}, 'difference'),
  'running minimum': (least, ('v', 'low'), {'v': 'bfloat16', 'low': 'bfloat16'}, 'over all steps'),
  'signed divisor': (signed_divisor, ('m', 'v'), {'m': 'bfloat16', 'v': 'bfloat16'}, 'relative precision'),
  'slow': (towards(lambda _: 0.9999), ('m',), {'m': 'int16'}, 'more than 1000 steps'),
  'not slow': (towards(lambda _: 0.999), ('m',), {'m': 'int8'}, 'nothing'),
  'slow in the end': (towards(warmed_up), ('m',), {'m': 'int16'}, 'more than 1000 steps'),
  'slow divisor': (scaled(0.9999), ('m', 'v'), {'m': 'bfloat16', 'v': 'bfloat16'}, 'divided by, and averaged'),
  'not slow divisor': (scaled(0.999), ('m', 'v'), {'m': 'int8', 'v': 'uint8_sqrt'}, 'nothing'),
  'sum as a divisor': (scaled(1.0), ('m', 'v'), {'m': 'int8', 'v': 'uint8_sqrt'}, 'nothing'),
  'sum of eight': (every_eighth, ('total',), {'total': 'int8'}, 'nothing'),
  'decomposed': (whitened, ('left',), {'left': DENSE}, 'decomposed'),
  'rotated and divided': (rotated, ('m', 'v'), {'m': 'int16', 'v': 'uint8_sqrt'}, 'multiplied as a matrix'),
  'in a loop': (orthogonal, ('m',), {'m': 'int16'}, 'multiplied as a matrix'),
  'divided by its norm': (normalized, ('m',), {'m': 'int8'}, 'nothing'),
  'change of a gradient': (secant, ('last',), {'last': DENSE}, 'what it changes by'),
  'change of a gradient, not divided by': (foreseen, ('last',), {'last': 'int8'}, 'nothing'),
  'rates': (multiplied, ('rate', 'm'), {'rate': 'bfloat16', 'm': 'int8'}, 'proportional'),
}


@pytest.mark.parametrize('name', KINDS)
def test_a_format_follows_from_the_use(name):
  update, fields, formats, reason = KINDS[name]
  tx = lpmm.low_precision(each(fields, update))
  state = tx.init(PARAMS)
  rows = [row for row in lpmm.memory_report(PARAMS, state, tx=tx).rows if row.group in fields]
  assert {row.group: row.format for row in rows} == formats
  assert any(reason in row.reason for row in rows)


def test_uses_are_seen_through_wrappers():
  def formats(inner, **kwargs):
    return field_formats(lpmm.low_precision(inner, **kwargs).init(PARAMS))

  slow = lambda decay: optax.chain(optax.ema(decay), optax.scale(-0.1))
  assert formats(optax.inject_hyperparams(slow)(decay=0.9999)) == {'ema': {'int16'}}
  assert formats(optax.inject_hyperparams(slow)(decay=0.99)) == {'ema': {'int8'}}
  assert formats(optax.apply_if_finite(slow(0.9999), 3)) == {'ema': {'int16'}}
  assert formats(optax.apply_if_finite(optax.amsgrad(0.1), 3))['nu_max'] == {'bfloat16'}
  masked = optax.masked(optax.amsgrad(0.1), lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
  assert formats(masked)['nu_max'] == {'bfloat16'}
  # Given one Format, a field takes that of its size which holds it.
  assert formats(slow(0.9999), formats=lpmm.BFLOAT16) == {'ema': {'int16'}}


@pytest.mark.parametrize('name', ['slow', 'slow in the end'])
def test_uses_are_seen_in_a_shard_map_that_knows_what_varies(name):
  update, fields, formats, _ = KINDS[name]
  found = []

  def init(params):
    state = lpmm.low_precision(each(fields, update)).init(params)
    found.extend(str(x.format) for x in jax.tree.leaves(state, is_leaf=lpmm.is_quantized) if lpmm.is_quantized(x))
    return jnp.zeros(())

  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  params = lpmm.quantize({'w': jnp.ones((8 * 96, 96))}, lpmm.INT8)
  jax.eval_shape(jax.shard_map(init, mesh=mesh, in_specs=P('x'), out_specs=P()), params)
  assert found == list(formats.values())


def test_a_numerator_follows_its_denominator_where_the_caller_says_nothing_of_it():
  def formats(inner, **given):
    state = lpmm.low_precision(inner, formats=given).init(PARAMS)
    return field_formats(state) | {name: given[name] for name in given if given[name] is None}

  assert formats(optax.adam(0.1), nu=lpmm.BFLOAT16) == {'mu': {'bfloat16'}, 'nu': {'bfloat16'}}
  assert formats(optax.adam(0.1), nu=None) == {'mu': {'bfloat16'}, 'nu': None}
  # In relative precision a slow average drowns, and in 16 bits of a block it has not the range.
  slow = formats(optax.contrib.ademamix(0.1), nu=lpmm.BFLOAT16)
  assert slow == {'m1': {'bfloat16'}, 'nu': {'bfloat16'}}


@pytest.mark.parametrize(
  ('inner', 'formats', 'message'),
  [
    (
      optax.adam(0.1),
      {'mu': lpmm.INT8, 'nu': lpmm.BFLOAT16},
      'mu/w: int8 .*divided by a field of relative precision: store it in BFLOAT16 or None',
    ),
    (optax.amsgrad(0.1), {'nu_max': lpmm.UINT8_SQRT}, 'nu_max/w: uint8_sqrt .*maximum.*store it in BFLOAT16 or None'),
    (optax.amsgrad(0.1), lpmm.INT8, 'nu/w: uint8_sqrt .*maximum'),
    (optax.contrib.muon(0.1), {'mu': lpmm.BFLOAT16}, 'mu/w: bfloat16 .*as a matrix: store it in INT16 or None'),
    (optax.rmsprop(0.1, centered=True), lpmm.BFLOAT16, r'/w: bfloat16 .*difference.*store it in None \(dense\)'),
    (optax.yogi(0.1), {'nu': lpmm.INT16}, 'nu/w: int16 .*root or quotient is taken of it: store it in BFLOAT16'),
    (each(('left',), whitened), {'left': lpmm.INT16}, 'left/w: int16 .*decomposed or solved'),
  ],
)
def test_what_cannot_be_right_is_refused_with_what_is(inner, formats, message):
  with pytest.raises(ValueError, match=message):
    lpmm.low_precision(inner, formats=formats).init(PARAMS)
