"""The cell of NAS-Bench-201 as a pure function, relaxed and discrete.

States are numbered from 0, the cell's input; every later one is the sum over its incoming edges of
one operation each, and the last is the output. A convolution is ReLU, convolution, batch norm; an
edge of the relaxed cell is the weighted sum of its candidates (arXiv 2001.00326, section 2.1).

Relaxed and discrete cells are one function: what differs is which edges have which operation
(`Members`). Parameters and running statistics are stacked by operation, over its edges in the order
of their sources, then destinations: the edges that leave a state share one product.

With partial channels, of PC-DARTS (arXiv 1907.05737), operations work on some of the channels, and
the others pass by them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from darts_jax.cells import beside_bypass
from darts_jax.operations import EPSILON, OPERATIONS, Moments, moments, relu, unbiased

PyTree = Any
Edges = tuple[tuple[int, int], ...]
Members = Mapping[str, tuple[int, ...]]
Convolution = Callable[..., Array]

CONVOLUTIONS = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}  # sizes of kernels


def by_source(edges: Edges) -> list[int]:
    """The edges' numbers, ordered by source, then by destination."""
    return sorted(range(len(edges)), key=lambda e: edges[e])


def members(
    edges: Edges, primitives: Sequence[str], choice: Sequence[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Which edges have an operation: name -> edges, in the order of their parameters.

    Args:
      edges: (source, destination) each.
      primitives: names of the candidates.
      choice: of each edge, its operation's number; None for all operations on all edges. Edges
        that leave a state which nothing enters are left out: they would carry zeros.
    """
    order = by_source(edges)
    if choice is not None:
        reached = {0}
        for e in order:
            source, destination = edges[e]
            if source in reached and primitives[choice[e]] != "none":
                reached.add(destination)
        order = [e for e in order if edges[e][0] in reached]
    return {
        name: tuple(e for e in order if choice is None or choice[e] == o)
        for o, name in enumerate(primitives)
    }


def shapes(channels: int, members: Members) -> PyTree:
    """Shapes of a cell's kernels: operation -> (edges, k, k, C, C)."""
    return {
        name: (len(members[name]), size, size, channels, channels)
        for name, size in CONVOLUTIONS.items()
        if members.get(name)
    }


def norm_shapes(channels: int, members: Members) -> PyTree:
    """Shapes of a cell's batch norms: operation -> (edges, C)."""
    return {name: (len(members[name]), channels) for name in CONVOLUTIONS if members.get(name)}


def cell(
    kernels: PyTree,
    affine: PyTree,
    running: PyTree | None,
    x: Array,
    weights: Array,
    *,
    edges: Edges,
    primitives: Sequence[str],
    members: Members,
    conv: Convolution,
    partial: int = 1,
    edge_weights: Array | None = None,
) -> tuple[Array, PyTree]:
    """Output of a cell, and the statistics of the batch.

    Args:
      kernels: as in `shapes`, of C / partial channels, like all of the cell's variables.
      affine: {"scale", "bias"}, each as in `norm_shapes`; empty for batch norms without.
      running: as in `norm_shapes`, each Moments, to normalise by. If None, by the batch.
      x: [N, H, W, C].
      weights: [edges, candidates], by which outputs are multiplied.
      edges: (source, destination) each.
      primitives: names of the candidates.
      members: which edges have which operations.
      conv: `conv(x, kernel, padding=...)`, as `convolution.conv`.
      partial: one of so many channels goes through the operations; 1 for a discrete cell.
      edge_weights: [edges], factors of all that they pass on; all 1 by default.

    Returns:
      [N, H, W, C], and the unbiased moments of the batch, or running as it is.
    """
    columns = {name: o for o, name in enumerate(primitives)}
    if edge_weights is not None:
        weights = weights * edge_weights[:, None]
    share = x.shape[-1] // partial
    seen: dict[str, list[Moments]] = {name: [] for name in shapes(share, members)}
    position = dict.fromkeys(seen, 0)  # of the next edge's parameters
    # Sums over what enters a state: what went through operations, and what passed them by.
    through: dict[int, Array] = {}
    past: dict[int, Array] = {}

    def add(sums: dict[int, Array], destination: int, arriving: Array) -> None:
        before = sums.get(destination)
        sums[destination] = arriving if before is None else before + arriving

    def state_of(number: int) -> Array | None:
        if number == 0:
            return x
        if partial == 1 or number not in through:
            return through.get(number)
        return beside_bypass(through[number][..., None, :], past[number], 1)[..., 0, :]

    last = max(destination for _, destination in edges)
    for source in range(last):
        whole = state_of(source)
        if partial > 1:
            for e, (start, destination) in enumerate(edges):
                if start == source:
                    by = whole[..., share:]
                    add(past, destination, by if edge_weights is None else by * edge_weights[e])
        for name, held in members.items():
            out = [e for e in held if edges[e][0] == source]
            if not out or name == "none":
                continue
            state = whole if partial == 1 else whole[..., :share]
            mix = weights[np.array(out), columns[name]]
            if name in seen:
                rows = slice(position[name], position[name] + len(out))
                position[name] = rows.stop
                y = _convolve(conv, relu(state), kernels[name][rows])
                batch = (
                    moments(y) if running is None else Moments(*(m[rows] for m in running[name]))
                )
                if running is None:
                    seen[name].append(unbiased(batch, math.prod(y.shape[:3])))
                own = {leaf: values[name][rows] for leaf, values in affine.items()}
                y = _weighted_norm(y, batch, mix, **own)
            else:
                y = OPERATIONS[name].apply({}, state, 1, None) * mix[:, None]
            for e, arriving in zip(out, lax.split(y, [1] * len(out), axis=3), strict=True):
                add(through, edges[e][1], arriving[..., 0, :])
    output = state_of(last)
    output = jnp.zeros_like(x) if output is None else output
    if running is not None:
        return output, running
    return output, {
        name: jax.tree.map(lambda *rows: lax.concatenate(rows, 0), *batches)
        for name, batches in seen.items()
    }


def _weighted_norm(
    y: Array, stats: Moments, mix: Array, scale: Array | float = 1.0, bias: Array | float = 0.0
) -> Array:
    """mix (scale (y - mean) / std + bias) of y [N, H, W, K, C], in one pass; mix [K]."""
    factor = mix[:, None] * scale * lax.rsqrt(stats.var + EPSILON)
    return y * factor + (mix[:, None] * bias - factor * stats.mean)


def _convolve(conv: Convolution, x: Array, kernels: Array) -> Array:
    """x [N, H, W, C] with each of K kernels [K, k, k, C, D]: [N, H, W, K, D]."""
    count, size = kernels.shape[:2]
    dense = kernels.transpose(1, 2, 3, 0, 4).reshape(size, size, x.shape[-1], -1)
    y = conv(x, dense, padding=size // 2)
    return y.reshape(*y.shape[:3], count, -1)
