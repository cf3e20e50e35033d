"""The published cells as plain data: the fields of their genotypes, by name."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# One node a line.
# fmt: off
CELLS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    # First order: Liu et al. 2019, arXiv 1806.09055, as released in quark0/darts.
    "DARTS_V1": {
        "normal": (
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 0),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0), ("skip_connect", 2),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("skip_connect", 2), ("max_pool_3x3", 0),
            ("max_pool_3x3", 0), ("skip_connect", 2),
            ("skip_connect", 2), ("avg_pool_3x3", 0),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
    # Second order: Liu et al. 2019, arXiv 1806.09055, as released in quark0/darts.
    "DARTS_V2": {
        "normal": (
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("skip_connect", 0),
            ("skip_connect", 0), ("dil_conv_3x3", 2),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2),
            ("skip_connect", 2), ("max_pool_3x3", 1),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
    # NASNet-A: Zoph et al. 2018, arXiv 1707.07012, in the encoding of quark0/darts.
    "NASNet": {
        "normal": (
            ("sep_conv_5x5", 1), ("sep_conv_3x3", 0),
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 0),
            ("avg_pool_3x3", 1), ("skip_connect", 0),
            ("avg_pool_3x3", 0), ("avg_pool_3x3", 0),
            ("sep_conv_3x3", 1), ("skip_connect", 1),
        ),
        "normal_concat": (2, 3, 4, 5, 6),
        "reduce": (
            ("sep_conv_5x5", 1), ("sep_conv_7x7", 0),
            ("max_pool_3x3", 1), ("sep_conv_7x7", 0),
            ("avg_pool_3x3", 1), ("sep_conv_5x5", 0),
            ("skip_connect", 3), ("avg_pool_3x3", 2),
            ("sep_conv_3x3", 2), ("max_pool_3x3", 1),
        ),
        "reduce_concat": (4, 5, 6),
    },
    # AmoebaNet-A: Real et al. 2019, arXiv 1802.01548, in the encoding of quark0/darts.
    "AmoebaNet": {
        "normal": (
            ("avg_pool_3x3", 0), ("max_pool_3x3", 1),
            ("sep_conv_3x3", 0), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0), ("avg_pool_3x3", 3),
            ("sep_conv_3x3", 1), ("skip_connect", 1),
            ("skip_connect", 0), ("avg_pool_3x3", 1),
        ),
        "normal_concat": (4, 5, 6),
        "reduce": (
            ("avg_pool_3x3", 0), ("sep_conv_3x3", 1),
            ("max_pool_3x3", 0), ("sep_conv_7x7", 2),
            ("sep_conv_7x7", 0), ("avg_pool_3x3", 1),
            ("max_pool_3x3", 0), ("max_pool_3x3", 1),
            ("conv_7x1_1x7", 0), ("sep_conv_3x3", 5),
        ),
        "reduce_concat": (3, 4, 6),
    },
    # Chen et al. 2019, arXiv 1904.12760, as released in chenxin061/pdarts.
    "P_DARTS": {
        "normal": (
            ("skip_connect", 0), ("dil_conv_3x3", 1),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 0), ("dil_conv_5x5", 4),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("avg_pool_3x3", 0), ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 0), ("dil_conv_5x5", 2),
            ("max_pool_3x3", 0), ("dil_conv_3x3", 1),
            ("dil_conv_3x3", 1), ("dil_conv_5x5", 3),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
    # On CIFAR-10: Xu et al. 2020, arXiv 1907.05737, as released in yuhuixu1993/PC-DARTS.
    "PC_DARTS": {
        "normal": (
            ("sep_conv_3x3", 1), ("skip_connect", 0),
            ("sep_conv_3x3", 0), ("dil_conv_3x3", 1),
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 1),
            ("avg_pool_3x3", 0), ("dil_conv_3x3", 1),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("sep_conv_5x5", 1), ("max_pool_3x3", 0),
            ("sep_conv_5x5", 1), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 3),
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 2),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
    # GDAS_V1: Dong and Yang 2019, arXiv 1910.04465, as released in D-X-Y/AutoDL-Projects.
    "GDAS": {
        "normal": (
            ("skip_connect", 0), ("skip_connect", 1),
            ("skip_connect", 0), ("sep_conv_5x5", 2),
            ("sep_conv_3x3", 3), ("skip_connect", 0),
            ("sep_conv_5x5", 4), ("sep_conv_3x3", 3),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("sep_conv_5x5", 0), ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 2), ("sep_conv_5x5", 1),
            ("dil_conv_5x5", 2), ("sep_conv_3x3", 1),
            ("sep_conv_5x5", 0), ("sep_conv_5x5", 1),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
    # On CIFAR-10: Chen et al. 2021, arXiv 2006.10355, as released in xiangning-chen/DrNAS.
    "DrNAS": {
        "normal": (
            ("sep_conv_3x3", 0), ("sep_conv_5x5", 1),
            ("sep_conv_3x3", 1), ("sep_conv_3x3", 2),
            ("skip_connect", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 2), ("dil_conv_5x5", 3),
        ),
        "normal_concat": (2, 3, 4, 5),
        "reduce": (
            ("max_pool_3x3", 0), ("sep_conv_5x5", 1),
            ("dil_conv_5x5", 2), ("sep_conv_5x5", 1),
            ("sep_conv_5x5", 1), ("dil_conv_5x5", 3),
            ("skip_connect", 4), ("sep_conv_5x5", 1),
        ),
        "reduce_concat": (2, 3, 4, 5),
    },
})

RECURRENT_CELLS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    # First order: Liu et al. 2019, arXiv 1806.09055, as released in quark0/darts.
    "DARTS_V1": {
        "recurrent": (
            ("relu", 0), ("relu", 1), ("tanh", 2), ("relu", 3),
            ("relu", 4), ("identity", 1), ("relu", 5), ("relu", 1),
        ),
        "concat": (1, 2, 3, 4, 5, 6, 7, 8),
    },
    # Second order, likewise.
    "DARTS_V2": {
        "recurrent": (
            ("sigmoid", 0), ("relu", 1), ("relu", 1), ("identity", 1),
            ("tanh", 2), ("sigmoid", 5), ("tanh", 3), ("relu", 5),
        ),
        "concat": (1, 2, 3, 4, 5, 6, 7, 8),
    },
    # ENAS: Pham et al. 2018, arXiv 1802.03268, in the encoding of quark0/darts.
    "ENAS": {
        "recurrent": (
            ("tanh", 0), ("tanh", 1), ("relu", 1), ("tanh", 3),
            ("tanh", 3), ("relu", 3), ("relu", 4), ("relu", 7),
            ("relu", 8), ("relu", 8), ("relu", 8),
        ),
        "concat": (2, 5, 6, 9, 10, 11),
    },
})
# fmt: on
