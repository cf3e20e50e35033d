"""Selection of operations by what the supernet loses without them: DARTS-PT.

Wang et al., arXiv 2108.04392: the strength of an operation is not its alpha, but the drop of the
supernet's validation accuracy when it is taken away. It needs a trained supernet alone, however its
weights and alphas were found.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from darts_jax.derivation import edges
from darts_jax.genotype import CNN_EDGES_PER_NODE, CNN_PRIMITIVES, Genotype, count_nodes

PyTree = Any
Kept = dict[str, np.ndarray]  # cell -> boolean [edges, operations]
CELLS = ("normal", "reduce")


def projected(weights: Mapping[str, ArrayLike], kept: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Mixing weights of what is left: 1 where it is an edge's only operation, 0 where it is gone.

    Args:
      weights: cell -> [edges, operations]; what is not in kept stays as it is.
      kept: cell -> boolean [edges, operations].
    """
    found = {name: np.array(values) for name, values in weights.items()}
    for cell, left in kept.items():
        single = left.sum(-1, keepdims=True) == 1
        found[cell] = np.where(left, np.where(single, 1, found[cell]), 0).astype(found[cell].dtype)
    return found


def select(
    state: PyTree,
    weigh: Callable[[PyTree], Mapping[str, ArrayLike]],
    evaluate: Callable[[PyTree, Mapping[str, np.ndarray]], float],
    rng: np.random.Generator,
    primitives: Sequence[str] = CNN_PRIMITIVES,
    tune: Callable[[PyTree, Kept], PyTree] = lambda state, kept: state,
) -> Genotype:
    """The cells of a supernet by perturbation, algorithm 1 of arXiv 2108.04392.

    Edge after edge, in random order, keeps the operation without which the accuracy is lowest. Then
    each node, in random order, loses the edge without which the accuracy is highest, until it has
    two. Both cells take turns. `none` adds nothing and is never kept, nor is an operation of
    weight 0 where an edge has another.

    Cost: with E edges and O operations in each cell, 2 E (O - 1) evaluations and a few for each
    node; and 2 E - 2 nodes tunings at most, if there is one.

    Args:
      state: the supernet: weights, alphas, and whatever else.
      weigh: state -> mixing weights, of undecided edges.
      evaluate: (state, mixing weights) -> validation accuracy; the authors' normalises by the
        batch, since running statistics are of other weights.
      rng: of the orders.
      primitives: names of the operations.
      tune: (state, what is kept) -> state, trained for a while with this discretisation; called
        after each decision of both cells. It does nothing by default.
    """
    shapes = {cell: np.shape(values) for cell, values in weigh(state).items() if cell in CELLS}
    kept = {cell: np.ones(shape, bool) for cell, shape in shapes.items()}
    num_edges = shapes["normal"][0]
    orders = {cell: rng.permutation(num_edges) for cell in CELLS}
    for turn in range(num_edges):
        for cell in CELLS:
            edge = orders[cell][turn]
            chosen = operation(state, weigh, evaluate, primitives, kept, cell, edge)
            kept[cell][edge] = np.arange(len(primitives)) == chosen
        state = tune(state, kept)
    num_nodes = count_nodes(num_edges)
    orders = {cell: rng.permutation(num_nodes) for cell in CELLS}
    for turn in range(num_nodes):
        for cell in CELLS:
            _drop_edges(state, weigh, evaluate, kept, cell, 2 + orders[cell][turn])
        state = tune(state, kept)
    return _genotype(kept, primitives)


def operation(
    state: PyTree,
    weigh: Callable[[PyTree], Mapping[str, ArrayLike]],
    evaluate: Callable[[PyTree, Mapping[str, np.ndarray]], float],
    primitives: Sequence[str],
    kept: Kept,
    cell: str,
    edge: int,
) -> int:
    """The operation of an edge without which the accuracy is lowest.

    Args:
      state, weigh, evaluate, primitives: as for `select`; cells may have any names.
      kept: what is decided so far.
      cell: of the edge.
      edge: its row.
    """
    weights = projected(weigh(state), kept)
    columns = [i for i, name in enumerate(primitives) if name != "none"]
    columns = [i for i in columns if weights[cell][edge, i] != 0] or columns
    accuracies = []
    for column in columns:
        without = weights[cell].copy()
        without[edge, column] = 0
        accuracies.append(evaluate(state, {**weights, cell: without}))
    return columns[int(np.argmin(accuracies))]


def _drop_edges(state, weigh, evaluate, kept, cell, node) -> None:
    """Takes edges into a node away until two are left."""
    table = edges(count_nodes(len(kept[cell])))
    left = [edge for edge, (_, destination) in enumerate(table) if destination == node]
    while len(left) > CNN_EDGES_PER_NODE:
        weights = projected(weigh(state), kept)
        accuracies = []
        for edge in left:
            without = weights[cell].copy()
            without[edge] = 0
            accuracies.append(evaluate(state, {**weights, cell: without}))
        kept[cell][left.pop(int(np.argmax(accuracies)))] = False


def _genotype(kept: Kept, primitives: Sequence[str]) -> Genotype:
    cells: dict[str, Any] = {}
    for cell, left in kept.items():
        table = edges(count_nodes(len(left)))
        cells[cell] = tuple(
            (primitives[int(row.argmax())], source)
            for row, (source, _) in zip(left, table, strict=True)
            if row.any()
        )
        cells[f"{cell}_concat"] = tuple(range(2, 2 + count_nodes(len(left))))
    return Genotype(**cells)
