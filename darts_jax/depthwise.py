"""Depthwise convolution, fast in derivatives of every order and mode.

Three bilinear maps are each other's transposes: `expand` (one image to K edges), `contract` (back,
summed over the edges) and `correlate` (both images to the kernel). Their images are "few", [N, H,
W, C], and "many", [N, H, W, K, C], their kernels [k, k, K, C]. Row h of the output meets row
(h * stride + i * kernel_dilation - low) / input_dilation of the input at tap i, where that is whole
and in the image; columns likewise.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from darts_jax.bilinear import bilinear

# Channels whose kernel gradients are taken from one dense product: more would waste arithmetic
# (only its diagonal is used), fewer would leave vector registers empty.
_BLOCK = 16
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def depthwise(x: Array, kernel: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Depthwise convolution of one image by the kernels of K edges, padded to keep its size.

    Args:
      x: [N, H, W, C].
      kernel: [k, k, K, C], k odd, of x's dtype.
      stride: step between outputs, in pixels.
      dilation: distance between taps, in pixels.

    Returns:
      [N, H', W', K, C], H' = ceil(H / stride).
    """
    height, width = (-(-size // stride) for size in x.shape[1:3])
    return _expand_p.bind(
        x,
        kernel,
        stride=stride,
        input_dilation=1,
        kernel_dilation=dilation,
        low=dilation * (kernel.shape[0] // 2),
        height=height,
        width=width,
    )


class _Steps(NamedTuple):
    stride: int
    input_dilation: int
    kernel_dilation: int
    low: int

    def transposed(self, size: int) -> "_Steps":
        """From the output's rows to the input's, by the reversed kernel of `size` taps."""
        reach = (size - 1) * self.kernel_dilation
        return _Steps(self.input_dilation, self.stride, self.kernel_dilation, reach - self.low)


def _sides(image: int, output: int, size: int, steps: _Steps) -> tuple[int, int, int]:
    """Padding of one axis: before, behind and between pixels."""
    reached = (output - 1) * steps.stride + (size - 1) * steps.kernel_dilation + 1
    dilated = (image - 1) * steps.input_dilation + 1
    return steps.low, reached - dilated - steps.low, steps.input_dilation - 1


def _products(image, kernel, *, height, width, **steps):
    """Sum over the taps of shifted images [N, H, W, K or 1, C], each times its row of the kernel."""
    steps, size = _Steps(**steps), kernel.shape[0]
    sides = [
        _sides(n, out, size, steps)
        for n, out in zip(image.shape[1:3], (height, width), strict=True)
    ]
    nothing = jnp.zeros((), image.dtype)
    padded = lax.pad(image, nothing, ((0, 0, 0), *sides, (0, 0, 0), (0, 0, 0)))

    def cut(x, axis, tap, count):
        first = tap * steps.kernel_dilation
        return lax.slice_in_dim(
            x, first, first + (count - 1) * steps.stride + 1, steps.stride, axis
        )

    return sum(
        cut(cut(padded, 1, i, height), 2, j, width) * kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def _expand(few, kernel, **params):
    return _products(few[..., None, :], kernel, **params)


def _contract(many, kernel, **params):
    return _products(many, kernel, **params).sum(3)


def _correlate(few, many, *, size, **steps):
    steps, channels = _Steps(**steps), many.shape[3] * many.shape[4]
    few = jnp.broadcast_to(few[..., None, :], (*few.shape[:3], *many.shape[3:]))
    few, flat = (x.reshape(*x.shape[:3], channels) for x in (few, many))
    sides = tuple(
        _sides(n, out, size, steps)[:2]
        for n, out in zip(few.shape[1:3], flat.shape[1:3], strict=True)
    )

    def block(start):
        stop = min(start + _BLOCK, channels)
        dense = lax.conv_general_dilated(
            lax.transpose(few[..., start:stop], (3, 1, 2, 0)),
            lax.transpose(flat[..., start:stop], (1, 2, 0, 3)),
            (steps.kernel_dilation,) * 2,
            sides,
            lhs_dilation=(steps.input_dilation,) * 2,
            rhs_dilation=(steps.stride,) * 2,
            dimension_numbers=_LAYOUT,
        )
        return jnp.diagonal(dense, axis1=0, axis2=3)

    taps = lax.concatenate([block(i) for i in range(0, channels, _BLOCK)], 2)
    return taps.reshape(size, size, *many.shape[3:])


def _reverse(kernel):
    return lax.rev(kernel, (0, 1))


def _pull_expand(ct, few, kernel, *, height, width, **steps):
    back = _Steps(**steps).transposed(kernel.shape[0])
    height, width = few.aval.shape[1:3]
    return _contract_p.bind(ct, _reverse(kernel), **back._asdict(), height=height, width=width)


def _pull_expand_kernel(ct, few, kernel, *, height, width, **steps):
    return _correlate_p.bind(few, ct, **steps, size=kernel.aval.shape[0])


def _pull_contract(ct, many, kernel, *, height, width, **steps):
    back = _Steps(**steps).transposed(kernel.shape[0])
    height, width = many.aval.shape[1:3]
    return _expand_p.bind(ct, _reverse(kernel), **back._asdict(), height=height, width=width)


def _pull_contract_kernel(ct, many, kernel, *, height, width, **steps):
    size = kernel.aval.shape[0]
    back = _Steps(**steps).transposed(size)
    return _reverse(_correlate_p.bind(ct, many, **back._asdict(), size=size))


def _pull_correlate_few(ct, few, many, *, size, **steps):
    back = _Steps(**steps).transposed(size)
    height, width = few.aval.shape[1:3]
    return _contract_p.bind(many, _reverse(ct), **back._asdict(), height=height, width=width)


def _pull_correlate_many(ct, few, many, *, size, **steps):
    height, width = many.aval.shape[1:3]
    return _expand_p.bind(few, ct, **steps, height=height, width=width)


_expand_p = bilinear(
    "depthwise_expand",
    _expand,
    lambda few, kernel, *, height, width, **_: (few.shape[0], height, width, *kernel.shape[2:]),
    _pull_expand,
    _pull_expand_kernel,
    looped=False,
    target="expand",
    attributes=_Steps._fields,
)
_contract_p = bilinear(
    "depthwise_contract",
    _contract,
    lambda many, kernel, *, height, width, **_: (many.shape[0], height, width, many.shape[4]),
    _pull_contract,
    _pull_contract_kernel,
    looped=False,
    target="contract",
    attributes=_Steps._fields,
)
_correlate_p = bilinear(
    "depthwise_correlate",
    _correlate,
    lambda few, many, *, size, **_: (size, size, *many.shape[3:]),
    _pull_correlate_few,
    _pull_correlate_many,
    looped=False,
    target="correlate",
    attributes=_Steps._fields,
)
