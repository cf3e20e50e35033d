"""Networks of the cells of NAS-Bench-201."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import convolution, dag_cell, dag_network, hypergradient, search
from darts_jax.operations import EPSILON
from darts_jax.spaces import nasbench201, nasbench201_small

SPACE = nasbench201.SPACE
SMALL = nasbench201_small.SPACE
MIXED = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_1x1~1|+|none~0|avg_pool_3x3~1|nor_conv_3x3~2|"
SIZES = {"num_classes": 3, "channels": 2, "stages": 1, "cells": 2}


def of_choice(variables, members):
    """The discrete network's part of the relaxed one's variables."""
    every = dag_cell.members(members.edges, members.primitives)
    held = dag_cell.members(members.edges, members.primitives, members.choice)

    def cut(tree):
        found = {}
        for name, leaf in tree.items():
            if name in ("kernels", "moments") and isinstance(leaf, dict):
                rows = {o: [every[o].index(e) for e in held[o]] for o in leaf if held[o]}
                found[name] = {
                    o: jax.tree.map(lambda x, r=r: x[np.array(r)], leaf[o]) for o, r in rows.items()
                }
            else:
                found[name] = cut(leaf) if isinstance(leaf, dict) else leaf
        return found

    return cut(variables)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(
    ("space", "text"),
    [
        (SPACE, MIXED),
        (SPACE, MIXED.replace("nor_conv_3x3~0", "none~0", 1)),
        (SMALL, "|nor_conv_3x3~0|+|skip_connect~0|nor_conv_1x1~1|+|none~1|nor_conv_3x3~2|"),
        (SMALL, "|none~0|+|none~0|nor_conv_1x1~1|+|none~1|nor_conv_3x3~2|"),
    ],
)
def test_one_hot_weights_make_the_discrete_network(space, text, train):
    relaxed = space.relaxed(**SIZES)
    discrete = space.discrete(text, affine=False, **SIZES)
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
    weights = jnp.asarray(space.encode(text))
    variables = relaxed.init(jax.random.key(1), x, weights, train=True)
    part = of_choice(variables, discrete)
    shapes = jax.eval_shape(lambda: discrete.init(jax.random.key(1), x, train=True))
    assert jax.tree.map(jnp.shape, part) == jax.tree.map(lambda s: s.shape, shapes)
    if train:
        expected, after = relaxed.apply(variables, x, weights, train=True, mutable=["batch_stats"])
        found, own = discrete.apply(part, x, train=True, mutable=["batch_stats"])
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            own,
            of_choice(after, discrete),
        )
    else:
        expected = relaxed.apply(variables, x, weights, train=False)
        found = discrete.apply(part, x, train=False)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_search_step():
    network = SMALL.relaxed(num_classes=3, channels=2, cells=1)
    w_optimizer, alpha_optimizer = optax.sgd(0.1), optax.adam(0.1)
    state = search.init(jax.random.key(0), network, w_optimizer, alpha_optimizer, (4, 4, 1))
    assert state.alpha.shape == (5, 4)
    estimator = partial(hypergradient.unrolled, inner_optimizer=w_optimizer)
    step = search.make_step(network, estimator, w_optimizer, alpha_optimizer, SMALL.relax)
    images = jax.random.normal(jax.random.key(1), (6, 4, 4, 1))
    batch = search.Batch(images, jnp.arange(6) % 3)
    before = np.asarray(state.alpha)
    state, metrics = step(state, batch, batch)
    assert metrics.nonfinite == -1
    assert (np.asarray(state.alpha) != before).any()
    assert SMALL.derive(state.alpha).startswith("|")


def test_a_cell_by_hand():
    """ReLU, convolution, batch norm, weighted; then summed at the node, by the definition."""
    edges, primitives = ((0, 1),), ("none", "skip_connect", "nor_conv_1x1")
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))
    kernel = jax.random.normal(jax.random.key(1), (1, 1, 1, 2, 2))
    y, batch = dag_cell.cell(
        {"nor_conv_1x1": kernel}, {}, None, x, jnp.array([[0.5, 0.2, 0.3]]),
        edges=edges, primitives=primitives,
        members=dag_cell.members(edges, primitives), conv=convolution.conv,
    )  # fmt: skip
    raw = np.maximum(x, 0) @ np.asarray(kernel)[0, 0, 0]
    mean, var = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
    np.testing.assert_allclose(
        y, 0.2 * x + 0.3 * (raw - mean) / np.sqrt(var + EPSILON), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(batch["nor_conv_1x1"].var[0], var * 48 / 47, rtol=1e-5)


@pytest.mark.parametrize("edge_weights", [None, (0.5, 0.2, 0.8)], ids=["edges alike", "weighed"])
@pytest.mark.parametrize("partial", [1, 2, 4])
def test_partial_channels(partial, edge_weights):
    """PC-DARTS edge after edge, channel by channel; of one part, the plain cell."""
    edges, primitives = ((0, 1), (0, 2), (1, 2)), ("none", "skip_connect", "nor_conv_1x1")
    share = 4 // partial
    x = jax.random.normal(jax.random.key(0), (3, 4, 4, 4))
    kernels = jax.random.normal(jax.random.key(1), (3, 1, 1, share, share))  # by source
    weights = jax.random.normal(jax.random.key(2), (3, 3))
    y, _ = dag_cell.cell(
        {"nor_conv_1x1": kernels}, {}, None, x, weights,
        edges=edges, primitives=primitives, partial=partial,
        members=dag_cell.members(edges, primitives), conv=convolution.conv,
        edge_weights=None if edge_weights is None else jnp.array(edge_weights),
    )  # fmt: skip

    def edge(state, number):
        through, past = state[..., :share], state[..., share:]
        raw = np.maximum(through, 0) @ np.asarray(kernels)[number, 0, 0]
        mean, var = raw.mean((0, 1, 2)), raw.var((0, 1, 2))
        normalized = (raw - mean) / np.sqrt(var + EPSILON)
        mixed = weights[number, 1] * through + weights[number, 2] * normalized
        together, shuffled = np.concatenate([mixed, past], -1), np.empty_like(state)
        for channel in range(4):
            group, inside = divmod(channel, share)
            shuffled[..., inside * partial + group] = together[..., channel]
        return shuffled * (1 if edge_weights is None else edge_weights[number])

    first = edge(np.asarray(x), 0)
    expected = edge(np.asarray(x), 1) + edge(first, 2)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def test_a_network_with_partial_channels():
    network = SMALL.relaxed(num_classes=3, channels=4, partial=2)
    x, weights = jnp.ones((2, 4, 4, 1)), jnp.ones((5, 4))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, weights, train=True))
    assert shapes["params"]["cell_0_0"]["kernels"]["nor_conv_3x3"].shape == (5, 3, 3, 2, 2)
    with pytest.raises(ValueError, match="partial is 3; give a divisor of 4 channels"):
        network.clone(partial=3).init(jax.random.key(0), x, weights)
    with pytest.raises(ValueError, match="partial is 2; give 1 for a discrete network"):
        network.clone(choice=(0,) * 5).init(jax.random.key(0), x)


def test_weights_of_edges_come_by_name():
    """1 for each is the network without; another one is not."""
    network = SMALL.relaxed(num_classes=3, channels=4, partial=2)
    x = jax.random.normal(jax.random.key(0), (4, 4, 4, 1))
    weights = jax.random.uniform(jax.random.key(1), (5, 4))
    variables = network.init(jax.random.key(2), x, weights)
    plain = network.apply(variables, x, weights)
    ones = {"cell": weights, "cell_edges": jnp.ones(5)}
    np.testing.assert_array_equal(network.apply(variables, x, ones), plain)
    other = {**ones, "cell_edges": jnp.array([1, 1, 1, 1, 0.5])}
    assert (network.apply(variables, x, other) != plain).any()


def test_affine_batch_norms_start_as_plain_ones():
    text = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|nor_conv_1x1~1|none~2|"
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 1))
    plain = SPACE.discrete(text, affine=False, **SIZES)
    affine = SPACE.discrete(text, **SIZES)
    variables = affine.init(jax.random.key(1), x, train=True)
    own = plain.init(jax.random.key(1), x, train=True)
    found, _ = affine.apply(variables, x, train=True, mutable=["batch_stats"])
    expected, _ = plain.apply(own, x, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + 1 if "bias" in jax.tree_util.keystr(path[-2:]) else leaf,
        variables,
    )
    other, _ = affine.apply(moved, x, train=True, mutable=["batch_stats"])
    assert np.abs(other - found).max() > 0.1


@pytest.mark.parametrize(
    ("size", "weights", "message"),
    [
        ((6, 6), (6, 4), r"weights have shape \[6, 4\]; this cell needs \[6, 5\]"),
        ((6, 6), (6, 5), "images of 6x6 do not halve 2 times"),
    ],
)
def test_what_does_not_fit(size, weights, message):
    with pytest.raises(ValueError, match=message):
        SPACE.relaxed(3).init(jax.random.key(0), jnp.zeros((1, *size, 1)), jnp.ones(weights))


def test_the_published_skeleton():
    """The parameters of one of the best published architectures, counted by hand."""
    text = MIXED.replace("nor_conv_1x1", "nor_conv_3x3").replace("none", "skip_connect")
    text = text.replace("avg_pool_3x3", "nor_conv_3x3")
    network = SPACE.discrete(text, num_classes=10)
    shapes = jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=True)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    # Five 3x3 convolutions with an affine norm in each of 5 cells of 3 stages, and the skeleton.
    cells = sum(5 * 5 * (9 * c * c + 2 * c) for c in (16, 32, 64))
    blocks = sum(9 * c * 2 * c + 9 * 4 * c * c + 2 * c * c + 2 * 4 * c for c in (16, 32))
    assert count == cells + blocks + (27 * 16 + 32) + 2 * 64 + 64 * 10 + 10


def test_matmul_conv_is_a_convolution():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    for size, stride in ((3, 1), (3, 2), (1, 1), (5, 1)):
        kernel = jax.random.normal(jax.random.key(size), (size, size, 3, 4))
        arguments = (x, kernel, stride, size // 2)
        np.testing.assert_allclose(
            convolution.matmul_conv(*arguments), convolution.conv(*arguments), rtol=1e-4, atol=1e-4
        )


def test_one_hot():
    np.testing.assert_array_equal(dag_network.one_hot(jnp.array([2, 0]), 3), [[0, 0, 1], [1, 0, 0]])
