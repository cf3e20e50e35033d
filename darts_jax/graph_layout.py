"""Where the states and edges of a cell stand in its picture: a layered layout.

The method is that of Sugiyama, Tagawa and Toda (1981). What is laid out are items: first the
states, numbered as in the cell, then its edges. An edge runs level through all columns between its
states, and its label stands in the last: so no line can cross a label or a state.
"""

from collections.abc import Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

# An edge as it is drawn: operation, source and destination state. No operation: a plain line.
DrawnEdge = tuple[str | None, int, int]

# Sizes in inches.
LABEL_HEIGHT = 0.22
STATE_HEIGHT = 0.34
PORT = 0.13  # between the ends of edges that meet at a state
GAP = 0.1  # between what stands in one column, twice between states


class Layout(NamedTuple):
    """Places of the items.

    Attributes:
      spans: first and last column of each item; an edge to the output may have none: last <
        first.
      columns: the items in each column, from top to bottom.
      heights: of each item in its last column, in inches; an edge's is that of its label.
      y: [items] of the centres, in inches, downwards.
      ports: [edges, 2] where an edge leaves its source and enters its destination, in inches from
        the centre of the state.
    """

    spans: list[tuple[int, int]]
    columns: list[list[int]]
    heights: list[float]
    y: np.ndarray
    ports: np.ndarray


def layout(edges: Sequence[DrawnEdge], num_inputs: int) -> Layout:
    """Returns the layout of a cell, from left to right, with few crossings and short rises.

    Args:
      edges: those without an operation lead to the output, which is the last state.
      num_inputs: how many states, the first ones, are inputs, to be kept in their order.
    """
    num_states = 1 + max(destination for _, _, destination in edges)
    column = [0] * num_states
    for _, source, destination in sorted(edges, key=lambda edge: edge[2]):
        column[destination] = max(column[destination], column[source] + 2)
    column[-1] -= 1  # no label stands before the output
    spans = [(c, c) for c in column] + [(column[s] + 1, column[d] - 1) for _, s, d in edges]
    rank = _ranking(edges, column, num_inputs)
    columns = [
        sorted((i for i, (first, last) in enumerate(spans) if first <= c <= last), key=rank.item)
        for c in range(1 + max(column))
    ]
    ports = np.zeros((len(edges), 2))
    heights = [STATE_HEIGHT] * num_states
    heights += [LABEL_HEIGHT if operation else 0.0 for operation, _, _ in edges]
    for state, side in product(range(num_states), (0, 1)):
        # What an edge that meets the state meets next: its own level part, or another state.
        onward = {
            edge: num_states + edge if column[ends[1]] - column[ends[0]] > 1 else ends[1 - side]
            for edge, (_, *ends) in enumerate(edges)
            if ends[side] == state
        }
        meeting = sorted(onward, key=lambda edge, onward=onward: rank[onward[edge]])
        ports[meeting, side] = PORT * (np.arange(len(meeting)) - (len(meeting) - 1) / 2)
        heights[state] = max(heights[state], PORT * len(meeting) + 0.04)
    y = _levels(edges, ports, columns, spans, heights)
    return Layout(spans, columns, heights, y, ports)


def _ranking(edges: Sequence[DrawnEdge], column: Sequence[int], num_inputs: int) -> np.ndarray:
    """Returns the rank of each item, from top to bottom, for which few edges cross.

    One ranking serves all columns. It is the best of a few local optima under moves of one item,
    from a fixed seed; inputs keep their order.
    """
    num_items = len(column) + len(edges)
    # Edges as lines from an item of one column to an item of the next.
    gap, left, right = np.array(
        [
            (c, s if c == column[s] else item, d if c + 1 == column[d] else item)
            for item, (_, s, d) in enumerate(edges, len(column))
            for c in range(column[s], column[d])
        ]
    ).T
    one, other = np.nonzero(np.triu(gap[:, None] == gap, 1))

    def ranks(order: np.ndarray) -> np.ndarray:
        rank = np.argsort(order, axis=-1)
        rank[..., :num_inputs].sort(axis=-1)
        return rank

    def cost(order: np.ndarray) -> np.ndarray:
        a, b = ranks(order)[..., left], ranks(order)[..., right]
        crossed = (a[..., one] - a[..., other]) * (b[..., one] - b[..., other]) < 0
        return crossed.sum(axis=-1) + 1e-3 * np.abs(a - b).sum(axis=-1)

    def local_optimum(order: np.ndarray) -> np.ndarray:
        lowest, before = cost(order), np.inf
        while lowest < before:
            before = lowest
            for item in range(num_items):
                rest = order[order != item]
                moved = np.stack([np.insert(rest, place, item) for place in range(num_items)])
                costs = cost(moved)
                if costs.min() < lowest:
                    order, lowest = moved[costs.argmin()], costs.min()
        return order

    rng = np.random.default_rng(0)
    return ranks(min((local_optimum(rng.permutation(num_items)) for _ in range(8)), key=cost))


def _levels(
    edges: Sequence[DrawnEdge],
    ports: np.ndarray,
    columns: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    heights: Sequence[float],
) -> np.ndarray:
    """Returns the y of each item for which edges rise least while nothing in a column overlaps.

    A linear program: minimise the sum of |rise| at both ends of the edges, given minimal distances
    between neighbours in a column (Gansner et al. 1993).
    """
    from scipy.optimize import linprog

    num_items, num_states = len(heights), len(heights) - len(edges)

    def room(item: int, column: int) -> float:
        own = heights[item] if column == spans[item][1] else 0.0
        return own + (2 * GAP if item < num_states else GAP)

    def differences(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns the matrix that maps y to y[second] - y[first]."""
        first, second = np.eye(num_items)[np.array(pairs, int).reshape(-1, 2).T]
        return second - first

    neighbours = [(c, *pair) for c, column in enumerate(columns) for pair in pairwise(column)]
    apart = differences([pair for _, *pair in neighbours])
    least = np.array([room(above, c) + room(below, c) for c, above, below in neighbours]) / 2
    rise = differences(
        [(s, item) for item, (_, s, _) in enumerate(edges, num_states)]
        + [(item, d) for item, (_, _, d) in enumerate(edges, num_states)]
    )
    level = np.concatenate([ports[:, 0], -ports[:, 1]])  # the difference that is no rise
    slack = np.eye(len(rise))
    solution = linprog(
        # A slight pull keeps neighbours together where no edge does.
        np.concatenate([1e-3 * apart.sum(axis=0), np.ones(len(rise))]),
        A_ub=np.block(
            [[-apart, np.zeros((len(apart), len(rise)))], [rise, -slack], [-rise, -slack]]
        ),
        b_ub=np.concatenate([-least, level, -level]),
        bounds=(None, None),
    )
    return solution.x[:num_items]
