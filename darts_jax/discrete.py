"""The discrete convolutional cell as a pure function: what is trained after a search.

A node is the sum of its two edges, each one operation on one earlier state. The operations are
those of the relaxed cell, with batch norms that scale and shift; pooling and identity have none.
Edges of one operation that leave one state run at once, and parameters are stacked by operation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from darts_jax.cells import split_rows
from darts_jax.genotype import CNN_EDGES_PER_NODE, CNN_NUM_INPUTS, Edge
from darts_jax.operations import Moments, Operation, batch_norm, factorized_reduce, relu

PyTree = Any
Operations = Mapping[str, Operation]

IDENTITY = "skip_connect"  # at stride 1; drop path leaves it alone
PREPROCESS = ("preprocess_0", "preprocess_1")


class Cell(NamedTuple):
    """A cell of a network.

    Attributes:
      edges: (operation, source state), two per node, as in a `genotype.Genotype`.
      concat: the states that are concatenated as output.
      channels: of each node.
      inputs: channels of the outputs of the cells two before and one before.
      reduction: whether it halves height and width.
      reduction_before: whether the cell before did, so that the older input is twice as large.
    """

    edges: tuple[Edge, ...]
    concat: tuple[int, ...]
    channels: int
    inputs: tuple[int, int]
    reduction: bool
    reduction_before: bool


class Group(NamedTuple):
    """Edges of one operation that leave one state: positions in the cell, source, stride."""

    positions: tuple[int, ...]
    source: int
    stride: int


def groups(cell: Cell) -> dict[str, list[Group]]:
    """The groups of each operation, in the order of their sources: that of its parameters."""
    found: dict[str, list[Group]] = {}
    for name, source in sorted(set(cell.edges)):
        positions = tuple(i for i, edge in enumerate(cell.edges) if edge == (name, source))
        stride = 2 if cell.reduction and source < CNN_NUM_INPUTS else 1
        found.setdefault(name, []).append(Group(positions, source, stride))
    return found


def shapes(cell: Cell, operations: Operations) -> PyTree:
    """Shapes of a cell's kernels: operation -> parameter -> (edges, ...).

    The preprocessing of the two inputs counts as an operation on one edge. A parameter that only
    strided edges have is stacked over those.
    """
    older, newer = cell.inputs
    half = cell.channels // 2
    reduce = {"conv_1": (1, older, half), "conv_2": (1, older, cell.channels - half)}
    tree: dict[str, dict[str, tuple[int, ...]]] = {
        "preprocess_0": reduce if cell.reduction_before else {"kernel": (1, older, cell.channels)},
        "preprocess_1": {"kernel": (1, newer, cell.channels)},
    }
    for name, members in groups(cell).items():
        for group in members:
            for leaf, shape in operations[name].shapes(cell.channels, group.stride).items():
                leaves = tree.setdefault(name, {})
                (count, *_) = leaves.get(leaf, (0,))
                leaves[leaf] = (count + len(group.positions), *shape)
    return tree


def norm_shapes(cell: Cell, operations: Operations) -> PyTree:
    """Shapes of a cell's batch norms: operation -> norm -> (edges, C), the last norm "norm"."""
    tree = {name: {"norm": (1, cell.channels)} for name in PREPROCESS}
    for name, members in groups(cell).items():
        norms: dict[str, tuple[int, int]] = {}
        for group in members:
            last = ("norm",) if _has_norm(operations[name], cell, group) else ()
            for norm in (*operations[name].inner, *last):
                count, _ = norms.get(norm, (0, 0))
                norms[norm] = (count + len(group.positions), cell.channels)
        if norms:
            tree[name] = norms
    return tree


def _has_norm(operation: Operation, cell: Cell, group: Group) -> bool:
    has_parameters = bool(operation.shapes(cell.channels, group.stride))
    return has_parameters and operation.normalized(group.stride)


def discrete(
    kernels: PyTree,
    affine: PyTree,
    running: PyTree | None,
    inputs: tuple[Array, Array],
    cell: Cell,
    operations: Operations,
    keep: Array | None = None,
    key: Array | None = None,
) -> tuple[Array, PyTree]:
    """Output of a discrete cell, and the statistics of the batch.

    Args:
      kernels: as in `shapes`, of any floating dtype; used in that of the inputs.
      affine: as in `norm_shapes`, each {"scale", "bias"}.
      running: as in `norm_shapes`, each Moments, to normalise by. If None, by the batch.
      inputs: outputs of the cells two before and one before, [N, H, W, C] each.
      cell: what to build.
      operations: those it names.
      keep: [edges, N], by which the output of each edge but an identity is multiplied, such as 0 or
        1 / (keep probability) for drop path; None for 1.
      key: random key, needed where an operation is random.

    Returns:
      [N, H', W', nodes * C], and the unbiased moments of the batch, or running as it is.
    """
    kernels = jax.tree.map(lambda x: x.astype(inputs[0].dtype), kernels)
    seen: dict[str, dict[str, list[Moments]]] = {}

    def norm(name: str, norms: PyTree, stats: PyTree, which: str, y: Array) -> Array:
        moments = None if stats is None else Moments(**stats[which])
        y, batch = batch_norm(y, moments, **norms[which])
        seen.setdefault(name, {}).setdefault(which, []).append(batch)
        return y

    stats = None if running is None else _as_dicts(running)
    states: list[Array] = []
    for name, x in zip(PREPROCESS, inputs, strict=True):
        leaves = kernels[name]
        y = (
            factorized_reduce(x, leaves["conv_1"], leaves["conv_2"])
            if "conv_1" in leaves
            else (relu(x) @ leaves["kernel"][0])[..., None, :]
        )
        part = None if stats is None else stats[name]
        states.append(norm(name, affine[name], part, "norm", y)[..., 0, :])

    parts = _parts(kernels, affine, stats, cell, operations)
    keys = None if key is None else jax.random.split(key, len(cell.edges))
    outputs: dict[int, Array] = {}
    for state in range(CNN_NUM_INPUTS + len(cell.edges) // CNN_EDGES_PER_NODE):
        if state >= CNN_NUM_INPUTS:
            first = CNN_EDGES_PER_NODE * (state - CNN_NUM_INPUTS)
            states.append(outputs[first] + outputs[first + 1])
        for name, group, part_kernels, part_affine, part_stats in parts.get(state, ()):

            def inner(which, y, name=name, norms=part_affine, stats=part_stats):
                return norm(name, norms, stats, which, y)

            if operations[name].random:
                part_kernels = {**part_kernels, "key": keys[np.array(group.positions)]}
            y = operations[name].apply(part_kernels, states[state], group.stride, inner)
            if _has_norm(operations[name], cell, group):
                y = inner("norm", y)
            for i, position in enumerate(group.positions):
                # What has no parameters is the same on every edge, and may come once.
                output = y[..., min(i, y.shape[3] - 1), :]
                if keep is not None and (name, group.stride) != (IDENTITY, 1):
                    output = output * keep[position, :, None, None, None].astype(output.dtype)
                outputs[position] = output
    output = lax.concatenate([states[state] for state in cell.concat], 3)
    if running is not None:
        return output, running
    return output, jax.tree.map(
        lambda pieces: jax.tree.map(lambda *rows: jnp.concatenate(rows), *pieces),
        seen,
        is_leaf=lambda node: isinstance(node, list),
    )


def _as_dicts(running: PyTree) -> PyTree:
    return jax.tree.map(Moments._asdict, running, is_leaf=lambda node: isinstance(node, Moments))


def _parts(
    kernels: PyTree, affine: PyTree, stats: PyTree | None, cell: Cell, operations: Operations
) -> dict[int, list[tuple[str, Group, PyTree, PyTree, PyTree | None]]]:
    """By source state: (operation, group, its kernels, scale and shift, and statistics)."""
    parts: dict[int, list] = {}
    for name, members in groups(cell).items():
        sizes = [len(group.positions) for group in members]
        prepared = operations[name].prepare(kernels.get(name, {}))
        rows = (
            split_rows(prepared, sizes),
            split_rows(affine.get(name, {}), sizes),
            [None] * len(sizes) if stats is None else split_rows(stats.get(name, {}), sizes),
        )
        for group, *row in zip(members, *rows, strict=True):
            parts.setdefault(group.source, []).append((name, group, *row))
    return parts
