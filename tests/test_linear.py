"""Arrays cut, joined and copied, against JAX's own."""

import derivatives
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from darts_jax.linear import copies, join, split

pytestmark = pytest.mark.usefixtures("forms", "x64")

SIZES = (2, 1, 0, 3)
PIECES = (((2, 3), (1, 3), (0, 3), (3, 3)), ((6,),), ((1, 2, 4), (2, 2, 4)))
FUNCTIONS = {
    "copies": (lambda x: copies(x, 3), lambda x: [x, x, x], ((3, 4),)),
    "copies-one": (lambda x: copies(x, 1), lambda x: [x], ((3, 4),)),
    "split": (lambda x: split(x, SIZES), lambda x: lax.split(x, SIZES), ((6, 3),)),
    "split-whole": (lambda x: split(x, (6,)), lambda x: lax.split(x, (6,)), ((6,),)),
    **{
        f"join-{len(shapes)}": (
            lambda *parts: join(parts),
            lambda *parts: lax.concatenate(parts, 0),
            shapes,
        )
        for shapes in PIECES
    },
}
each = pytest.mark.parametrize(
    ("function", "reference", "shapes"), FUNCTIONS.values(), ids=FUNCTIONS
)


@each
def test_exact(function, reference, shapes):
    """Bit by bit, in and outside of jit."""
    point = derivatives.draw(0, *shapes)
    with jax.disable_jit():
        outside = function(*point)
    for found in (function(*point), jax.jit(function)(*point), outside):
        jax.tree.map(np.testing.assert_array_equal, found, reference(*point))


@each
def test_derivatives(function, reference, shapes):
    point = derivatives.draw(0, *shapes)
    derivatives.values_and_gradients(function, reference, point)
    if all(x.size for x in point):
        derivatives.second(function, reference, point)
        derivatives.third(function, reference, point)


@each
def test_vmap(function, reference, shapes):
    point = derivatives.draw(0, *shapes)
    derivatives.mapped(function, reference, point, [0] * len(shapes))
    if len(shapes) > 1:
        last = len(shapes[0])
        derivatives.mapped(function, reference, point, [last] + [None] * (len(shapes) - 1))


@each
def test_keeps_float32(function, reference, shapes):
    derivatives.single_precision(function, reference, derivatives.draw(0, *shapes))


@pytest.mark.parametrize("dtype", ["bfloat16", "int32", "bool"])
def test_other_dtypes(dtype):
    x = jnp.arange(6).reshape(3, 2).astype(dtype)
    parts = split(x, (1, 2))
    assert [part.shape for part in parts] == [(1, 2), (2, 2)]
    np.testing.assert_array_equal(join(parts), x)
    np.testing.assert_array_equal(copies(x, 2), [x, x])


def test_parts_that_are_not_used():
    """Their cotangents are zeros that nobody made."""
    (x,) = derivatives.draw(0, (6, 3))
    found = jax.grad(lambda x: jnp.sin(split(x, SIZES)[1]).sum())(x)
    expected = jax.grad(lambda x: jnp.sin(lax.split(x, SIZES)[1]).sum())(x)
    np.testing.assert_array_equal(found, expected)
    found = jax.grad(lambda x: jnp.sin(copies(x, 3)[1]).sum())(x)
    np.testing.assert_array_equal(found, jnp.cos(x))


@each
def test_of_one_argument_alone(function, reference, shapes):
    """The others are constant: their tangents are zeros that nobody made."""
    x, *others = derivatives.draw(0, *shapes)
    functions = [lambda x, f=f: f(x, *others) for f in (function, reference)]
    derivatives.values_and_gradients(*functions, (x,))
    derivatives.second(*functions, (x,))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_large(dtype):
    x = derivatives.draw(0, (50_000,))[0].astype(dtype)
    np.testing.assert_array_equal(join(split(x, (10_000, 40_000))), x)
