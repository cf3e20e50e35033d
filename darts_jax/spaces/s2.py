"""S2 of RobustDARTS (arXiv 1909.09656, and its code): identity or separable convolution."""

from darts_jax.spaces._darts import CELLS, EDGES, space

SPACE = space(dict.fromkeys(CELLS, (("skip_connect", "sep_conv_3x3"),) * len(EDGES)))
