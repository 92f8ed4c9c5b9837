"""Transformations of Optax's, and how their state is stored by default."""

import jax
import jax.numpy as jnp
import optax
from optax import contrib

import lpmm_optax as lpmm


def tree(seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  return {
    'a': jax.random.normal(keys[0], (64, 128)),
    'c': {'kernel': 0.1 * jax.random.normal(keys[1], (96, 192))},
    'b': jax.random.normal(keys[2], (7,)),
  }


def only_matrices(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


def schedule(count):
  return 0.01 / (1 + 0.1 * jnp.asarray(count, jnp.float32))


# An inner transformation, and the formats of its state fields by default.
TILED = {
  'sgd': (lambda: optax.sgd(0.01, 0.9), {'trace': 'int8'}),
  'sgd nesterov': (lambda: optax.sgd(schedule, 0.9, nesterov=True), {'trace': 'int8'}),
  'adam': (lambda: optax.adam(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'adamw schedule': (lambda: optax.adamw(schedule, weight_decay=0.1), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'adamw mask': (lambda: optax.adamw(0.01, mask=only_matrices), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'nadamw': (lambda: optax.nadamw(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'amsgrad': (lambda: optax.amsgrad(0.01), {'mu': 'bfloat16', 'nu': 'bfloat16', 'nu_max': 'bfloat16'}),
  'adamax': (lambda: optax.adamax(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'radam': (lambda: optax.radam(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'yogi': (lambda: optax.yogi(0.01), {'mu': 'bfloat16', 'nu': 'bfloat16'}),
  # The mean enters the denominator, as (g - mu)^2.
  'adabelief': (lambda: optax.adabelief(0.01), {'mu': 'bfloat16', 'nu': 'uint8_sqrt'}),
  'ademamix': (lambda: contrib.ademamix(0.01), {'m1': 'int8', 'm2': 'int16', 'nu': 'uint8_sqrt'}),
  'lion': (lambda: optax.lion(0.001), {'mu': 'int8'}),
  'rmsprop': (lambda: optax.rmsprop(0.01, momentum=0.9), {'nu': 'uint8_sqrt', 'trace': 'int8'}),
  'centered rmsprop': (lambda: optax.rmsprop(0.01, centered=True, momentum=0.9), {'trace': 'int8'}),
  'adadelta': (lambda: optax.adadelta(0.1), {'e_g': 'uint8_sqrt', 'e_x': 'bfloat16'}),
  'rprop': (lambda: optax.rprop(0.01), {'step_sizes': 'bfloat16', 'prev_updates': 'bfloat16'}),
  'madgrad': (lambda: contrib.madgrad(0.01), {'grad_sum_sq': 'uint8_sqrt', 's': 'int16', 'x0': 'int8'}),
  'adagrad': (lambda: optax.adagrad(0.1), {'sum_of_squares': 'uint8_sqrt'}),
  'novograd': (lambda: optax.novograd(0.01), {'mu': 'int8'}),
  'schedule_free': (lambda: contrib.schedule_free(optax.sgd(0.01), 0.01), {'z': 'int8'}),
  'schedule_free_adamw': (lambda: contrib.schedule_free_adamw(0.01), {'nu': 'uint8_sqrt', 'z': 'int8'}),
  'clipped adamw': (
    lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'centralized adam': (
    lambda: optax.chain(optax.centralize(), optax.adam(0.01)),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'partition': (
    lambda: optax.partition(
      {'adam': optax.adam(0.01), 'sgd': optax.sgd(0.01, 0.9)},
      lambda params: jax.tree.map(lambda p: 'adam' if p.ndim > 1 else 'sgd', params),
    ),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'masked decay': (
    lambda: optax.chain(optax.masked(optax.add_decayed_weights(0.1), only_matrices), optax.sgd(0.01, 0.9)),
    {'trace': 'int8'},
  ),
  'inject_hyperparams': (
    lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=schedule),
    {'mu': 'int8', 'nu': 'uint8_sqrt'},
  ),
  'apply_if_finite': (lambda: optax.apply_if_finite(optax.adam(0.01), 3), {'mu': 'int8', 'nu': 'uint8_sqrt'}),
  'MultiSteps': (
    lambda: optax.MultiSteps(optax.sgd(0.01, 0.9), 3).gradient_transformation(),
    {'trace': 'int8', 'acc_grads': 'int8'},
  ),
  'average of updates': (
    lambda: optax.chain(optax.adam(0.01), optax.ema(0.9)),
    {'mu': 'int8', 'nu': 'uint8_sqrt', 'ema': 'int8'},
  ),
}

# The operation that is not elementwise.
WHOLE = {
  'lamb': (lambda: optax.lamb(0.01), {'mu': 'int8', 'nu': 'uint8_sqrt'}, 'reduce_sum'),
  'lars': (lambda: optax.lars(0.01), {'trace': 'int8'}, 'reduce_sum'),
  'adafactor': (
    lambda: optax.adafactor(0.01, min_dim_size_to_factor=32, multiply_by_parameter_scale=True), {}, 'reduce_sum'
  ),
  'prodigy': (
    lambda: contrib.prodigy(),
    {'exp_avg': 'int8', 'exp_avg_sq': 'uint8_sqrt', 'grad_sum': 'int16', 'params0': 'int8'},
    'reshape',
  ),
  'muon': (lambda: contrib.muon(0.01), {'mu': 'int16'}, 'reshape'),
}  # fmt: skip

ALL = {name: case[0] for name, case in (TILED | WHOLE).items()}


def field_formats(state):
  """The formats of a state by field, without those of exempt leaves."""
  out = {}
  for path, x in jax.tree_util.tree_flatten_with_path(state, is_leaf=lpmm.is_quantized)[0]:
    if lpmm.is_quantized(x):
      names = [key.name for key in path if hasattr(key, 'name')]
      out.setdefault(names[-1], set()).add(str(x.format))
  return out
