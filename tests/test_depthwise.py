"""Depthwise convolution, and its derivatives, against `lax.conv_general_dilated` by groups."""

from functools import partial

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.ordinary import conv
from darts_jax.depthwise import depthwise

pytestmark = pytest.mark.usefixtures("kernels", "x64")


def ordinary(x, kernel, stride=1, dilation=1):
    edges, size, _, channels = kernel.shape
    x = x if x.ndim == 5 else jnp.repeat(x[..., None, :], edges, 3)
    flat = x.reshape(*x.shape[:3], edges * channels)
    taps = kernel.transpose(1, 2, 0, 3).reshape(size, size, 1, -1)
    y = conv(flat, taps, stride, dilation * (size // 2), dilation, groups=edges * channels)
    return y.reshape(*y.shape[:3], edges, channels)


def case(many, size, stride=1, dilation=1, channels=4, edges=3, image=(5, 6)):
    options = {"stride": stride, "dilation": dilation}
    functions = partial(depthwise, **options), partial(ordinary, **options)
    own = (edges,) if many else ()
    shapes = (2, *image, *own, channels), (edges, size, size, channels)
    name = f"{'many' if many else 'few'}-k{size}-s{stride}-d{dilation}-c{channels}-e{edges}"
    return pytest.param(*functions, shapes, id=f"{name}-{image[0]}x{image[1]}")


MANY, FEW = True, False
# Kernels take the edges' channels in blocks of 16: several edges fill one (1, 4, 8), or one does
# (16), or a block ends in the midst of an edge (3, 19, 36).
CASES = [
    case(FEW, 1, channels=3, edges=1),
    case(MANY, 1, stride=2, channels=8, edges=3),
    case(FEW, 1, stride=3, channels=16, edges=3),
    case(FEW, 3, channels=4, edges=5),
    case(MANY, 3, channels=4, edges=3),
    case(MANY, 3, channels=4, edges=5, stride=2, image=(7, 6)),
    case(FEW, 3, channels=1, edges=1),
    case(FEW, 3, channels=1, edges=5, stride=3, image=(7, 5)),
    case(MANY, 3, channels=1, edges=3, dilation=2),
    case(FEW, 3, channels=8, edges=3, stride=2, dilation=2),
    case(MANY, 3, channels=8, edges=5, stride=3, dilation=2, image=(4, 7)),
    case(FEW, 3, channels=19, edges=1),
    case(MANY, 3, channels=19, edges=3, stride=2, image=(5, 5)),
    case(FEW, 3, channels=36, edges=3),
    case(MANY, 3, channels=36, edges=1, dilation=2),
    case(FEW, 3, channels=16, edges=1, stride=2, dilation=2),
    case(MANY, 3, channels=16, edges=3, stride=2),
    case(FEW, 5, channels=4, edges=3, stride=2, dilation=2, image=(9, 8)),
    case(MANY, 5, channels=3, edges=3),
    case(FEW, 5, channels=3, edges=5, dilation=2),
    case(MANY, 5, channels=8, edges=1, stride=2, image=(9, 7)),
    case(FEW, 7, channels=4, edges=1),
    case(MANY, 7, channels=3, edges=1, stride=2, image=(9, 8)),
    # Images smaller than the kernel, of one pixel, or one row, or one column.
    case(FEW, 5, channels=4, edges=3, image=(2, 3)),
    case(MANY, 5, channels=3, edges=1, stride=2, dilation=2, image=(3, 2)),
    case(FEW, 7, channels=3, edges=1, image=(2, 2)),
    case(FEW, 3, channels=4, edges=3, image=(1, 1)),
    case(MANY, 3, channels=3, edges=3, stride=2, dilation=2, image=(1, 1)),
    case(MANY, 3, channels=8, edges=3, stride=3, image=(1, 6)),
    case(FEW, 3, channels=19, edges=1, stride=2, image=(5, 1)),
]
CHOSEN = [
    case(FEW, 3, channels=4, edges=3, image=(4, 3)),
    case(MANY, 3, channels=3, edges=3, stride=2, image=(5, 4)),
    case(FEW, 3, channels=19, edges=1, stride=2, dilation=2, image=(5, 4)),
    case(MANY, 5, channels=8, edges=3, dilation=2, image=(3, 4)),
]
each = pytest.mark.parametrize(("function", "reference", "shapes"), CASES)
each_chosen = pytest.mark.parametrize(("function", "reference", "shapes"), CHOSEN)


def arguments(shapes):
    return derivatives.draw(0, *shapes)


@each
def test_values_and_gradients(function, reference, shapes):
    derivatives.values_and_gradients(function, reference, arguments(shapes))


@each
def test_second_derivatives(function, reference, shapes):
    derivatives.second(function, reference, arguments(shapes))


@each_chosen
def test_third_derivatives(function, reference, shapes):
    derivatives.third(function, reference, arguments(shapes))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 3)])
@pytest.mark.parametrize(("function", "reference", "shapes"), CHOSEN[1:3])
def test_vmap(function, reference, shapes, axes):
    derivatives.mapped(function, reference, arguments(shapes), axes)


@pytest.mark.parametrize("shapes", [((2, 4, 3, 3), (1, 3, 3, 3)), ((2, 3, 3, 2, 4), (2, 3, 3, 4))])
def test_scan(shapes):
    def keeping_shape(function):
        return lambda x, kernel: function(x, kernel).reshape(x.shape)

    functions = (keeping_shape(f) for f in (depthwise, ordinary))
    derivatives.scanned(*functions, arguments(shapes))


@each_chosen
def test_keeps_float32(function, reference, shapes):
    derivatives.single_precision(function, reference, arguments(shapes))


@each_chosen
def test_numerical_derivative(function, reference, shapes):
    derivatives.numerical(function, arguments(shapes))


@pytest.mark.parametrize("options", [{}, {"stride": 2, "dilation": 2}])
@pytest.mark.parametrize("shape", [(2, 5, 4, 3), (2, 5, 4, 2, 3)])
def test_bfloat16(shape, options):
    """Correct to its 8 bits, in value and gradients."""
    point = tuple(x.astype(jnp.bfloat16) for x in arguments((shape, (2, 3, 3, 3))))
    cotangent = arguments([jax.eval_shape(partial(depthwise, **options), *point).shape])[0]

    def run(function, dtype):
        y, pullback = jax.vjp(partial(function, **options), *(x.astype(dtype) for x in point))
        return y, pullback(cotangent.astype(dtype))

    found = run(depthwise, jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), found)
    derivatives.close(wide, run(ordinary, jnp.float64), rtol=2**-6)


@pytest.mark.parametrize("own", [(), (2,)], ids=["few", "many"])
def test_no_images(own):
    """A batch of none has a gradient too: 0 for the kernels."""
    kernel = arguments([(2, 3, 3, 3)])[0]
    x = jnp.zeros((0, 4, 5, *own, 3))
    y, pullback = jax.vjp(depthwise, x, kernel)
    assert y.shape == (0, 4, 5, 2, 3)
    derivatives.close(pullback(y), (x, jnp.zeros_like(kernel)))


def test_outside_of_jit():
    """Where jit is disabled, and where NumPy's arrays come in."""
    x, kernel = arguments(((2, 4, 3, 3), (2, 3, 3, 3)))
    expected = ordinary(x, kernel)
    with jax.disable_jit():
        derivatives.close(depthwise(x, kernel), expected)
    derivatives.close(depthwise(np.asarray(x), np.asarray(kernel)), expected)


def test_rematerialized():
    x, kernel = arguments(((2, 4, 3, 3), (2, 3, 3, 3)))
    derivatives.second(jax.checkpoint(depthwise), ordinary, (x, kernel))


@pytest.mark.parametrize(
    ("image", "dtype", "message"),
    [
        ((2, 4, 5, 2), float, r"kernels float64\[2,3,3,3\] do not fit images float64\[2,4,5,2\]"),
        ((2, 4, 5, 3, 3), float, r"do not fit images float64\[2,4,5,3,3\]"),
        ((2, 4, 5, 1, 3), float, r"do not fit images float64\[2,4,5,1,3\]"),
        ((2, 4, 5, 3), jnp.float32, r"do not fit images float32\[2,4,5,3\]"),
    ],
)
def test_refuses_what_does_not_fit(image, dtype, message):
    with pytest.raises(TypeError, match=message):
        depthwise(jnp.zeros(image, dtype), jnp.zeros((2, 3, 3, 3)))


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (2, 3, 1, 3)])
def test_refuses_kernels_that_are_not_square(shape):
    with pytest.raises(TypeError, match=r"kernels float64\[2,\d,\d,3\] are not square"):
        depthwise(jnp.zeros((2, 4, 5, 3)), jnp.zeros(shape))


@each_chosen
def test_a_batch_over_devices_stays_there(function, reference, shapes):
    """Each device convolves its own, and so do the derivatives."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("seed",), axis_types=(AxisType.Auto,))
    point = arguments([(2, *shape) for shape in shapes])

    def gradients(*point):
        return derivatives.gradient(function, point)(*point)

    with jax.set_mesh(mesh):
        spread = jax.device_put(point, NamedSharding(mesh, PartitionSpec("seed")))
        step = jax.jit(jax.vmap(gradients, spmd_axis_name="seed")).lower(*spread).compile()
        found = step(*spread)
    assert not any(word in step.as_text() for word in ("all-", "collective"))
    rows = [derivatives.gradient(reference, pair)(*pair) for pair in zip(*point, strict=True)]
    for part, of_each in zip(found, zip(*rows, strict=True), strict=True):
        assert len(part.sharding.device_set) == 2 and not part.is_fully_replicated
        derivatives.close(np.asarray(part), np.stack(of_each))
