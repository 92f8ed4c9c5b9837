"""Low-precision AdamW in a Flax `nnx.Optimizer`.

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
    self.second = nnx.Linear(512, 512, rngs=rngs)
    self.out = nnx.Linear(512, 10, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images, float32[batch, 64], to logits, float32[batch, 10]."""
    return self.out(nnx.relu(self.second(nnx.relu(self.first(x)))))


@nnx.jit
def train_step(model: Mlp, optimizer: nnx.Optimizer, images: jax.Array, labels: jax.Array) -> jax.Array:
  # The stored parameters are taken out of the model, and the loss is a function of the dense ones.
  graph, params = nnx.split(model, nnx.Param)

  def loss_fn(weights):
    logits = nnx.merge(graph, weights)(images)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

  loss, grads = jax.value_and_grad(loss_fn)(lpmm.dequantize(params))
  optimizer.update(model, grads)
  return loss


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model = Mlp(nnx.Rngs(0))
  nnx.update(model, lpmm.quantize(nnx.as_pure(nnx.state(model, nnx.Param)), lpmm.INT8))
  optimizer = nnx.Optimizer(model, lpmm.adamw(1e-3), wrt=nnx.Param)
  losses = [float(train_step(model, optimizer, images, labels)) for _ in range(steps)]
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}')
  params, opt_state = (nnx.as_pure(x) for x in (nnx.state(model, nnx.Param), optimizer.opt_state))
  print(lpmm.memory_report(params, opt_state))
  return losses


if __name__ == '__main__':
  main()
