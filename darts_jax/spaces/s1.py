"""S1 of RobustDARTS (arXiv 1909.09656, and its code): two candidates an edge, not the same two.

They are what is left of the space of DARTS when the least important candidate is dropped again and
again.
"""

from darts_jax.spaces._darts import space

SKIP, MAX, AVG = "skip_connect", "max_pool_3x3", "avg_pool_3x3"
SEP_3, DIL_3, DIL_5 = "sep_conv_3x3", "dil_conv_3x3", "dil_conv_5x5"

# A line a node, its edges by source.
NORMAL = (
    *((SKIP, DIL_3), (SKIP, DIL_5)),
    *((SKIP, DIL_5), (SKIP, SEP_3), (SKIP, DIL_3)),
    *((MAX, SKIP), (SKIP, SEP_3), (SKIP, SEP_3), (SKIP, DIL_3)),
    *((SKIP, SEP_3), (MAX, SKIP), (SKIP, DIL_3), (DIL_3, DIL_5), (DIL_3, DIL_5)),
)
REDUCE = (
    *((MAX, AVG), (MAX, DIL_3)),
    *((MAX, AVG), (MAX, AVG), (SKIP, DIL_5)),
    *((MAX, AVG), (MAX, SEP_3), (SKIP, DIL_3), (SKIP, DIL_5)),
    *((MAX, AVG), (MAX, AVG), (SKIP, DIL_5), (SKIP, DIL_5), (SKIP, DIL_5)),
)

SPACE = space({"normal": NORMAL, "reduce": REDUCE})
