"""Pointwise convolutions, each edge by its own matrix, against one `einsum`."""

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax.pointwise import block_diagonal, pointwise

pytestmark = pytest.mark.usefixtures("kernels", "x64")


def ordinary(x, matrices):
    return jnp.einsum("...kc,kcd->...kd", x, matrices)


def case(edges, channels, outputs, lead=(2, 3, 4)):
    shapes = (*lead, edges, channels), (edges, channels, outputs)
    rows = "x".join(map(str, lead))
    return pytest.param(shapes, id=f"e{edges}-c{channels}-d{outputs}-{rows}")


# Kernels take 128 rows at a time and 16 columns, 8 rows or channels of them in registers; several
# edges' at once if their matrices are 4x4 or 8x8.
CASES = [
    case(1, 4, 4),
    case(3, 4, 4),
    case(5, 4, 4, (2, 11, 13)),
    case(1, 8, 8),
    case(3, 8, 8, (1, 1, 1)),
    case(5, 8, 8, (1, 5, 7)),
    case(1, 1, 1),
    case(3, 3, 3, (1, 1, 1)),
    case(3, 4, 8),
    case(5, 8, 4),
    case(1, 16, 16),
    case(3, 19, 16),
    case(2, 16, 19, (2, 11, 13)),
    case(1, 36, 3),
    case(3, 1, 17, (2, 10, 7)),
    case(2, 9, 33, (3, 16, 48)),
    case(4, 5, 6, (7,)),
    case(2, 3, 2, ()),
]
CHOSEN = [case(3, 4, 4), case(5, 8, 8), case(2, 3, 5), case(1, 19, 17)]
each = pytest.mark.parametrize("shapes", CASES)
each_chosen = pytest.mark.parametrize("shapes", CHOSEN)


def arguments(shapes):
    return derivatives.draw(0, *shapes)


@each
def test_values_and_gradients(shapes):
    derivatives.values_and_gradients(pointwise, ordinary, arguments(shapes))


@each
def test_second_derivatives(shapes):
    derivatives.second(pointwise, ordinary, arguments(shapes))


@each_chosen
def test_third_derivatives(shapes):
    derivatives.third(pointwise, ordinary, arguments(shapes))


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (2, 1)])
@each_chosen
def test_vmap(shapes, axes):
    derivatives.mapped(pointwise, ordinary, arguments(shapes), axes)


def test_scan():
    derivatives.scanned(pointwise, ordinary, arguments(((2, 3, 3, 2, 3), (2, 3, 3))))


@each_chosen
def test_keeps_float32(shapes):
    derivatives.single_precision(pointwise, ordinary, arguments(shapes))


@each_chosen
def test_numerical_derivative(shapes):
    derivatives.numerical(pointwise, arguments(shapes))


def test_bfloat16():
    """Correct to its 8 bits, in value and gradients."""
    point = tuple(x.astype(jnp.bfloat16) for x in arguments(((2, 3, 4, 3, 4), (3, 4, 4))))
    found = pointwise(*point), *jax.grad(lambda *p: pointwise(*p).sum(), (0, 1))(*point)
    assert {leaf.dtype for leaf in found} == {jnp.dtype("bfloat16")}
    exact = tuple(x.astype(jnp.float64) for x in point)
    expected = ordinary(*exact), *jax.grad(lambda *p: ordinary(*p).sum(), (0, 1))(*exact)
    derivatives.close([x.astype(jnp.float64) for x in found], list(expected), rtol=2**-6)


def test_no_images():
    x, matrices = jnp.zeros((0, 4, 5, 2, 3)), arguments([(2, 3, 4)])[0]
    y, pullback = jax.vjp(pointwise, x, matrices)
    assert y.shape == (0, 4, 5, 2, 4)
    derivatives.close(pullback(y), (x, jnp.zeros_like(matrices)))


def test_outside_of_jit():
    """Where jit is disabled, and where NumPy's arrays come in."""
    x, matrices = arguments(((2, 3, 4, 2, 3), (2, 3, 4)))
    with jax.disable_jit():
        derivatives.close(pointwise(x, matrices), ordinary(x, matrices))
    derivatives.close(pointwise(np.asarray(x), np.asarray(matrices)), ordinary(x, matrices))


@pytest.mark.parametrize(
    ("image", "dtype", "message"),
    [
        ((5, 2, 2), float, r"matrices float64\[2,3,4\] do not fit images float64\[5,2,2\]"),
        ((5, 1, 3), float, r"do not fit images float64\[5,1,3\]"),
        ((5, 2, 3), jnp.float32, r"do not fit images float32\[5,2,3\]"),
    ],
)
def test_refuses_what_does_not_fit(image, dtype, message):
    with pytest.raises(TypeError, match=message):
        pointwise(jnp.zeros(image, dtype), jnp.zeros((2, 3, 4)))


def test_block_diagonal():
    matrices, x = arguments(((3, 2, 4), (5, 3, 2)))
    y = x.reshape(5, -1) @ block_diagonal(matrices)
    derivatives.close(y.reshape(5, 3, 4), ordinary(x, matrices), 1e-13)
