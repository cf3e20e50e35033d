"""Checks of a function of arrays, and of its derivatives in every order and mode.

Each compares it with an ordinary one at a point, a tuple of arrays. Both may return any pytree.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

PyTree = Any
Point = tuple[Array, ...]
Function = Callable[..., PyTree]


def draw(seed: int, *shapes: tuple[int, ...]) -> Point:
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.standard_normal(shape)) for shape in shapes)


def like(point: Point, seed: int) -> Point:
    drawn = draw(seed, *(x.shape for x in point))
    return tuple(d.astype(x.dtype) for d, x in zip(drawn, point, strict=True))


def close(actual: PyTree, expected: PyTree, rtol: float = 1e-11) -> None:
    """Relative to the largest entry: a value near zero is a difference of larger ones."""

    def check(a, e):
        assert a.dtype == e.dtype
        assert a.shape == e.shape
        largest = np.abs(e).max(initial=0)
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * largest)

    jax.tree.map(check, actual, expected)


def nonlinear(function: Function) -> Callable[..., Array]:
    """A scalar whose derivatives of every order in all arguments are not zero."""

    def loss(*point):
        leaves = jax.tree.leaves(function(*point))
        return sum(
            (jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum() for y in leaves
        )

    return loss


def gradient(function: Function, point: Point) -> Callable[..., PyTree]:
    return jax.grad(nonlinear(function), argnums=tuple(range(len(point))))


def values_and_gradients(
    function: Function, ordinary: Function, point: Point, rtol: float = 1e-11
) -> None:
    """Outside of jit, and as one program."""

    def both(f, *point):
        return f(*point), gradient(f, point)(*point)

    expected = jax.jit(partial(both, ordinary))(*point)
    close(function(*point), expected[0], rtol)
    close(jax.jit(partial(both, function))(*point), expected, rtol)


def second(function: Function, ordinary: Function, point: Point, rtol: float = 1e-11) -> None:
    """Forward over reverse, reverse over reverse, reverse over forward; none of them is zero."""
    tangent = like(point, 1)

    def forward_over_reverse(f):
        return jax.jvp(gradient(f, point), point, tangent)[1]

    def reverse_over_reverse(f):
        _, pullback = jax.vjp(gradient(f, point), *point)
        return pullback(tangent)

    def reverse_over_forward(f):
        def slope(*point):
            return jax.jvp(nonlinear(f), point, tangent)[1]

        return jax.grad(slope, argnums=tuple(range(len(point))))(*point)

    expected = jax.jit(lambda: forward_over_reverse(ordinary))()
    assert all(np.abs(part).max() > 0.1 for part in expected)
    modes = (forward_over_reverse, reverse_over_reverse, reverse_over_forward)
    for found in jax.jit(lambda: [mode(function) for mode in modes])():
        close(found, expected, rtol)


def third(function: Function, ordinary: Function, point: Point, rtol: float = 1e-11) -> None:
    """Forward and reverse over forward over reverse."""
    u, v = like(point, 1), like(point, 2)

    def both(f):
        def product(*point):
            return jax.jvp(gradient(f, point), point, u)[1]

        _, pullback = jax.vjp(product, *point)
        return jax.jvp(product, point, v)[1], pullback(v)

    close(*(jax.jit(partial(both, f))() for f in (function, ordinary)), rtol)


def mapped(
    function: Function,
    ordinary: Function,
    point: Point,
    axes: Sequence[int | None],
    rtol: float = 1e-11,
) -> None:
    """The map of value and gradients, and the gradients of the map, against a loop."""
    examples, argnums = 3, tuple(range(len(point)))
    stacked = tuple(
        x if axis is None else jnp.moveaxis(jnp.stack([x, *like((x, x), 3)]), 0, axis)
        for x, axis in zip(point, axes, strict=True)
    )

    def example(i, point):
        return [a if x is None else jnp.take(a, i, x) for a, x in zip(point, axes, strict=True)]

    def both(f, *point):
        return f(*point), gradient(f, point)(*point)

    def total_of_map(*stacked):
        return jax.vmap(nonlinear(function), in_axes=tuple(axes))(*stacked).sum()

    def total_of_loop(*stacked):
        return sum(nonlinear(ordinary)(*example(i, stacked)) for i in range(examples))

    def by_map(*stacked):
        each = jax.vmap(partial(both, function), in_axes=tuple(axes))(*stacked)
        return each, jax.grad(total_of_map, argnums)(*stacked)

    def by_loop(*stacked):
        rows = [both(ordinary, *example(i, stacked)) for i in range(examples)]
        each = jax.tree.map(lambda *rows: jnp.stack(rows), *rows)
        return each, jax.grad(total_of_loop, argnums)(*stacked)

    close(*(jax.jit(f)(*stacked) for f in (by_map, by_loop)), rtol)


def scanned(function: Function, ordinary: Function, point: Point, rtol: float = 1e-11) -> None:
    """In a scan over four of each argument but the first, whose shape the function keeps."""
    x, *others = point
    stacks = draw(3, *((4, *other.shape) for other in others))
    tangents = draw(4, x.shape), draw(5, *(stack.shape for stack in stacks))

    def by_scan(x, stacks):
        return lax.scan(lambda x, rows: (jnp.tanh(function(x, *rows)), None), x, stacks)[0]

    def by_loop(x, stacks):
        for rows in zip(*stacks, strict=True):
            x = jnp.tanh(ordinary(x, *rows))
        return x

    def all_of(f):
        slope = jax.grad(lambda *point: jnp.sin(f(*point)).sum(), argnums=(0, 1))
        return f(x, stacks), jax.jvp(slope, (x, stacks), (tangents[0][0], tangents[1]))

    close(*(jax.jit(partial(all_of, f))() for f in (by_scan, by_loop)), rtol)


def single_precision(
    function: Function, ordinary: Function, point: Point, rtol: float = 1e-5
) -> None:
    """Values and gradients of float32 stay float32, though float64 is there."""
    narrow = tuple(x.astype(jnp.float32) for x in point)
    found, expected = (
        jax.jit(lambda *p, f=f: (f(*p), gradient(f, p)(*p)))(*narrow) for f in (function, ordinary)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    close(found, expected, rtol)


def numerical(function: Function, point: Point) -> None:
    """The gradient against a central difference."""
    tangent, step = like(point, 1), 1e-5
    slope = sum(
        jnp.vdot(g, t)
        for g, t in zip(jax.jit(gradient(function, point))(*point), tangent, strict=True)
    )
    value = jax.jit(nonlinear(function))

    def at(sign):
        return value(*(p + sign * step * t for p, t in zip(point, tangent, strict=True)))

    np.testing.assert_allclose((at(1) - at(-1)) / (2 * step), slope, rtol=1e-6)
