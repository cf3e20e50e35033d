"""A part of NAS-Bench-201 that is small enough to train every architecture of it.

The cell without its edge from the input to the output, and without average pooling: 1024
architectures, 306 of them different. One stage of 2 cells of 8 channels, so that all of them train
on tiny images within the hour; `ground_truth` has their accuracies.
"""

from darts_jax import convolution
from darts_jax.spaces._dag import space

PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (1, 3), (2, 3))

SPACE = space(EDGES, PRIMITIVES, channels=8, stages=1, cells=2, conv=convolution.matmul_conv)
