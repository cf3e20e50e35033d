"""Primitives for bilinear maps that are closed under differentiation, forward and reverse.

The transposes of such a map are given as primitives again, so that derivatives of every order and
mode are built of the same few, each of which can be compiled in its own way.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec as P

from darts_jax import native
from darts_jax.polynomial import add


def bilinear(
    name: str,
    function: Callable[..., Array],
    shape: Callable[..., tuple[int, ...]],
    transpose_lhs: Callable[..., Array],
    transpose_rhs: Callable[..., Array],
    *,
    looped: bool = True,
    target: str | None = None,
    attributes: tuple[str, ...] = (),
) -> Primitive:
    """A primitive for a bilinear `function(lhs, rhs, **params)`, complete with its derivatives.

    If `looped`, a batch of both arguments is a loop on CPUs: as one convolution it would be one of
    groups, for which they have no fast path. A batch that is spread over devices (`spmd_axis_name`
    of `jax.vmap`, where the mesh is set) is a convolution on each: of one with groups, the
    compiler would gather the groups, or fail.

    Args:
      name: of the primitive.
      function: what it computes.
      shape: `shape(lhs, rhs, **params)`, that of the result, from two arrays or their avals.
      transpose_lhs: `transpose_lhs(cotangent, lhs, rhs, **params)`, of which lhs is undefined but
        for its `aval`: the cotangent of lhs.
      transpose_rhs: that of rhs, which is undefined.
      looped: as above.
      target: the kernel that computes the same on CPUs (`native.define`), used if it is there.
      attributes: the parameters that it takes.
    """
    primitive = Primitive(name)

    def abstract(lhs, rhs, **params):
        return jax.core.ShapedArray(shape(lhs, rhs, **params), lhs.dtype)

    def batch(axis, args, dims, **params):
        if all(dim is None for dim in dims):
            return primitive.bind(*args, **params), None

        def at_once(*args):
            return jax.vmap(lambda a, b: function(a, b, **params), in_axes=tuple(dims))(*args)

        if axis.spmd_name is not None:
            specs = tuple(P() if dim is None else P(*(None,) * dim, axis.spmd_name) for dim in dims)
            on_each = jax.shard_map(
                at_once,
                in_specs=specs,
                out_specs=P(axis.spmd_name),
                axis_names=set(axis.spmd_name),
            )
            return on_each(*args), 0

        if None in dims or not (looped or (target is not None and native.AVAILABLE)):
            return at_once(*args), 0

        def one_by_one(*args):
            pairs = tuple(jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True))
            return lax.map(lambda pair: primitive.bind(*pair, **params), pairs)

        return lax.platform_dependent(*args, cpu=one_by_one, default=at_once), 0

    native.define(primitive, function, abstract, target, attributes)
    ad.defbilinear(primitive, transpose_lhs, transpose_rhs)

    def jvp(primals, tangents, **params):
        (lhs, rhs), (lhs_dot, rhs_dot) = primals, tangents
        out, terms = primitive.bind(lhs, rhs, **params), []
        if type(lhs_dot) is not ad.Zero:
            terms.append(primitive.bind(lhs_dot, rhs, **params))
        if type(rhs_dot) is not ad.Zero:
            terms.append(primitive.bind(lhs, rhs_dot, **params))
        return out, add(*terms) if len(terms) == 2 else terms[0]

    ad.primitive_jvps[primitive] = jvp
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive
