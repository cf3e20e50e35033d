"""Convolutions whose derivatives, of every order and mode, are fast convolutions again.

XLA's CPU compiler has a fast path for convolutions in one layout only (NHWC, HWIO -> NHWC), and
brings others into it only in a program's outermost computation. The transposes that
`jax.lax.conv_general_dilated` derives have other layouts, so in a scan, or in a computation that
is compiled once and called often, they run twenty times slower. So the convolution is a primitive
here, with transposes written out in the fast layout.
"""

import jax.numpy as jnp
from jax import Array, lax

from darts_jax.bilinear import bilinear

_LAYOUT = ("NHWC", "HWIO", "NHWC")


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


def _conv_shape(x, kernel, *, stride, padding, input_dilation, kernel_dilation):
    inputs = _dilated(x.shape[1:3], input_dilation)
    windows = _dilated(kernel.shape[:2], kernel_dilation)
    sizes = (
        (low + size + high - window) // stride + 1
        for (low, high), size, window in zip(padding, inputs, windows, strict=True)
    )
    return x.shape[0], *sizes, kernel.shape[3]


_conv_p = bilinear("conv", _conv, _conv_shape, _conv_transpose_x, _conv_transpose_kernel)
