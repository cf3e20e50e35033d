"""Relaxations: functions (alpha, context) -> weights that make the choice of operations continuous.

A relaxation turns the architecture variables into the mixing weights that the relaxed cells take.
It is applied outside the network, so another one is any function with the signature of `softmax`.
What it may depend on besides alpha, a random key and how far the search is, rides in the batch as
a `Context` (see `search.with_context`): all passes over one batch see the same noise.

Some relaxations are modified ones: `edge_weighted`, `with_auxiliary_skip` and `masked` take another
and can be nested. An alpha of -inf takes an operation away, whatever the relaxation.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from darts_jax.derivation import count_nodes

PyTree = Any
Schedule = Callable[[Array | float], Array | float]  # of the progress in [0, 1]

CONCENTRATION = 1e-6  # smallest of a Dirichlet distribution: below, draws are no more numbers
EDGES = "_edges"  # ends the names of weights of edges: "normal_edges" is [edges]


class Context(NamedTuple):
    """What a relaxation may depend on besides alpha.

    Attributes:
      key: random key; None for no noise, as in an evaluation.
      progress: finished share of the search, a scalar in [0, 1].
    """

    key: Array | None
    progress: Array | float


EVALUATION = Context(None, 1.0)

Relaxation = Callable[[PyTree, Context | None], PyTree]


def linear(start: float, end: float) -> Schedule:
    """The schedule that goes from start to end in a straight line."""
    return lambda progress: start + (end - start) * progress


def value_at(value: float | Schedule, context: Context | None) -> Array | float:
    """A schedule's value at the progress of the context; a number as it is.

    Raises:
      ValueError: for a schedule without a context.
    """
    return value(_required(context).progress) if callable(value) else value


def softmax(alpha: PyTree, context: Context | None = None) -> PyTree:
    """Weights exp(alpha_o) / sum over o' of exp(alpha_o'), equation (2) of arXiv 1806.09055.

    Args:
      alpha: pytree of floating-point arrays [..., edges, operations].
      context: not used.

    Returns:
      The same pytree; the last axis of every leaf sums to one.
    """
    return jax.tree.map(partial(jax.nn.softmax, axis=-1), alpha)


def tempered_softmax(temperature: float | Schedule) -> Relaxation:
    """softmax(alpha / temperature): one-hot weights as it goes to 0, equal ones as it grows.

    ASAP, Noy et al., arXiv 1904.04123, anneals it in the course of a search. At a temperature of 1
    it is `softmax`, bit for bit.
    """

    def relax(alpha: PyTree, context: Context | None = None) -> PyTree:
        return softmax(_over(alpha, value_at(temperature, context)))

    return relax


def concrete(temperature: float | Schedule) -> Relaxation:
    """softmax((alpha + G) / temperature) with Gumbel noise G = -log(-log(U)): SNAS.

    Xie et al., arXiv 1812.09926: samples of the concrete distribution. Without a key it is
    `tempered_softmax`.
    """

    def relax(alpha: PyTree, context: Context | None = None) -> PyTree:
        noisy = alpha if _required(context).key is None else _with_gumbel_noise(alpha, context.key)
        return softmax(_over(noisy, value_at(temperature, context)))

    return relax


def gumbel(temperature: float | Schedule) -> Relaxation:
    """One-hot weights at the largest alpha + G, with the gradient of `concrete`: GDAS.

    Dong and Yang, arXiv 1910.04465; the straight-through estimator of Jang et al., arXiv
    1611.01144. Without a key the largest alpha is taken.
    """
    soften = concrete(temperature)

    def straight_through(soft: Array) -> Array:
        hard = jax.nn.one_hot(soft.argmax(-1), soft.shape[-1], dtype=soft.dtype)
        return hard + (soft - lax.stop_gradient(soft))  # exactly hard: the bracket is zero

    def relax(alpha: PyTree, context: Context | None = None) -> PyTree:
        return jax.tree.map(straight_through, soften(alpha, context))

    return relax


def sigmoid(alpha: PyTree, context: Context | None = None) -> PyTree:
    """Weights 1 / (1 + exp(-alpha_o)), operations that do not compete: FairDARTS.

    Chu et al., arXiv 1911.12126. Its zero-one loss is not part of it.
    """
    return jax.tree.map(jax.nn.sigmoid, alpha)


def dirichlet(alpha: PyTree, context: Context | None = None) -> PyTree:
    """Weights drawn from Dirichlet(elu(alpha) + 1), differentiated through the draw: DrNAS.

    Chen et al., arXiv 2006.10355. Without a key it is the mean of the distribution.
    The second derivative in alpha of a draw is not defined in JAX; no estimator needs it.
    """
    key = _required(context).key

    def weights(a: Array, key: Array | None) -> Array:
        allowed = a > -jnp.inf
        concentration = jnp.exp(jnp.minimum(a, 0)) + jnp.maximum(a, 0)  # elu(a) + 1
        concentration = jnp.where(allowed, jnp.maximum(concentration, CONCENTRATION), 1)
        if key is None:
            logarithm = jnp.log(concentration)
        else:
            logarithm = jax.random.loggamma(key, concentration, dtype=a.dtype)
        return jax.nn.softmax(jnp.where(allowed, logarithm, -jnp.inf), axis=-1)

    if key is None:
        return jax.tree.map(lambda a: weights(a, None), alpha)
    return jax.tree.map(weights, alpha, split_like(key, alpha))


def as_they_are(weights: PyTree, context: Context | None = None) -> PyTree:
    """Mixing weights, given in the place of alpha: for a loss of these."""
    return weights


def edge_weighted(relax: Relaxation, sizes: Sequence[int] | None = None) -> Relaxation:
    """Weighs edges too: PC-DARTS, Xu et al., arXiv 1907.05737.

    Beside the cells, alpha and the weights that come of it have leaves "normal_edges" and
    "reduce_edges" [edges]: a softmax over the edges into each node, which multiplies what they
    pass on. Without such leaves it is `relax`. sizes are those of `softmax_into_nodes`.
    """
    into_nodes = partial(softmax_into_nodes, sizes=sizes)

    def relax_both(alpha: Mapping[str, Array], context: Context | None = None) -> PyTree:
        operations = {name: leaf for name, leaf in alpha.items() if not name.endswith(EDGES)}
        edges = {name: leaf for name, leaf in alpha.items() if name.endswith(EDGES)}
        return relax(operations, context) | jax.tree.map(into_nodes, edges)

    return relax_both


def softmax_into_nodes(beta: Array, sizes: Sequence[int] | None = None) -> Array:
    """Softmax of beta [edges] over the edges into each node.

    Args:
      beta: ordered by node.
      sizes: how many edges enter each node; by default 2, 3, ..., of a cell with two inputs.
    """
    sizes = range(2, 2 + count_nodes(len(beta))) if sizes is None else sizes
    return jnp.concatenate([jax.nn.softmax(part) for part in lax.split(beta, sizes)])


def with_auxiliary_skip(relax: Relaxation, strength: float | Schedule) -> Relaxation:
    """Appends to the weights of every edge a column of this strength: DARTS-.

    Chu et al., arXiv 2009.01027: a skip connection besides the candidates, whose
    strength decays to 0: `linear(1, 0)`. Give the network one operation more, the skip connection,
    as the last of its primitives; alpha has no column for it.
    """

    def append(weights: Array, amount: Array | float) -> Array:
        column = jnp.full_like(weights[..., :1], amount)
        return jnp.concatenate([weights, column], axis=-1)

    def relax_all(alpha: PyTree, context: Context | None = None) -> PyTree:
        amount = value_at(strength, context)
        weights = relax(alpha, context)
        return {
            name: leaf if name.endswith(EDGES) else append(leaf, amount)
            for name, leaf in weights.items()
        }

    return relax_all


def masked(relax: Relaxation, mask: PyTree) -> Relaxation:
    """Takes away the operations where the mask is False.

    For spaces whose edges have different candidates, and the progressive shrinking of P-DARTS.

    Args:
      relax: gives the weights of those that are left.
      mask: boolean [edges, operations], at least one of them True for each edge, in the structure
        of alpha; by cell, as `shrinking.survivors` gives it, it may lack leaves of alpha.
    """

    def left(alpha: Array, kept: Any) -> Array:
        return jnp.where(kept, alpha, -jnp.inf)

    def relax_left(alpha: PyTree, context: Context | None = None) -> PyTree:
        if isinstance(mask, Mapping):
            alpha = {**alpha, **{name: left(alpha[name], kept) for name, kept in mask.items()}}
        else:
            alpha = left(alpha, mask)
        return relax(alpha, context)

    return relax_left


def split_like(key: Array, tree: PyTree) -> PyTree:
    """A pytree like `tree` of random keys."""
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, jax.random.split(key, structure.num_leaves))


def _required(context: Context | None) -> Context:
    if context is None:
        raise ValueError(
            "the relaxation needs a context: wrap the step by search.with_context, or evaluate"
            " with relaxation.EVALUATION"
        )
    return context


def _over(alpha: PyTree, temperature: Array | float) -> PyTree:
    return jax.tree.map(lambda a: a / jnp.asarray(temperature, a.dtype), alpha)


def _with_gumbel_noise(alpha: PyTree, key: Array) -> PyTree:
    def add(a: Array, key: Array) -> Array:
        return a + jax.random.gumbel(key, a.shape, a.dtype)

    return jax.tree.map(add, alpha, split_like(key, alpha))
