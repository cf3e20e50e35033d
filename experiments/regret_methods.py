"""The methods that `experiments.regret` compares."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array

from darts_jax import hypergradient, relaxation, search, smoothing
from darts_jax.dag_network import CELL, Network
from darts_jax.relaxation import EDGES, Relaxation, linear
from darts_jax.spaces.nasbench201_small import EDGES as CELL_EDGES

PyTree = Any

EXACT = "exact"
# PC-DARTS: weights of operations, and those of edges by a softmax over the edges into each node.
INTO_NODES = np.unique([destination for _, destination in CELL_EDGES], return_counts=True)[1]
EDGE_WEIGHTED = relaxation.edge_weighted(relaxation.softmax, INTO_NODES.tolist())
RADIUS = linear(0.03, 0.3)  # of the perturbations of SmoothDARTS, the authors'
PARTIAL = 4  # of PC-DARTS: one of so many channels, the authors'


class Method(NamedTuple):
    """How a search goes.

    Attributes:
      text: what it is, in a few words.
      estimator: (bilevel problem, inner optimizer) -> hypergradient estimator.
      relax: from alpha to mixing weights, as the network takes them.
      train_loss: network -> the training loss, if it is not that of `relax`.
      init_alpha: (key, network) -> alpha, or {"cell": alpha, "cell_edges": [edges]}.
      partial: whether `PARTIAL` channels go through the operations.
      keep: how many operations an edge keeps for each search that follows a first one, from new
        weights, the epochs shared out among all.
    """

    text: str
    estimator: Callable[..., hypergradient.Estimator] = hypergradient.unrolled
    relax: Relaxation = relaxation.softmax
    train_loss: Callable[[Network], Callable] | None = None
    init_alpha: Callable[[Array, Network], PyTree] = search.init_alpha
    partial: bool = False
    keep: tuple[int, ...] = ()


def named(relax: Relaxation) -> Relaxation:
    """The relaxation of one array, its weights by name: {"cell"}."""
    return lambda alpha, context=None: {CELL: relax(alpha, context)}


def unnamed(relax: Relaxation) -> Relaxation:
    """A relaxation that gives weights by name, as one of an array."""
    return lambda alpha, context=None: relax(alpha, context)[CELL]


def auxiliary_skip(column: int) -> Relaxation:
    """DARTS-: since a skip connection is the identity in this cell, b x is b more of its weight."""
    both = relaxation.with_auxiliary_skip(named(relaxation.softmax), linear(1, 0))

    def relax(alpha: Array, context: relaxation.Context | None = None) -> Array:
        weights = both(alpha, context)[CELL]
        return weights[:, :-1].at[:, column].add(weights[:, -1])

    return relax


def init_edge_weights(key: Array, network: Network) -> dict[str, Array]:
    """Alphas as without edge weights, and those of the edges."""
    beta = jax.random.normal(jax.random.fold_in(key, 1), (len(network.edges),))
    return {
        CELL: search.init_alpha(key, network),
        CELL + EDGES: search.ALPHA_SCALE * beta,
    }


def operations(alpha: PyTree) -> Array:
    """Of alpha, what stands for operations: [..., edges, candidates]."""
    return alpha[CELL] if isinstance(alpha, dict) else alpha


def _random(network: Network) -> Callable:
    relax = smoothing.random(named(relaxation.softmax), RADIUS)
    return search.make_loss(network, unnamed(relax))


def _adversarial(network: Network) -> Callable:
    loss = search.make_loss(network, unnamed(relaxation.as_they_are))
    return smoothing.adversarial(loss, named(relaxation.softmax), RADIUS)


METHODS = {
    "first_order": Method("first order", lambda problem, _: hypergradient.first_order(problem)),
    EXACT: Method("exact, through one step"),
    "finite_difference": Method("finite difference", hypergradient.finite_difference),
    "t1_t2": Method("T1-T2", hypergradient.t1_t2),
    "neumann": Method("Neumann series, 5 terms", hypergradient.neumann),
    "temperature": Method(
        "temperature 5 to 0.5", relax=relaxation.tempered_softmax(linear(5, 0.5))
    ),
    "concrete": Method("SNAS, from 1 to 0.03", relax=relaxation.concrete(linear(1, 0.03))),
    "gumbel": Method("GDAS, from 10 to 0.1", relax=relaxation.gumbel(linear(10, 0.1))),
    "sigmoid": Method("FairDARTS", relax=relaxation.sigmoid),
    "dirichlet": Method("DrNAS", relax=relaxation.dirichlet),
    "auxiliary_skip": Method("DARTS-", relax=auxiliary_skip(column=1)),
    "random": Method("SmoothDARTS, random", train_loss=_random),
    "adversarial": Method("SmoothDARTS, adversarial", train_loss=_adversarial),
    "partial_channels": Method("PC-DARTS, partial channels", partial=True),
    "edge_weights": Method(
        "PC-DARTS, edge weights", relax=EDGE_WEIGHTED, init_alpha=init_edge_weights
    ),
    "partial_and_edges": Method(
        "PC-DARTS, both", relax=EDGE_WEIGHTED, init_alpha=init_edge_weights, partial=True
    ),
    "shrinking": Method("P-DARTS, 4 to 3 to 2", keep=(3, 2)),
}
