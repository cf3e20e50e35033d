"""S4 of RobustDARTS (arXiv 1909.09656, and its code): noise or separable convolution."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from darts_jax.operations import DISCRETE_OPERATIONS, Operation
from darts_jax.spaces._darts import CELLS, EDGES, space


def noise(kernels, x: Array, stride: int, norm) -> Array:
    """Standard normal noise of x's shape, whatever x is; no gradient flows through it.

    The bits of x make the key, so that an operation stays a function of its input: another batch
    has other noise. The edges that leave one state share it.
    """
    x = lax.stop_gradient(x[:, ::stride, ::stride])
    bits = lax.bitcast_convert_type(x.astype(jnp.float32).sum(), jnp.uint32)
    drawn = jax.random.normal(jax.random.fold_in(jax.random.key(0), bits), x.shape, x.dtype)
    return drawn[..., None, :]


NOISE = Operation(noise, normalized=lambda stride: False)

SPACE = space(
    dict.fromkeys(CELLS, (("noise", "sep_conv_3x3"),) * len(EDGES)),
    DISCRETE_OPERATIONS.copy({"noise": NOISE}),
)
