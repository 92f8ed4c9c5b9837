"""Low-precision AdamW in Equinox, with BatchNorm and Dropout: three lines differ from full precision.

python examples/minimal_equinox.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import lpmm_optax as lpmm


class Mlp(eqx.Module):
  """A perceptron for the 8 x 8 digits."""

  first: eqx.nn.Linear
  norm: eqx.nn.BatchNorm
  dropout: eqx.nn.Dropout
  rest: eqx.nn.MLP

  def __init__(self, key: jax.Array):
    first, rest = jax.random.split(key)
    self.first = eqx.nn.Linear(64, 512, key=first)
    self.norm = eqx.nn.BatchNorm(512, axis_name='batch', mode='batch')
    self.dropout = eqx.nn.Dropout(0.1)
    self.rest = eqx.nn.MLP(512, 10, 512, 1, key=rest)

  def __call__(self, x: jax.Array, state: eqx.nn.State, key: jax.Array | None) -> tuple[jax.Array, eqx.nn.State]:
    """An image, float32[64], to logits, float32[10]."""
    x, state = self.norm(self.first(x), state)
    return self.rest(self.dropout(jax.nn.relu(x), key=key)), state


def apply(model: Mlp, state: eqx.nn.State, images: jax.Array, keys: jax.Array | None):
  """A batch, to logits, float32[batch, 10], and the statistics."""
  in_axes = (0, None, None if keys is None else 0)
  return jax.vmap(model, in_axes, out_axes=(0, None), axis_name='batch')(images, state, keys)


@eqx.filter_value_and_grad(has_aux=True)
def loss_fn(model, state, images, labels, key):
  logits, state = apply(model, state, images, jax.random.split(key, len(images)))
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)), state


@eqx.filter_jit
def train_step(model, state, opt_state, tx, images, labels, key):
  (loss, state), grads = loss_fn(lpmm.dequantize(model), state, images, labels, key)  # 1: the loss sees dense weights
  updates, opt_state = tx.update(grads, opt_state, eqx.filter(model, eqx.is_array))
  return eqx.apply_updates(model, updates), state, opt_state, loss


def main(steps: int = 100) -> list[float]:
  """Trains on the digits and returns the losses."""
  digits = load_digits()
  images, labels = jnp.asarray(digits.data / 16, jnp.float32), jnp.asarray(digits.target)
  model, state = eqx.nn.make_with_state(Mlp)(jax.random.key(0))
  model = lpmm.quantize(model, lpmm.INT8)  # 2: parameters are stored in 8 bits
  tx = lpmm.adamw(1e-3)  # 3: and so are the moments
  # Not is_inexact_array: the codes of quantized parameters are integers.
  opt_state = tx.init(eqx.filter(model, eqx.is_array))
  losses = []
  for key in jax.random.split(jax.random.key(1), steps):
    model, state, opt_state, loss = train_step(model, state, opt_state, tx, images, labels, key)
    losses.append(float(loss))
  logits, _ = apply(eqx.nn.inference_mode(lpmm.dequantize(model)), state, images, None)
  print(f'loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {jnp.mean(jnp.argmax(logits, axis=-1) == labels):.1%}')
  print(lpmm.memory_report(eqx.filter(model, eqx.is_array), opt_state))
  return losses


if __name__ == '__main__':
  main()
