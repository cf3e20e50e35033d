"""Pointwise convolutions, each edge by a matrix of its own, and sums over the pixels of a batch.

Each is a primitive whose transposes are among the others, so that derivatives of every order and
mode run as fast as it does.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from darts_jax import native
from darts_jax.bilinear import bilinear

PIXELS = (0, 1, 2)


def pointwise(x: Array, matrices: Array) -> Array:
    """x [..., K, C] by the matrix of each edge, [K, C, D]: [..., K, D]."""
    return _apply_p.bind(x, matrices)


def mean(x: Array) -> Array:
    """Mean over the pixels of x [N, H, W, ...]."""
    return _mean_p.bind(x)


def covariance(x: Array, y: Array) -> Array:
    """Mean over the pixels of (x - mean x) (y - mean y), both [N, H, W, ...]."""
    return _covariance_p.bind(x, y)


def scale(x: Array, factors: Array) -> Array:
    """x [N, H, W, K, C] times factors [K, C], edge by edge; x may be the same for all, [N, H, W, 1, C]."""
    return _scale_p.bind(x, factors)


def block_diagonal(matrices: Array) -> Array:
    """[K, C, D] matrices as one [K * C, K * D] matrix that applies each to its own channels."""
    num, rows, columns = matrices.shape
    identity = jnp.eye(num, dtype=matrices.dtype)
    blocks = identity[:, None, :, None] * matrices[:, :, None, :]
    return blocks.reshape(num * rows, num * columns)


def _flat(x):
    return x.reshape(*x.shape[:-2], -1)


def _apply(x, matrices):
    flat = _flat(x) @ block_diagonal(matrices)
    return flat.reshape(*x.shape[:-1], matrices.shape[2])


def _outer(x, y):
    """[K, C, D]: sum over rows of the product of x's and y's channels, edge by edge."""
    rows, columns = (_flat(z).reshape(-1, z.shape[-2] * z.shape[-1]) for z in (x, y))
    (num, height), width = x.shape[-2:], y.shape[-1]
    blocks = (rows.T @ columns).reshape(num, height, num, width)
    return jnp.moveaxis(jnp.diagonal(blocks, axis1=0, axis2=2), -1, 0)


def _transposed(matrices):
    return matrices.swapaxes(1, 2)


_apply_p = bilinear(
    "pointwise_apply",
    _apply,
    lambda x, matrices: (*x.shape[:-1], matrices.shape[2]),
    lambda ct, x, matrices: _apply_p.bind(ct, _transposed(matrices)),
    lambda ct, x, matrices: _outer_p.bind(x, ct),
    looped=False,
    target="apply",
)
_outer_p = bilinear(
    "pointwise_outer",
    _outer,
    lambda x, y: (*x.shape[-2:], y.shape[-1]),
    lambda ct, x, y: _apply_p.bind(y, _transposed(ct)),
    lambda ct, x, y: _apply_p.bind(x, ct),
    looped=False,
    target="outer",
)


def _centered(x, factors):
    return (x - mean(x)) * (factors / _count(x))


def _count(x) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


_covariance_p = bilinear(
    "covariance",
    lambda x, y: ((x - x.mean(PIXELS)) * (y - y.mean(PIXELS))).mean(PIXELS),
    lambda x, y: x.shape[3:],
    lambda ct, x, y: _centered(y, ct),
    lambda ct, x, y: _centered(x, ct),
    looped=False,
    target="covariance",
)


def _pull_scale(ct, x, factors):
    if x.aval.shape == ct.shape:
        return scale(ct, factors)
    # A sum of few terms, not a reduction over a short axis, which is slow on CPUs.
    edges = range(factors.shape[0])
    return sum(scale(ct[:, :, :, k : k + 1], factors[k : k + 1]) for k in edges)


def _pull_dot_few(ct, x, y):
    return _pull_scale(y, x, ct)


_scale_p = bilinear(
    "scale",
    lambda x, factors: x * factors,
    lambda x, factors: (*x.shape[:3], *factors.shape),
    _pull_scale,
    lambda ct, x, factors: _dot_p.bind(x, ct),
    looped=False,
)
_dot_p = bilinear(
    "pixel_dot",
    lambda x, y: (x * y).sum(PIXELS),
    lambda x, y: y.shape[3:],
    _pull_dot_few,
    lambda ct, x, y: scale(x, ct),
    looped=False,
    target="dot",
)


def _linear_mean() -> Primitive:
    primitive, portable = Primitive("pixel_mean"), lambda x: x.mean(PIXELS)
    compiled: Callable = jax.jit(primitive.bind)
    primitive.def_impl(lambda x: compiled(x))
    primitive.def_abstract_eval(lambda x: jax.core.ShapedArray(x.shape[3:], x.dtype))
    lowering = mlir.lower_fun(portable, multiple_results=False)
    mlir.register_lowering(primitive, lowering)
    if native.AVAILABLE:
        mlir.register_lowering(primitive, native.lowering("mean", lowering), platform="cpu")
    ad.deflinear2(primitive, lambda ct, x: [jnp.broadcast_to(ct / _count(x.aval), x.aval.shape)])
    batching.primitive_batchers[primitive] = lambda args, dims: (
        jax.vmap(portable, in_axes=dims)(*args),
        0,
    )
    return primitive


_mean_p = _linear_mean()
