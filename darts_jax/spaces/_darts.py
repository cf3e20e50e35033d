"""Spaces of the convolutional cells of DARTS, which differ by their candidates."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from flax.core import FrozenDict
from numpy.typing import ArrayLike

from darts_jax import genotype, relaxation
from darts_jax.evaluation import EvaluationNetwork
from darts_jax.genotype import Genotype
from darts_jax.networks import Supernet
from darts_jax.operations import DISCRETE_OPERATIONS, Operation
from darts_jax.spaces import Space

NODES = 4
EDGES = genotype.edges(NODES)
CELLS = ("normal", "reduce")
FAR_BELOW = -1e9  # alpha of a candidate that an edge does not have

Candidates = Mapping[str, Sequence[Sequence[str]]]


def space(
    candidates: Candidates, operations: Mapping[str, Operation] = DISCRETE_OPERATIONS
) -> Space:
    """A space of pairs of cells with 4 nodes.

    Args:
      candidates: {"normal", "reduce"}: of each of the 14 edges, its operations.
      operations: by name, those that discrete cells may have.
    """
    named = {name for cell in candidates.values() for edge in cell for name in edge}
    # "none" first, the others in the order of DARTS, then new ones.
    order = (*genotype.CNN_PRIMITIVES, *sorted(named - set(genotype.CNN_PRIMITIVES)))
    primitives = tuple(name for name in order if name in named)
    allowed = {
        cell: np.array([[name in edge for name in primitives] for edge in candidates[cell]])
        for cell in CELLS
    }
    everything = all(mask.all() for mask in allowed.values())
    held = FrozenDict({name: operations[name] for name in primitives if name != "none"})
    own = None if everything else FrozenDict({c: tuple(map(tuple, candidates[c])) for c in CELLS})
    return Space(
        primitives,
        dict.fromkeys(CELLS, EDGES),
        allowed,
        relaxation.softmax if everything else relaxation.masked(relaxation.softmax, allowed),
        partial(Supernet, nodes=NODES, operations=held, primitives=primitives, candidates=own),
        partial(EvaluationNetwork, operations=FrozenDict(operations)),
        partial(_derive, allowed, primitives),
        partial(_encode, primitives),
    )


def _derive(
    allowed: Mapping[str, np.ndarray], primitives: Sequence[str], alpha: Mapping[str, ArrayLike]
) -> Genotype:
    def masked(cell: str) -> np.ndarray:
        values = np.asarray(alpha[cell], np.float64)
        fits = values.shape == allowed[cell].shape  # else `derive` says what is wrong
        return np.where(allowed[cell], values, FAR_BELOW) if fits else values

    return genotype.derive({cell: masked(cell) for cell in alpha}, primitives)


def _encode(primitives: Sequence[str], cells: Genotype) -> dict[str, np.ndarray]:
    return {
        cell: encode_edges(
            getattr(cells, cell), primitives, genotype.CNN_EDGES_PER_NODE, genotype.CNN_NUM_INPUTS
        )
        for cell in CELLS
    }


def encode_edges(
    cell: Sequence[genotype.Edge], primitives: Sequence[str], edges_per_node: int, num_inputs: int
) -> np.ndarray:
    """Mixing weights, float32 [edges, candidates], of the edges that a genotype keeps.

    All other edges are `none` where that is a candidate, and else nothing at all.

    Raises:
      ValueError: for an operation that is no candidate.
    """
    table = genotype.edges(len(cell) // edges_per_node, num_inputs)
    weights = np.zeros((len(table), len(primitives)), np.float32)
    for i, (name, source) in enumerate(cell):
        if name not in primitives:
            raise ValueError(
                f"operation {name!r} is not in the space; it has: {', '.join(primitives)}"
            )
        row = table.index((source, num_inputs + i // edges_per_node))
        weights[row, primitives.index(name)] += 1
    if "none" in primitives:
        weights[weights.sum(1) == 0, primitives.index("none")] = 1
    return weights
