"""The recurrent space of DARTS (arXiv 1806.09055): 5 candidates on each of 36 edges.

Its networks are cells for `language_model.apply`.
"""

import numpy as np

from darts_jax import genotype, language_model, relaxation
from darts_jax.genotype import RNN_EDGES_PER_NODE, RNN_NUM_INPUTS, RNN_PRIMITIVES, RecurrentGenotype
from darts_jax.spaces import Space
from darts_jax.spaces._darts import encode_edges

NODES = 8
EDGES = genotype.edges(NODES, RNN_NUM_INPUTS)


def _encode(cell: RecurrentGenotype) -> np.ndarray:
    return encode_edges(cell.recurrent, RNN_PRIMITIVES, RNN_EDGES_PER_NODE, RNN_NUM_INPUTS)


SPACE = Space(
    RNN_PRIMITIVES,
    EDGES,
    np.ones((len(EDGES), len(RNN_PRIMITIVES)), bool),
    relaxation.softmax,
    language_model.relaxed_cell,
    language_model.discrete_cell,
    genotype.derive_recurrent,
    _encode,
)
