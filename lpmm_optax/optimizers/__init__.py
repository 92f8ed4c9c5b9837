"""Optax transformations in low precision: any of them, SGD with momentum, Adam and Lion."""
