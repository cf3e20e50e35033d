"""Depthwise convolution, fast in derivatives of every order and mode.

Two bilinear maps are all that its derivatives are made of: `convolve` (an image by a kernel) and
`correlate` (two images to a kernel). Images are "many", [N, H, W, K, C], of K edges, or "few", [N,
H, W, C], the same for all; kernels are [K, k, k, C]. Row h of the output meets row (h * stride + i
* kernel_dilation - low) / input_dilation of the input at tap i, where that is whole and in the
image; columns likewise.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from darts_jax.bilinear import bilinear

# Channels whose kernel gradients are taken from one dense product: more would waste arithmetic
# (only its diagonal is used), fewer would leave vector registers empty.
_BLOCK = 16
_LAYOUT = ("NHWC", "HWIO", "NHWC")


def depthwise(x: Array, kernel: Array, stride: int = 1, dilation: int = 1) -> Array:
    """Depthwise convolution by the kernels of K edges, padded to keep the size.

    Args:
      x: [N, H, W, C], or [N, H, W, K, C] where every edge has its own.
      kernel: [K, k, k, C], k odd, of x's dtype.
      stride: step between outputs, in pixels.
      dilation: distance between taps, in pixels.

    Returns:
      [N, H', W', K, C], H' = ceil(H / stride).

    Raises:
      TypeError: x and kernel do not fit in shape or dtype, or kernels are not square.
    """
    if kernel.shape[1] != kernel.shape[2]:
        raise TypeError(f"kernels {jax.typeof(kernel)} are not square")
    if x.shape[3:] not in (kernel.shape[3:], kernel.shape[::3]) or x.dtype != kernel.dtype:
        raise TypeError(f"kernels {jax.typeof(kernel)} do not fit images {jax.typeof(x)}")
    height, width = (-(-size // stride) for size in x.shape[1:3])
    low = dilation * (kernel.shape[1] // 2)
    return _convolve(x, kernel, _Steps(stride, 1, dilation, low, False), (height, width), True)


class _Steps(NamedTuple):
    stride: int
    input_dilation: int
    kernel_dilation: int
    low: int
    reversed: bool  # the kernel, along both of its axes

    def transposed(self, size: int) -> "_Steps":
        """From the output's rows to the input's, by a kernel of `size` taps."""
        low = (size - 1) * self.kernel_dilation - self.low
        steps = self.input_dilation, self.stride, self.kernel_dilation
        return _Steps(*steps, low, not self.reversed)


def _convolve(image, kernel, steps, size, many):
    height, width = size
    return _convolve_p.bind(image, kernel, **steps._asdict(), height=height, width=width, many=many)


def _correlate(image, many, steps, size):
    return _correlate_p.bind(image, many, **steps._asdict(), size=size)


def _sides(image: int, output: int, size: int, steps: _Steps) -> tuple[int, int, int]:
    """Padding of one axis: before, behind and between pixels."""
    reached = (output - 1) * steps.stride + (size - 1) * steps.kernel_dilation + 1
    dilated = (image - 1) * steps.input_dilation + 1
    return steps.low, reached - dilated - steps.low, steps.input_dilation - 1


def _products(image, kernel, *, height, width, many, **steps):
    """Sum over the taps of the shifted image, each times its row of the kernel."""
    steps, size = _Steps(**steps), kernel.shape[1]
    image = image if image.ndim == 5 else image[..., None, :]
    kernel = lax.rev(kernel, (1, 2)) if steps.reversed else kernel
    sides = [
        _sides(n, out, size, steps)
        for n, out in zip(image.shape[1:3], (height, width), strict=True)
    ]
    nothing = jnp.zeros((), image.dtype)
    padded = lax.pad(image, nothing, ((0, 0, 0), *sides, (0, 0, 0), (0, 0, 0)))

    def cut(x, axis, tap, count):
        first = tap * steps.kernel_dilation
        last = first + (count - 1) * steps.stride + 1
        return lax.slice_in_dim(x, first, last, steps.stride, axis)

    total = sum(
        cut(cut(padded, 1, i, height), 2, j, width) * kernel[:, i, j]
        for i in range(size)
        for j in range(size)
    )
    return total if many else total.sum(3)


def _taps(image, many, *, size, **steps):
    steps, (edges, channels) = _Steps(**steps), many.shape[3:]
    image = image if image.ndim == 5 else image[..., None, :]
    image = jnp.broadcast_to(image, (*image.shape[:3], edges, channels))
    image, flat = (x.reshape(*x.shape[:3], edges * channels) for x in (image, many))
    sides = tuple(
        _sides(n, out, size, steps)[:2]
        for n, out in zip(image.shape[1:3], flat.shape[1:3], strict=True)
    )

    def block(start):
        stop = min(start + _BLOCK, flat.shape[3])
        dense = lax.conv_general_dilated(
            lax.transpose(image[..., start:stop], (3, 1, 2, 0)),
            lax.transpose(flat[..., start:stop], (1, 2, 0, 3)),
            (steps.kernel_dilation,) * 2,
            sides,
            lhs_dilation=(steps.input_dilation,) * 2,
            rhs_dilation=(steps.stride,) * 2,
            dimension_numbers=_LAYOUT,
        )
        return jnp.diagonal(dense, axis1=0, axis2=3)

    taps = lax.concatenate([block(i) for i in range(0, flat.shape[3], _BLOCK)], 2)
    kernel = taps.reshape(size, size, edges, channels).transpose(2, 0, 1, 3)
    return lax.rev(kernel, (1, 2)) if steps.reversed else kernel


def _pull_image(ct, image, kernel, *, height, width, many, **steps):
    back = _Steps(**steps).transposed(kernel.shape[1])
    return _convolve(ct, kernel, back, image.aval.shape[1:3], image.aval.ndim == 5)


def _pull_kernel(ct, image, kernel, *, height, width, many, **steps):
    steps, size = _Steps(**steps), kernel.aval.shape[1]
    if many:
        return _correlate(image, ct, steps, size)
    return _correlate(ct, image, steps.transposed(size), size)


def _pull_first(ct, image, many, *, size, **steps):
    back = _Steps(**steps).transposed(size)
    return _convolve(many, ct, back, image.aval.shape[1:3], image.aval.ndim == 5)


def _pull_second(ct, image, many, *, size, **steps):
    return _convolve(image, ct, _Steps(**steps), many.aval.shape[1:3], True)


def _convolved(image, kernel, *, height, width, many, **_):
    edges = (kernel.shape[0],) if many else ()
    return (image.shape[0], height, width, *edges, kernel.shape[3])


_convolve_p = bilinear(
    "depthwise_convolve",
    _products,
    _convolved,
    _pull_image,
    _pull_kernel,
    looped=False,
    target="convolve",
    attributes=_Steps._fields,
)
_correlate_p = bilinear(
    "depthwise_correlate",
    _taps,
    lambda image, many, *, size, **_: (many.shape[3], size, size, many.shape[4]),
    _pull_first,
    _pull_second,
    looped=False,
    target="correlate",
    attributes=_Steps._fields,
)
