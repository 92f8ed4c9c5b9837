"""Low-precision AdamW in a Flax linen `TrainState`, with BatchNorm and Dropout: three lines differ from full precision.

python examples/minimal_linen.py
"""

from typing import Any

import flax.linen as nn
from flax.training import train_state
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lpmm_optax as lpmm


class Mlp(nn.Module):
  """A perceptron for the 8 x 8 digits."""

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Images, float32[batch, 64], to logits, float32[batch, 10]."""
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(512)(x)))
    x = nn.Dropout(0.1, deterministic=not train)(x)
    return nn.Dense(10)(nn.relu(nn.Dense(512)(x)))


class TrainState(train_state.TrainState):
  """With the statistics of BatchNorm."""

  batch_stats: Any


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[TrainState, jax.Array]:
  def loss_fn(weights):
    variables = {'params': weights, 'batch_stats': state.batch_stats}
    logits, changed = state.apply_fn(variables, images, True, rngs={'dropout': key}, mutable='batch_stats')
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), changed['batch_stats']

  # 1: the loss sees dense weights
  (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(lpmm.dequantize(state.params))
  return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
  variables = {'params': lpmm.dequantize(state.params), 'batch_stats': state.batch_stats}
  return jnp.mean(jnp.argmax(state.apply_fn(variables, images, False), axis=-1) == labels)


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model = Mlp()
  variables = model.init(jax.random.key(0), images[:1], False)
  params = lpmm.quantize(variables['params'], lpmm.INT8)  # 2: parameters are stored in 8 bits
  tx = optax.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(1e-3))  # 3: and so are the moments
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx, batch_stats=variables['batch_stats'])
  losses = []
  for key in jax.random.split(jax.random.key(1), steps):
    state, loss = train_step(state, images, labels, key)
    losses.append(float(loss))
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy(state, images, labels):.1%}')
  print(lpmm.memory_report(state.params, state.opt_state))
  return losses


if __name__ == '__main__':
  main()
