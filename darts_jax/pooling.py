"""3x3 max pooling, fast in derivatives of every order and mode.

The gradient of `lax.reduce_window` is 50 times slower on CPUs. By kernels, pooling is the position
of each maximum, and a linear map that takes the pixels there.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from darts_jax import native

_TAPS = [(i, j) for i in range(3) for j in range(3)]


def max_pool(x: Array, stride: int) -> Array:
    """Maxima of x [N, H, W, C] over 3x3 pixels around every stride-th: [N, H', W', C].

    The gradient goes to the first of equal pixels, in row-major order; NaN where one of them is.
    """
    if native.preferred(x.dtype):
        return _take_p.bind(x, _index_p.bind(x, stride=stride), stride=stride)
    # Rows of a window first, then columns: ties go to the first of its pixels in row-major order.
    side = (1, 1, 0)
    y = lax.pad(x, jnp.asarray(-jnp.inf, x.dtype), ((0, 0, 0), side, side, (0, 0, 0)))
    for axis in (2, 1):
        stop = stride * (-(-x.shape[axis] // stride) - 1) + 1
        parts = [lax.slice_in_dim(y, i, i + stop, stride, axis) for i in range(3)]
        y = first_max(first_max(parts[0], parts[1]), parts[2])
    return y


def first_max(a: Array, b: Array) -> Array:
    """max(a, b), NaN where either is; its gradient goes to a alone where they are equal."""
    return jnp.where((a >= b) | jnp.isnan(a), a, b)


def _shape(shape, stride):
    return shape[0], -(-shape[1] // stride), -(-shape[2] // stride), shape[3]


def _cut(x, stride, fill):
    """The pixels of each tap, [N, H', W', C]."""
    _, height, width, _ = _shape(x.shape, stride)
    side = (1, 1, 0)
    padded = lax.pad(x, jnp.asarray(fill, x.dtype), ((0, 0, 0), side, side, (0, 0, 0)))
    rows, columns = stride * (height - 1) + 1, stride * (width - 1) + 1
    return [padded[:, i : i + rows : stride, j : j + columns : stride] for i, j in _TAPS]


def _index(x, *, stride):
    taps = _cut(x, stride, -jnp.inf)
    # The first tap is outside of the image at its edges; a pixel of -inf comes before what is not.
    inside = _cut(jnp.ones_like(x, dtype=bool), stride, False)
    best, index = taps[0], jnp.where(inside[0], 0, -1).astype(jnp.int8)
    for tap in range(1, len(_TAPS)):
        new = taps[tap]
        more = inside[tap] & ((index < 0) | (new > best) | (jnp.isnan(new) & ~jnp.isnan(best)))
        best = jnp.where(more, new, best)
        index = jnp.where(more, jnp.int8(tap), index)
    return index


def _take(x, index, *, stride):
    taps = _cut(x, stride, 0)
    zero = jnp.zeros((), x.dtype)
    return sum(jnp.where(index == tap, taps[tap], zero) for tap in range(len(_TAPS)))


def _put(y, index, *, stride, height, width):
    zero = jnp.zeros((), y.dtype)
    total = 0
    for tap, (i, j) in enumerate(_TAPS):
        sides = (
            (first - 1, size - first + 1 - (stride * (count - 1) + 1), stride - 1)
            for first, size, count in ((i, height, y.shape[1]), (j, width, y.shape[2]))
        )
        part = jnp.where(index == tap, y, zero)
        total = total + lax.pad(part, zero, ((0, 0, 0), *sides, (0, 0, 0)))
    return total


def _primitive(name, function, abstract, target):
    primitive = Primitive(name)
    native.define(primitive, function, abstract, target, ("stride",))

    def batch(args, dims, **params):
        return jax.vmap(lambda *a: function(*a, **params), in_axes=tuple(dims))(*args), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_index_p = _primitive(
    "pool_index",
    _index,
    lambda x, *, stride: jax.core.ShapedArray(_shape(x.shape, stride), jnp.int8),
    "pool_index",
)
ad.primitive_jvps[_index_p] = lambda primals, tangents, **params: (
    _index_p.bind(*primals, **params),
    ad.Zero(jax.core.ShapedArray(_shape(primals[0].shape, params["stride"]), jax.dtypes.float0)),
)
_take_p = _primitive(
    "pool_take",
    _take,
    lambda x, index, *, stride: jax.core.ShapedArray(index.shape, x.dtype),
    "pool_take",
)
_put_p = _primitive(
    "pool_put",
    _put,
    lambda y, index, *, stride, height, width: jax.core.ShapedArray(
        (y.shape[0], height, width, y.shape[3]), y.dtype
    ),
    "pool_put",
)


def _pull_take(ct, x, index, *, stride):
    height, width = x.aval.shape[1:3]
    return [_put_p.bind(ct, index, stride=stride, height=height, width=width), None]


def _pull_put(ct, y, index, *, stride, height, width):
    return [_take_p.bind(ct, index, stride=stride), None]


ad.defjvp(_take_p, lambda x_dot, x, index, **params: _take_p.bind(x_dot, index, **params), None)
ad.defjvp(_put_p, lambda y_dot, y, index, **params: _put_p.bind(y_dot, index, **params), None)
ad.primitive_transposes[_take_p] = _pull_take
ad.primitive_transposes[_put_p] = _pull_put
