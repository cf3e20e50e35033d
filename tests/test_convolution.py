"""Dense convolution, and its derivatives, against `lax.conv_general_dilated`."""

from functools import partial

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.ordinary import conv as ordinary_conv
from darts_jax.convolution import conv

pytestmark = pytest.mark.usefixtures("x64")

BATCH, HEIGHT, WIDTH = 2, 7, 6


def dense(kernel, stride=1, padding=0, dilation=1):
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    functions = partial(conv, **options), partial(ordinary_conv, **options)
    name = f"k{kernel}-s{stride}-p{padding}-d{dilation}"
    return pytest.param(*functions, (kernel, kernel, 2, 3), id=name)


CASES = [
    dense(1),
    dense(1, stride=2),
    dense(2, stride=2),
    dense(3),
    dense(3, padding=1),
    dense(3, stride=2, padding=1),
    dense(3, stride=3, padding=1),
    dense(3, padding=4),  # more padding than the kernel reaches: its transpose crops
    dense(3, padding=2, dilation=2),
    dense(3, stride=2, padding=2, dilation=2),
    dense(5, stride=2, padding=2),
    dense(5, stride=2, padding=4, dilation=2),
]
FEW = [
    dense(3, stride=2, padding=1),
    dense(5, stride=2, padding=4, dilation=2),
]
each = pytest.mark.parametrize(("function", "ordinary", "shape"), CASES)
each_of_few = pytest.mark.parametrize(("function", "ordinary", "shape"), FEW)


def arguments(shape):
    return derivatives.draw(0, (BATCH, HEIGHT, WIDTH, shape[2]), shape)


@each
def test_values_and_gradients(function, ordinary, shape):
    derivatives.values_and_gradients(function, ordinary, arguments(shape))


@each
def test_second_derivatives(function, ordinary, shape):
    derivatives.second(function, ordinary, arguments(shape))


@each_of_few
def test_third_derivatives(function, ordinary, shape):
    derivatives.third(function, ordinary, arguments(shape))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
@each_of_few
def test_vmap(function, ordinary, shape, axes):
    derivatives.mapped(function, ordinary, arguments(shape), axes)


def test_scan():
    functions = partial(conv, padding=1), partial(ordinary_conv, padding=1)
    derivatives.scanned(*functions, arguments((3, 3, 2, 2)))


@each_of_few
def test_keeps_float32(function, ordinary, shape):
    derivatives.single_precision(function, ordinary, arguments(shape))


@each_of_few
def test_numerical_derivative(function, ordinary, shape):
    derivatives.numerical(function, arguments(shape))


@pytest.mark.parametrize("function, _, shape", [dense(1), dense(3, stride=2, padding=1)])
def test_a_batch_over_devices_stays_there(function, _, shape):
    """Each device convolves its own, and so do the derivatives."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("seed",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, BATCH, HEIGHT, WIDTH, shape[2])), rng.normal(size=(2, *shape))

    def gradients(x, kernel):
        return jax.grad(lambda *args: jnp.sum(jnp.sin(function(*args))), (0, 1))(x, kernel)

    with jax.set_mesh(mesh):
        spread = jax.device_put((x, kernel), NamedSharding(mesh, PartitionSpec("seed")))
        step = jax.jit(jax.vmap(gradients, spmd_axis_name="seed")).lower(*spread).compile()
        found = step(*spread)
    assert not any(word in step.as_text() for word in ("all-", "collective", "group_count"))
    expected = [gradients(*pair) for pair in zip(x, kernel, strict=True)]
    for part, of_each in zip(found, zip(*expected, strict=True), strict=True):
        assert len(part.sharding.device_set) == 2 and not part.is_fully_replicated
        np.testing.assert_allclose(part, np.stack(of_each), rtol=1e-12, atol=1e-12)
