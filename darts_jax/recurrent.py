"""Relaxed and discrete recurrent cells as pure functions, scanned over time.

State 0 of a cell is its start, a gated step from the hidden state; state i > 0 is node i - 1. Every
edge is a gated step, too: with [c, h] = s W, c through a sigmoid,

    o(s) = s + c (f(h) - s)

for an activation f. DARTS (arXiv 1806.09055), section 2.1 and appendix A.1.2.

All edges that enter a node share its matrix: one product serves them all, of the states so far,
stacked. So the matrix is read, and its gradient written, once a node and not once an edge.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax import Array, lax

from darts_jax.genotype import RecurrentGenotype
from darts_jax.operations import (
    EPSILON,
    Moments,
    batch_norm,
    relu,
    unbiased,
    update_running,
)

PyTree = Any
Activations = Mapping[str, Callable[[Array], Array]]

# The paper's candidates besides "none", which is zero and takes its share of the softmax only.
ACTIVATIONS: FrozenDict[str, Callable[[Array], Array]] = FrozenDict(
    {
        "tanh": jnp.tanh,
        "relu": relu,
        "sigmoid": jax.nn.sigmoid,
        "identity": lambda h: h,
    }
)
UNIFORM_BOUND = 0.04  # of initial weights


class Masks(NamedTuple):
    """Dropout inside of a cell, the same at all times: [B, inputs] and [B, D], 0 or 1 / keep."""

    input: Array
    hidden: Array


class Trajectory(NamedTuple):
    """What a cell does with a sequence.

    Attributes:
      hiddens: [T, B, D], after each step.
      last: the hidden state after the last valid step, shaped as the first: [B, D].
      running: running statistics after it, or as they were.
    """

    hiddens: Array
    last: Array
    running: Moments | None


def shapes(inputs: int, size: int, num_nodes: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a cell's parameters, gate first and candidate second along the last axis."""
    return {"start": (inputs + size, 2 * size), "nodes": (num_nodes, size, 2 * size)}


def uniform(key: Array, shapes: PyTree) -> PyTree:
    """Arrays of the given shapes, uniform in +-0.04."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    draws = [
        jax.random.uniform(k, shape, minval=-UNIFORM_BOUND, maxval=UNIFORM_BOUND)
        for k, shape in zip(jax.random.split(key, len(leaves)), leaves, strict=True)
    ]
    return treedef.unflatten(draws)


def running_statistics(size: int) -> Moments:
    """Initial running statistics of a relaxed cell, which all its states share: [D]."""
    return Moments(jnp.zeros(size), jnp.ones(size))


def relaxed(
    params: Mapping[str, Array],
    running: Moments,
    x: Array,
    hidden: Array,
    weights: Array,
    *,
    train: bool,
    activations: Activations,
    columns: Mapping[str, int],
    masks: Masks | None = None,
    valid: Array | None = None,
) -> Trajectory:
    """Runs a relaxed cell over a sequence; its output is the mean of all nodes.

    The start and every node go through a batch norm without scale and shift, by the batch at each
    time if `train`.

    Args:
      params: as in `shapes`.
      running: [D] each; in training, each batch norm of each valid step updates them in turn.
      x: [T, B, inputs].
      hidden: [B, D].
      weights: mixing weights [edges, candidates], rows ordered by node, then by source.
      train: normalise by the batch.
      activations: the candidates by name.
      columns: each candidate's column in weights.
      masks: dropout; None for none.
      valid: bool [T], False at steps that are padding; None if there are none.
    """
    num_nodes, size = params["nodes"].shape[:2]
    order = np.array([columns[name] for name in activations])
    # Edge i (i + 1) / 2 + j leads from state j to node i: by source, from the node of its number.
    mix = [weights[i * (i + 1) // 2 :][: i + 1, order, None, None] for i in range(num_nodes)]
    # Apart, so that the loop sums the gradient of each alone.
    matrices = [matrix[0] for matrix in lax.split(params["nodes"], [1] * num_nodes)]

    def normalize(s, running):
        if train:
            s, batch = _standardize(s)
            return s, update_running(running, batch)
        return batch_norm(s, running)[0], running

    # Computed again for its gradient: to keep what is in it for all times takes longer.
    @partial(jax.checkpoint, prevent_cse=False)
    def arriving(products, sources, shares):
        gate, candidate = jnp.split(products.reshape(*sources.shape[:-1], -1), 2, axis=-1)
        gate = jax.nn.sigmoid(gate)
        mixed = sum(f(candidate) * shares[:, o] for o, f in enumerate(activations.values()))
        # sum_o p_o (s + c (o(h) - s)) of all edges, the part of s gathered.
        return (shares.sum(1) * (1 - gate) * sources + gate * mixed).sum(0)

    def cell(x, hidden, running):
        s, running = normalize(_start(params, x, hidden, masks), running)
        states = [s]
        for matrix, shares in zip(matrices, mix, strict=True):
            sources = jnp.stack(states)
            products = _masked(sources, masks).reshape(-1, size) @ matrix
            s, running = normalize(arriving(products, sources, shares), running)
            states.append(s)
        return sum(states[1:]) / num_nodes, running

    # Statistics are of float32 at least, and a scan keeps the dtypes of what it carries.
    running = jax.tree.map(lambda r: r.astype(jnp.promote_types(r.dtype, jnp.float32)), running)
    return _scan(cell, x, hidden, running, valid)


def discrete(
    params: Mapping[str, Array],
    x: Array,
    hidden: Array,
    genotype: RecurrentGenotype,
    *,
    activations: Activations,
    masks: Masks | None = None,
    valid: Array | None = None,
) -> Trajectory:
    """Runs a discrete cell over a sequence; its output is the mean of the concatenated states.

    Args:
      params: as in `shapes`, with as many nodes as the genotype has.
      genotype: the cell.
      The others: as for `relaxed`.
    """
    size = hidden.shape[-1]

    def cell(x, hidden, running):
        states = [_start(params, x, hidden, masks)]
        for i, (name, source) in enumerate(genotype.recurrent):
            s = states[source]
            gate, candidate = jnp.split(_masked(s, masks) @ params["nodes"][i], [size], axis=-1)
            states.append(s + jax.nn.sigmoid(gate) * (activations[name](candidate) - s))
        return sum(states[i] for i in genotype.concat) / len(genotype.concat), running

    return _scan(cell, x, hidden, None, valid)


def lstm_params(key: Array, inputs: int, size: int) -> PyTree:
    """Parameters of flax's LSTM cell, as flax draws them."""
    x, state = jnp.zeros((1, inputs)), jnp.zeros((1, size))
    return nn.OptimizedLSTMCell(size).init(key, (state, state), x)["params"]


def lstm(
    params: PyTree,
    x: Array,
    hidden: Array,
    *,
    masks: Masks | None = None,
    valid: Array | None = None,
) -> Trajectory:
    """Runs flax's LSTM cell over a sequence, to compare with.

    Args:
      params: as from `lstm_params`.
      hidden: [B, 2 D], the cell's memory and its output beside each other; so is the last one.
      The others: as for `relaxed`. The mask of hidden states is that of the outputs that it reads.
    """
    size = hidden.shape[-1] // 2
    flax_cell = nn.OptimizedLSTMCell(size)

    def cell(x, hidden, running):
        memory, output = jnp.split(hidden, 2, axis=-1)
        x = x if masks is None else x * masks.input
        after, _ = flax_cell.apply({"params": params}, (memory, _masked(output, masks)), x)
        return jnp.concatenate(after, axis=-1), running

    states = _scan(cell, x, hidden, None, valid)
    return states._replace(hiddens=states.hiddens[..., size:])


def _start(params, x, hidden, masks):
    inputs = x if masks is None else x * masks.input
    both = jnp.concatenate([inputs, _masked(hidden, masks)], axis=-1) @ params["start"]
    gate, candidate = jnp.split(both, 2, axis=-1)
    return hidden + jax.nn.sigmoid(gate) * (jnp.tanh(candidate) - hidden)


def _masked(s, masks):
    return s if masks is None else s * masks.hidden


def _standardize(s: Array) -> tuple[Array, Moments]:
    """Batch norm of s [B, D] by the batch, without scale and shift, and its unbiased moments.

    The mean is taken away by a product: XLA computes most else again wherever it is used, and what
    all edges of a node read, in the gradient, it would compute for each of them.
    """
    wide = s.astype(jnp.promote_types(s.dtype, jnp.float32))
    count = len(s)
    center = jnp.eye(count, dtype=wide.dtype) - 1 / count
    difference = jnp.matmul(center, wide, precision=lax.Precision.HIGHEST)
    batch = Moments(wide.mean(0), lax.square(difference).mean(0))
    normalized = difference * lax.rsqrt(batch.var + EPSILON)
    return normalized.astype(s.dtype), unbiased(batch, count)


def _scan(cell, x, hidden, running, valid) -> Trajectory:
    def step(carry, at):
        x, is_valid = at
        after = cell(x, *carry)
        if is_valid is not None:
            after = jax.tree.map(lambda a, b: jnp.where(is_valid, a, b), after, carry)
        return after, after[0]

    (last, running), hiddens = lax.scan(step, (hidden, running), (x, valid))
    return Trajectory(hiddens, last, running)
