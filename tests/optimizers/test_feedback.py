"""Error feedback of any optimizer: which field is its momentum, what comes back through it, and what it is good for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest
from runs import assert_same_bits
from runs import descent
from runs import excess
from runs import gradients
from runs import slow
from runs import train
from runs import tree

import lpmm_optax as lpmm
from lpmm_optax.trace import _momentum
from lpmm_optax.trace import _plan

pytestmark = pytest.mark.usefixtures('standard_promotion')


def planned(inner, shape=(64, 128)):
  """The plan of the update of one leaf, and the names of its fields."""
  structure, _ = _plan.flatten(jnp.zeros(shape))
  inner = optax.with_extra_args_support(inner)
  state = _plan.trace_init(inner, structure)[1]
  plan = _plan.plan_update(inner, structure, state, {})
  return plan, plan.leaves[0], [state.entries[e].field for e in plan.leaves[0].fields]


MOMENTA = {
  'adamw': (lambda: optax.adamw(0.1), 'mu'),
  'nadam': (lambda: optax.nadam(0.1), 'mu'),
  # Of its second moment, too, the first one is part.
  'adabelief': (lambda: optax.adabelief(0.1), 'mu'),
  'amsgrad': (lambda: optax.amsgrad(0.1), 'mu'),
  'radam': (lambda: optax.radam(0.1), 'mu'),
  'sgd': (lambda: optax.sgd(0.1, 0.9), 'trace'),
  'rmsprop': (lambda: optax.rmsprop(0.1, momentum=0.9), 'trace'),
  'adamw, injected': (lambda: optax.inject_hyperparams(optax.adamw)(0.1), 'mu'),
  'adamw, clipped': (lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda count: 0.1)), 'mu'),
  'adamw, if finite': (lambda: optax.apply_if_finite(optax.adamw(0.1), 5), 'mu'),
  # Of two, the one that decays faster: .9 beside .9999, and .92, of differences, beside .98.
  'ademamix': (lambda: contrib.ademamix(0.1), 'm1'),
  'adan': (lambda: optax.adan(0.1), 'v'),
  'no momentum': (lambda: optax.sgd(0.1), None),
  'a second moment alone': (lambda: optax.rmsprop(0.1), None),
  'a sign': (lambda: optax.lion(0.1), None),
  'a decay of one': (lambda: optax.sgd(0.1, 1.0), None),
  'a decay of zero': (lambda: optax.adam(0.1, b1=0.0), None),
  'a rate of zero': (lambda: optax.sgd(0.0, 0.9), None),
}


@pytest.mark.parametrize('name', MOMENTA)
def test_the_momentum_is_found_by_what_the_update_does_with_it(name):
  make, expected = MOMENTA[name]
  _, leaf, fields = planned(make())
  found = _momentum.find(leaf.program, leaf.templates, tuple(range(len(fields))))
  assert (None if found is None else fields[found]) == expected


@pytest.mark.slow
def test_of_two_momenta_of_one_name_the_one_is_corrected_that_moves_the_parameter():
  inner = optax.chain(optax.trace(0.5), optax.trace(0.9), optax.scale(-0.01))
  _, leaf, fields = planned(inner)
  assert fields == ['trace', 'trace']
  assert _momentum.find(leaf.program, leaf.templates, (0, 1)) == 1
  params = lpmm.quantize(tree()['kernel'], lpmm.INT8)
  step = lambda feedback: train(lpmm.low_precision(inner, error_feedback=feedback), params, gradients(1)['kernel'])[1]
  with_feedback, without = step(True).inner_state, step(False).inner_state
  assert_same_bits(with_feedback[0], without[0])
  assert (with_feedback[1].trace.codes != without[1].trace.codes).any()


CONSTANT = ('sgd', 'sgd nesterov', 'adam', 'nadam', 'rmsprop')


@pytest.mark.parametrize('name', CONSTANT)
def test_what_is_added_to_a_momentum_moves_the_parameter_by_as_much_as_it_should(name):
  # One gradient throughout, from its own stationary state, so that the program stays as it is.
  g = jnp.array([0.5, -2.0, 1e-3, 3.0])
  inner = {
    'sgd': optax.sgd(0.1, 0.8),
    'sgd nesterov': optax.sgd(0.1, 0.8, nesterov=True),
    'adam': optax.adam(0.1, b1=0.8),
    'nadam': optax.nadam(0.1, b1=0.8),
    'rmsprop': optax.rmsprop(0.1, momentum=0.8),
  }[name]
  plan, leaf, fields = planned(inner, g.shape)
  start = {'mu': g, 'nu': g**2, 'trace': jnp.zeros_like(g)}
  state = jax.tree_util.tree_map_with_path(
    lambda path, x: start.get(getattr(path[-1], 'name', ''), jnp.asarray(10000, x.dtype)), inner.init(jnp.zeros_like(g))
  )
  (field,) = (k for k, name in enumerate(fields) if name in ('mu', 'trace'))
  program = _momentum.Linearized(leaf.program, field)
  arrays = dict(zip(plan.graph.inputs, [g, *jax.tree.leaves(state), jnp.zeros_like(g)], strict=True))
  scalars = plan.graph.evaluate(leaf.scalars, lambda v: arrays[v] if v in arrays else plan.graph.known[v])
  move, _ = program(g, jnp.zeros_like(g), *(start[f] for f in fields), *scalars.values())[-2:]

  def moved(change):
    """After one step, in which the momentum is changed, and a hundred more, in which 0.8^100 of it is left."""
    _, changed = inner.update(g, state, jnp.zeros_like(g))
    changed = jax.tree_util.tree_map_with_path(
      lambda path, x: x + change if getattr(path[-1], 'name', '') == fields[field] else x, changed
    )
    add = lambda carry, _: (lambda delta, new: ((carry[0] + delta, new), None))(*inner.update(g, carry[1], carry[0]))
    return jax.lax.scan(add, (jnp.zeros_like(g), changed), None, 100)[0][0]

  error = jnp.array([1e-2, -3e-2, 2e-2, 1e-2])
  # Sums of 100 steps of .1 are rounded to 1e-6; biases of the moments are corrected to that after 10^4 steps.
  np.testing.assert_allclose(moved(error / move) - moved(0.0), error, atol=2e-5)


NOISY = {
  'nadam': optax.nadam,
  'sgd nesterov': functools.partial(optax.sgd, momentum=0.9, nesterov=True),
  'adabelief': optax.adabelief,
}


# Steps are a 24th of a grid step long. Of what rounding alone adds to the loss, a quarter is left.
@pytest.mark.parametrize('name', slow(*NOISY))
def test_feedback_removes_what_rounding_adds_to_the_loss(name):
  inner = NOISY[name](1e-3)
  exact = excess(inner, None, seeds=2)
  fed_back = excess(lpmm.low_precision(inner, error_feedback=None), lpmm.INT8, seeds=2) - exact
  lost = excess(lpmm.low_precision(inner, error_feedback=False), lpmm.INT8, seeds=2) - exact
  assert (lost > 0).all()
  assert (fed_back < 0.3 * lost).all()


@pytest.mark.slow
def test_adamw_loses_no_more_than_our_own():
  rate = 1e-3
  exact = excess(optax.adamw(rate), None)
  ours, found = (
    excess(tx, lpmm.INT8) - exact
    for tx in (lpmm.adamw(rate), lpmm.low_precision(optax.adamw(rate), error_feedback=None))
  )
  # Which have other derivatives, hence other random roundings. They differ by under 15 % here.
  assert (found < 1.3 * ours).all()


def rises_thirtyfold(count):
  return jnp.where((count >= 500) & (count < 1000), 3e-5, 1e-3)


@pytest.mark.parametrize('make', slow(optax.adamw, functools.partial(optax.sgd, momentum=0.9)))
def test_errors_fed_back_at_a_low_rate_do_no_harm_when_it_rises(make):
  inner = make(rises_thirtyfold)
  plain = descent(lpmm.low_precision(inner, error_feedback=False), lpmm.INT8, 1100, 1)[0, 1000:]
  fed_back = descent(lpmm.low_precision(inner, error_feedback=None), lpmm.INT8, 1100, 1)[0, 1000:]
  # By a fifth for some thirty steps. With a bound 2.7 times as high, losses would be eight times as large.
  assert fed_back.max() < 1.3 * plain.max()


REFUSED = {
  'lion': (optax.lion(0.1), {}, 'kernel: .*decays by one factor'),
  'whole': (optax.lamb(0.1), {}, 'kernel: .*element by element'),
  'nearest': (optax.adam(0.1), {'mu': lpmm.Format(rounding='nearest')}, 'kernel: .*stochastic'),
  'dense': (optax.adam(0.1), None, 'kernel: .*stochastic'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_where_it_cannot_work_it_is_refused_or_nothing_is_different(name):
  inner, formats, message = REFUSED[name]
  start = lpmm.quantize(tree(), lpmm.INT8)
  make = lambda feedback: lpmm.low_precision(inner, formats=formats, error_feedback=feedback)
  with pytest.raises(ValueError, match=message):
    train(make(True), start, gradients(1))
  computations = [
    str(jax.make_jaxpr(functools.partial(lpmm.step, tx))(tree(1), start, tx.init(start)))
    for tx in (make(None), make(False))
  ]
  assert computations[0] == computations[1]


MIXED = [('a', lpmm.INT4), ('b', lpmm.INT8)]


@pytest.mark.parametrize('wanted', [MIXED, lambda path, leaf: dict(MIXED)[path]], ids=['list', 'function'])
def test_each_leaf_has_it_that_stores_its_momentum_finely_enough(wanted):
  params = lpmm.quantize({'a': jnp.ones((64, 128)), 'b': jnp.ones((64, 128))}, lpmm.INT8)
  grads = dict.fromkeys(params, jax.random.normal(jax.random.key(0), (1, 64, 128)))
  run = lambda formats, feedback: train(lpmm.sgdm(0.01, formats=formats, error_feedback=feedback), params, grads)[0]
  mixed = run({'trace': wanted}, None)
  assert_same_bits(mixed['b'], run({'trace': lpmm.INT8}, True)['b'])
  with pytest.raises(ValueError, match=r'^a: .* fewer than 8 bits'):
    run({'trace': wanted}, True)


def test_dense_parameters_have_no_errors_to_feed_back():
  results = [train(lpmm.low_precision(optax.adam(0.1), error_feedback=x), tree(), gradients(2)) for x in (True, False)]
  assert_same_bits(*results)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_a_bad_gradient_stays_visible_and_poisons_only_its_block(bad):
  start = lpmm.quantize(tree()['kernel'], lpmm.INT8)
  tx = lpmm.low_precision(optax.nadam(0.1), error_feedback=True)
  params, _ = train(tx, start, gradients(1)['kernel'].at[0, 2, 70].set(bad))
  is_bad = ~np.isfinite(lpmm.dequantize(params))
  assert is_bad[2, 70]
  assert is_bad.sum() <= start.blocks.size


@pytest.mark.parametrize('rate', [0.0, 1e-40])
def test_rates_at_which_nothing_moves_leave_state_finite_and_parameters_alone(rate):
  start = lpmm.quantize(tree(), lpmm.INT8)
  params, state = train(
    lpmm.low_precision(optax.inject_hyperparams(optax.nadam)(rate), error_feedback=None), start, gradients(3)
  )
  assert_same_bits(params['kernel'], start['kernel'])
  assert np.isfinite(lpmm.dequantize(optax.tree.get(state, 'mu'))['kernel']).all()
