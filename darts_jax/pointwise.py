"""Pointwise convolutions, each edge by a matrix of its own."""

import jax
import jax.numpy as jnp
from jax import Array

from darts_jax.bilinear import bilinear


def pointwise(x: Array, matrices: Array) -> Array:
    """x [..., K, C] by the matrix of each edge, [K, C, D]: [..., K, D].

    Raises:
      TypeError: they do not fit in shape or dtype.
    """
    if x.shape[-2:] != matrices.shape[:2] or x.dtype != matrices.dtype:
        raise TypeError(f"matrices {jax.typeof(matrices)} do not fit images {jax.typeof(x)}")
    return _apply_p.bind(x, matrices, transposed=False)


def block_diagonal(matrices: Array) -> Array:
    """[K, C, D] matrices as one [K * C, K * D] matrix that applies each to its own channels."""
    num, rows, columns = matrices.shape
    identity = jnp.eye(num, dtype=matrices.dtype)
    blocks = identity[:, None, :, None] * matrices[:, :, None, :]
    return blocks.reshape(num * rows, num * columns)


def _flat(x):
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _apply(x, matrices, *, transposed):
    matrices = matrices.swapaxes(1, 2) if transposed else matrices
    flat = _flat(x) @ block_diagonal(matrices)
    return flat.reshape(*x.shape[:-1], matrices.shape[2])


def _applied(x, matrices, *, transposed):
    return (*x.shape[:-1], matrices.shape[1 if transposed else 2])


def _outer(x, y):
    """[K, C, D]: sum over rows of the product of x's and y's channels, edge by edge."""
    rows, columns = (_flat(z).reshape(-1, z.shape[-2] * z.shape[-1]) for z in (x, y))
    (num, height), width = x.shape[-2:], y.shape[-1]
    blocks = (rows.T @ columns).reshape(num, height, num, width)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)


_apply_p = bilinear(
    "pointwise_apply",
    _apply,
    _applied,
    lambda ct, x, matrices, transposed: _apply_p.bind(ct, matrices, transposed=not transposed),
    lambda ct, x, matrices, transposed: _outer_p.bind(*((ct, x) if transposed else (x, ct))),
    looped=False,
    target="apply",
    attributes=("transposed",),
)
_outer_p = bilinear(
    "pointwise_outer",
    _outer,
    lambda x, y: (*x.shape[-2:], y.shape[-1]),
    lambda ct, x, y: _apply_p.bind(y, ct, transposed=True),
    lambda ct, x, y: _apply_p.bind(x, ct, transposed=False),
    looped=False,
    target="outer",
)
