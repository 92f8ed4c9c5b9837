"""`layerwise`: slices of a stack are updated as leaves of their own, in a step and as their gradients come."""

import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest
from runs import assert_same_bits
from runs import slow
from runs import step_by
from training.test_backward import LAYERS
from training.test_backward import LOSSES
from training.test_backward import X
from training.test_backward import lean
from training.test_backward import make_params
from training.test_backward import ordinary
from training.test_backward import quantized
from training.test_backward import scanned
from training.test_backward import scanned_twice_over
from training.test_backward import stacked
from training.test_layerwise import run

import lpmm_optax as lpmm

adafactor = functools.partial(optax.adafactor, 0.01, min_dim_size_to_factor=32)
INNER = {
  'adafactor': lambda: adafactor(weight_decay_rate=0.1),
  'adafactor with momentum': lambda: adafactor(momentum=0.9),
  'muon': lambda: contrib.muon(0.01),
  'clipped adamw': lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(0.01)),
}


def layered(name='adafactor', **options):
  return lpmm.layerwise(lpmm.low_precision(INNER[name](), **options), '^kernel|^gain')


def start():
  """Two stacks, one of matrices that differ in size, and a leaf that is none."""
  sizes = jnp.exp2(jnp.arange(float(LAYERS)))[:, None, None]
  table = jax.random.normal(jax.random.key(0), (64, 96))
  return {'kernel': sizes * stacked()['kernel'], 'gain': stacked()['gain'], 'table': table}


def gradients(step):
  keys = jax.random.split(jax.random.fold_in(jax.random.key(7), step), 3)
  return {name: jax.random.normal(key, p.shape) for key, (name, p) in zip(keys, start().items(), strict=True)}


def apart(tree):
  """The stacks as leaves of their own."""
  return {'table': tree['table']} | {f'{k}{i}': tree[k][i] for k in ('kernel', 'gain') for i in range(LAYERS)}


@pytest.mark.parametrize('name', ['adafactor', *slow('adafactor with momentum', 'muon')])
def test_a_stack_in_float32_is_updated_as_optax_updates_separate_leaves(name):
  inner, tx = INNER[name](), layered(name, formats=None)

  @jax.jit
  def both(params, state, separate, separate_state, grads):
    with jax.numpy_dtype_promotion('standard'):
      updates, separate_state = inner.update(apart(grads), separate_state, separate)
    return *lpmm.step(tx, grads, params, state), optax.apply_updates(separate, updates), separate_state

  # Of the stack as one leaf, it is another optimizer.
  whole = lpmm.low_precision(inner, formats=None)
  step_whole = jax.jit(functools.partial(lpmm.step, whole))
  params = now = start()
  carry, state = (params, tx.init(params), apart(params), inner.init(apart(params))), whole.init(params)
  for i in range(3):
    carry = both(*carry, gradients(i))
    now, state = step_whole(gradients(i), now, state)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-7), apart(carry[0]), carry[2])
  moved, differs = (np.abs(carry[0]['kernel'] - x['kernel']).max((1, 2)) for x in (params, now))
  assert (differs / moved).max() > 0.1


@pytest.mark.slow
def test_quantized_slices_have_the_bits_of_separate_leaves():
  names = 'kernel', 'gain'
  only = lambda tree: {name: tree[name] for name in names}
  params, inner = quantized(only(start())), lpmm.low_precision(adafactor(momentum=0.9))
  tx = lpmm.layerwise(inner, lambda path, leaf: leaf.shape[0] == LAYERS)
  step, state = jax.jit(functools.partial(lpmm.step, tx)), tx.init(params)
  one = jax.jit(functools.partial(lpmm.step, inner))
  for i in range(2):
    grads = only(gradients(i))
    new, new_state = step(grads, params, state)
    for name in names:
      for k in range(LAYERS):
        of = lambda tree, name=name, k=k: jax.tree.map(lambda x: x[k], tree[name])
        alone = lambda tree, name=name, of=of: dict.fromkeys(names, optax.MaskedNode()) | {name: of(tree)}
        found, found_state = one(alone(grads), alone(params), of(state.states))
        assert_same_bits((found[name], found_state), (of(new), of(new_state.states)))
    assert (params['kernel'].codes != new['kernel'].codes).any()
    params, state = new, new_state


def test_what_is_the_same_in_two_slices_is_not_rounded_alike():
  twins, grads = (jnp.stack([tree['kernel'][0]] * 2) for tree in (start(), gradients(0)))
  tx = lpmm.layerwise(lpmm.low_precision(adafactor()), '')
  params = quantized(twins)
  found, _ = lpmm.step(tx, grads, params, tx.init(params))
  moved = found.codes[0] != params.codes[0]
  assert 0.1 < np.mean((found.codes[0] != found.codes[1])[moved]) < 0.9


@pytest.mark.parametrize(
  ('name', 'tx'),
  [
    ('scan', 'adafactor'),
    *slow(
      *[('scan', tx) for tx in INNER if tx != 'adafactor'],
      *[(n, 'adafactor') for n in LOSSES if n not in ('scan', 'scan of scans')],
    ),
  ],
)
def test_a_step_in_the_backward_pass_resumed_leaves_the_bits_of_the_ordinary_path(name, tx):
  params = quantized(make_params(name))
  is_stacked = lambda path, leaf: name != 'unrolled'
  tx = lpmm.layerwise(lpmm.low_precision(INNER[tx]()), is_stacked)
  step = lean(LOSSES[name], tx)
  _, *saved = jax.tree.map(np.array, step(params, tx.init(params), X))
  value, found, state = step(*jax.tree.map(jnp.asarray, saved), X)
  wanted, expected, expected_state = run(ordinary, LOSSES[name], tx, params, 2, X)
  np.testing.assert_allclose(value, wanted, rtol=1e-6)
  # Gradients come from other programs, which may differ in a last bit.
  for x, y in zip(jax.tree.leaves((found, state)), jax.tree.leaves((expected, expected_state)), strict=True):
    if jnp.issubdtype(x.dtype, jnp.integer):
      assert np.mean(x != y) < 1e-3
    else:
      np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
  assert all((x != y).any() for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True) if x.ndim > 2)


# ---------------------------------------------------------------------------------------------------------------------
# What else there is in a model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('how', slow('twice', 'not', 'whole'))
def test_a_stack_moves_however_it_is_used(how):
  weights = quantized(stacked()['kernel'])

  def loss(w, x):
    if how == 'whole':
      return jnp.mean((jnp.einsum('bi,lij->lbj', x, lpmm.dequantize(w)) - 1) ** 2)
    if how == 'not':
      return jnp.mean(x)
    layer = jax.checkpoint(lambda x, w: (jnp.tanh(x @ (w := lpmm.dequantize(w)) @ w.T), None))
    return jnp.mean(lax.scan(layer, lax.scan(layer, x, w)[0], w)[0])

  tx = lpmm.layerwise(lpmm.low_precision(adafactor(weight_decay_rate=0.1)), '')
  _, found, state = run(lean, loss, tx, weights, 2, X)
  _, expected, expected_state = run(ordinary, loss, tx, weights, 2, X)
  assert np.mean(found.codes != expected.codes) < 1e-3
  assert (found.codes != weights.codes).any()
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-7)
  jax.tree.map(close, state, expected_state)


@pytest.mark.slow
@pytest.mark.parametrize('route', ['step', 'update'])
def test_wrappers_go_around_it(route):
  """Accumulation, clipping by the norm of all, and a guard against what is not finite."""
  params, tx = quantized(start()), layered()
  expected = run_steps(tx, params, [jax.tree.map(lambda g, h: (g + h) / 2, gradients(0), gradients(1))], route)[0]
  accumulated = lpmm.MultiSteps(tx, 2, accumulator=None)
  found = run_steps(accumulated, params, [gradients(0), gradients(1)], route)[0]
  assert np.mean(found['kernel'].codes != expected['kernel'].codes) < 1e-3
  grads = gradients(0)
  clipped = jax.tree.map(lambda g: g * (0.1 / optax.tree.norm(grads)), grads)
  found = run_steps(lpmm.chain(optax.clip_by_global_norm(0.1), tx), params, [grads], route)[0]
  expected = run_steps(tx, params, [clipped], route)[0]
  assert np.mean(found['kernel'].codes != expected['kernel'].codes) < 1e-3
  guarded = lpmm.apply_if_finite(tx, 3)
  assert_same_bits(run_steps(guarded, params, [jax.tree.map(lambda g: g * jnp.nan, grads)], route)[0], params)


def run_steps(tx, params, grads, route):
  state = tx.init(params)
  for g in grads:
    params, state = jax.jit(step_by(tx, route))(g, params, state)
  return params, state


def test_it_takes_the_bytes_of_the_parameters_alone():
  shapes = {'layers': (16, 1024, 4096), 'norm': (16, 1024), 'embedding': (32000, 1024)}
  shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
  params = jax.eval_shape(quantized, shapes)
  tx = lpmm.layerwise(lpmm.low_precision(optax.adafactor(0.01)), 'layers|norm')
  report = lpmm.memory_report(params, tx.init(params), tx=tx)
  assert_same_bits(jax.tree.map(jnp.shape, tx.init(params)), jax.tree.map(jnp.shape, jax.eval_shape(tx.init, params)))
  small = 4 * (16 * (1024 + 4096 + 1) + 16 * (1 + 1 + 1024) + 32000 + 1024 + 1)
  assert report.groups['v_row'] + report.groups['v_col'] + report.groups['v'] == small
  assert set(report.groups) == {'params', 'v_row', 'v_col', 'v'}
  assert report.bytes_per_param == pytest.approx(1.03, abs=0.01)
  assert 'layers: updated whole, for reduce_sum, a slice at a time' in str(report)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('loss', 'name', 'stacks', 'words'),
  [
    (scanned, 'scan', None, r'kernel: .* slices of shape \(64, 64\).* Name a parameter in its `stacked`'),
    *slow((scanned_twice_over, 'scan of scans', 'kernel', 'kernel: .* all of .2, 64, 64. at once')),
  ],
)
def test_a_gradient_that_comes_in_other_slices_is_refused(loss, name, stacks, words):
  params, tx = quantized(make_params(name)), lpmm.layerwise(lpmm.low_precision(adafactor()), stacks)
  with pytest.raises(ValueError, match=words):
    lean(loss, tx)(params, tx.init(params), X)


def test_what_cannot_be_sliced_or_updated_is_refused():
  inner = lpmm.low_precision(adafactor())
  with pytest.raises(TypeError, match=r'layerwise takes an optimizer of lpmm_optax.*low_precision'):
    lpmm.layerwise(adafactor())
  with pytest.raises(TypeError, match=r'MultiSteps.* goes around layerwise'):
    lpmm.layerwise(lpmm.MultiSteps(inner, 2))
  tx = lpmm.layerwise(inner, 'w')
  with pytest.raises(ValueError, match=r'a/w: .*no axis'):
    tx.init({'a': {'w': jnp.ones(())}})
  across = {'w': lpmm.quantize(jnp.ones((4096, 8)), lpmm.INT8)}
  with pytest.raises(ValueError, match=r'w: its blocks run along the first axis .*block_size=8'):
    tx.init(across)
  params = {'w': jnp.ones((2, 8))}
  with pytest.raises(TypeError, match='layerwise got a state of type LowPrecisionState'):
    lpmm.step(tx, params, params, inner.init(params))
  with pytest.raises(ValueError, match='layerwise needs the parameters'):
    tx.update(params, tx.init(params))
  refused = quantized(stacked())
  with pytest.raises(ValueError, match=r'kernel: its update is not elementwise .*lpmm_optax.layerwise\(tx, stacked\)'):
    lean(scanned, inner)(refused, inner.init(refused), X)
