"""Both convolutions, and their derivatives, against `lax.conv_general_dilated`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.ordinary import conv as ordinary_conv
from darts_jax.convolution import conv
from darts_jax.depthwise import depthwise

pytestmark = pytest.mark.usefixtures("x64")

BATCH, HEIGHT, WIDTH = 2, 7, 6


def ordinary_depthwise(x, kernel):
    return ordinary_conv(x, kernel[:, :, None], padding=kernel.shape[0] // 2, groups=x.shape[3])


def dense(kernel, stride=1, padding=0, dilation=1):
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    functions = partial(conv, **options), partial(ordinary_conv, **options)
    name = f"dense-k{kernel}-s{stride}-p{padding}-d{dilation}"
    return pytest.param(*functions, (kernel, kernel, 2, 3), id=name)


def by_channel(kernel, channels):
    shape = (kernel, kernel, channels)
    return pytest.param(depthwise, ordinary_depthwise, shape, id=f"depthwise-k{kernel}-c{channels}")


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
    by_channel(1, 3),
    by_channel(3, 3),
    by_channel(5, 2),
    by_channel(3, 19),  # more channels than one block of the kernel's gradient, and not a multiple
]
FEW = [
    dense(3, stride=2, padding=1),
    dense(5, stride=2, padding=4, dilation=2),
    by_channel(3, 3),
    by_channel(3, 19),
]


def draw(seed, *shapes):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def arguments(kernel_shape, seed=0, batch=()):
    return draw(seed, (*batch, BATCH, HEIGHT, WIDTH, kernel_shape[2]), (*batch, *kernel_shape))


def nonlinear(function):
    """A scalar whose derivatives of every order in both arguments are not zero."""

    def loss(x, kernel):
        y = function(x, kernel)
        return (jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()

    return loss


def close(actual, expected, rtol=1e-11):
    def check(a, e):
        assert a.dtype == e.dtype
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())

    jax.tree.map(check, actual, expected)


@pytest.mark.parametrize(("function", "ordinary", "shape"), CASES)
def test_values_and_gradients(function, ordinary, shape):
    point = arguments(shape)
    close(function(*point), ordinary(*point))  # one by one, and as one program
    close(jax.jit(function)(*point), ordinary(*point))
    functions = function, ordinary
    close(*(jax.jit(jax.grad(nonlinear(f), argnums=(0, 1)))(*point) for f in functions))


@pytest.mark.parametrize(("function", "ordinary", "shape"), CASES)
def test_second_derivatives(function, ordinary, shape):
    point, tangent = arguments(shape), arguments(shape, seed=1)

    def gradient(f):
        return jax.grad(nonlinear(f), argnums=(0, 1))

    def forward_over_reverse(f):
        return jax.jvp(gradient(f), point, tangent)[1]

    def reverse_over_reverse(f):
        _, pullback = jax.vjp(gradient(f), *point)
        return pullback(tangent)

    def reverse_over_forward(f):
        def slope(*point):
            return jax.jvp(nonlinear(f), point, tangent)[1]

        return jax.grad(slope, argnums=(0, 1))(*point)

    expected = jax.jit(lambda: forward_over_reverse(ordinary))()
    assert all(np.abs(part).max() > 0.1 for part in expected)
    modes = (forward_over_reverse, reverse_over_reverse, reverse_over_forward)
    for found in jax.jit(lambda: [mode(function) for mode in modes])():
        close(found, expected)


@pytest.mark.parametrize(("function", "ordinary", "shape"), FEW)
def test_third_derivatives(function, ordinary, shape):
    point, u, v = (arguments(shape, seed) for seed in range(3))

    def third(f):
        gradient = jax.grad(nonlinear(f), argnums=(0, 1))

        def product(*point):
            return jax.jvp(gradient, point, u)[1]

        _, pullback = jax.vjp(product, *point)
        return jax.jvp(product, point, v)[1], pullback(v)

    found, expected = (jax.jit(partial(third, f))() for f in (function, ordinary))
    close(found, expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (1, 2)])
@pytest.mark.parametrize(("function", "ordinary", "shape"), FEW)
def test_vmap(function, ordinary, shape, axes):
    """The map of value and gradients, and the gradients of the map, against a loop."""
    examples = 3
    point = tuple(
        stack[0] if axis is None else jnp.moveaxis(stack, 0, axis)
        for stack, axis in zip(arguments(shape, batch=(examples,)), axes, strict=True)
    )

    def example(i, point):
        return [a if x is None else jnp.take(a, i, x) for a, x in zip(point, axes, strict=True)]

    def value_and_gradients(f):
        return lambda *point: (f(*point), jax.grad(nonlinear(f), argnums=(0, 1))(*point))

    def loop(*point):
        rows = [value_and_gradients(ordinary)(*example(i, point)) for i in range(examples)]
        return jax.tree.map(lambda *rows: jnp.stack(rows), *rows)

    mapped = jax.vmap(value_and_gradients(function), in_axes=axes)
    close(jax.jit(mapped)(*point), jax.jit(loop)(*point))

    def total_of_map(*point):
        return jax.vmap(nonlinear(function), in_axes=axes)(*point).sum()

    def total_of_loop(*point):
        return sum(nonlinear(ordinary)(*example(i, point)) for i in range(examples))

    totals = total_of_map, total_of_loop
    close(*(jax.jit(jax.grad(f, argnums=(0, 1)))(*point) for f in totals))


@pytest.mark.parametrize(
    ("function", "ordinary", "shape"),
    [
        pytest.param(
            partial(conv, padding=1), partial(ordinary_conv, padding=1), (3, 3, 2, 2), id="dense"
        ),
        pytest.param(depthwise, ordinary_depthwise, (3, 3, 2), id="depthwise"),
    ],
)
def test_scan(function, ordinary, shape):
    x, _ = arguments(shape)
    (kernels,) = draw(3, (4, *shape))
    tangents = draw(4, x.shape, kernels.shape)

    def scanned(x, kernels):
        return lax.scan(lambda x, kernel: (jnp.tanh(function(x, kernel)), None), x, kernels)[0]

    def looped(x, kernels):
        for kernel in kernels:
            x = jnp.tanh(ordinary(x, kernel))
        return x

    def all_of(f):
        gradient = jax.grad(lambda *point: jnp.sin(f(*point)).sum(), argnums=(0, 1))
        return f(x, kernels), jax.jvp(gradient, (x, kernels), tangents)

    close(*(jax.jit(partial(all_of, f))() for f in (scanned, looped)))


@pytest.mark.parametrize(("function", "ordinary", "shape"), FEW)
def test_keeps_float32(function, ordinary, shape):
    point = tuple(a.astype(jnp.float32) for a in arguments(shape))
    results = [
        jax.jit(lambda *p, f=f: (f(*p), jax.grad(nonlinear(f), argnums=(0, 1))(*p)))(*point)
        for f in (function, ordinary)
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(results[0])} == {jnp.dtype("float32")}
    close(*results, rtol=1e-5)


@pytest.mark.parametrize(("function", "ordinary", "shape"), FEW)
def test_numerical_derivative(function, ordinary, shape):
    point, tangent = arguments(shape), arguments(shape, seed=1)
    gradient = jax.jit(jax.grad(nonlinear(function), argnums=(0, 1)))
    slope = sum(jnp.vdot(g, t) for g, t in zip(gradient(*point), tangent, strict=True))
    value, step = jax.jit(nonlinear(function)), 1e-5

    def at(sign):
        return value(*(p + sign * step * t for p, t in zip(point, tangent, strict=True)))

    np.testing.assert_allclose((at(1) - at(-1)) / (2 * step), slope, rtol=1e-6)


@pytest.mark.parametrize("function, _, shape", [dense(1), dense(3, stride=2, padding=1), FEW[2]])
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
