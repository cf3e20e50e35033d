"""The relaxed convolutional cell as a pure function.

A cell is a directed acyclic graph of states. States 0 and 1 are the outputs of the two cells
before, state j > 1 is an intermediate node: the sum over its incoming edges i < j of the mixed
operation sum_o weights[edge, o] * o(state i), equations (1) and (2) of DARTS (arXiv 1806.09055).
The cell's output is the concatenation of its nodes.

Parameters, running statistics and work are grouped: the K edges that leave a state share their
input, so each operation runs once for all of them. Where edges have different candidates, a group
is of those that leave one state and have the same: what an edge does not have is not made.

With partial channels, of PC-DARTS (arXiv 1907.05737), operations work on some of the channels, and
the others pass by them.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from darts_jax import genotype, native
from darts_jax.linear import copies, join, split
from darts_jax.mixing import mix
from darts_jax.operations import (
    EPSILON,
    Moments,
    Operation,
    moments,
    normalize,
    standardize,
    unbiased,
)
from darts_jax.polynomial import add, inverse_root, polynomial
from darts_jax.pooling import first_max

PyTree = Any
Operations = Mapping[str, Operation]
Candidates = Sequence[Sequence[str]]  # of each edge, in the order of alpha


class Group(NamedTuple):
    """Edges that leave one state and have the same candidates.

    Attributes:
      state: which they leave.
      edges: their rows in alpha.
      destinations: of each.
      stride: of all.
      operations: their candidates by name.
    """

    state: int
    edges: tuple[int, ...]
    destinations: tuple[int, ...]
    stride: int
    operations: Operations


def groups(
    num_edges: int, reduction: bool, operations: Operations, candidates: Candidates | None = None
) -> tuple[Group, ...]:
    """The groups of a cell's edges, by state, then by their first destination.

    Args:
      num_edges: rows of alpha: 2 for one node, 5 for two, 9, 14, ...
      reduction: whether the edges that leave the two inputs have stride 2.
      operations: by name.
      candidates: of each edge, names, such as "none", that operations lack left out; by default,
        every edge has all operations.
    """
    num_nodes = genotype.count_nodes(num_edges)
    table = genotype.edges(num_nodes)
    held: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for edge, (state, _) in sorted(enumerate(table), key=lambda row: row[1]):
        own = operations if candidates is None else candidates[edge]
        held.setdefault((state, tuple(n for n in operations if n in own)), []).append(edge)
    return tuple(
        Group(
            state,
            tuple(rows),
            tuple(table[edge][1] for edge in rows),
            2 if reduction and state < 2 else 1,
            {name: operations[name] for name in names},
        )
        for (state, names), rows in held.items()
    )


def shapes(channels: int, groups: Sequence[Group]) -> PyTree:
    """Shapes of a cell's parameters: operation -> parameter -> (edges, ...).

    The edges are ordered by group, unlike in alpha: so those of a group are neighbours. A parameter
    is stacked over the edges that have it: whose candidate it is of, and that are of its stride.
    """
    tree: dict[str, dict[str, tuple[int, ...]]] = {}
    for group in groups:
        for name, operation in group.operations.items():
            for leaf, shape in operation.shapes(channels, group.stride).items():
                leaves = tree.setdefault(name, {})
                (count, *_) = leaves.get(leaf, (0,))
                leaves[leaf] = (count + len(group.edges), *shape)
    return tree


def norms(operations: Operations, stride: int) -> tuple[tuple[str, str], ...]:
    """The batch norms of one edge, (operation, name): those inside, then each operation's last."""
    inner = [(name, norm) for name, op in operations.items() for norm in op.inner]
    return *inner, *((name, "norm") for name, op in operations.items() if op.normalized(stride))


def running_statistics(channels: int, groups: Sequence[Group]) -> Moments:
    """Initial running statistics of a cell: mean 0 and variance 1.

    Returns:
      Moments of [norms, C], one row for each group, batch norm of `norms` and edge, in this order.
    """
    rows = sum(len(norms(group.operations, group.stride)) * len(group.edges) for group in groups)
    return Moments(jnp.zeros((rows, channels)), jnp.ones((rows, channels)))


def relaxed(
    params: PyTree,
    running: Moments | None,
    inputs: tuple[Array, Array],
    weights: Array,
    *,
    groups: Sequence[Group],
    columns: Mapping[str, int],
    partial: int = 1,
    edge_weights: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, Moments | None]:
    """Output of a relaxed cell, and the statistics of the batch.

    Args:
      params: as in `shapes`, of C / partial channels.
      running: as in `running_statistics`, of C / partial channels, to normalise by. If None,
        normalise by the batch.
      inputs: states 0 and 1, each [N, H, W, C].
      weights: mixing weights [edges, candidates], rows ordered by destination, then by source.
        Those of what an edge does not have are not read.
      groups: the cell's edges, as `groups` gives them.
      columns: each candidate's column in weights.
      partial: one of so many channels goes through the operations.
      edge_weights: [edges], factors of what they pass on; all 1 by default.
      key: random key, needed where an operation is random.

    Returns:
      [N, H', W', nodes * C], and, if running is None, the batch's unbiased moments like it.
    """
    parts = _parameters(params, groups)
    if key is not None:
        _give_keys(parts, jax.random.split(key, weights.shape), groups, columns)
    running_parts = iter(() if running is None else _split_rows(running, groups))
    mixes = _mixing(weights, groups, columns)
    states, arrived = list(inputs), defaultdict(list)
    share = inputs[0].shape[-1] // partial
    nothing = jnp.zeros((0, share), inputs[0].dtype)
    gathered = [Moments(nothing, nothing)]
    for group, own_mix, part in zip(groups, mixes, parts, strict=True):
        if group.state == len(states):
            states.append(add(*arrived.pop(group.state))[..., 0, :])
        x = states[group.state]
        mixed, batch = mixed_operation(
            part,
            None if running is None else next(running_parts),
            x if partial == 1 else x[..., :share],
            own_mix,
            stride=group.stride,
            operations=group.operations,
        )
        gathered += batch
        if partial > 1:
            mixed = beside_bypass(mixed, x[..., share:], group.stride)
        if edge_weights is not None:
            mixed = mixed * edge_weights[np.array(group.edges), None]
        # Split rather than slice: its gradient is one concatenation, not a sum of padded slices.
        arrivals = lax.split(mixed, [1] * len(group.edges), axis=3)
        for node, arriving in zip(group.destinations, arrivals, strict=True):
            arrived[node].append(arriving)
    states += [add(*arrived[node])[..., 0, :] for node in sorted(arrived)]
    output = lax.concatenate(states[2:], 3)
    if running is not None:
        return output, None
    return output, jax.tree.map(lambda *rows: join(rows), *gathered)


def beside_bypass(mixed: Array, bypass: Array, stride: int) -> Array:
    """The channels that went through the operations, and those that did not, shuffled.

    PC-DARTS: at stride 2 the others go through 2x2 max pooling. Then channel g * share + c moves to
    c * groups + g: the next operation meets one of the first group and others in turn.

    Args:
      mixed: [N, H', W', K, share].
      bypass: [N, H, W, (groups - 1) * share].
      stride: 1, or 2 where H is 2 H'.

    Returns:
      [N, H', W', K, groups * share].
    """
    if stride == 2:
        rows = first_max(bypass[:, ::2], bypass[:, 1::2])
        bypass = first_max(rows[:, :, ::2], rows[:, :, 1::2])
    others = jnp.broadcast_to(bypass[..., None, :], (*mixed.shape[:-1], bypass.shape[-1]))
    together = lax.concatenate([mixed, others], 4)
    groups = (together.shape[-1] // mixed.shape[-1], mixed.shape[-1])
    return together.reshape(*together.shape[:-1], *groups).swapaxes(-1, -2).reshape(together.shape)


def split_rows(tree: PyTree, sizes: Sequence[int]) -> list[PyTree]:
    """The rows of each group of edges: dicts of arrays [edges, ...] to a list of such dicts.

    An array with fewer rows is of the first groups alone (the strided edges, which leave the first
    states), and is not in the dicts of the others.
    """
    if not isinstance(tree, Mapping):
        held = list(itertools.accumulate(sizes)).index(tree.shape[0]) + 1
        return split(tree, sizes[:held])
    parts: list[dict[str, PyTree]] = [{} for _ in sizes]
    for name, child in tree.items():
        for part, piece in zip(parts, split_rows(child, sizes), strict=False):
            part[name] = piece
    return parts


def _parameters(params: PyTree, groups: Sequence[Group]) -> list[PyTree]:
    """Prepared parameters of each group: operation -> kernel -> [K, ...]."""
    parts: list[dict[str, PyTree]] = [{} for _ in groups]
    operations = {name: op for group in groups for name, op in group.operations.items()}
    for name, leaves in params.items():
        own = [i for i, group in enumerate(groups) if name in group.operations]
        pieces = split_rows(operations[name].prepare(leaves), [len(groups[i].edges) for i in own])
        for i, piece in zip(own, pieces, strict=True):
            parts[i][name] = piece
    return parts


def _give_keys(
    parts: Sequence[PyTree], keys: Array, groups: Sequence[Group], columns: Mapping[str, int]
) -> None:
    """Puts the keys [edges, candidates] of random operations with the parameters."""
    for group, part in zip(groups, parts, strict=True):
        for name, operation in group.operations.items():
            if operation.random:
                own = keys[np.array(group.edges), columns[name]]
                part[name] = {**part.get(name, {}), "key": own}


def _mixing(weights: Array, groups: Sequence[Group], columns: Mapping[str, int]) -> list[Array]:
    """The mixing weights of each group, [K, operations]."""
    pairs = [
        np.array([(edge, columns[name]) for edge in group.edges for name in group.operations])
        for group in groups
    ]
    rows, places = np.concatenate(pairs).T
    flat = split(weights[rows, places], [len(own) for own in pairs])
    return [part.reshape(len(g.edges), -1) for part, g in zip(flat, groups, strict=True)]


def _split_rows(running: Moments, groups: Sequence[Group]) -> list[dict[tuple[str, str], Moments]]:
    """Running statistics [K, C] of each group's batch norms: a list over groups."""
    keys = [
        (i, key) for i, group in enumerate(groups) for key in norms(group.operations, group.stride)
    ]
    sizes = [len(groups[i].edges) for i, _ in keys]
    pieces = zip(*(split(moment, sizes) for moment in running), strict=True)
    parts: list[dict[tuple[str, str], Moments]] = [{} for _ in groups]
    for (i, key), piece in zip(keys, pieces, strict=True):
        parts[i][key] = Moments(*piece)
    return parts


def mixed_operation(
    kernels: PyTree,
    running: Mapping[tuple[str, str], Moments] | None,
    x: Array,
    weights: Array,
    *,
    stride: int,
    operations: Operations,
) -> tuple[Array, list[Moments]]:
    """Equation (2) on the K edges of a group: sum_o weights[:, o] * o(x).

    The last batch norm of each operation has neither scale nor shift, so it is folded into the
    weight: w (y - mean) / std = (w / std) y - (w / std) mean. The sum is then one pass over the
    operations' raw outputs, and no normalised copy of them is kept for the gradient.

    Args:
      kernels: operation -> kernel -> [K, ...], prepared.
      running: (operation, norm) -> moments [K, C] to normalise by; None for the batch's.
      x: [N, H, W, C].
      weights: [K, operations].
      stride: of these edges.
      operations: the candidates by name, in the order of the columns of weights.

    Returns:
      [N, H', W', K, C], and the unbiased moments [K, C] of each batch norm in the order of
      `norms`, if running is None.
    """
    by_kernels = native.preferred(x.dtype)
    shape = (weights.shape[0], x.shape[-1] if by_kernels else 1)
    columns = split(
        jnp.broadcast_to(weights.T[..., None], (len(operations), *shape)).reshape(-1, shape[1]),
        [shape[0]] * len(operations),
    )
    inner_moments: list[Moments] = []
    outputs, chosen, others = {}, [], []
    states = copies(x, len(operations))
    for (name, operation), state, column in zip(operations.items(), states, columns, strict=True):

        def norm(inner: str, y: Array, name: str = name) -> Array:
            if running is not None:
                return normalize(y, running[name, inner])
            y, batch = standardize(y)
            inner_moments.append(unbiased(batch, math.prod(y.shape[:3])))
            return y

        y = operation.apply(kernels.get(name, {}), state, stride, norm)
        if operation.normalized(stride):
            outputs[name] = y
            chosen.append(column)
        else:
            others.append((y, column))

    if not outputs:
        return sum(y * factors for y, factors in others), inner_moments
    stats = None if running is None else [running[name, "norm"] for name in outputs]
    total_of = _sum_by_kernels if by_kernels else _sum_beside
    total, each = total_of(list(outputs.values()), chosen, stats, others)
    if running is not None:
        return total, []
    count = math.prod(total.shape[:3])
    return total, [*inner_moments, *(unbiased(batch, count) for batch in each)]


def _sum_by_kernels(
    images: list[Array],
    weights: list[Array],
    stats: list[Moments] | None,
    others: list[tuple[Array, Array]],
) -> tuple[Array, list[Moments]]:
    """Sum of normalised images times weights [K, C], and of others, images times factors.

    Returns:
      [N, H', W', K, C], and the moments [K, C] that each image was normalised by.
    """
    if stats is None:
        pairs = [copies(y, 2) for y in images]
        images, stats = [y for y, _ in pairs], [moments(y) for _, y in pairs]
    # An image that is the same on every edge has moments of one.
    edges = len(weights[0])
    stats = [
        own if len(own.var) == edges else Moments(*(join(copies(m, edges)) for m in own))
        for own in stats
    ]
    scales = [
        copies(polynomial((1.0, (weight, inverse_root(own.var, EPSILON)))), 2)
        for weight, own in zip(weights, stats, strict=True)
    ]
    shift = polynomial(
        *((-1.0, (scale, own.mean)) for (scale, _), own in zip(scales, stats, strict=True))
    )
    factors = [scale for _, scale in scales] + [factor for _, factor in others]
    return mix([*images, *(y for y, _ in others)], factors, shift), stats


def _sum_beside(
    images: list[Array],
    weights: list[Array],
    stats: list[Moments] | None,
    others: list[tuple[Array, Array]],
) -> tuple[Array, list[Moments]]:
    """The same where XLA compiles it: all images side by side, to be a few array operations.

    Weights and factors are [K, 1].
    """
    shape = (weights[0].shape[0], images[0].shape[-1])
    beside = lax.concatenate(
        [jnp.broadcast_to(y, (*y.shape[:3], *shape))[:, :, :, None] for y in images], 3
    )
    batch = moments(beside) if stats is None else jax.tree.map(lambda *m: jnp.stack(m), *stats)
    scale = jnp.stack(weights) * lax.rsqrt(batch.var + EPSILON)
    total = (beside * scale).sum(3) - (scale * batch.mean).sum(0)
    rows = jax.tree.map(lambda m: m.reshape(-1, shape[1]), batch)
    return total + sum(y * factor for y, factor in others), [rows]
