"""`outlier_report`: the leaves whose grid a value far above the others of its block makes too coarse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lpmm_optax as lpmm

W = jax.random.normal(jax.random.key(0), (64, 128))


def test_leaves_with_outliers_are_listed_with_the_format_that_would_do():
  tree = {
    'normal': W,
    'scaled rows': W * jnp.exp(3 * jax.random.normal(jax.random.key(1), (64, 1))),
    'sparse': jnp.where(jax.random.uniform(jax.random.key(2), W.shape) < 0.01, W, 0.0),
    'zero': jnp.zeros_like(W),
    'one weight': W.at[3, 5].set(200.0),
    'a column': W.at[:, 7].multiply(1e7),
    'small': jnp.ones(3),
    'dense': W.at[3, 5].set(200.0),
  }
  report = lpmm.outlier_report(tree, lpmm.INT8, where=[('dense', None)])
  assert {row.path: row.suggestion for row in report.rows} == {'one weight': lpmm.INT16, 'a column': lpmm.BFLOAT16}
  assert report.rows[0].blocks == pytest.approx(0.5)
  assert report.rows[1].blocks == pytest.approx(1 / 128)
  fixed = [(row.path, row.suggestion) for row in report.rows] + [('dense', None)]
  assert str(lpmm.outlier_report(tree, lpmm.INT8, where=fixed)) == 'every leaf suits its format'


def test_a_format_too_coarse_for_a_leaf_is_listed_by_its_error():
  (row,) = lpmm.outlier_report(W, lpmm.INT4).rows
  values, stored = (np.abs(x) for x in (W, lpmm.dequantize(lpmm.quantize(W, lpmm.INT4))))
  assert row.error == pytest.approx(np.abs(values - stored).sum() / values.sum(), rel=1e-4)
  assert (row.path, row.suggestion) == ('<root>', lpmm.INT8)
