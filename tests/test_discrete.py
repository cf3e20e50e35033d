"""The discrete cell against the relaxed one, and its groups and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax import cells, discrete, genotype
from darts_jax.discrete import Cell, Group
from darts_jax.genotype import CNN_PRIMITIVES, PUBLISHED
from darts_jax.operations import (
    DISCRETE_OPERATIONS,
    OPERATIONS,
    Moments,
    batch_norm,
    factorized_reduce,
    relu,
)

pytestmark = pytest.mark.usefixtures("x64")

CHANNELS, SIZE, NUM_EDGES = 2, 8, 5
# Operations that both cells follow by a batch norm or none: pooling has one in the relaxed alone.
KEPT = {
    False: (("sep_conv_3x3", 0), ("skip_connect", 1), ("dil_conv_5x5", 2), ("sep_conv_3x3", 0)),
    True: (("skip_connect", 1), ("sep_conv_3x3", 0), ("skip_connect", 2), ("skip_connect", 0)),
}


def cell_of(reduction, reduction_before=False):
    return Cell(KEPT[reduction], (2, 3), CHANNELS, (3, 4), reduction, reduction_before)


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def draw_tree(seed, shapes):
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    return treedef.unflatten([draw(seed + i, shape) for i, shape in enumerate(leaves)])


def unit(shapes):
    """Scale 1 and shift 0: what the batch norms of a relaxed cell have."""
    return jax.tree.map(
        lambda shape: {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)},
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def from_relaxed(params, cell):
    """The discrete cell's kernels out of the relaxed one's, which has all operations everywhere."""
    by_source = [(i, j) for i in range(3) for j in range(max(i + 1, 2), 4)]
    kernels = {}
    for name, members in discrete.groups(cell).items():
        rows = [
            by_source.index((group.source, 2 + position // 2))
            for group in members
            for position in group.positions
            if OPERATIONS[name].shapes(CHANNELS, group.stride)
        ]
        if rows:
            kernels[name] = {leaf: stack[np.array(rows)] for leaf, stack in params[name].items()}
    return kernels


@pytest.mark.parametrize("reduction_before", [False, True])
@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_is_the_relaxed_cell_with_one_hot_weights(reduction, reduction_before):
    cell = cell_of(reduction, reduction_before)
    own = draw_tree(0, discrete.shapes(cell, OPERATIONS))
    groups = cells.groups(NUM_EDGES, reduction, OPERATIONS)
    params = draw_tree(50, cells.shapes(CHANNELS, groups))
    kernels = {name: own[name] for name in discrete.PREPROCESS} | from_relaxed(params, cell)
    assert jax.tree.map(jnp.shape, kernels) == jax.tree.map(jnp.shape, own)
    affine = unit(discrete.norm_shapes(cell, OPERATIONS))
    older_size = 2 * SIZE if reduction_before else SIZE
    inputs = draw(100, (2, older_size, older_size, 3)), draw(101, (2, SIZE, SIZE, 4))
    y, _ = jax.jit(
        lambda: discrete.discrete(kernels, affine, None, inputs, cell, DISCRETE_OPERATIONS)
    )()

    first = kernels["preprocess_0"]
    older = (
        factorized_reduce(inputs[0], first["conv_1"], first["conv_2"])[..., 0, :]
        if reduction_before
        else relu(inputs[0]) @ first["kernel"][0]
    )
    newer = relu(inputs[1]) @ kernels["preprocess_1"]["kernel"][0]
    chosen = {(source, 2 + i // 2): name for i, (name, source) in enumerate(cell.edges)}
    columns = [CNN_PRIMITIVES.index(chosen.get(edge, "none")) for edge in genotype.edges(2)]
    expected, _ = jax.jit(
        lambda: cells.relaxed(
            params,
            None,
            (batch_norm(older, None)[0], batch_norm(newer, None)[0]),
            jnp.eye(len(CNN_PRIMITIVES))[np.array(columns)],
            groups=groups,
            columns={name: CNN_PRIMITIVES.index(name) for name in OPERATIONS},
        )
    )()
    np.testing.assert_allclose(y, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_statistics_come_back_as_they_go_in(reduction):
    """By the moments of a batch, a batch is normalised as by itself, but for the unbiased part."""
    cell = cell_of(reduction)
    kernels = draw_tree(0, discrete.shapes(cell, OPERATIONS))
    norms = discrete.norm_shapes(cell, OPERATIONS)
    affine = jax.tree.map(lambda x: x + 0.5, unit(norms))
    inputs = draw(100, (64, SIZE, SIZE, 3)), draw(101, (64, SIZE, SIZE, 4))

    @jax.jit
    def run(running):
        return discrete.discrete(kernels, affine, running, inputs, cell, DISCRETE_OPERATIONS)

    y, batch = run(None)
    assert jax.tree.structure(
        batch, is_leaf=lambda x: isinstance(x, Moments)
    ) == jax.tree.structure(norms, is_leaf=lambda x: isinstance(x, tuple))
    again, same = run(batch)
    jax.tree.map(np.testing.assert_array_equal, same, batch)
    np.testing.assert_allclose(again, y, rtol=0, atol=2e-3 * float(jnp.abs(y).max()))


def test_groups_are_edges_of_one_operation_from_one_state():
    found = discrete.groups(cell_of(True))
    assert found == {
        "sep_conv_3x3": [Group((1,), 0, 2)],
        "skip_connect": [Group((3,), 0, 2), Group((0,), 1, 2), Group((2,), 2, 1)],
    }
    assert discrete.groups(cell_of(False))["sep_conv_3x3"] == [Group((0, 3), 0, 1)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_edge_is_in_one_group(name):
    found = PUBLISHED[name]
    for edges, concat, reduction in (
        (found.normal, found.normal_concat, False),
        (found.reduce, found.reduce_concat, True),
    ):
        cell = Cell(edges, concat, CHANNELS, (3, 4), reduction, False)
        positions = sorted(
            position
            for members in discrete.groups(cell).values()
            for group in members
            for position in group.positions
        )
        assert positions == list(range(len(edges)))


def test_pooling_and_identity_have_no_norm():
    edges = (("max_pool_3x3", 0), ("skip_connect", 1), ("avg_pool_3x3", 2), ("none", 0))
    cell = Cell(edges, (2, 3), CHANNELS, (3, 4), False, False)
    assert set(discrete.norm_shapes(cell, DISCRETE_OPERATIONS)) == set(discrete.PREPROCESS)
    reduction = discrete.norm_shapes(cell._replace(reduction=True), DISCRETE_OPERATIONS)
    assert reduction["skip_connect"] == {"norm": (1, CHANNELS)}


def test_edges_are_dropped_but_for_identities():
    cell = Cell(
        (("skip_connect", 0), ("avg_pool_3x3", 1)), (2,), CHANNELS, (CHANNELS,) * 2, False, False
    )
    kernels = draw_tree(0, discrete.shapes(cell, OPERATIONS))
    affine = unit(discrete.norm_shapes(cell, OPERATIONS))
    inputs = draw(1, (3, SIZE, SIZE, CHANNELS)), draw(2, (3, SIZE, SIZE, CHANNELS))

    @jax.jit
    def run(keep):
        return discrete.discrete(kernels, affine, None, inputs, cell, DISCRETE_OPERATIONS, keep)[0]

    both, only_identity = run(jnp.ones((2, 3))), run(jnp.zeros((2, 3)))
    np.testing.assert_allclose(
        only_identity, batch_norm(relu(inputs[0]) @ kernels["preprocess_0"]["kernel"][0], None)[0]
    )
    twice = run(jnp.stack([jnp.ones(3), jnp.array([2.0, 1.0, 0.0])]))
    pooled = both - only_identity
    for sample, factor in enumerate((2, 1, 0)):
        expected = only_identity[sample] + factor * pooled[sample]
        np.testing.assert_allclose(twice[sample], expected, rtol=1e-12, atol=1e-12)


def test_none_is_zero():
    cell = Cell((("none", 0), ("none", 1)), (2,), CHANNELS, (CHANNELS,) * 2, True, False)
    kernels = draw_tree(0, discrete.shapes(cell, DISCRETE_OPERATIONS))
    affine = unit(discrete.norm_shapes(cell, DISCRETE_OPERATIONS))
    inputs = draw(1, (3, SIZE, SIZE, CHANNELS)), draw(2, (3, SIZE, SIZE, CHANNELS))
    y, _ = discrete.discrete(kernels, affine, None, inputs, cell, DISCRETE_OPERATIONS)
    np.testing.assert_array_equal(y, np.zeros((3, SIZE // 2, SIZE // 2, CHANNELS)))
