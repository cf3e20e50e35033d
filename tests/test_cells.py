"""Relaxed cells against recorded mixed operations, and against discrete cells written plainly."""

import math

import jax
import jax.numpy as jnp
import layout
import numpy as np
import pytest

from darts_jax import cells, genotype
from darts_jax.cells import Group
from darts_jax.genotype import CNN_PRIMITIVES
from darts_jax.operations import OPERATIONS, Moments, moments, normalize, unbiased

pytestmark = pytest.mark.usefixtures("x64")

RTOL = 1e-9
COLUMNS = {name: CNN_PRIMITIVES.index(name) for name in OPERATIONS}
CHANNELS, SIZE = 2, 8


def close(actual, expected, rtol=RTOL):
    """Relative to the largest entry: a value near zero is a difference of larger ones."""

    def check(a, e):
        assert a.shape == e.shape
        np.testing.assert_allclose(a, e, rtol=rtol, atol=rtol * np.abs(e).max())

    jax.tree.map(check, actual, expected)


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


# One mixed operation.


@pytest.fixture
def recorded(oracle):
    """`recorded(stride)`: the arrays of the recorded mixed operation, images in our layout."""

    def group(stride):
        prefix = f"MixedOp/stride{stride}/"
        arrays = {
            key.removeprefix(prefix): value
            for key, value in oracle("ops.npz").items()
            if key.startswith(prefix)
        }
        images = ("input", "cotangent", "output", "grad_input")
        return {k: v.transpose(0, 2, 3, 1) if k in images else v for k, v in arrays.items()}

    return group


def mixed_params(group, stride, prefix="weight"):
    return {
        name: {
            leaf: jnp.asarray(to_ours(group[f"{prefix}._ops.{COLUMNS[name]}.{theirs}.weight"]))[
                None
            ]
            for leaf, (theirs, to_ours) in leaves.items()
        }
        for name, leaves in layout.PARAMETERS.items()
        if OPERATIONS[name].shapes(4, stride)
    }


def mixed(params, x, weights, stride, running=None):
    kernels = {name: OPERATIONS[name].prepare(leaves) for name, leaves in params.items()}
    return cells.mixed_operation(kernels, running, x, weights, stride=stride, operations=OPERATIONS)


def without_none(alpha):
    return jax.nn.softmax(alpha)[..., 1:]


@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_operation(recorded, stride):
    group = recorded(stride)
    assert tuple(OPERATIONS) == CNN_PRIMITIVES[1:]

    @jax.jit
    def run(params, alpha, x):
        def loss(params, alpha, x):
            y, _ = mixed(params, x, without_none(alpha)[None], stride)
            return (y[..., 0, :] * group["cotangent"]).sum(), y[..., 0, :]

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, alpha, x)

    params = mixed_params(group, stride)
    (_, y), (grad_params, grad_alpha, grad_x) = run(params, group["alpha"], group["input"])
    close(y, group["output"])
    close(grad_alpha, group["grad_alpha"])
    close(grad_x, group["grad_input"])
    close(grad_params, mixed_params(group, stride, "grad.weight"))


@pytest.mark.parametrize("stride", [1, 2])
def test_mixed_operation_by_running_statistics(recorded, stride):
    """Normalised by the batch's own moments, handed in as running ones, it is the same."""
    group = recorded(stride)
    params = mixed_params(group, stride)
    x, weights = group["input"], without_none(jnp.asarray(group["alpha"]))[None]
    y, batch = jax.jit(lambda: mixed(params, x, weights, stride))()
    rows = jax.tree.map(lambda *rows: jnp.concatenate(rows), *batch)
    keys, count = cells.norms(OPERATIONS, stride), math.prod(y.shape[:3])
    assert rows.mean.shape == rows.var.shape == (len(keys), 4)
    biased = Moments(rows.mean, rows.var * (count - 1) / count)
    running = {key: jax.tree.map(lambda m, i=i: m[i][None], biased) for i, key in enumerate(keys)}
    by_running, none = jax.jit(lambda: mixed(params, x, weights, stride, running))()
    assert none == []
    close(by_running, y, 1e-12)


# The layout of a cell.


@pytest.mark.parametrize("reduction", [False, True])
def test_groups_of_two_nodes(reduction):
    outer = 2 if reduction else 1
    assert cells.groups(5, reduction, OPERATIONS) == (
        Group(0, (0, 2), (2, 3), outer, OPERATIONS),
        Group(1, (1, 3), (2, 3), outer, OPERATIONS),
        Group(2, (4,), (3,), 1, OPERATIONS),
    )


def test_groups_of_different_candidates():
    """In the order of the operations' names, whatever theirs; "none" makes no difference."""
    skip, pool = ("skip_connect", "none"), ("max_pool_3x3", "skip_connect")
    candidates = (pool, skip, pool[::-1], pool, skip[:1])
    small = {"skip_connect": OPERATIONS["skip_connect"]}
    both = {"max_pool_3x3": OPERATIONS["max_pool_3x3"], **small}
    assert cells.groups(5, False, OPERATIONS, candidates) == (
        Group(0, (0, 2), (2, 3), 1, both),
        Group(1, (1,), (2,), 1, small),
        Group(1, (3,), (3,), 1, both),
        Group(2, (4,), (3,), 1, small),
    )


@pytest.mark.parametrize("num_edges", [2, 5, 9, 14, 20])
def test_groups_cover_alpha(num_edges):
    """Every row of alpha once: they go by destination, then by source, as recorded."""
    expected = [(i, j) for j in range(2, 8) for i in range(j)][:num_edges]
    found = [
        (edge, (group.state, node))
        for group in cells.groups(num_edges, False, OPERATIONS)
        for edge, node in zip(group.edges, group.destinations, strict=True)
    ]
    assert sorted(found) == list(enumerate(expected))
    assert [pair for _, pair in found] == sorted(expected)  # as parameters are stacked


def test_refuses_a_number_of_edges_that_no_cell_has():
    with pytest.raises(ValueError, match="6 edges"):
        cells.groups(6, False, OPERATIONS)


def test_shapes():
    normal, reduction = (
        cells.shapes(4, cells.groups(5, strided, OPERATIONS)) for strided in (False, True)
    )
    assert "skip_connect" not in normal
    assert reduction.pop("skip_connect") == {"conv_1": (4, 4, 2), "conv_2": (4, 4, 2)}
    assert normal == reduction
    assert normal["sep_conv_5x5"] == {
        "depthwise_1": (5, 5, 5, 4),
        "pointwise_1": (5, 4, 4),
        "depthwise_2": (5, 5, 5, 4),
        "pointwise_2": (5, 4, 4),
    }
    assert normal["dil_conv_3x3"] == {"depthwise": (5, 3, 3, 4), "pointwise": (5, 4, 4)}
    assert set(normal) == {"sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"}


@pytest.mark.parametrize(("reduction", "rows"), [(False, 5 * 8), (True, 4 * 9 + 8)])
def test_running_statistics(reduction, rows):
    stats = cells.running_statistics(3, cells.groups(5, reduction, OPERATIONS))
    assert stats.mean.shape == stats.var.shape == (rows, 3)
    assert not stats.mean.any() and (stats.var == 1).all()


def test_norms():
    inner = [("sep_conv_3x3", "norm_1"), ("sep_conv_5x5", "norm_1")]
    last = [(name, "norm") for name in OPERATIONS]
    assert list(cells.norms(OPERATIONS, 2)) == inner + last
    last.remove(("skip_connect", "norm"))
    assert list(cells.norms(OPERATIONS, 1)) == inner + last


# Whole cells. A discrete cell is a dict: node -> its kept (operation, source) pairs.

KEPT = {
    False: {
        2: (("sep_conv_3x3", 0), ("skip_connect", 1)),
        3: (("max_pool_3x3", 2), ("dil_conv_5x5", 0)),
        4: (("avg_pool_3x3", 1), ("sep_conv_5x5", 3)),
    },
    True: {
        2: (("skip_connect", 1), ("max_pool_3x3", 0)),
        3: (("skip_connect", 2), ("sep_conv_5x5", 1)),
        4: (("dil_conv_3x3", 0), ("dil_conv_5x5", 3)),
    },
}
NUM_EDGES = 9


def edge_of(source, node):
    """Row in alpha."""
    return genotype.edges(node - 1).index((source, node))


def parameter_row(source, node):
    """Row in the stacks of a cell's parameters."""
    return [(i, j) for i in range(4) for j in range(max(i + 1, 2), 5)].index((source, node))


def statistics_of(stats, source, node, key, reduction):
    """Moments [C] of one batch norm: rows go by source, then by norm, then by destination."""
    rows = [
        (i, k, j)
        for i in range(4)
        for k in cells.norms(OPERATIONS, stride_of(i, reduction))
        for j in range(max(i + 1, 2), 5)
    ]
    assert len(rows) == stats.mean.shape[0]
    return jax.tree.map(lambda m: m[rows.index((source, key, node))], stats)


def stride_of(source, reduction):
    return 2 if reduction and source < 2 else 1


def discrete(params, running, inputs, kept, reduction):
    """Output of a discrete cell, and its batch's moments by (source, node, (operation, norm))."""
    states, seen = list(inputs), {}
    for node, entries in kept.items():
        total = 0
        for name, source in entries:
            operation, stride = OPERATIONS[name], stride_of(source, reduction)

            def norm(inner, y, name=name, source=source, node=node):
                place, batch = (source, node, (name, inner)), moments(y)
                seen[place] = jax.tree.map(lambda m: m[0], unbiased(batch, y[..., 0, 0].size))
                if running is not None:
                    batch = statistics_of(running, *place, reduction)
                return normalize(y, batch)

            own = {}
            if operation.shapes(CHANNELS, stride):
                row = parameter_row(source, node)
                own = {leaf: stack[row : row + 1] for leaf, stack in params[name].items()}
            y = operation.apply(operation.prepare(own), states[source], stride, norm)
            y = norm("norm", y) if operation.normalized(stride) else y
            total = total + y[..., 0, :]
        states.append(total)
    return jnp.concatenate(states[2:], -1), seen


def one_hot(kept):
    """Mixing weights [edges, primitives] of a discrete cell: edges not kept choose "none"."""
    chosen = {edge_of(source, node): name for node, pairs in kept.items() for name, source in pairs}
    columns = [CNN_PRIMITIVES.index(chosen.get(edge, "none")) for edge in range(NUM_EDGES)]
    return jnp.eye(len(CNN_PRIMITIVES))[np.array(columns)]


def draw_cell(reduction, num_edges=NUM_EDGES):
    shapes = cells.shapes(CHANNELS, cells.groups(num_edges, reduction, OPERATIONS))
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    params = treedef.unflatten([draw(i, shape) for i, shape in enumerate(leaves)])
    inputs = tuple(draw(100 + i, (2, SIZE, SIZE, CHANNELS)) for i in range(2))
    return params, inputs


def relaxed(params, running, inputs, weights, reduction, candidates=None):
    return cells.relaxed(
        params,
        running,
        inputs,
        weights,
        groups=cells.groups(len(weights), reduction, OPERATIONS, candidates),
        columns=COLUMNS,
    )


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_one_hot_weights_make_the_discrete_cell(reduction):
    """Output, all gradients, and the batch's moments, each in its row."""
    kept = KEPT[reduction]
    params, inputs = draw_cell(reduction)
    size = SIZE // 2 if reduction else SIZE
    cotangent = draw(200, (2, size, size, 3 * CHANNELS))

    def differentiate(cell):
        def loss(params, inputs):
            y, batch = cell(params, inputs)
            return (y * cotangent).sum(), (y, batch)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, inputs)

    (_, (y, batch)), gradients = differentiate(
        lambda params, inputs: relaxed(params, None, inputs, one_hot(kept), reduction)
    )
    (_, (expected, seen)), expected_gradients = differentiate(
        lambda params, inputs: discrete(params, None, inputs, kept, reduction)
    )
    close(y, expected)
    close(gradients, expected_gradients)
    assert len(seen) >= 5
    for place, moment in seen.items():
        close(statistics_of(batch, *place, reduction), moment)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_one_hot_weights_by_running_statistics(reduction):
    kept = KEPT[reduction]
    params, inputs = draw_cell(reduction)
    groups = cells.groups(NUM_EDGES, reduction, OPERATIONS)
    shape = cells.running_statistics(CHANNELS, groups).mean.shape
    running = Moments(draw(300, shape), 0.5 + draw(301, shape) ** 2)
    y, none = jax.jit(lambda: relaxed(params, running, inputs, one_hot(kept), reduction))()
    assert none is None
    expected, _ = jax.jit(lambda: discrete(params, running, inputs, kept, reduction))()
    close(y, expected)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_cell_of_two_nodes_is_the_sum_of_its_mixed_operations(reduction):
    """Edge by edge, in the order of alpha, with weights that are all different."""
    params, inputs = draw_cell(reduction, num_edges=5)
    weights = jax.nn.softmax(draw(400, (5, len(CNN_PRIMITIVES))))
    rows = [0, 2, 1, 3, 4]  # of the parameters, for each row of alpha

    def plain():
        states = list(inputs)
        for node, edges in ((2, (0, 1)), (3, (2, 3, 4))):
            total = 0
            for source, edge in enumerate(edges):
                stride = 2 if reduction and source < 2 else 1
                own = {
                    name: {leaf: stack[rows[edge]][None] for leaf, stack in leaves.items()}
                    for name, leaves in params.items()
                    if OPERATIONS[name].shapes(CHANNELS, stride)
                }
                y, _ = mixed(own, states[source], weights[edge, 1:][None], stride)
                total = total + y[..., 0, :]
            assert node == len(states)
            states.append(total)
        return jnp.concatenate(states[2:], -1)

    y, batch = jax.jit(lambda: relaxed(params, None, inputs, weights, reduction))()
    size = SIZE // 2 if reduction else SIZE
    assert y.shape == (2, size, size, 2 * CHANNELS)
    close(y, jax.jit(plain)())
    fresh = cells.running_statistics(CHANNELS, cells.groups(5, reduction, OPERATIONS))
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(jnp.shape, fresh)


# Of each edge, in the order of alpha.
CANDIDATES = (
    ("none", "skip_connect", "dil_conv_3x3"),
    ("max_pool_3x3", "sep_conv_3x3"),
    ("skip_connect", "dil_conv_3x3"),  # as the first edge
    ("sep_conv_5x5",),
    ("skip_connect",),
)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
def test_edges_of_different_candidates(reduction):
    """The cell of all operations on every edge, but the weights that count for nothing are zero."""
    everything, inputs = draw_cell(reduction, num_edges=5)
    has = np.array([[name in own for name in CNN_PRIMITIVES] for own in CANDIDATES])
    weights = draw(400, has.shape)
    groups = cells.groups(5, reduction, OPERATIONS, CANDIDATES)
    all_groups = cells.groups(5, reduction, OPERATIONS)

    def rows(groups, name, leaf):
        """Edges by row of a parameter."""
        held = [
            group
            for group in groups
            if name in group.operations and leaf in OPERATIONS[name].shapes(CHANNELS, group.stride)
        ]
        return [edge for group in held for edge in group.edges]

    shapes = cells.shapes(CHANNELS, groups)
    params = {
        name: {
            leaf: everything[name][leaf][
                np.array([rows(all_groups, name, leaf).index(e) for e in rows(groups, name, leaf)])
            ]
            for leaf in leaves
        }
        for name, leaves in shapes.items()
    }
    assert jax.tree.map(jnp.shape, params) == shapes
    assert shapes["sep_conv_5x5"]["pointwise_1"][0] == 1

    def differentiate(params, candidates, weights):
        def loss(params, weights, inputs):
            y, batch = relaxed(params, None, inputs, weights, reduction, candidates)
            return jnp.sin(y).sum(), (y, batch)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(params, weights, inputs)

    (_, (y, batch)), own = differentiate(params, CANDIDATES, weights)
    (_, (expected, all_rows)), full = differentiate(everything, None, jnp.where(has, weights, 0))
    close(y, expected)
    close(own[1], jnp.where(has, full[1], 0).at[:, 0].set(0))
    close(own[2], full[2])
    for name, leaves in own[0].items():
        for leaf, gradient in leaves.items():
            at = np.array([rows(all_groups, name, leaf).index(e) for e in rows(groups, name, leaf)])
            close(gradient, full[0][name][leaf][at])

    def moment_rows(groups):
        return [
            (edge, key)
            for group in groups
            for key in cells.norms(group.operations, group.stride)
            for edge in group.edges
        ]

    at = np.array([moment_rows(all_groups).index(row) for row in moment_rows(groups)])
    close(batch, jax.tree.map(lambda m: m[at], all_rows))
    fresh = cells.running_statistics(CHANNELS, groups)
    assert jax.tree.map(jnp.shape, batch) == jax.tree.map(jnp.shape, fresh)
    by_running, _ = jax.jit(
        lambda: relaxed(params, batch, inputs, weights, reduction, CANDIDATES)
    )()
    again, _ = jax.jit(lambda: relaxed(everything, all_rows, inputs, weights * has, reduction))()
    close(by_running, again)


def test_a_table_without_parameters():
    """Of one operation that is normalised and one that is not, in another order of columns."""
    operations = {name: OPERATIONS[name] for name in ("skip_connect", "max_pool_3x3")}
    inputs = tuple(draw(i, (2, SIZE, SIZE, CHANNELS)) for i in range(2))
    weights = draw(2, (2, 3))
    y, batch = cells.relaxed(
        {},
        None,
        inputs,
        weights,
        groups=cells.groups(2, False, operations),
        columns={"max_pool_3x3": 0, "skip_connect": 2},
    )
    expected = 0
    for x, (pool, _, skip) in zip(inputs, weights, strict=True):
        pooled = OPERATIONS["max_pool_3x3"].apply({}, x, 1, None)[..., 0, :]
        expected = expected + pool * normalize(pooled, moments(pooled)) + skip * x
    close(y, expected, 1e-12)
    assert batch.mean.shape == (2, CHANNELS)
