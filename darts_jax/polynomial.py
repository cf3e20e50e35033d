"""Sums of products of arrays of one shape, element by element.

On CPUs with kernels (`native`) each is a call of one: a search has thousands on a few numbers,
which XLA compiles one by one, longer than all else.
"""

import math
from collections import Counter
from itertools import accumulate

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from darts_jax import native

Term = tuple[float, tuple[Array, ...]]


def polynomial(*terms: Term) -> Array:
    """Sum of coefficient * product over the terms (coefficient, arrays), all of one shape."""
    if not native.preferred(terms[0][1][0].dtype):
        return sum(coefficient * math.prod(arrays) for coefficient, arrays in terms)
    places: dict[int, int] = {}  # by the identity of arrays, which are kept in `given`
    given, merged = [], Counter()
    for coefficient, arrays in terms:
        for x in arrays:
            if id(x) not in places:
                places[id(x)] = len(given)
                given.append(x)
        merged[tuple(sorted(places[id(x)] for x in arrays))] += coefficient
    return _polynomial_p.bind(
        *given,
        coefficients=tuple(map(float, merged.values())),
        lengths=tuple(map(len, merged)),
        places=sum(merged, ()),
    )


def add(*arrays: Array) -> Array:
    """Sum of arrays of one shape."""
    first, *others = arrays
    if not others or not native.preferred(first.dtype):
        return sum(others, first)
    return polynomial(*((1.0, (x,)) for x in arrays))


def inverse_root(x: Array, epsilon: float) -> Array:
    """1 / sqrt(x + epsilon)."""
    if not native.preferred(x.dtype):
        return lax.rsqrt(x + epsilon)
    return _inverse_root_p.bind(x, epsilon=epsilon)


def _terms(coefficients, lengths, places) -> list[tuple[float, tuple[int, ...]]]:
    ends = accumulate(lengths)
    own = [places[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return list(zip(coefficients, own, strict=True))


def _evaluate(*arrays, **params):
    return sum(c * math.prod(arrays[i] for i in places) for c, places in _terms(**params))


def _jvp(primals, tangents, **params):
    out = _polynomial_p.bind(*primals, **params)
    terms = [
        (c, (*(primals[i] for i in places[:j] + places[j + 1 :]), tangents[place]))
        for c, places in _terms(**params)
        for j, place in enumerate(places)
        if type(tangents[place]) is not ad.Zero
    ]
    return out, polynomial(*terms)


def _transpose(ct, *args, **params):
    """Linear in what is not known: each term has one such factor, or none has."""
    terms = _terms(**params)

    def of(place):
        if not ad.is_undefined_primal(args[place]):
            return None
        own = [(c, places) for c, places in terms if place in places]
        return polynomial(*((c, (*(args[i] for i in p if i != place), ct)) for c, p in own))

    return [None if type(ct) is ad.Zero else of(place) for place in range(len(args))]


def _primitive(name, function, attributes) -> Primitive:
    primitive = Primitive(name)

    def abstract(*args, **params):
        if any(x.shape != args[0].shape or x.dtype != args[0].dtype for x in args):
            raise TypeError(f"arrays of one shape are needed: {', '.join(map(str, args))}")
        return jax.core.ShapedArray(args[0].shape, args[0].dtype)

    native.define(primitive, function, abstract, name, attributes)

    def batch(args, dims, **params):
        size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
        moved = [
            jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
            for x, d in zip(args, dims, strict=True)
        ]
        return primitive.bind(*moved, **params), 0

    batching.primitive_batchers[primitive] = batch
    return primitive


_polynomial_p = _primitive("polynomial", _evaluate, ("coefficients", "lengths", "places"))
ad.primitive_jvps[_polynomial_p] = _jvp
ad.primitive_transposes[_polynomial_p] = _transpose

_inverse_root_p = _primitive(
    "inverse_root", lambda x, *, epsilon: lax.rsqrt(x + epsilon), ("epsilon",)
)


def _inverse_root_jvp(primals, tangents, *, epsilon):
    root = _inverse_root_p.bind(*primals, epsilon=epsilon)
    return root, polynomial((-0.5, (root, root, root, *tangents)))


ad.primitive_jvps[_inverse_root_p] = _inverse_root_jvp
