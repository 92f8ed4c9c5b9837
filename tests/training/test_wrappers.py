"""Everything public of Optax that can stand around, before or after an optimizer of ours: it works, or is an error.

What is new in Optax fails `test_every_public_name_is_classified` until somebody has said which of the two it is.
"""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib
import pytest
from runs import slow
from runs import step_by

import lpmm_optax as lpmm

KEY = jax.random.key(0)
DENSE = {
  'a': jax.random.normal(jax.random.key(1), (8, 64)),
  'b': jax.random.normal(jax.random.key(2), (8, 64)),
  'bias': jnp.ones(3),
}
PARAMS = lpmm.quantize(DENSE, lpmm.INT16, where=[('[ab]$', lpmm.INT16)])
SOME = {'a': True, 'b': False, 'bias': True}
ALL = jax.tree.map(lambda _: True, SOME)
GRADS = [jax.tree.map(lambda p, i=i: jax.random.normal(jax.random.key(10 + i), p.shape), DENSE) for i in range(3)]
# A grid step of INT16 for each of three steps, from parameters of at most 4.
ATOL = 3 * 4 / 32767


def even(step):
  return step % 2 == 0


def low(tx):
  return lpmm.low_precision(tx, formats=None)


# What goes around an optimizer: how, and whether it works around one of ours.
AROUND = {
  'MultiSteps': (lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(), False),
  'apply_if_finite': (lambda tx: optax.apply_if_finite(tx, 3), False),
  'chain': (lambda tx: optax.chain(tx), True),
  'conditionally_mask': (lambda tx: optax.conditionally_mask(tx, even), False),
  'conditionally_transform': (lambda tx: optax.conditionally_transform(tx, even), False),
  'flatten': (lambda tx: optax.flatten(tx), False),
  'galore': (lambda tx: contrib.galore(0.1, rank=4, base_optimizer=tx), False),
  'inject_hyperparams': (lambda tx: injected(optax.inject_hyperparams, tx), True),
  'inject_stateful_hyperparams': (lambda tx: injected(optax.inject_stateful_hyperparams, tx), True),
  'lookahead': (lambda tx: optax.lookahead(tx, 2, 0.5), False),
  'masked': (lambda tx: optax.masked(tx, ALL), True),
  'masked, some': (lambda tx: optax.masked(tx, SOME), False),
  'mechanize': (lambda tx: contrib.mechanize(tx), False),
  'multi_transform': (lambda tx: optax.multi_transform({True: tx, False: tx}, SOME), True),
  'named_chain': (lambda tx: optax.named_chain(('clip', optax.clip(0.5)), ('tx', tx)), True),
  'partition': (lambda tx: optax.partition({True: tx, False: tx}, SOME), True),
  'sam': (lambda tx: contrib.sam(tx, tx), False),
  'scale_by_galore': (lambda tx: contrib.scale_by_galore(rank=4, base_optimizer=tx), False),
  'schedule_free': (lambda tx: contrib.schedule_free(tx, 0.01), False),
  'selective_transform': (lambda tx: optax.selective_transform(tx, freeze_mask=SOME), False),
  'split_real_and_imaginary': (lambda tx: contrib.split_real_and_imaginary(tx), True),
  'with_extra_args_support': (lambda tx: optax.with_extra_args_support(tx), True),
}

# What there is in place of those that do not work.
INSTEAD = {
  'MultiSteps': lambda make: lpmm.MultiSteps(make(formats=None), 2, accumulator=None),
  'apply_if_finite': lambda make: lpmm.apply_if_finite(make(formats=None), 3),
  'masked, some': lambda make: lpmm.masked(make(formats=None), SOME),
  'selective_transform': lambda make: lpmm.masked(make(formats=None), jax.tree.map(lambda x: not x, SOME)),
  'conditionally_mask': lambda make: low(optax.conditionally_mask(optax.adamw(0.01), even)),
  'conditionally_transform': lambda make: low(optax.conditionally_transform(optax.adamw(0.01), even)),
  'flatten': lambda make: low(optax.flatten(optax.adamw(0.01))),
  'mechanize': lambda make: low(contrib.mechanize(optax.adamw(0.01))),
  'sam': lambda make: low(contrib.sam(optax.adamw(0.01), optax.adamw(0.01))),
  'schedule_free': lambda make: low(contrib.schedule_free(optax.adamw(0.01), 0.01)),
}

# Transformations of gradients, with their arguments where there must be some.
ARGUMENTS = {
  'adaptive_grad_clip': (0.1,),
  'add_decayed_weights': (0.1,),
  'add_noise': (0.1, 0.5, KEY),
  'apply_every': (2,),
  'clip': (0.5,),
  'clip_by_block_rms': (0.5,),
  'clip_by_global_norm': (0.5,),
  'differentially_private_aggregate': (1.0, 0.1, KEY),
  'ema': (0.9,),
  'freeze': (SOME,),
  'measure_with_ema': (optax.tree.norm, 0.9),
  'monitor': ({'norm': optax.tree.norm},),
  'scale': (0.5,),
  'scale_by_backtracking_linesearch': (5,),
  'scale_by_learning_rate': (0.1,),
  'scale_by_madgrad': (0.1,),
  'scale_by_rprop': (0.1,),
  'scale_by_schedule': (lambda count: 0.5,),
  'scale_by_zoom_linesearch': (5,),
  'snapshot': ('norm', optax.tree.norm),
  'stateless': (lambda updates, params: jax.tree.map(lambda u: 0.5 * u, updates),),
  'stateless_with_tree_map': (lambda u, p: 0.5 * u,),
  'trace': (0.9,),
}
WITHOUT_ARGUMENTS = (
  'centralize', 'hutchinson_estimator_diag_hessian', 'identity', 'keep_params_nonnegative', 'normalize',
  'normalize_by_update_norm', 'reduce_on_plateau', 'scale_by_acprop', 'scale_by_adadelta', 'scale_by_adam',
  'scale_by_adamax', 'scale_by_adan', 'scale_by_ademamix', 'scale_by_adopt', 'scale_by_amsgrad', 'scale_by_belief',
  'scale_by_cocob', 'scale_by_distance_over_gradients', 'scale_by_factored_rms', 'scale_by_lbfgs', 'scale_by_lion',
  'scale_by_muon', 'scale_by_novograd', 'scale_by_optimistic_gradient', 'scale_by_param_block_norm',
  'scale_by_param_block_rms', 'scale_by_polyak', 'scale_by_radam', 'scale_by_rms', 'scale_by_rss', 'scale_by_sign',
  'scale_by_simplified_ademamix', 'scale_by_sm3', 'scale_by_stddev', 'scale_by_trust_ratio', 'scale_by_yogi',
  'set_to_zero', 'zero_nans',
)  # fmt: skip
TRANSFORMATIONS = sorted((*ARGUMENTS, *WITHOUT_ARGUMENTS))

# Optimizers for `low_precision`, without which they are for dense parameters.
OPTIMIZERS = (
  'acprop', 'adabelief', 'adadelta', 'adafactor', 'adagrad', 'adam', 'adamax', 'adamaxw', 'adamw', 'adan', 'ademamix',
  'adopt', 'amsgrad', 'cocob', 'dadapt_adamw', 'dog', 'dowg', 'dpsgd', 'fromage', 'lamb', 'lars', 'lbfgs', 'lion',
  'madgrad', 'momo', 'momo_adam', 'muon', 'nadam', 'nadamw', 'noisy_sgd', 'novograd', 'optimistic_adam',
  'optimistic_adam_v2', 'optimistic_gradient_descent', 'polyak_sgd', 'prodigy', 'radam', 'rmsprop', 'rprop',
  'schedule_free_adamw', 'schedule_free_sgd', 'sgd', 'sign_sgd', 'signum', 'simplified_ademamix', 'sm3', 'sophia',
  'yogi',
)  # fmt: skip

# Functions of trees that may hold parameters, tested below or, as what they do to codes is no error, documented.
OF_TREES = {
  'apply_updates',
  'global_norm',
  'incremental_update',
  'init_empty_state',
  'periodic_update',
  'schedule_free_eval_params',
  'tree_map_params',
}

# Of numbers, of single arrays, of gradients or of loss functions: they see no parameters that ours would have.
OTHERS = {
  'bias_correction', 'matrix_inverse_pth_root', 'microbatch', 'multi_normal', 'nnls', 'per_example_global_norm_clip',
  'per_example_layer_norm_clip', 'power_iteration', 'safe_increment', 'safe_int32_increment', 'safe_norm',
  'safe_root_mean_squares', 'scale_gradient', 'skip_large_updates', 'skip_not_finite', 'update_infinity_moment',
  'update_moment', 'update_moment_per_elem_norm', 'value_and_grad_from_state',
}  # fmt: skip
MODULES_OF_OTHERS = (
  'typing', 'collections.abc', 'optax.losses', 'optax.schedules._schedule', 'optax.schedules._join',
)  # fmt: skip

# Messages of Optax's own, from looking at the leaves one by one, about which docs/guides/wrappers.md says the rest.
OF_OPTAX = ('Cannot compare dtype', 'cannot convert float infinity to integer', 'accepts only NDarrays, got: Quantized')
SAYS_WHAT_TO_DO = '|'.join([r'lpmm_optax\.', *OF_OPTAX])
ERRORS = (TypeError, ValueError, OverflowError)

pytestmark = [
  pytest.mark.usefixtures('compile_fast'),
  pytest.mark.filterwarnings('ignore:.*is deprecated:DeprecationWarning'),
  pytest.mark.filterwarnings('ignore:Specifying a key will be required:UserWarning'),
]


def public_names():
  for module in (optax, contrib):
    for name, x in vars(module).items():
      is_plain_class = inspect.isclass(x) and not issubclass(x, optax.GradientTransformation | optax.MultiSteps)
      if not name.startswith('_') and callable(x) and not is_plain_class:
        yield name, x.__module__


def of_optax(name):
  """A factory, of contrib's if both have one."""
  return getattr(contrib, name, None) or getattr(optax, name)


def injected(inject, tx):
  return inject(lambda rate: tx, hyperparam_dtype=jnp.float32)(rate=0.1)


def make_transformation(name):
  if name == 'scale_by_muon':
    dimensions = lambda params: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)
    tx = optax.masked(of_optax(name)(weight_dimension_numbers=dimensions), ALL | {'bias': False})
  else:
    tx = of_optax(name)(*ARGUMENTS.get(name, ()))
  return optax.with_extra_args_support(tx)


def extra_args(name):
  """What some ask for besides the gradients."""
  if 'linesearch' in name:
    return {'value': jnp.float32(1.0), 'grad': GRADS[0], 'value_fn': lambda params: jnp.float32(1.0)}
  if name == 'hutchinson_estimator_diag_hessian':
    return {'obj_fn': lambda params: optax.tree.norm(params) ** 2}
  return {'value': jnp.float32(1.0)}


def of_each_example(gradients):
  return jax.tree.map(lambda g: jnp.stack([g, -0.5 * g]), gradients)


def gradients_for(name):
  private = name in ('differentially_private_aggregate', 'dpsgd')
  return [of_each_example(g) for g in GRADS] if private else GRADS


def run(tx, params):
  """Parameters after three updates with the state that the first left, all of them in one program."""
  step = step_by(tx, 'update')
  params, state = step(GRADS[0], params, tx.init(params))
  grads = jax.tree.map(lambda *g: jnp.stack(g), *GRADS[1:])
  return jax.lax.scan(lambda carry, g: (step(g, *carry), None), (params, state), grads)[0][0]


def says_what_to_do_unless_it_returns(fn):
  """What fn returns; None if it raises, which must be an error that says what to do."""
  try:
    return fn()
  except ERRORS as error:
    message = str(error)
  assert re.search(SAYS_WHAT_TO_DO, message)
  return None


def assert_close(quantized, dense):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=ATOL), lpmm.dequantize(quantized), dense)


@pytest.fixture(autouse=True)
def _settings_that_optax_needs():
  with jax.numpy_dtype_promotion('standard'), jax.numpy_rank_promotion('allow'):
    yield


def test_every_public_name_is_classified():
  known = {*AROUND, *TRANSFORMATIONS, *OPTIMIZERS, *OF_TREES, *OTHERS, 'GradientTransformation'}
  known |= {'GradientTransformationExtraArgs'}
  new = {name for name, module in public_names() if name not in known and not module.startswith(MODULES_OF_OTHERS)}
  assert new == set()


QUICK = ('inject_hyperparams', 'partition')
REFUSED = [name for name, (_, works) in AROUND.items() if not works]


@pytest.mark.parametrize('name', [*REFUSED, *QUICK, *slow(*sorted(set(AROUND) - {*REFUSED, *QUICK}))])
def test_a_wrapper_works_around_ours_or_says_what_to_do(name):
  wrap, works = AROUND[name]
  params, tx = PARAMS, wrap(lpmm.adamw(0.01, formats=None))
  if name == 'lookahead':
    params = optax.LookaheadParams.init_synced(params)
  if works:
    found = jax.jit(lambda: run(tx, params))()
    assert_close(found, jax.jit(lambda: run(wrap(optax.adamw(0.01)), DENSE))())
  else:
    with pytest.raises(ERRORS, match=SAYS_WHAT_TO_DO):
      jax.eval_shape(lambda: run(tx, params))


@pytest.mark.parametrize('name', slow(*INSTEAD))
def test_what_stands_in_its_place_gives_its_result(name):
  wrap, _ = AROUND[name]
  expected = jax.jit(lambda: run(wrap(optax.adamw(0.01)), DENSE))()
  if name == 'masked, some':  # Optax's adds the gradient where the mask is False.
    expected |= {'b': DENSE['b']}
  tx = INSTEAD[name](lambda **kwargs: lpmm.adamw(0.01, error_feedback=False, **kwargs))
  assert_close(jax.jit(lambda: run(tx, PARAMS))(), expected)


@pytest.mark.parametrize('name', slow(*TRANSFORMATIONS))
def test_before_ours_in_a_chain_of_optax_it_works_or_says_what_to_do(name):
  def transformed(params):
    tx = make_transformation(name)
    state = tx.init(params)
    for g in gradients_for(name)[:2]:
      g, state = tx.update(g, state, params, **extra_args(name))
    return g

  expected = transformed(DENSE)
  found = says_what_to_do_unless_it_returns(lambda: transformed(PARAMS))
  if found is not None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, expected)


AFTER = ('reduce_on_plateau', 'scale')


@pytest.mark.parametrize('name', [*AFTER, *slow(*(name for name in TRANSFORMATIONS if name not in AFTER))])
def test_after_ours_it_leaves_updates_alone_or_says_what_to_do(name):
  tx, after = lpmm.sgdm(0.1), make_transformation(name)
  updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
  expected = optax.apply_updates(PARAMS, updates)

  def applied():
    state = after.init(PARAMS)
    for _ in range(2):
      transformed, state = after.update(updates, state, PARAMS, **extra_args(name))
    return optax.apply_updates(PARAMS, transformed)

  found = says_what_to_do_unless_it_returns(applied)
  if found is not None:
    kept = {leaf: PARAMS[leaf] for leaf in found if name == 'set_to_zero' or (name == 'freeze' and SOME[leaf])}
    jax.tree.map(np.testing.assert_array_equal, found, expected | kept)


# Those that look at parameters, or whose state is made of them; the others need no `lpmm.chain`.
PRECEDING = (
  'add_decayed_weights',
  *slow('adaptive_grad_clip', 'scale_by_trust_ratio', 'scale_by_adam', 'ema', 'snapshot'),
)


@pytest.mark.parametrize('name', PRECEDING)
def test_before_ours_in_our_chain_it_works(name):
  found = jax.jit(lambda: run(lpmm.chain(make_transformation(name), lpmm.adamw(0.01, formats=None)), PARAMS))()
  assert_close(found, jax.jit(lambda: run(optax.chain(make_transformation(name), optax.adamw(0.01)), DENSE))())


WRAPPERS = {
  'MultiSteps': lambda tx: lpmm.MultiSteps(tx, 1),
  'apply_if_finite': lambda tx: lpmm.apply_if_finite(tx, 1),
  'partition': lambda tx: lpmm.partition({'all': tx}, lambda params: jax.tree.map(lambda _: 'all', params)),
  'layerwise': lpmm.layerwise,
}


@pytest.mark.parametrize('name', PRECEDING)
@pytest.mark.parametrize('wrapper', ['MultiSteps', *slow('apply_if_finite', 'partition', 'layerwise')])
def test_before_a_wrapper_in_our_chain_it_works_too(name, wrapper):
  tx = lpmm.chain(make_transformation(name), WRAPPERS[wrapper](lpmm.adamw(0.01, formats=None)))
  # An integer, whose gradient has no numbers, is updated by nobody.
  params = PARAMS | {'count': jnp.int32(3)}
  state = tx.init(params)
  assert_same_start(state, lpmm.chain(make_transformation(name), lpmm.adamw(0.01, formats=None)).init(params)[:1])
  for grads in GRADS:
    grads = grads | {'count': np.zeros((), jax.dtypes.float0)}
    params, state = jax.jit(lambda p, s, grads=grads: lpmm.step(tx, grads, p, s))(params, state)
  assert params.pop('count') == 3
  expected = jax.jit(lambda: run(optax.chain(make_transformation(name), optax.adamw(0.01)), DENSE))()
  assert_close(params, expected)


def assert_same_start(states, expected):
  """Of what precedes: as dense parameters have it, not their codes."""
  same = lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype)
  assert jax.tree.all(jax.tree.map(same, states[: len(expected)], expected))
  jax.tree.map(np.testing.assert_array_equal, states[: len(expected)], expected)


@pytest.mark.parametrize('name', ['adam', 'sgd', *slow(*(name for name in OPTIMIZERS if name not in ('adam', 'sgd')))])
def test_an_optimizer_of_optax_refuses_quantized_parameters(name):
  make, gradients = of_optax(name), gradients_for(name)
  needed = [p for p in inspect.signature(make).parameters.values() if p.default is p.empty]
  known = {'learning_rate': 0.1, 'l2_norm_clip': 1.0, 'noise_multiplier': 0.1, 'optimism': 0.1}
  known |= {'key': KEY, 'seed': 0, 'eta': 0.1, 'gamma': 0.5}
  tx = optax.with_extra_args_support(make(**{p.name: known[p.name] for p in needed if p.name in known}))
  with pytest.raises(ERRORS, match=SAYS_WHAT_TO_DO):
    jax.eval_shape(lambda: step_of(tx, gradients, extra_args(name)))


def step_of(tx, gradients, extra):
  updates, _ = tx.update(gradients[0], tx.init(PARAMS), PARAMS, **extra)
  return optax.apply_updates(PARAMS, updates)


def test_functions_of_trees_select_or_are_refused():
  copied = optax.periodic_update(PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), jnp.int32(4), 2)
  jax.tree.map(np.testing.assert_array_equal, copied, PARAMS)
  with pytest.raises(TypeError, match=r'a: the codes .* have become float32.*lpmm_optax\.ema'):
    lpmm.dequantize(optax.incremental_update(PARAMS, PARAMS, 0.1))
  tx = lpmm.sgdm(0.1)
  updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
  with pytest.raises(TypeError, match=r'Delta\(a, int16'):
    optax.tree.norm(updates)


def test_deltas_are_added_to_the_parameters_they_are_of_alone():
  tx = lpmm.sgdm(0.1)
  updates, _ = tx.update(GRADS[0], tx.init(PARAMS), PARAMS)
  with pytest.raises(TypeError, match='to the arrays that `update` was given alone'):
    optax.apply_updates(jax.tree.map(jnp.copy, PARAMS), updates)
  for compared in (lambda u: u == 0, lambda u: u != 0):
    with pytest.raises(TypeError, match=r'and Delta.* is none'):
      jax.tree.map(compared, updates)
  with pytest.raises(TypeError, match=r'use|lpmm_optax\.step'):
    jax.jit(tx.update)(GRADS[0], tx.init(PARAMS), PARAMS)
  # In any order, of arrays of NumPy too, and where the updates' tree comes first.
  backwards = jax.tree.map(lambda u, p: u + p, updates, PARAMS)
  jax.tree.map(np.testing.assert_array_equal, backwards, optax.apply_updates(PARAMS, updates))
  on_host = jax.tree.map(np.asarray, PARAMS)
  updates, _ = tx.update(GRADS[0], tx.init(PARAMS), on_host)
  jax.tree.map(np.testing.assert_array_equal, optax.apply_updates(on_host, updates), backwards)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('format', [lpmm.INT4, lpmm.INT8, lpmm.INT16, lpmm.BFLOAT16], ids=str)
def test_updates_are_dequantized_to_what_values_change_by(format, dtype):
  dense = jax.random.normal(jax.random.key(0), (64, 64)).astype(dtype)
  params = {'w': lpmm.quantize(dense, format), 'b': jnp.ones(3)}
  tx = lpmm.sgdm(10.0)
  updates, _ = tx.update({'w': dense, 'b': jnp.ones(3)}, tx.init(params), params)
  new = optax.apply_updates(params, updates)
  values = [lpmm.dequantize(tree, jnp.float32) for tree in (new, params)]
  changes = lpmm.dequantize(updates)
  assert changes['w'].dtype == dtype
  np.testing.assert_array_equal(changes['w'], (values[0]['w'] - values[1]['w']).astype(dtype))
  np.testing.assert_array_equal(changes['b'], updates['b'])


def test_schedule_free_is_evaluated_by_one_call():
  wrap = lambda tx: contrib.schedule_free(tx, 0.01)
  tx, params = lpmm.low_precision(wrap(optax.sgd(0.01))), PARAMS
  theirs, dense = wrap(optax.sgd(0.01)), DENSE
  state, expected = tx.init(params), theirs.init(dense)
  for g in GRADS:
    params, state = lpmm.step(tx, g, params, state)
    dense, expected = lpmm.step(theirs, g, dense, expected)
  found = contrib.schedule_free_eval_params(lpmm.dequantize(state.inner_state), lpmm.dequantize(params))
  wanted = contrib.schedule_free_eval_params(expected, dense)
  # z takes the format of the parameters.
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2 * ATOL), found, wanted)


@pytest.mark.parametrize('wrap', [lambda tx: lpmm.apply_if_finite(tx, 3), lambda tx: lpmm.MultiSteps(tx, 2)])
def test_what_may_not_change_is_in_no_conditional(wrap):
  """XLA for a GPU copied all that a conditional may change: with jax 0.10.2, 3 bytes per parameter of AdamW."""
  params, tx = lpmm.quantize({'w': jnp.ones((256, 256))}, lpmm.INT8), wrap(lpmm.adamw(0.1))
  jaxpr = jax.make_jaxpr(lambda *args: lpmm.step(tx, *args))({'w': jnp.ones((256, 256))}, params, tx.init(params))
  changing = [eqn for eqn in jaxpr.eqns if any(var.aval.shape == (256, 256) for var in eqn.outvars)]
  assert 'while' in {eqn.primitive.name for eqn in changing}
  assert 'cond' not in {eqn.primitive.name for eqn in changing}
