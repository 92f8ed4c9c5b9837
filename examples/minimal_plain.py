"""Low-precision AdamW in plain JAX, in place: the model is a pytree, and both trees are donated.

python examples/minimal_plain.py
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lpmm_optax as lpmm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
  """y = x W + b."""

  weight: jax.Array
  bias: jax.Array

  def __call__(self, x: jax.Array) -> jax.Array:
    """float32[batch, inputs] to float32[batch, outputs]."""
    return x @ self.weight + self.bias[None, :]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mlp:
  """A perceptron for the 8 x 8 digits, itself a tree of its parameters."""

  layers: list[Linear]

  def __call__(self, x: jax.Array) -> jax.Array:
    """Images, float32[batch, 64], to logits, float32[batch, 10]."""
    for layer in self.layers[:-1]:
      x = jax.nn.relu(layer(x))
    return self.layers[-1](x)


def make_model(key: jax.Array, sizes: tuple[int, ...]) -> Mlp:
  layers = []
  keys = jax.random.split(key, len(sizes) - 1)
  for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True):
    weight = jax.random.normal(layer_key, (inputs, outputs)) * (2 / inputs) ** 0.5
    layers.append(Linear(weight, jnp.zeros(outputs)))
  return Mlp(layers)


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model = lpmm.quantize(make_model(jax.random.key(0), (64, 512, 512, 10)), lpmm.INT8)
  tx = lpmm.chain(optax.clip_by_global_norm(1.0), lpmm.adamw(1e-3))
  opt_state = tx.init(model)

  # With both donated, and returned in the same order, the step updates them in place.
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def train_step(model, opt_state, images, labels):
    def loss_fn(dense):
      return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(dense(images), labels))

    loss, grads = jax.value_and_grad(loss_fn)(lpmm.dequantize(model))
    model, opt_state = lpmm.step(tx, grads, model, opt_state)
    return model, opt_state, loss

  losses = []
  for _ in range(steps):
    model, opt_state, loss = train_step(model, opt_state, images, labels)
    losses.append(float(loss))
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}')
  print(lpmm.memory_report(model, opt_state, tx=tx))
  return losses


if __name__ == '__main__':
  main()
