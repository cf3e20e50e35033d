"""Arrays cut along their first axis, put together, or read several times.

On CPUs with kernels (`native`) these are calls of them: a search has hundreds of each, which XLA
compiles one by one, longer than all else.
"""

from collections.abc import Callable, Sequence

import jax
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from darts_jax import native
from darts_jax.polynomial import add


def copies(x: Array, count: int) -> list[Array]:
    """x so many times: their cotangents are added in one go, by a kernel."""
    if native.preferred(x.dtype):
        return _copies_p.bind(x, count=count)
    return [x] * count


def split(x: Array, sizes: Sequence[int]) -> list[Array]:
    """So many rows of x [sum of sizes, ...] each."""
    if native.preferred(x.dtype):
        return _split_p.bind(x, sizes=tuple(sizes))
    return lax.split(x, sizes)


def join(parts: Sequence[Array]) -> Array:
    """The rows of all parts, one after the other: the inverse of `split`."""
    if native.preferred(parts[0].dtype):
        return _join_p.bind(*parts)
    return lax.concatenate(parts, 0)


def _primitive(
    name: str, function: Callable, target: str | None = None, multiple: bool = False
) -> Primitive:
    primitive = Primitive(f"rows_{name}")
    primitive.multiple_results = multiple

    def abstract(*args, **params):
        out = jax.eval_shape(lambda *a: function(*a, **params), *args)
        return jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), out)

    native.define(primitive, function, abstract, target)

    def batch(args, dims, **params):
        out = jax.vmap(lambda *a: function(*a, **params), in_axes=tuple(dims))(*args)
        return out, jax.tree.map(lambda _: 0, out)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _instantiated(args):
    return [ad.instantiate_zeros(arg) for arg in args]


_split_p = _primitive(
    "split", lambda x, *, sizes: list(lax.split(x, sizes)), "split", multiple=True
)
_join_p = _primitive("join", lambda *parts: lax.concatenate(parts, 0), "join")
ad.primitive_jvps[_split_p] = lambda primals, tangents, *, sizes: (
    _split_p.bind(*primals, sizes=sizes),
    _split_p.bind(*_instantiated(tangents), sizes=sizes),
)
ad.primitive_transposes[_split_p] = lambda cts, x, *, sizes: [_join_p.bind(*_instantiated(cts))]
ad.primitive_jvps[_join_p] = lambda primals, tangents: (
    _join_p.bind(*primals),
    _join_p.bind(*_instantiated(tangents)),
)


def _join_transpose(ct, *parts):
    shapes = [part.aval if ad.is_undefined_primal(part) else part for part in parts]
    pieces = _split_p.bind(ct, sizes=tuple(x.shape[0] for x in shapes))
    return [
        piece if ad.is_undefined_primal(part) else None
        for part, piece in zip(parts, pieces, strict=True)
    ]


ad.primitive_transposes[_join_p] = _join_transpose


_copies_p = _primitive("copies", lambda x, *, count: [x] * count, multiple=True)
ad.primitive_jvps[_copies_p] = lambda primals, tangents, *, count: (
    _copies_p.bind(*primals, count=count),
    _copies_p.bind(*tangents, count=count),
)
ad.primitive_transposes[_copies_p] = lambda cts, x, *, count: [
    add(*(ct for ct in cts if type(ct) is not ad.Zero))
]
