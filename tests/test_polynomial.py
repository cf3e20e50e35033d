"""Sums of products, and inverse roots, against the same in array operations."""

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from darts_jax.polynomial import add, inverse_root, polynomial

pytestmark = pytest.mark.usefixtures("forms", "x64")

FUNCTIONS = {
    "one": (lambda x: polynomial((-2.5, (x,))), lambda x: -2.5 * x, 1),
    "powers": (
        lambda x: polynomial((1.5, (x, x, x)), (-1.0, (x, x)), (0.5, (x,))),
        lambda x: 1.5 * x**3 - x**2 + 0.5 * x,
        1,
    ),
    "several": (
        lambda x, y, z: polynomial((2.0, (x, y, z)), (-0.5, (y, x, x)), (3.0, (z, z))),
        lambda x, y, z: 2 * x * y * z - 0.5 * x**2 * y + 3 * z**2,
        3,
    ),
    "equal terms": (
        lambda x, y: polynomial((2.0, (x, y)), (-0.5, (y, x))),
        lambda x, y: 1.5 * x * y,
        2,
    ),
    "add": (add, lambda *arrays: sum(arrays), 4),
    "inverse_root": (
        lambda x: inverse_root(polynomial((1.0, (x, x))), 0.1),
        lambda x: lax.rsqrt(x * x + 0.1),
        1,
    ),
}
each = pytest.mark.parametrize(
    ("function", "reference", "count"), FUNCTIONS.values(), ids=FUNCTIONS
)


def point_of(count, shape=(3, 4)):
    return derivatives.draw(0, *[shape] * count)


@each
def test_derivatives(function, reference, count):
    point = point_of(count)
    derivatives.values_and_gradients(function, reference, point)
    derivatives.second(function, reference, point)
    derivatives.third(function, reference, point)
    derivatives.numerical(function, point)


@each
def test_vmap(function, reference, count):
    derivatives.mapped(function, reference, point_of(count), [2, None, 0, 1][:count])


@each
def test_keeps_float32(function, reference, count):
    derivatives.single_precision(function, reference, point_of(count))


@each
def test_of_one_argument_alone(function, reference, count):
    """The others are constant: their tangents are zeros that nobody made."""
    x, *others = point_of(count)
    functions = [lambda x, f=f: f(x, *others) for f in (function, reference)]
    derivatives.values_and_gradients(*functions, (x,))
    with jax.disable_jit():
        derivatives.close(function(x, *others), reference(x, *others))


@pytest.mark.parametrize("size", [0, 1, 511, 513, (1 << 14) + 1, 50_000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_sizes(size, dtype):
    """Pieces of other lengths, and a number without axes."""
    x, y, z = (x.astype(dtype) for x in point_of(3, (size,)))
    exact = np.asarray(x) * np.asarray(y) - 2 * np.asarray(z)
    tolerance = 8 * np.finfo(dtype).eps
    found = polynomial((1.0, (x, y)), (-2.0, (z,)))
    np.testing.assert_allclose(found, exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(add(x, y), np.asarray(x) + np.asarray(y))
    if size:
        np.testing.assert_array_equal(add(x[0], y[0]), x[0] + y[0])


def test_a_slope_that_is_not_needed():
    """The gradient in one argument does not ask for that of another."""
    x, y = point_of(2)
    found = jax.grad(lambda x: jnp.sin(polynomial((2.0, (x, y, y)))).sum())(x)
    np.testing.assert_allclose(found, jnp.cos(2 * x * y**2) * 2 * y**2, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_other_dtypes(dtype):
    x = jnp.arange(6).reshape(3, 2).astype(dtype)
    np.testing.assert_array_equal(add(x, x), x + x)
    assert add(x, x).dtype == dtype


def test_shapes_that_differ(forms):
    if forms == "kernels":
        with pytest.raises(TypeError, match="one shape"):
            add(jnp.ones(3), jnp.ones(4))
