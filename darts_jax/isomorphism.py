"""Which architectures of a cell compute the same functions. Needs numpy alone.

A state is a sum of terms. `none` adds nothing, `skip_connect` adds the terms of its source, and
`avg_pool_3x3`, which is linear, their pooled versions. Every other operation has parameters of its
own and adds one term, or nothing where its source is empty. Two architectures are the same if a
renaming of their operations with parameters, those that reach the output, makes one the other.

This is exact for cells whose batch norms neither scale nor shift. The count that is published for
NAS-Bench-201, 6466, goes by strings (`spaces.nasbench201.unique_string`), which also take one
operation that is used twice for two equal ones, and zeros for terms.
"""

import itertools
from collections.abc import Hashable, Sequence

import numpy as np

Edges = tuple[tuple[int, int], ...]

INPUT = -1  # in place of an edge's number


def canonical(choice: Sequence[int], edges: Edges, primitives: Sequence[str]) -> Hashable:
    """A form that is the same for architectures that compute the same functions.

    Args:
      choice: of each edge, its operation's number.
      edges: (source, destination) each.
      primitives: names of the operations.
    """
    last = max(destination for _, destination in edges)
    # A state: (times pooled, edge that the term comes from) -> how often.
    states: list[dict[tuple[int, int], int]] = [{} for _ in range(last + 1)]
    states[0] = {(0, INPUT): 1}
    inputs: dict[int, dict[tuple[int, int], int]] = {}
    for e in sorted(range(len(edges)), key=lambda e: edges[e]):
        source, destination = edges[e]
        name = primitives[choice[e]]
        if name == "none" or not states[source]:
            continue
        if name in ("skip_connect", "avg_pool_3x3"):
            more = int(name == "avg_pool_3x3")
            arriving = {(pooled + more, t): n for (pooled, t), n in states[source].items()}
        else:
            inputs[e] = dict(states[source])
            arriving = {(0, e): 1}
        for term, count in arriving.items():
            states[destination][term] = states[destination].get(term, 0) + count

    live: set[int] = set()
    waiting = [e for _, e in states[last]]
    while waiting:
        e = waiting.pop()
        if e != INPUT and e not in live:
            live.add(e)
            waiting += [t for _, t in inputs[e]]

    def form(names: dict[int, int]) -> Hashable:
        def renamed(state):
            return tuple(sorted((pooled, names[t], n) for (pooled, t), n in state.items()))

        parts = sorted((names[e], choice[e], renamed(inputs[e])) for e in live)
        return renamed(states[last]), tuple(parts)

    orders = itertools.permutations(range(len(live)))
    return min(form({INPUT: INPUT, **dict(zip(sorted(live), o, strict=True))}) for o in orders)


def choices(num_edges: int, num_candidates: int) -> np.ndarray:
    """All architectures, int8 [candidates ** edges, edges], in the order of `index`."""
    grid = np.indices((num_candidates,) * num_edges, np.int8)
    return grid.reshape(num_edges, -1).T.copy()


def classes(edges: Edges, primitives: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The architectures of a cell up to isomorphism.

    Returns:
      representatives: int8 [classes, edges], the first architecture of each class.
      class_of: int16 [candidates ** edges], the class of every architecture of `choices`.
    """
    every = choices(len(edges), len(primitives))
    numbers: dict[Hashable, int] = {}
    forms = (canonical(choice, edges, primitives) for choice in every.tolist())
    class_of = np.array([numbers.setdefault(f, len(numbers)) for f in forms], np.int16)
    _, first = np.unique(class_of, return_index=True)
    return every[first], class_of
