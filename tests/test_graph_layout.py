from itertools import pairwise

import numpy as np
import pytest

from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.graph_layout import GAP, PORT, layout


def random_cell(seed, num_nodes, num_inputs):
    rng = np.random.default_rng(seed)
    edges = [
        (str(rng.choice(CNN_PRIMITIVES)), int(rng.integers(node)), node)
        for node in range(num_inputs, num_inputs + num_nodes)
        for _ in range(2)
    ]
    concat = [None, *range(num_inputs, num_inputs + num_nodes)][
        -int(rng.integers(1, num_nodes + 1)) :
    ]
    return edges + [(None, node, num_inputs + num_nodes) for node in concat]


@pytest.mark.parametrize("seed", range(12))
def test_nothing_overlaps_in_a_layout(seed):
    num_nodes, num_inputs = 2 + seed % 5, 1 + seed % 2
    edges = random_cell(seed, num_nodes, num_inputs)
    spans, columns, heights, y, ports = layout(edges, num_inputs)
    num_states = num_inputs + num_nodes + 1

    # Every edge leads rightwards, and its label and level part have columns to stand in.
    for item, (operation, source, destination) in enumerate(edges, num_states):
        first, last = spans[item]
        assert spans[source][1] + 1 == first and last + 1 == spans[destination][0]
        assert operation is None or first <= last
        assert all(item in columns[column] for column in range(first, last + 1))

    # Boxes and the lines that pass them stand one below the other.
    for column, items in enumerate(columns):
        extents = [heights[item] / 2 if spans[item][1] == column else 0.0 for item in items]
        for (above, upper), (below, lower) in pairwise(zip(items, extents, strict=True)):
            assert y[below] - y[above] >= upper + lower + GAP - 1e-6

    # Edges meet a state at places of their own, inside its box.
    for side in (0, 1):
        for state in range(num_states):
            meeting = [
                port for port, edge in zip(ports, edges, strict=True) if edge[1 + side] == state
            ]
            places = sorted(port[side] for port in meeting)
            assert all(b - a > PORT - 1e-6 for a, b in pairwise(places))
            assert all(abs(place) < heights[state] / 2 for place in places)


def test_a_cell_of_one_edge_is_drawn_level():
    *_, y, ports = layout([("a", 0, 1), (None, 1, 2)], 1)
    np.testing.assert_allclose(y[:4], y[0])
    np.testing.assert_array_equal(ports, 0)


def test_a_planar_cell_is_drawn_without_crossings():
    edges = [("a", 0, 2), ("a", 1, 2), ("a", 0, 3), ("a", 2, 3), ("a", 1, 4), ("a", 2, 4)]
    edges += [(None, 3, 5), (None, 2, 5), (None, 4, 5)]
    *_, y, ports = layout(edges, 2)
    assert y[3] < y[2] < y[4] and y[0] < y[1]
    assert ports[0, 0] > ports[2, 0] and ports[1, 0] < ports[4, 0]  # as the edges leave 0 and 1
    assert np.argsort(ports[6:, 1]).tolist() == [0, 1, 2]  # as they enter the output
