"""Partial channels, edge weights and the auxiliary skip in cells and networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from darts_jax import cells, hypergradient, relaxation, search
from darts_jax.networks import Supernet
from darts_jax.operations import OPERATIONS, Operation

SIZE, CHANNELS, EDGES = 4, 6, 5


def _double(params, x, stride, norm):
    """Without parameters or batch norm: what a cell makes of it can be told by hand."""
    return 2 * x[:, ::stride, ::stride, None]


def _square(params, x, stride, norm):
    return x[:, ::stride, ::stride, None] ** 2


TABLE = {
    "double": Operation(_double, normalized=lambda stride: False),
    "square": Operation(_square, normalized=lambda stride: False),
}
COLUMNS = {"double": 1, "square": 2}  # column 0 is none


def draw(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def cell(inputs, weights, reduction, **options):
    return jax.jit(
        lambda: cells.relaxed(
            {},
            None,
            inputs,
            weights,
            groups=cells.groups(EDGES, reduction, TABLE),
            columns=COLUMNS,
            **options,
        )
    )()


def by_hand(inputs, weights, edge_weights, groups, reduction):
    """PC-DARTS edge by edge, channel by channel, in the order of alpha's rows."""
    states, edge = list(map(np.asarray, inputs)), 0
    for node in range(2):
        total = 0
        for source in range(2 + node):
            x, stride = states[source], 2 if reduction and source < 2 else 1
            share = CHANNELS // groups
            through, past = x[..., :share], x[..., share:]
            size = SIZE // stride
            if stride == 2:
                past = past.reshape(2, size, 2, size, 2, -1).max((2, 4))
            at = through[:, ::stride, ::stride]
            together = np.concatenate(
                [weights[edge, 1] * 2 * at + weights[edge, 2] * at**2, past], -1
            )
            shuffled = np.empty_like(together)
            for channel in range(CHANNELS):
                group, inside = divmod(channel, share)
                shuffled[..., inside * groups + group] = together[..., channel]
            total = total + edge_weights[edge] * shuffled
            edge += 1
        states.append(total)
    return np.concatenate(states[2:], -1)


@pytest.mark.parametrize("reduction", [False, True], ids=["normal", "reduction"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_a_cell_with_partial_channels_and_edge_weights(groups, reduction, x64):
    inputs = [draw(i, (2, SIZE, SIZE, CHANNELS)) for i in range(2)]
    weights, edge_weights = draw(2, (EDGES, 3)), draw(3, (EDGES,))
    y, batch = cell(inputs, weights, reduction, partial=groups, edge_weights=edge_weights)
    np.testing.assert_allclose(
        y, by_hand(inputs, weights, edge_weights, groups, reduction), rtol=1e-12, atol=1e-12
    )
    assert batch.mean.shape == (0, CHANNELS // groups)


def test_switched_off_is_the_plain_cell_bit_for_bit():
    inputs = [draw(i, (2, SIZE, SIZE, CHANNELS)).astype(jnp.float32) for i in range(2)]
    weights = draw(2, (EDGES, 3)).astype(jnp.float32)
    plain, _ = cell(inputs, weights, True)
    off, _ = cell(inputs, weights, True, partial=1, edge_weights=jnp.ones(EDGES, jnp.float32))
    np.testing.assert_array_equal(plain, off)


@pytest.mark.parametrize("partial", [0, 4])
def test_partial_must_divide_the_channels(partial):
    network = Supernet(6, 3, 10, partial=partial)
    with pytest.raises(ValueError, match=f"partial is {partial}; give a divisor of 6 channels"):
        jax.eval_shape(
            lambda: network.init(
                jax.random.key(0),
                jnp.zeros((1, 8, 8, 1)),
                dict.fromkeys(("normal", "reduce"), jnp.zeros((14, 8))),
                train=True,
            )
        )


SKIP = "auxiliary_skip"


def network(**options):
    """Of cheap operations."""
    table = {name: OPERATIONS[name] for name in ("max_pool_3x3", "skip_connect")}
    names = ("none", *table)
    if options.pop("skip", False):
        table, names = {**table, SKIP: OPERATIONS["skip_connect"]}, (*names, SKIP)
    return Supernet(4, 3, 10, nodes=1, operations=FrozenDict(table), primitives=names, **options)


def start(net, **options):
    optimizer = optax.sgd(0.05)
    return search.init(
        jax.random.key(0),
        net,
        optimizer,
        optimizer,
        (8, 8, 1),
        lambda key, net: search.init_alpha(key, net, **options),
    )


def batch(seed):
    return search.Batch(draw(seed, (4, 8, 8, 1)).astype(jnp.float32), jnp.arange(4))


def test_a_search_with_partial_channels_and_edge_weights():
    """Fewer parameters, and betas that move."""
    net = network(partial=2)
    state, optimizer = start(net, edge_weights=True), optax.sgd(0.05)
    assert set(state.alpha) == {"normal", "reduce", "normal_edges", "reduce_edges"}
    plain = start(network())
    for name in plain.alpha:
        np.testing.assert_array_equal(state.alpha[name], plain.alpha[name])
    assert state.w["cell_1"]["edges"]["skip_connect"]["conv_1"].shape == (2, 4, 2)
    assert plain.w["cell_1"]["edges"]["skip_connect"]["conv_1"].shape == (2, 8, 4)
    relax = relaxation.edge_weighted(relaxation.softmax)
    before = jax.device_get(state.alpha)
    step = search.make_step(
        net, lambda p: hypergradient.unrolled(p, optimizer), optimizer, optimizer, relax
    )
    state, metrics = step(state, batch(0), batch(1))
    assert np.isfinite(metrics).all()
    assert all((before[name] != state.alpha[name]).any() for name in before)
    evaluate = search.make_evaluate(net, relax)
    assert np.isfinite(evaluate(state, batch(0), jnp.ones(4, bool))[0])


def test_an_auxiliary_skip_adds_itself_to_every_edge():
    """Against the same network whose own skip connection has the sum of both weights."""
    net, plain = network(skip=True), network()
    state, alone = start(net, fixed=1), start(plain)
    for name in alone.alpha:
        assert state.alpha[name].shape == (2, 3)
        np.testing.assert_array_equal(state.alpha[name], alone.alpha[name])
    w = jax.tree.map(lambda x: x, state.w)
    for i in range(3):
        edges = w[f"cell_{i}"].get("edges", {})
        if "skip_connect" in edges:
            edges[SKIP] = edges["skip_connect"]
    variables = {"params": w, "batch_stats": state.carry}
    relax = relaxation.with_auxiliary_skip(relaxation.softmax, relaxation.linear(0.8, 0))
    weights = relax(state.alpha, relaxation.Context(None, 0.25))

    def logits(net, params, weights, stats):
        return jax.jit(
            lambda: net.apply(
                {"params": params, "batch_stats": stats},
                batch(0).image,
                weights,
                train=True,
                mutable=["batch_stats"],
            )[0]
        )()

    def without(tree):
        return {
            name: {k: v for k, v in leaf.items() if k != SKIP} if name == "edges" else leaf
            for name, leaf in tree.items()
        }

    own = {n: without(leaf) if n.startswith("cell") else leaf for n, leaf in w.items()}
    summed = {n: a[:, :3].at[:, 2].add(a[:, 3]) for n, a in weights.items()}
    np.testing.assert_allclose(weights["normal"][:, 3], 0.6, rtol=1e-6)
    np.testing.assert_allclose(
        logits(net, variables["params"], weights, state.carry),
        logits(plain, own, summed, alone.carry),
        rtol=1e-4,
        atol=1e-5,
    )
