"""Weighted sums, moments and ReLU against their plain formulas."""

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax.mixing import mean, mean_and_variance, mix, relu

pytestmark = pytest.mark.usefixtures("forms", "x64")

PIXELS = (0, 1, 2)
# More than one piece of work for a kernel, the last one smaller.
LARGE = (4, 16, 17)


def weighted(function, count):
    """`mix` or another of `count` images and factors, as a function of one array each."""
    return lambda *args: function(args[:count], args[count:-1], args[-1])


def ordinary_mix(images, factors, bias):
    return sum((x * f for x, f in zip(images, factors, strict=True)), start=bias)


def ordinary_moments(x):
    centered = x - x.mean(PIXELS)
    return x.mean(PIXELS), (centered * centered).mean(PIXELS)


def ordinary_relu(x):
    return jnp.where(x > 0, x, 0)


def case(kinds, edges, channels, pixels=(2, 3, 4)):
    """Images by the letters of `kinds`: f for few, m for many."""
    name = f"{kinds}-e{edges}-c{channels}-{'x'.join(map(str, pixels))}"
    return pytest.param(kinds, edges, channels, pixels, id=name)


def arguments(kinds, edges, channels, pixels, seed=0):
    images = [(*pixels, 1 if kind == "f" else edges, channels) for kind in kinds]
    return derivatives.draw(seed, *images, *[(edges, channels)] * (len(kinds) + 1))


SUMS = [
    case("m", 3, 4),
    case("f", 3, 4),
    case("f", 1, 4),
    case("mf", 5, 8),
    case("fm", 2, 3),
    case("ff", 3, 1),
    case("mm", 1, 1, (1, 1, 1)),
    case("mfm", 3, 16),
    case("fmmfmfm", 2, 19),
    case("mf", 3, 4, LARGE),
    case("fm", 2, 5, LARGE),
    case("mf", 3, 8, (1, 1, 1)),
]
FEW_SUMS = [case("mf", 3, 4, (1, 2, 3)), case("ffm", 2, 3, (1, 2, 2))]
each_sum = pytest.mark.parametrize(("kinds", "edges", "channels", "pixels"), SUMS)
few_sums = pytest.mark.parametrize(("kinds", "edges", "channels", "pixels"), FEW_SUMS)
IMAGES = [
    (2, 3, 4, 2, 3),
    (2, 3, 4, 5),
    (1, 1, 2, 1, 1),
    (3, 1, 1, 4, 4),
    (*LARGE, 3, 4),
    (*LARGE, 7),
]
each_image = pytest.mark.parametrize("shape", IMAGES)
small_images = pytest.mark.parametrize("shape", IMAGES[:2])
MOMENTS = {
    "mean": (mean, lambda x: x.mean(PIXELS)),
    "mean_and_variance": (mean_and_variance, ordinary_moments),
}
ONE_IMAGE = {**MOMENTS, "relu": (relu, ordinary_relu)}
each_function = pytest.mark.parametrize(
    ("function", "reference"), ONE_IMAGE.values(), ids=ONE_IMAGE
)
each_moment = pytest.mark.parametrize(("function", "reference"), MOMENTS.values(), ids=MOMENTS)


# Weighted sums.


@each_sum
def test_sum(kinds, edges, channels, pixels):
    functions = (weighted(f, len(kinds)) for f in (mix, ordinary_mix))
    derivatives.values_and_gradients(*functions, arguments(kinds, edges, channels, pixels))


@few_sums
def test_higher_derivatives_of_a_sum(kinds, edges, channels, pixels):
    functions = [weighted(f, len(kinds)) for f in (mix, ordinary_mix)]
    point = arguments(kinds, edges, channels, pixels)
    derivatives.second(*functions, point)
    derivatives.third(*functions, point)
    derivatives.numerical(functions[0], point)


@pytest.mark.parametrize("kept", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2), (0, 4), (2, 4)])
def test_some_arguments_of_a_sum_are_constant(kept):
    """The derivatives in the others, of every mode: tangents of two images, two factors, a bias."""
    point = arguments("mf", 3, 4, (1, 2, 3))

    def of_some(function):
        def call(*some):
            args = list(point)
            for i, x in zip(kept, some, strict=True):
                args[i] = x
            return weighted(function, 2)(*args)

        return call

    functions = [of_some(f) for f in (mix, ordinary_mix)]
    some = tuple(point[i] for i in kept)
    derivatives.values_and_gradients(*functions, some)
    derivatives.second(*functions, some)


@pytest.mark.parametrize("position", range(5))
def test_vmap_of_each_argument_of_a_sum(position):
    point = arguments("mf", 3, 4, (1, 2, 3))
    axes = [1 if i == position else None for i in range(5)]
    derivatives.mapped(*(weighted(f, 2) for f in (mix, ordinary_mix)), point, axes)


@few_sums
def test_vmap_of_a_sum(kinds, edges, channels, pixels):
    functions = (weighted(f, len(kinds)) for f in (mix, ordinary_mix))
    point = arguments(kinds, edges, channels, pixels)
    derivatives.mapped(*functions, point, [0] * len(point))


def test_scan_of_a_sum():
    functions = (weighted(f, 1) for f in (mix, ordinary_mix))
    derivatives.scanned(*functions, arguments("m", 2, 3, (1, 2, 2)))


@few_sums
def test_a_sum_keeps_float32(kinds, edges, channels, pixels):
    functions = (weighted(f, len(kinds)) for f in (mix, ordinary_mix))
    derivatives.single_precision(*functions, arguments(kinds, edges, channels, pixels))


def test_a_sum_of_two_dtypes_is_of_the_wider():
    x, factors, bias = arguments("m", 2, 3, (1, 2, 2))
    narrow = x.astype(jnp.float32)
    derivatives.close(mix([narrow], [factors], bias), ordinary_mix([narrow], [factors], bias))
    slope = jax.grad(lambda x: mix([x], [factors], bias).sum())(narrow)
    assert slope.dtype == jnp.float32


def test_a_sum_of_bfloat16():
    point = tuple(x.astype(jnp.bfloat16) for x in arguments("mf", 3, 4, (1, 2, 3)))
    y = weighted(mix, 2)(*point)
    assert y.dtype == jnp.bfloat16
    exact = weighted(ordinary_mix, 2)(*(x.astype(jnp.float64) for x in point))
    derivatives.close(y.astype(jnp.float64), exact, rtol=2**-6)


def test_a_sum_of_no_images():
    """No image in the batch: the factors' gradients are 0."""
    x, bias = jnp.zeros((0, 4, 5, 2, 3)), jnp.ones((2, 3))
    y, pullback = jax.vjp(weighted(mix, 2), x, x[:, :, :, :1], bias, bias, bias)
    assert y.shape == x.shape
    zero = jnp.zeros_like(bias)
    derivatives.close(pullback(y), (x, x[:, :, :, :1], zero, zero, zero))


@pytest.mark.parametrize(
    ("image", "factor", "bias"),
    [
        ((1, 2, 2, 2, 4), (2, 3), (2, 3)),
        ((1, 2, 2, 2, 3), (4, 3), (4, 3)),
        ((1, 2, 2, 2, 3), (1, 3), (2, 3)),
        ((1, 2, 2, 2, 3), (2, 3), (1, 3)),
        ((1, 2, 2, 3), (2, 3), (2, 3)),
    ],
)
def test_a_sum_refuses_what_does_not_fit(image, factor, bias):
    with pytest.raises(TypeError, match="images, factors and bias do not fit: float64"):
        mix([jnp.zeros(image)], [jnp.zeros(factor)], jnp.zeros(bias))


def test_a_sum_refuses_images_of_two_sizes():
    images, factor = [jnp.zeros((1, 2, size, 2, 3)) for size in (2, 3)], jnp.zeros((2, 3))
    with pytest.raises(TypeError, match=r"float64\[1,2,2,2,3\], float64\[1,2,3,2,3\]"):
        mix(images, [factor, factor], factor)


# Functions of one image.


@each_image
@each_function
def test_values_and_gradients(function, reference, shape):
    derivatives.values_and_gradients(function, reference, derivatives.draw(0, shape))


@small_images
@each_function
def test_higher_derivatives(function, reference, shape):
    (point,) = derivatives.draw(0, shape)
    # Else the second derivatives of a mean, which are means, would be nearly zero.
    scaled = [lambda x, f=f: f(30 * x) for f in (function, reference)]
    derivatives.second(*scaled, (point,))
    derivatives.third(*scaled, (point,))
    derivatives.numerical(function, (point,))


@pytest.mark.parametrize("axis", [0, 2, 5])
@each_function
def test_vmap(function, reference, axis):
    derivatives.mapped(function, reference, derivatives.draw(0, (1, 2, 3, 2, 3)), (axis,))


@each_moment
def test_scan(function, reference):
    def subtracting(f):
        return lambda x, y: x * y - jax.tree.leaves(f(x))[-1]

    functions = (subtracting(f) for f in (function, reference))
    derivatives.scanned(*functions, derivatives.draw(0, (1, 2, 3, 4), (1, 2, 3, 4)))


@small_images
@each_function
def test_keeps_float32(function, reference, shape):
    derivatives.single_precision(function, reference, derivatives.draw(0, shape))


@each_function
def test_bfloat16(function, reference):
    x = derivatives.draw(0, (2, 3, 4, 5))[0].astype(jnp.bfloat16)
    found, slope = function(x), jax.grad(lambda x: jax.tree.leaves(function(x))[-1].sum())(x)
    assert {leaf.dtype for leaf in jax.tree.leaves([found, slope])} == {jnp.dtype("bfloat16")}
    exact = reference(x.astype(jnp.float64))
    derivatives.close(jax.tree.map(lambda y: y.astype(jnp.float64), found), exact, rtol=2**-6)


@each_function
def test_outside_of_jit(function, reference):
    (x,) = derivatives.draw(0, (2, 3, 4, 5))
    with jax.disable_jit():
        derivatives.close(function(x), reference(x))
    derivatives.close(function(np.asarray(x)), reference(x))


@each_function
def test_a_batch_of_no_images(function, reference):
    x = jnp.zeros((0, 4, 5, 2, 3))
    found, pullback = jax.vjp(function, x)
    np.testing.assert_array_equal(jax.tree.leaves(found), jax.tree.leaves(reference(x)))
    assert pullback(found)[0].shape == x.shape


# Moments.


def test_moments_against_numpy():
    (x,) = derivatives.draw(0, (*LARGE, 2, 3))
    flat = np.asarray(x).reshape(-1, 2, 3)
    derivatives.close(mean(x), flat.mean(0), 1e-14)
    derivatives.close(mean_and_variance(x), (flat.mean(0), flat.var(0)), 1e-13)


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("ratio", [1e2, 1e4])
def test_small_deviation_from_a_large_mean(ratio, batch):
    """In float32, where the mean of the squares less the square of the mean would be noise."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(ratio + rng.standard_normal((batch, 32, 32, 3)), jnp.float32)
    found, variance = mean_and_variance(x)
    assert found.dtype == variance.dtype == jnp.float32
    exact = np.asarray(x, np.float64).reshape(-1, 3)
    np.testing.assert_allclose(found, exact.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, exact.var(0), rtol=1e-4)
    squares = jnp.square(x).mean(PIXELS) - jnp.square(found)
    assert ratio < 1e3 or np.abs(squares / exact.var(0) - 1).max() > 1e-3


def test_a_constant_image_has_no_variance():
    found, variance = mean_and_variance(jnp.full((*LARGE, 2, 3), 0.1))
    np.testing.assert_allclose(found, 0.1, rtol=1e-13)
    np.testing.assert_allclose(variance, 0, atol=1e-28)


# ReLU.


def test_relu_at_its_kink():
    x = jnp.array([-jnp.inf, -1.0, -0.0, 0.0, 1e-300, 2.0, jnp.inf, jnp.nan])
    y, pullback = jax.vjp(relu, x)
    np.testing.assert_array_equal(y, [0, 0, 0, 0, 1e-300, 2, jnp.inf, jnp.nan])
    assert not np.signbit(y[:-1]).any()
    np.testing.assert_array_equal(pullback(jnp.ones(8))[0], [0, 0, 0, 0, 1, 1, 1, 1])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5), (17, 33, 31)])
def test_relu_is_exact(shape, dtype):
    """Bit by bit, and so is its gradient, of any shape."""
    x = derivatives.draw(0, shape)[0].astype(dtype)
    y, pullback = jax.vjp(relu, x)
    assert np.asarray(y).tobytes() == np.asarray(ordinary_relu(x)).tobytes()
    (slope,) = pullback(x)
    assert np.asarray(slope).tobytes() == np.asarray(ordinary_relu(x)).tobytes()


def test_relu_passes_what_is_not_a_number():
    """The gradient too, where a gradient is not a number and the image is."""
    x, ct = jnp.array([[1.0, -1.0, jnp.nan]]), jnp.array([[jnp.nan, jnp.nan, 3.0]])
    np.testing.assert_array_equal(jax.vjp(relu, x)[1](ct)[0], [[jnp.nan, 0, 3]])
    np.testing.assert_array_equal(jax.jvp(relu, (x,), (ct,))[1], [[jnp.nan, 0, 3]])
