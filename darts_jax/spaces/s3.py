"""S3 of RobustDARTS (arXiv 1909.09656, and its code): S2 with `none`."""

from darts_jax.spaces._darts import CELLS, EDGES, space

SPACE = space(dict.fromkeys(CELLS, (("none", "skip_connect", "sep_conv_3x3"),) * len(EDGES)))
