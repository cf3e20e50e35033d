"""S4 of RobustDARTS (arXiv 1909.09656, and its code): noise or separable convolution."""

import jax
from jax import Array

from darts_jax.operations import DISCRETE_OPERATIONS, Operation
from darts_jax.spaces._darts import CELLS, EDGES, space


def noise(kernels, x: Array, stride: int, norm) -> Array:
    """Standard normal noise of x's shape, whatever x is, drawn by each edge for itself.

    A search needs `search.with_context`, from which the keys come.
    """
    shape = x[:, ::stride, ::stride].shape

    def draw(key: Array) -> Array:
        return jax.random.normal(key, shape, x.dtype)

    return jax.vmap(draw, out_axes=3)(kernels["key"])


NOISE = Operation(noise, normalized=lambda stride: False, random=True)

SPACE = space(
    dict.fromkeys(CELLS, (("noise", "sep_conv_3x3"),) * len(EDGES)),
    DISCRETE_OPERATIONS.copy({"noise": NOISE}),
)
