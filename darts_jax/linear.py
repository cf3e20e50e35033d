"""Sums of two arrays, and arrays cut along their first axis or put together.

On CPUs with kernels (`native`) these are calls of them: a search has hundreds of each, which XLA
compiles one by one, longer than all else.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from darts_jax import native


def add(x: Array, y: Array) -> Array:
    """x + y, of one shape."""
    return _add_p.bind(x, y) if native.preferred(x.dtype) else x + y


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


def _primitive(name: str, function: Callable, multiple: bool = False) -> Primitive:
    primitive = Primitive(f"rows_{name}")
    primitive.multiple_results = multiple

    def abstract(*args, **params):
        out = jax.eval_shape(lambda *a: function(*a, **params), *args)
        return jax.tree.map(lambda x: jax.core.ShapedArray(x.shape, x.dtype), out)

    native.define(primitive, function, abstract, name)

    def batch(args, dims, **params):
        out = jax.vmap(lambda *a: function(*a, **params), in_axes=tuple(dims))(*args)
        return out, jax.tree.map(lambda _: 0, out)

    batching.primitive_batchers[primitive] = batch
    return primitive


def _instantiated(args):
    return [ad.instantiate_zeros(arg) for arg in args]


def _add_jvp(primals, tangents):
    out = _add_p.bind(*primals)
    nonzero = [t for t in tangents if type(t) is not ad.Zero]
    if len(nonzero) == 2:
        return out, _add_p.bind(*nonzero)
    return out, nonzero[0] if nonzero else ad.Zero(jax.typeof(out).to_tangent_aval())


def _undefined(ct, *args):
    return [ct if ad.is_undefined_primal(arg) else None for arg in args]


_add_p = _primitive("add", jnp.add)
ad.primitive_jvps[_add_p] = _add_jvp
ad.primitive_transposes[_add_p] = _undefined

_split_p = _primitive("split", lambda x, *, sizes: list(lax.split(x, sizes)), multiple=True)
_join_p = _primitive("join", lambda *parts: lax.concatenate(parts, 0))
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
