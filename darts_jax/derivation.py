"""From alphas to the strongest edges of a cell. Needs numpy alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

Edge = tuple[str, int]

CNN_NUM_INPUTS = 2


def edges(num_nodes: int, num_inputs: int = CNN_NUM_INPUTS) -> tuple[tuple[int, int], ...]:
    """Returns all (source, destination) states of a cell, by destination, then by source.

    This is the order of alpha's rows.
    """
    states = range(num_inputs, num_inputs + num_nodes)
    return tuple((source, state) for state in states for source in range(state))


def count_nodes(num_edges: int, num_inputs: int = CNN_NUM_INPUTS) -> int:
    """Returns the number of intermediate nodes of a cell with `num_edges` candidate edges.

    Raises:
      ValueError: if no whole number of nodes has that many edges.
    """
    num_nodes = total = 0
    while total < num_edges:
        total += num_inputs + num_nodes
        num_nodes += 1
    if total != num_edges or num_nodes == 0:
        valid = ", ".join(str(len(edges(n, num_inputs))) for n in (1, 2, 3, 4))
        raise ValueError(
            f"{num_edges} edges fit no cell with {num_inputs} inputs; alpha needs one row per edge:"
            f" {valid}, ... rows for 1, 2, 3, 4, ... nodes"
        )
    return num_nodes


def derive_cell(
    alpha: ArrayLike,
    primitives: Sequence[str],
    edges_per_node: int,
    num_inputs: int,
    with_none: bool = False,
    edge_alpha: ArrayLike | None = None,
) -> tuple[Edge, ...]:
    """Returns the strongest edges into each node of one cell, strongest first within a node.

    An edge's strength is the largest softmax probability of its operations other than `none`,
    which does keep its mass in the denominator; that operation is the edge's. Ties go to the lower
    operation and to the lower source. DARTS (arXiv 1806.09055), section 2.4.

    Args:
      alpha: [edges, operations] real, rows in the order of `edges`; the number of nodes follows.
        An operation of -inf is not chosen where an edge has another one.
      primitives: names of the columns.
      edges_per_node: how many edges each node keeps.
      num_inputs: how many input states the cell has.
      with_none: `none` can be chosen like any other operation.
      edge_alpha: [edges] real; strengths are multiplied by their softmax over the edges into a
        node, as in PC-DARTS (arXiv 1907.05737).

    Raises:
      ValueError: if alpha has another shape or holds a value that is not finite, but for -inf in a
        row with a finite one.
    """
    alpha = _matrix(alpha, len(primitives))
    num_nodes = count_nodes(len(alpha), num_inputs)
    if not 1 <= edges_per_node <= num_inputs:
        raise ValueError(
            f"the first node has {num_inputs} incoming edges and cannot keep {edges_per_node};"
            f" keep 1 to {num_inputs} per node"
        )
    columns = [i for i, name in enumerate(primitives) if with_none or name != "none"]
    choice = [columns[i] for i in alpha[:, columns].argmax(axis=1)]
    strength = _log_softmax(alpha)[np.arange(len(alpha)), choice]
    if edge_alpha is not None:
        beta = _matrix(np.reshape(edge_alpha, (len(alpha), 1)), 1)
        ends = np.cumsum(range(num_inputs, num_inputs + num_nodes))[:-1]
        strength = strength + np.concatenate([_log_softmax(p.T)[0] for p in np.split(beta, ends)])

    kept, row = [], 0
    for num_sources in range(num_inputs, num_inputs + num_nodes):
        sources = sorted(range(num_sources), key=lambda source: -strength[row + source])
        kept += [(primitives[choice[row + s]], s) for s in sources[:edges_per_node]]
        row += num_sources
    return tuple(kept)


def _matrix(alpha: ArrayLike, num_operations: int) -> np.ndarray:
    try:
        alpha = np.asarray(alpha, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"not an array of real numbers; alpha is [edges, {num_operations} operations]"
        ) from error
    if alpha.ndim != 2 or alpha.shape[1] != num_operations:
        raise ValueError(
            f"shape {list(alpha.shape)}; alpha is [edges, {num_operations} operations]"
        )
    excluded = np.isneginf(alpha) & np.isfinite(alpha).any(axis=1, keepdims=True)
    if not (np.isfinite(alpha) | excluded).all():
        row, column = np.argwhere(~np.isfinite(alpha) & ~excluded)[0]
        raise ValueError(
            f"element [{row}, {column}] is {alpha[row, column]};"
            " derive from the last alpha that is finite"
        )
    return alpha


def _log_softmax(alpha: np.ndarray) -> np.ndarray:
    # The logarithm orders edges as the probability does, and does not underflow where `none`
    # dominates. Sorting fixes the order of the sum: rows that hold the same numbers tie exactly.
    shifted = alpha - alpha.max(axis=1, keepdims=True)
    return shifted - np.log(np.sort(np.exp(shifted), axis=1).sum(axis=1, keepdims=True))
