"""3x3 max pooling against `lax.reduce_window`, and what that leaves open: ties, and NaN."""

from functools import partial

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from darts_jax.pooling import first_max, max_pool

pytestmark = pytest.mark.usefixtures("forms", "x64")

SIZES = [(1, 1), (2, 2), (1, 4), (3, 1), (3, 5), (4, 4), (7, 6), (5, 9)]
STRIDES = [1, 2, 3]
strides = pytest.mark.parametrize("stride", STRIDES)


def ordinary(x, stride):
    window, steps = (1, 3, 3, 1), (1, stride, stride, 1)
    sides = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, window, steps, sides)


def by_index(x, stride):
    """The same by each window's pixels: `reduce_window` has no second derivatives."""
    count, height, width, channels = x.shape

    def near(size):  # rows (or columns) of each window, [size', 3]
        return np.arange(0, size, stride)[:, None] + np.arange(-1, 2)

    rows, columns = near(height)[:, None, :, None], near(width)[None, :, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    places = np.where(inside, rows * width + columns, 0).reshape(*inside.shape[:2], 9)
    windows = x.reshape(count, height * width, channels)[:, places]
    least = jnp.where(inside.reshape(places.shape)[..., None], windows, -jnp.inf)
    index = jnp.argmax(least, 3, keepdims=True)  # the first of equal ones
    return jnp.take_along_axis(windows, index, 3)[:, :, :, 0]


def image(size, channels=3, count=2):
    return derivatives.draw(0, (count, *size, channels))


@strides
@pytest.mark.parametrize(
    ("size", "channels"), [*((size, 3) for size in SIZES), *(((5, 9), n) for n in (1, 16, 19))]
)
def test_values_and_gradients(size, stride, channels):
    function, reference = (partial(f, stride=stride) for f in (max_pool, ordinary))
    (x,) = image(size, channels)
    np.testing.assert_array_equal(function(x), reference(x))  # exactly
    derivatives.values_and_gradients(function, reference, (x,), 1e-13)


@strides
@pytest.mark.parametrize("size", [(1, 1), (3, 4)])
def test_higher_derivatives(size, stride):
    function, reference = (partial(f, stride=stride) for f in (max_pool, by_index))
    derivatives.second(function, reference, image(size))
    derivatives.third(function, reference, image(size))


@pytest.mark.parametrize(("stride", "axis"), [(1, 0), (2, 1), (3, 4)])
def test_vmap(stride, axis):
    function, reference = (partial(f, stride=stride) for f in (max_pool, ordinary))
    derivatives.mapped(function, reference, image((4, 3)), (axis,))


def test_scan():
    def both(pool):
        return lambda x, y: pool(x, 1) * y

    functions = both(max_pool), both(by_index)
    derivatives.scanned(*functions, derivatives.draw(0, (1, 3, 3, 2), (1, 3, 3, 2)))


@strides
def test_keeps_float32(stride):
    function, reference = (partial(f, stride=stride) for f in (max_pool, ordinary))
    derivatives.single_precision(function, reference, image((5, 4)))


@strides
def test_numerical_derivative(stride):
    derivatives.numerical(partial(max_pool, stride=stride), image((5, 4)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(dtype):
    x = image((5, 4))[0].astype(dtype)
    y, slope = jax.value_and_grad(lambda x: max_pool(x, 2).sum())(x)
    assert y.dtype == slope.dtype == x.dtype
    np.testing.assert_array_equal(max_pool(x, 2), ordinary(x, 2))
    expected = jax.grad(lambda x: ordinary(x, 2).sum())(x.astype(jnp.float64))
    np.testing.assert_array_equal(slope, expected)


def gradient(x, stride):
    return jax.jit(jax.grad(lambda x: max_pool(x, stride).sum()))(x)


@strides
@pytest.mark.parametrize("values", [1, 3])
def test_a_tie_goes_to_the_first_pixel(stride, values):
    """In row-major order, whole and not shared."""
    x = jnp.asarray(np.random.default_rng(0).integers(values, size=(2, 7, 6, 3)), float)
    expected = jax.jit(jax.grad(lambda x: by_index(x, stride).sum()))(x)
    np.testing.assert_array_equal(gradient(x, stride), expected)


def test_a_constant_image():
    expected = {
        1: [[4, 2, 2, 0], [2, 1, 1, 0], [2, 1, 1, 0], [0, 0, 0, 0]],
        2: [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]],
        3: [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]],
    }
    for stride in STRIDES:
        found = gradient(jnp.full((1, 4, 4, 1), -2.0), stride)[0, :, :, 0]
        np.testing.assert_array_equal(found, expected[stride])


@strides
def test_nan(stride):
    """Every window that holds one is NaN, and no other."""
    x = image((7, 6))[0]
    x = x.at[0, 2, 3, 1].set(jnp.nan).at[1, 6, 0].set(jnp.nan).at[1, 5, 1].set(jnp.nan)
    holds = ordinary(jnp.isnan(x).astype(float), stride) > 0
    assert holds.any() and not holds.all()
    found = max_pool(x, stride)
    np.testing.assert_array_equal(jnp.isnan(found), holds)
    np.testing.assert_array_equal(found[~holds], ordinary(x, stride)[~holds])


@strides
def test_infinities(stride):
    """Pixels of -inf are less than any, and no more than what is outside of the image."""
    x = jnp.full((1, 5, 4, 2), -jnp.inf).at[0, 2, 1, 0].set(3).at[0, 4, 3, 1].set(jnp.inf)
    np.testing.assert_array_equal(max_pool(x, stride), ordinary(x, stride))
    assert jnp.isfinite(gradient(x, stride)).all()


def test_no_images():
    x = jnp.zeros((0, 5, 4, 3))
    y, pullback = jax.vjp(partial(max_pool, stride=2), x)
    assert y.shape == (0, 3, 2, 3)
    assert pullback(y)[0].shape == x.shape


def test_outside_of_jit():
    (x,) = image((5, 4))
    with jax.disable_jit():
        np.testing.assert_array_equal(max_pool(x, 2), ordinary(x, 2))
    np.testing.assert_array_equal(max_pool(np.asarray(x), 2), ordinary(x, 2))


def test_first_max():
    a, b = jnp.array([1.0, 2.0, 3.0]), jnp.array([2.0, 2.0, 1.0])
    y, pullback = jax.vjp(first_max, a, b)
    np.testing.assert_array_equal(y, [2, 2, 3])
    np.testing.assert_array_equal(pullback(jnp.ones(3)), [[0, 1, 1], [1, 0, 0]])
