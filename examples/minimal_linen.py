"""Low-precision AdamW in a Flax linen `TrainState`: three lines differ from full precision.

python examples/minimal_linen.py
"""

import flax.linen as nn
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lpmm_optax as lpmm


class Mlp(nn.Module):
  """A perceptron for the 8 x 8 digits."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Images, float32[batch, 64], to logits, float32[batch, 10]."""
    return nn.Dense(10)(nn.relu(nn.Dense(512)(nn.relu(nn.Dense(512)(x)))))


@jax.jit
def train_step(state: TrainState, images: jax.Array, labels: jax.Array) -> tuple[TrainState, jax.Array]:
  def loss_fn(weights):
    logits = state.apply_fn({'params': weights}, images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  loss, grads = jax.value_and_grad(loss_fn)(lpmm.dequantize(state.params))  # 1: the loss sees dense weights
  return state.apply_gradients(grads=grads), loss


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model = Mlp()
  params = model.init(jax.random.key(0), images[:1])['params']
  params = lpmm.quantize(params, lpmm.INT8)  # 2: parameters are stored in 8 bits
  tx = optax.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(1e-3))  # 3: and so are the moments
  state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
  losses = []
  for _ in range(steps):
    state, loss = train_step(state, images, labels)
    losses.append(float(loss))
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}')
  print(lpmm.memory_report(state.params, state.opt_state))
  return losses


if __name__ == '__main__':
  main()
