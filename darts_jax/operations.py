"""Candidate operations as pure functions over edge-stacked parameters, and their table.

All edges that leave one state of a cell see the same input, so an operation is applied once per
state: it takes the state and the parameters of its K outgoing edges, stacked along a leading axis,
and returns the K outputs. Few large array operations compile and run faster than many small ones.

A depthwise convolution followed by a pointwise one is one dense convolution whose kernel is their
product. Composing the kernels costs little, is done for all edges of a cell at once, and lets the K
edges of a state run as a single convolution.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array, lax

from darts_jax import native
from darts_jax.convolution import conv
from darts_jax.depthwise import depthwise
from darts_jax.linear import copies
from darts_jax.mixing import mean_and_variance, mix, relu
from darts_jax.pointwise import pointwise
from darts_jax.polynomial import inverse_root, polynomial
from darts_jax.pooling import max_pool

EPSILON = 1e-5  # of batch norm
NOISE = "noise"  # Flax's name of the key that random operations draw from
MOMENTUM = 0.9  # of running statistics, Flax's convention: PyTorch calls it 0.1

Shapes = dict[str, tuple[int, ...]]


class Moments(NamedTuple):
    """Mean and variance of each channel: of a batch (biased), or running."""

    mean: Array
    var: Array


class Operation(NamedTuple):
    """A candidate operation.

    Attributes:
      apply: `apply(kernels, x, stride, norm) -> y`, with kernels a dict of arrays [K, ...], x of
        shape [N, H, W, C], and y [N, H / stride, W / stride, K, C], before its last batch norm. An
        operation without parameters is the same on every edge: it may return 1 in place of K.
        `norm(name, y)` is for batch norm inside: it normalises y [N, H, W, K, C].
      shapes: `shapes(channels, stride)`, shapes of the parameters of one edge, by name.
      prepare: `prepare(params) -> kernels`, from the parameters of all edges of a cell, [edges,
        ...] each, to what `apply` needs of them, [edges, ...] again.
      inner: names that `apply` passes to `norm`.
      normalized: `normalized(stride)`, whether a batch norm follows in the relaxed cell. In a
        discrete cell, it follows only where the operation has parameters: not after pooling.
      random: whether kernels hold "key", a random key of each edge, [K].
      uses: `uses(name, stride)`, how often the ordinary formulation uses a parameter for one pixel
        of the output, to count multiply-adds.
    """

    apply: Callable[[Mapping[str, Array], Array, int, Callable[[str, Array], Array]], Array]
    shapes: Callable[[int, int], Shapes] = lambda channels, stride: {}
    prepare: Callable[[Mapping[str, Array]], Mapping[str, Array]] = lambda params: params
    inner: tuple[str, ...] = ()
    normalized: Callable[[int], bool] = lambda stride: True
    random: bool = False
    uses: Callable[[str, int], int] = lambda name, stride: 1


def moments(y: Array) -> Moments:
    """Mean and biased variance over batch and space of y [N, H, W, ...]."""
    return Moments(*mean_and_variance(y))


def normalize(y: Array, stats: Moments) -> Array:
    """Batch norm without scale and shift: (y - mean) / sqrt(var + 1e-5)."""
    if y.ndim < 4 or not native.preferred(y.dtype):  # kernels are for images
        return (y - stats.mean) * lax.rsqrt(stats.var + EPSILON)
    factor, own = copies(inverse_root(stats.var, EPSILON), 2)
    shape = jnp.broadcast_shapes(stats.mean.shape, y.shape[3:])
    shift = jnp.broadcast_to(polynomial((-1.0, (stats.mean, own))), shape)
    return mix([y], [jnp.broadcast_to(factor, shape)], shift)


def standardize(y: Array) -> tuple[Array, Moments]:
    """`normalize` by the moments of y itself, and these."""
    first, second = copies(y, 2)
    batch = moments(first)
    return normalize(second, batch), batch


def unbiased(batch: Moments, count: int) -> Moments:
    """Moments of `count` values, N * H * W, their variance made unbiased."""
    return Moments(batch.mean, polynomial((count / max(count - 1, 1), (batch.var,))))


def update_running(running: Moments, batch: Moments) -> Moments:
    """Running statistics after a batch of unbiased moments, as the original keeps them."""
    return jax.tree.map(lambda r, b: MOMENTUM * r + (1 - MOMENTUM) * b, running, batch)


def batch_norm(
    y: Array, running: Moments | None, scale: Array | float = 1.0, bias: Array | float = 0.0
) -> tuple[Array, Moments]:
    """Batch norm with scale and shift, and the moments to update running statistics by.

    Computed in float32 at least, whatever the dtype of y.

    Args:
      y: [N, H, W, ...].
      running: moments [...] to normalise by; None for the batch's.
      scale, bias: [...].

    Returns:
      [N, H, W, ...] of y's dtype, and the batch's unbiased moments, or running as it is.
    """
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    if running is None:
        normalized, batch = standardize(wide)
        running = unbiased(batch, math.prod(y.shape[:3]))
    else:
        normalized = normalize(wide, running)
    return (normalized * scale + bias).astype(y.dtype), running


def compose(depthwise_kernel: Array, pointwise_kernel: Array) -> Array:
    """The dense kernels equal to a depthwise, then a pointwise convolution.

    Args:
      depthwise_kernel: [edges, k, k, C].
      pointwise_kernel: [edges, C, D].

    Returns:
      [edges, k, k, C, D].
    """
    return jnp.einsum("eijc,ecd->eijcd", depthwise_kernel, pointwise_kernel)


def conv_edges(
    x: Array, kernels: Array, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Array:
    """One convolution of x [N, H, W, C] with K kernels [K, k, k, C, D]: [N, H', W', K, D]."""
    num_edges, k, _, channels, _ = kernels.shape
    dense = kernels.transpose(1, 2, 3, 0, 4).reshape(k, k, channels, -1)
    y = conv(x, dense, stride, padding, dilation)
    return y.reshape(*y.shape[:3], num_edges, -1)


def _max_pool(params, x, stride, norm):
    return max_pool(x, stride)[..., None, :]


def _avg_pool(params, x, stride, norm):
    def inside(size):  # how many of a window's three rows (or columns) lie in the image
        ends = np.arange(0, size, stride)
        return np.minimum(ends + 2, size) - np.maximum(ends - 1, 0)

    count = np.outer(inside(x.shape[1]), inside(x.shape[2]))[:, :, None]
    sums = depthwise(x, jnp.ones((1, 3, 3, x.shape[3]), x.dtype), stride)
    return sums * jnp.asarray(1 / count, x.dtype)[..., None]


def _none(params, x, stride, norm):
    return jnp.zeros_like(x[:, ::stride, ::stride])[..., None, :]


def _skip_connect(params, x, stride, norm):
    if stride == 1:
        return x[..., None, :]
    return factorized_reduce(x, params["conv_1"], params["conv_2"])


def factorized_reduce(x: Array, conv_1: Array, conv_2: Array) -> Array:
    """ReLU, then half the channels from the even pixels of x and half from the odd ones.

    Args:
      x: [N, H, W, C], H and W even.
      conv_1: [K, C, D // 2], for pixels (0, 0), (0, 2), ...
      conv_2: [K, C, D - D // 2], for pixels (1, 1), (1, 3), ...

    Returns:
      [N, H / 2, W / 2, K, D].
    """
    x = relu(x)
    even = jnp.einsum("nhwc,kcd->nhwkd", x[:, ::2, ::2], conv_1)
    odd = jnp.einsum("nhwc,kcd->nhwkd", x[:, 1::2, 1::2], conv_2)
    return lax.concatenate([even, odd], 4)


def _skip_shapes(channels, stride):
    if stride == 1:
        return {}
    half = channels // 2
    return {"conv_1": (channels, half), "conv_2": (channels, channels - half)}


def separable(depthwise_kernel: Array, pointwise_kernel: Array) -> dict[str, Array]:
    """Kernels of a separable convolution of a shared input, in the form that is fastest here.

    A dense kernel is a product that costs little, and has C times the arithmetic: on few channels,
    that is less than what depthwise convolution costs where there are no kernels made for it.

    Args:
      depthwise_kernel: [edges, k, k, C].
      pointwise_kernel: [edges, C, D].

    Returns:
      What `separable_conv` takes.
    """
    if native.preferred(depthwise_kernel.dtype):
        return {"taps": depthwise_kernel, "mix": pointwise_kernel}
    return {"dense": compose(depthwise_kernel, pointwise_kernel)}


def separable_conv(
    x: Array, kernels: Mapping[str, Array], stride: int = 1, dilation: int = 1
) -> Array:
    """x [N, H, W, C] by K separable kernels that keep its size: [N, H', W', K, D]."""
    if "dense" in kernels:
        padding = dilation * (kernels["dense"].shape[1] // 2)
        return conv_edges(x, kernels["dense"], stride, padding, dilation)
    return pointwise(depthwise(x, kernels["taps"], stride, dilation), kernels["mix"])


def _sep_conv(kernel_size: int) -> Operation:
    """ReLU, depthwise, pointwise, batch norm, twice; the stride is in the first half."""

    def prepare(params):
        return {
            "first": separable(params["depthwise_1"], params["pointwise_1"]),
            "taps": params["depthwise_2"],
            "mix": params["pointwise_2"],
        }

    def apply(kernels, x, stride, norm):
        y = relu(norm("norm_1", separable_conv(relu(x), kernels["first"], stride)))
        # Every edge now has an input of its own: a dense kernel of them all would be mostly zeros.
        return pointwise(depthwise(y, kernels["taps"]), kernels["mix"])

    def shapes(channels, stride):
        taps, mix = (kernel_size, kernel_size, channels), (channels, channels)
        return {"depthwise_1": taps, "pointwise_1": mix, "depthwise_2": taps, "pointwise_2": mix}

    return Operation(apply, shapes, prepare, inner=("norm_1",))


def _dil_conv(kernel_size: int) -> Operation:
    """ReLU, depthwise with dilation 2, pointwise."""

    def prepare(params):
        return separable(params["depthwise"], params["pointwise"])

    def apply(kernels, x, stride, norm):
        return separable_conv(relu(x), kernels, stride, dilation=2)

    def shapes(channels, stride):
        taps = (kernel_size, kernel_size, channels)
        return {"depthwise": taps, "pointwise": (channels, channels)}

    return Operation(apply, shapes, prepare)


def _conv_7x1_1x7() -> Operation:
    """ReLU, 1x7, then 7x1, the stride of each in its long direction: together a dense 7x7."""

    def prepare(params):
        return {"dense": jnp.einsum("ejcd,eidf->eijcf", params["conv_1x7"], params["conv_7x1"])}

    def apply(kernels, x, stride, norm):
        return conv_edges(relu(x), kernels["dense"], stride, padding=3)

    def shapes(channels, stride):
        return dict.fromkeys(("conv_1x7", "conv_7x1"), (7, channels, channels))

    # The first one is still at full height.
    return Operation(
        apply, shapes, prepare, uses=lambda name, stride: stride if name == "conv_1x7" else 1
    )


# The paper's candidates besides "none", which is zero and takes its share of the softmax only.
OPERATIONS: FrozenDict[str, Operation] = FrozenDict(
    {
        "max_pool_3x3": Operation(_max_pool),
        "avg_pool_3x3": Operation(_avg_pool),
        "skip_connect": Operation(
            _skip_connect, _skip_shapes, normalized=lambda stride: stride != 1
        ),
        "sep_conv_3x3": _sep_conv(3),
        "sep_conv_5x5": _sep_conv(5),
        "dil_conv_3x3": _dil_conv(3),
        "dil_conv_5x5": _dil_conv(5),
    }
)
# What discrete cells are made of: a genotype may name "none", and published ones use two more.
DISCRETE_OPERATIONS: FrozenDict[str, Operation] = OPERATIONS.copy(
    {"none": Operation(_none), "sep_conv_7x7": _sep_conv(7), "conv_7x1_1x7": _conv_7x1_1x7()}
)
