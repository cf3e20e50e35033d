"""NAS-Bench-201 (arXiv 2001.00326): 5 operations on 6 edges, 15625 architectures.

Its networks have 3 stages of 5 cells, of 16, 32 and 64 channels. Accuracies that are published for
them load by `nasbench201_table`.
"""

from collections.abc import Sequence

from darts_jax.spaces._dag import space

PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))

SPACE = space(EDGES, PRIMITIVES)


def unique_string(choice: Sequence[int]) -> str:
    """The string by which the authors count different architectures: there are 6466.

    Zeros stay as terms "#", and what two edges read is written twice. `isomorphism.canonical` is
    exact.
    """
    states = ["0"]
    for state in (1, 2, 3):
        terms = []
        for e, (source, destination) in enumerate(EDGES):
            if destination != state:
                continue
            name, before = PRIMITIVES[choice[e]], states[source]
            if name == "none" or before == "#":
                terms.append("#")
            else:
                terms.append(before if name == "skip_connect" else f"({before})@{name}")
        states.append("+".join(sorted(terms)))
    return states[-1]
