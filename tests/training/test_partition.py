"""Groups of parameters: each is updated in place as by its optimizer alone, whatever is around, or kept."""

from flax import serialization
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import optax
import pytest
from runs import assert_same_bits
from runs import slow
from runs import step_by

import lpmm_optax as lpmm

DENSE = {
  'body': {'kernel': jax.random.normal(jax.random.key(0), (64, 128)), 'bias': jnp.ones(128)},
  'head': {'kernel': jax.random.normal(jax.random.key(1), (64, 128))},
  'embedding': jax.random.normal(jax.random.key(2), (128, 64)),
}
LABELS = {'body': {'kernel': 'sgdm', 'bias': 'adamw'}, 'head': 'adamw', 'embedding': 'frozen'}


def gradient(i):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(3), i), len(jax.tree.leaves(DENSE)))
  leaves, treedef = jax.tree.flatten(DENSE)
  return treedef.unflatten(0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True))


def by_shape(params):
  """The labels of a function that knows nothing of quantized arrays."""
  return jax.tree.map(lambda p: 'adamw' if p.ndim < 2 else 'sgdm' if p.shape[0] == 64 else 'frozen', params)


def groups():
  """A rate, an optimizer and a format by group, with error feedback."""
  return {
    'sgdm': lpmm.sgdm(0.1),
    'adamw': lpmm.adamw(0.01, formats={'mu': lpmm.INT16}),
    'frozen': lpmm.set_to_zero(),
  }


def start():
  return lpmm.quantize(DENSE, lpmm.INT8)


def run(tx, params, steps=3, route='step'):
  state, one = tx.init(params), jax.jit(step_by(tx, route))
  for i in range(steps):
    params, state = one(only_like(gradient(i), params), params, state)
  return params, state


def only_like(tree, params):
  """The part of a dict that parameters of some of its keys have."""
  if not isinstance(params, dict):
    return tree
  return {key: only_like(tree[key], params[key]) for key in params}


def alone(make=lambda tx: tx, steps=3):
  """Each group's parameters by its own optimizer, in trees of their own."""
  params, txs = start(), groups()
  sgdm, adamw = {'body': {'kernel': params['body']['kernel']}}, {'body': {'bias': params['body']['bias']}}
  a, _ = run(make(txs['sgdm']), sgdm, steps)
  b, _ = run(make(txs['adamw']), adamw | {'head': params['head']}, steps)
  return {'body': a['body'] | b['body'], 'head': b['head'], 'embedding': params['embedding']}


AROUND = {
  'alone': lambda tx: tx,
  'apply_if_finite': lambda tx: lpmm.apply_if_finite(tx, 2),
  'chain': lambda tx: lpmm.chain(optax.clip(0.05), tx),
  'MultiSteps': lambda tx: lpmm.MultiSteps(tx, 3),
}


@pytest.mark.parametrize(
  ('name', 'route'),
  [('alone', 'update'), *slow(*((name, 'step') for name in AROUND), ('chain', 'update'))],
)
def test_a_group_is_updated_as_by_its_optimizer_alone(name, route):
  around = AROUND[name]
  found, _ = run(around(lpmm.partition(groups(), LABELS)), start(), route=route)
  assert_same_bits(found, alone(around))
  assert not jnp.array_equal(found['body']['kernel'].codes, start()['body']['kernel'].codes)


@pytest.mark.parametrize('labels', [by_shape, by_shape(start())], ids=['function', 'of codes and scales'])
def test_labels_may_be_made_without_knowing_of_quantized_arrays(labels):
  tx = lpmm.partition(groups(), labels)
  params, _ = lpmm.step(tx, DENSE, start(), tx.init(start()))
  expected = lpmm.partition(groups(), by_shape(DENSE))
  assert_same_bits(params, lpmm.step(expected, DENSE, start(), expected.init(start()))[0])


def test_wrong_labels_and_states_are_named():
  with pytest.raises(ValueError, match=r"head: the label 'adam' has no transformation; there are .*'adamw'"):
    lpmm.partition(groups(), LABELS | {'head': 'adam'}).init(start())
  with pytest.raises(ValueError, match='labels must be a tree like the parameters'):
    lpmm.partition(groups(), {'body': 'sgdm'}).init(start())
  tx = lpmm.partition(groups(), LABELS)
  with pytest.raises(ValueError, match='partition got a state that it did not create'):
    lpmm.step(tx, DENSE, start(), lpmm.sgdm(0.1).init(start()))
  with pytest.raises(ValueError, match='partition needs the parameters'):
    tx.update(DENSE, tx.init(start()))


@pytest.mark.parametrize('mask', [{'body': False, 'head': True, 'embedding': False}, None])
def test_what_is_masked_out_stays_and_takes_no_state(mask):
  mask = mask or (lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == 'head', params))
  params, state = run(lpmm.masked(lpmm.adamw(0.01), mask), start())
  only, alone_state = run(lpmm.adamw(0.01), {'head': start()['head']})
  assert_same_bits(params, start() | only)
  assert lpmm.memory_report(params, state).bytes == lpmm.memory_report(params, alone_state).bytes


def test_dense_groups_may_have_an_optimizer_of_optax():
  tx = lpmm.partition({'ours': lpmm.adamw(0.1), 'theirs': optax.sgd(0.5)}, {'w': 'ours', 'b': 'theirs'})
  params = lpmm.quantize({'w': jnp.ones((64, 64)), 'b': jnp.ones(3)}, lpmm.INT8)
  params, _ = lpmm.step(
    tx, jax.tree.map(lambda x: jnp.ones(x.shape), params, is_leaf=lpmm.is_quantized), params, tx.init(params)
  )
  assert params['b'].tolist() == [0.5] * 3


def test_its_state_is_reported_sharded_saved_and_mapped_as_any():
  tx = lpmm.MultiSteps(lpmm.partition(groups(), LABELS), 2)
  params, state = run(tx, start())
  report = lpmm.memory_report(params, state, tx=tx)
  assert {row.path for row in report.rows} >= {'body/kernel', 'head/kernel', 'embedding'}
  assert 'updated in tiles' in str(report)
  restored = serialization.from_bytes(tx.init(start()), serialization.to_bytes(state))
  assert_same_bits(restored, state)
  mesh = jax.make_mesh((2,), ('x',), devices=jax.devices()[:2])
  placed = lpmm.shardings(state, params, {'body': P(), 'head': P('x', None), 'embedding': P()}, mesh)
  momentum = placed.inner_opt_state.inner_states['adamw'].inner_state.inner_state[0].mu['head']['kernel']
  assert momentum.codes.spec == P('x', None)
  emptied = optax.tree.map_params(tx, jnp.zeros_like, state)
  assert_same_bits(optax.tree.get(emptied, 'trace'), optax.tree.get(tx.init(start()), 'trace'))


@pytest.mark.slow
def test_the_update_of_groups_is_in_place():
  tx = lpmm.partition({'a': lpmm.sgdm(0.1), 'b': lpmm.adamw(0.1)}, list('abababab'))
  grads = [jax.ShapeDtypeStruct((2048, 2048), jnp.float32)] * 8
  params = jax.eval_shape(lambda x: lpmm.quantize(x, lpmm.INT8), grads)
  state = jax.eval_shape(tx.init, params)
  step = jax.jit(lambda params, state, grads: lpmm.step(tx, grads, params, state), donate_argnums=(0, 1))
  memory = step.lower(params, state, grads).compile().memory_analysis()
  total = lpmm.memory_report(params, state).bytes
  assert memory.alias_size_in_bytes == total
  assert memory.temp_size_in_bytes < 0.08 * total
