"""Low-precision AdamW in a Flax `nnx.Optimizer`, with BatchNorm and Dropout: three lines differ from full precision.

python examples/minimal_nnx.py
"""

from flax import nnx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lpmm_optax as lpmm


class Mlp(nnx.Module):
  """A perceptron for the 8 x 8 digits."""

  def __init__(self, rngs: nnx.Rngs):
    self.first = nnx.Linear(64, 512, rngs=rngs)
    self.norm = nnx.BatchNorm(512, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)
    self.second = nnx.Linear(512, 512, rngs=rngs)
    self.out = nnx.Linear(512, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images, float32[batch, 64], to logits, float32[batch, 10]."""
    x = self.dropout(nnx.relu(self.norm(self.first(x))))
    return self.out(nnx.relu(self.second(x)))


@nnx.jit
def train_step(model: Mlp, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
  def loss_fn(dense):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(dense(images), labels))

  # 1: the loss sees dense weights; statistics and keys are still those of the model, and advance in it
  loss, grads = nnx.value_and_grad(loss_fn)(lpmm.dequantize(model))
  optimizer.update(model, grads)
  return loss


@nnx.jit
def accuracy(model: Mlp, images: jax.Array, labels: jax.Array) -> jax.Array:
  dense = nnx.view(lpmm.dequantize(model), use_running_average=True, deterministic=True)
  return jnp.mean(jnp.argmax(dense(images), axis=-1) == labels)


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model = lpmm.quantize(Mlp(nnx.Rngs(0)), lpmm.INT8)  # 2: parameters are stored in 8 bits
  optimizer = nnx.Optimizer(model, lpmm.adamw(1e-3), wrt=nnx.Param)  # 3: and so are the moments
  losses = [float(train_step(model, optimizer, images, labels)) for _ in range(steps)]
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {accuracy(model, images, labels):.1%}')
  print(lpmm.memory_report(nnx.state(model, nnx.Param), optimizer.opt_state))
  return losses


if __name__ == '__main__':
  main()
