"""Convolutions whose derivatives, of every order and mode, are fast convolutions again.

XLA's CPU compiler has a fast path for convolutions in one layout only (NHWC, HWIO -> NHWC), and
brings others into it only in a program's outermost computation. The transposes that
`jax.lax.conv_general_dilated` derives have other layouts, so in a scan, or in a computation that
is compiled once and called often, they run twenty times slower. Depthwise convolution has no fast
path at all. Both maps are bilinear: as primitives with transposes written out in the fast layout,
they are closed under differentiation, forward and reverse, to any order.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec as P

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Channels whose depthwise kernel gradients are taken from one dense product: more would waste
# arithmetic (only its diagonal is used), fewer would leave vector registers empty.
_DEPTHWISE_BLOCK = 16

Padding = tuple[tuple[int, int], tuple[int, int]]


def conv(x: Array, kernel: Array, stride: int = 1, padding: int = 0, dilation: int = 1) -> Array:
    """Dense convolution with symmetric explicit padding.

    Args:
      x: [N, H, W, C_in].
      kernel: [k, k, C_in, C_out], of x's dtype.
      stride: step between outputs, in pixels.
      padding: zeros added on each of the four sides, in pixels.
      dilation: distance between taps, in pixels.

    Returns:
      [N, H', W', C_out], H' = (H + 2 padding - dilation (k - 1) - 1) // stride + 1.
    """
    sides = ((padding, padding), (padding, padding))
    return _conv_p.bind(
        x, kernel, stride=stride, padding=sides, input_dilation=1, kernel_dilation=dilation
    )


def matmul_conv(x: Array, kernel: Array, stride: int = 1, padding: int = 0) -> Array:
    """The same as `conv`, by one matrix product for each row of the kernel.

    Mapped over kernels (`jax.vmap`), it is a batched product: on small images many times faster
    on CPU than `conv`, which then is a grouped convolution.

    Args and returns: as `conv`.
    """
    size, _, channels, outputs = kernel.shape
    side = (padding, padding, 0)
    x = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), side, side, (0, 0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])

    def cut(x: Array, axis: int, first: int, count: int) -> Array:
        return lax.slice_in_dim(x, first, first + stride * (count - 1) + 1, stride, axis)

    beside = lax.concatenate([cut(x, 2, j, width) for j in range(size)], 3)
    rows = kernel.reshape(size, size * channels, outputs)
    products = [cut(beside, 1, i, height) @ rows[i] for i in range(size)]
    return sum(products[1:], products[0])


def depthwise(x: Array, kernel: Array) -> Array:
    """Depthwise convolution at stride 1 that keeps the size: a sum of shifted products.

    Args:
      x: [N, H, W, C].
      kernel: [k, k, C], k odd, of x's dtype.

    Returns:
      [N, H, W, C].
    """
    return _depthwise_p.bind(x, kernel)


def _bilinear(
    name: str,
    function: Callable,
    transpose_lhs: Callable,
    transpose_rhs: Callable,
    looped: bool = True,
) -> Primitive:
    """A primitive for a bilinear `function(lhs, rhs, **params)`, complete with its derivatives.

    If `looped`, a batch of both arguments is a loop on CPUs: as one convolution it would be one of
    groups, for which they have no fast path. A batch that is spread over devices (`spmd_axis_name`
    of `jax.vmap`, where the mesh is set) is a convolution on each: of one with groups, the
    compiler would gather the groups, or fail.
    """
    primitive = Primitive(name)

    def abstract(lhs, rhs, **params):
        out = jax.eval_shape(lambda a, b: function(a, b, **params), lhs, rhs)
        return jax.core.ShapedArray(out.shape, out.dtype)

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

        if None in dims or not looped:
            return at_once(*args), 0

        def one_by_one(*args):
            pairs = tuple(jnp.moveaxis(a, d, 0) for a, d in zip(args, dims, strict=True))
            return lax.map(lambda pair: primitive.bind(*pair, **params), pairs)

        return lax.platform_dependent(*args, cpu=one_by_one, default=at_once), 0

    @lru_cache
    def compiled(items):  # for calls outside of jit
        return jax.jit(lambda a, b: function(a, b, **dict(items)))

    primitive.def_impl(lambda a, b, **params: compiled(tuple(params.items()))(a, b))
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=False))
    ad.defbilinear(primitive, transpose_lhs, transpose_rhs)
    batching.fancy_primitive_batchers[primitive] = batch
    return primitive


def _conv(x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        padding,
        lhs_dilation=(input_dilation, input_dilation),
        rhs_dilation=(kernel_dilation, kernel_dilation),
        dimension_numbers=_LAYOUT,
    )


def _dilated(sizes, dilation: int) -> list[int]:
    return [(size - 1) * dilation + 1 for size in sizes]


def _conv_transpose_x(ct, x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    """Cotangent of x: the cotangent of the output convolved with the reversed kernel."""
    inputs = _dilated(x.aval.shape[1:3], input_dilation)
    outputs = _dilated(ct.shape[1:3], stride)
    windows = _dilated(kernel.shape[:2], kernel_dilation)
    sides = []
    for (low, _), size, out, window in zip(padding, inputs, outputs, windows, strict=True):
        before = window - 1 - low
        sides.append((before, size + window - 1 - out - before))
    return _conv_p.bind(
        ct,
        lax.transpose(lax.rev(kernel, (0, 1)), (0, 1, 3, 2)),
        stride=input_dilation,
        padding=tuple(sides),
        input_dilation=stride,
        kernel_dilation=kernel_dilation,
    )


def _conv_transpose_kernel(ct, x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    """Cotangent of the kernel: x convolved with the output's cotangent, over the batch."""
    inputs = _dilated(x.shape[1:3], input_dilation)
    outputs = _dilated(ct.shape[1:3], stride)
    windows = _dilated(kernel.aval.shape[:2], kernel_dilation)
    sides = tuple(
        (low, window - 1 + out - size - low)
        for (low, _), size, out, window in zip(padding, inputs, outputs, windows, strict=True)
    )
    out = _conv_p.bind(
        lax.transpose(x, (3, 1, 2, 0)),
        lax.transpose(ct, (1, 2, 0, 3)),
        stride=kernel_dilation,
        padding=sides,
        input_dilation=input_dilation,
        kernel_dilation=stride,
    )
    return lax.transpose(out, (1, 2, 0, 3))


def _depthwise(x, kernel):
    size, (height, width) = kernel.shape[0], x.shape[1:3]
    side = (size // 2, size // 2, 0)
    padded = lax.pad(x, jnp.zeros((), x.dtype), ((0, 0, 0), side, side, (0, 0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] * kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def _correlation(x, ct, *, size):
    """Cotangent [k, k, C] of a depthwise kernel: correlation of x with ct, channel by channel."""
    side, channels = (size // 2, size // 2), x.shape[3]

    def block(start):
        stop = min(start + _DEPTHWISE_BLOCK, channels)
        dense = lax.conv_general_dilated(
            lax.transpose(x[..., start:stop], (3, 1, 2, 0)),
            lax.transpose(ct[..., start:stop], (1, 2, 0, 3)),
            (1, 1),
            (side, side),
            dimension_numbers=_LAYOUT,
        )
        return jnp.diagonal(dense, axis1=0, axis2=3)

    return lax.concatenate([block(i) for i in range(0, channels, _DEPTHWISE_BLOCK)], 2)


def _reverse(kernel):
    return lax.rev(kernel, (0, 1))


_conv_p = _bilinear("conv", _conv, _conv_transpose_x, _conv_transpose_kernel)
_depthwise_p = _bilinear(
    "depthwise",
    _depthwise,
    lambda ct, x, kernel: _depthwise_p.bind(ct, _reverse(kernel)),
    lambda ct, x, kernel: _correlation_p.bind(x, ct, size=kernel.aval.shape[0]),
    looped=False,
)
_correlation_p = _bilinear(
    "depthwise_correlation",
    _correlation,
    lambda ct, x, y, size: _depthwise_p.bind(y, _reverse(ct)),
    lambda ct, x, y, size: _depthwise_p.bind(x, ct),
)
