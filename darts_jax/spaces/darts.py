"""The convolutional space of DARTS (arXiv 1806.09055): 8 candidates on each of 14 edges."""

from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.spaces._darts import CELLS, EDGES, space

SPACE = space(dict.fromkeys(CELLS, (CNN_PRIMITIVES,) * len(EDGES)))
