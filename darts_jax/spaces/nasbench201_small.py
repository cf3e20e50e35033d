"""A part of NAS-Bench-201 that is small enough to train every architecture of it.

The cell without its edge from the input to the output, and without average pooling: 1024
architectures, 306 of them different. `ground_truth` has their accuracies. The network is one cell
of 8 channels, so that all of them train within the hour, after a stem of size 1: what a network
sees of an image's shapes, it sees through the 3x3 convolutions of its cell, so that architectures
differ by much.
"""

from darts_jax import convolution
from darts_jax.spaces._dag import space

PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))

SPACE = space(
    EDGES, PRIMITIVES, channels=8, stages=1, cells=1, stem=1, conv=convolution.matmul_conv
)
