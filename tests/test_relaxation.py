"""The relaxations by their formulas, as layers over `softmax`, and in a search."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_network import TinyNetwork

from darts_jax import hypergradient, relaxation, search
from darts_jax.relaxation import EVALUATION, Context

ALPHA = np.random.default_rng(0).normal(size=(5, 4))
W_OPTIMIZER = optax.sgd(0.1, momentum=0.9)
ALPHA_OPTIMIZER = optax.adam(0.05)
ESTIMATORS = {
    "first_order": lambda problem, _: hypergradient.first_order(problem),
    "unrolled": hypergradient.unrolled,
    "reverse": partial(hypergradient.unrolled, mode="reverse"),
    "finite_difference": hypergradient.finite_difference,
    "neumann": partial(hypergradient.neumann, num_terms=2),
}
RANDOM = {
    "concrete": relaxation.concrete(0.5),
    "gumbel": relaxation.gumbel(0.5),
    "dirichlet": relaxation.dirichlet,
}
EACH = {
    "softmax": relaxation.softmax,
    "tempered": relaxation.tempered_softmax(0.7),
    "sigmoid": relaxation.sigmoid,
    **RANDOM,
}


def draws(relax, count, alpha=ALPHA):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.jit(jax.vmap(lambda key: relax(jnp.asarray(alpha), Context(key, 0.5))))(keys)


def by_numpy(logits):
    power = np.exp(logits)
    return power / power.sum(-1, keepdims=True)


def test_softmax_of_every_leaf():
    rng = np.random.default_rng(0)
    alpha = {"normal": rng.normal(size=(14, 8)), "nested": [rng.normal(size=(3, 5, 4))]}
    weights = relaxation.softmax(alpha)
    assert jax.tree.structure(weights) == jax.tree.structure(alpha)

    for given, found in zip(jax.tree.leaves(alpha), jax.tree.leaves(weights), strict=True):
        np.testing.assert_allclose(found, by_numpy(given), rtol=1e-5)


def test_softmax_gradient():
    p = relaxation.softmax(jnp.array([0.3, -1.0, 2.0]))
    jacobian = jax.jacobian(relaxation.softmax)(jnp.array([0.3, -1.0, 2.0]))
    np.testing.assert_allclose(jacobian, np.diag(p) - np.outer(p, p), atol=1e-6)


def test_softmax_of_extreme_alphas():
    np.testing.assert_array_equal(relaxation.softmax(jnp.array([1e4, 0.0, -1e4])), [1, 0, 0])


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_tempered_softmax(temperature, x64):
    found = relaxation.tempered_softmax(temperature)({"normal": jnp.asarray(ALPHA)})["normal"]
    np.testing.assert_allclose(found, by_numpy(ALPHA / temperature), rtol=1e-12)


def test_a_schedule_of_temperatures(x64):
    relax = relaxation.tempered_softmax(relaxation.linear(10, 0.1))
    for progress, temperature in ((0.0, 10), (0.5, 5.05), (1.0, 0.1)):
        found = relax(jnp.asarray(ALPHA), Context(None, progress))
        np.testing.assert_allclose(found, by_numpy(ALPHA / temperature), rtol=1e-12)
    with pytest.raises(ValueError, match="with_context"):
        relax(jnp.asarray(ALPHA))


def test_concrete_is_a_softmax_of_gumbel_noise(x64):
    """The largest weight is that of operation o with the probability softmax(alpha)_o."""
    drawn = draws(relaxation.concrete(0.5), 4_000)
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-12)
    share = jax.nn.one_hot(drawn.argmax(-1), 4).mean(0)
    np.testing.assert_allclose(share, by_numpy(ALPHA), atol=0.03)
    # log w_0 - log w_1 = (alpha_0 - alpha_1 + G_0 - G_1) / temperature: a logistic difference.
    logits = 0.5 * (jnp.log(drawn[..., 0]) - jnp.log(drawn[..., 1])) - (ALPHA[:, 0] - ALPHA[:, 1])
    np.testing.assert_allclose(logits.mean(), 0, atol=0.1)
    np.testing.assert_allclose(logits.var(), np.pi**2 / 3, rtol=0.05)


def test_gumbel_is_the_hard_concrete_with_its_gradient(x64):
    alpha, context = jnp.asarray(ALPHA), Context(jax.random.key(3), 0.5)
    soft, hard = relaxation.concrete(0.5), relaxation.gumbel(0.5)
    weights = hard(alpha, context)
    np.testing.assert_array_equal(weights, np.eye(4)[soft(alpha, context).argmax(-1)])
    values = jnp.asarray(np.random.default_rng(1).normal(size=ALPHA.shape))
    gradients = [
        jax.grad(lambda a, relax=relax: (values * relax(a, context)).sum())(alpha)
        for relax in (soft, hard)
    ]
    np.testing.assert_array_equal(*gradients)
    np.testing.assert_array_equal(hard(alpha, EVALUATION), np.eye(4)[ALPHA.argmax(-1)])


def test_sigmoid(x64):
    found = relaxation.sigmoid({"normal": jnp.asarray(ALPHA)})["normal"]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-ALPHA)), rtol=1e-12)


def test_dirichlet(x64):
    concentration = np.where(ALPHA > 0, ALPHA + 1, np.exp(ALPHA))
    total = concentration.sum(-1, keepdims=True)
    mean = concentration / total
    np.testing.assert_allclose(
        relaxation.dirichlet(jnp.asarray(ALPHA), EVALUATION), mean, rtol=1e-12
    )
    drawn = draws(relaxation.dirichlet, 4_000)
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(drawn.mean(0), mean, atol=0.03)
    np.testing.assert_allclose(drawn.var(0), mean * (1 - mean) / (total + 1), atol=0.01)


def test_dirichlet_gradient(x64):
    """The mean gradient of draws is that of the mean."""
    values = jnp.asarray(np.random.default_rng(1).normal(size=ALPHA.shape))

    def value(alpha, context):
        return (values * relaxation.dirichlet(alpha, context)).sum()

    keys = jax.random.split(jax.random.key(0), 4_000)
    gradient = jax.vmap(lambda key: jax.grad(value)(jnp.asarray(ALPHA), Context(key, 0.5)))(keys)
    expected = jax.grad(value)(jnp.asarray(ALPHA), EVALUATION)
    np.testing.assert_allclose(gradient.mean(0), expected, atol=0.06)
    assert abs(expected).max() > 0.2


@pytest.mark.parametrize("alpha", [-100.0, 0.0, 50.0])
def test_dirichlet_of_extreme_alphas(alpha):
    def value(alpha, key):
        return relaxation.dirichlet(jnp.full((2, 3), alpha), Context(key, 0.5))[0, 0]

    value, slope = jax.value_and_grad(value)(alpha, jax.random.key(0))
    assert 0 <= value <= 1 and np.isfinite(slope)


@pytest.mark.parametrize("relax", RANDOM.values(), ids=RANDOM)
def test_noise_is_of_the_key_alone(relax):
    alpha = {"normal": jnp.zeros((5, 4)), "reduce": jnp.zeros((5, 4))}
    a, b, other = (relax(alpha, Context(jax.random.key(i), 0.5)) for i in (0, 0, 1))
    assert (a["normal"] == b["normal"]).all()
    assert (a["normal"] != other["normal"]).any() and (a["normal"] != a["reduce"]).any()
    with pytest.raises(ValueError, match="needs a context"):
        relax(alpha)


@pytest.mark.parametrize("relax", EACH.values(), ids=EACH)
def test_minus_infinity_takes_an_operation_away(relax):
    """Others share its weight, as if it had not been there; no gradient is NaN."""
    mask = {"normal": ALPHA > np.sort(ALPHA)[:, 1:2]}
    alpha, context = {"normal": jnp.asarray(ALPHA, jnp.float32)}, Context(jax.random.key(0), 0.5)
    left = relaxation.masked(relax, mask)
    weights = left(alpha, context)["normal"]
    assert (weights[~mask["normal"]] == 0).all()
    without = np.where(mask["normal"], relax(alpha, context)["normal"], 0)
    if relax is relaxation.softmax:
        without /= without.sum(-1, keepdims=True)
        np.testing.assert_allclose(weights, without, rtol=1e-5)
    gradient = jax.grad(lambda a: (left(a, context)["normal"] * ALPHA).sum())(alpha)["normal"]
    assert np.isfinite(gradient).all() and (gradient[~mask["normal"]] == 0).all()


def test_softmax_into_nodes(x64):
    beta = np.random.default_rng(0).normal(size=9)  # 2, 3 and 4 edges
    found = relaxation.softmax_into_nodes(jnp.asarray(beta))
    parts = [by_numpy(part) for part in np.split(beta, (2, 5))]
    np.testing.assert_allclose(found, np.concatenate(parts), rtol=1e-12)
    other = relaxation.softmax_into_nodes(jnp.asarray(beta[:5]), (1, 2, 2))
    parts = [by_numpy(part) for part in np.split(beta[:5], (1, 3))]
    np.testing.assert_allclose(other, np.concatenate(parts), rtol=1e-12)


def test_edge_weights_stand_beside_the_cells():
    alpha = {"normal": jnp.asarray(ALPHA), "normal_edges": jnp.arange(5.0)}
    weights = relaxation.edge_weighted(relaxation.sigmoid)(alpha)
    assert set(weights) == set(alpha)
    np.testing.assert_array_equal(weights["normal"], relaxation.sigmoid(alpha["normal"]))
    np.testing.assert_allclose(weights["normal_edges"][:2].sum(), 1, rtol=1e-6)


def test_auxiliary_skip_decays():
    relax = relaxation.with_auxiliary_skip(relaxation.softmax, relaxation.linear(0.8, 0))
    alpha = {"normal": jnp.asarray(ALPHA), "normal_edges": jnp.zeros(5)}
    for progress, strength in ((0.0, 0.8), (0.25, 0.6), (1.0, 0.0)):
        weights = relax(alpha, Context(None, progress))
        assert weights["normal"].shape == (5, 5) and weights["normal_edges"].shape == (5,)
        np.testing.assert_array_equal(weights["normal"][:, :4], relaxation.softmax(alpha["normal"]))
        np.testing.assert_allclose(weights["normal"][:, 4], strength, rtol=1e-6)


# In a search.


def batch(seed):
    rng = np.random.default_rng(seed)
    return search.Batch(jnp.asarray(rng.normal(size=(4, 4, 4, 1)), jnp.float32), jnp.arange(4))


def searched(relax, steps=2, with_context=True):
    network = TinyNetwork(2, 3, 10, nodes=1)
    state = search.init(jax.random.key(0), network, W_OPTIMIZER, ALPHA_OPTIMIZER, (4, 4, 1))
    step = search.make_step(
        network,
        lambda problem: hypergradient.unrolled(problem, W_OPTIMIZER),
        W_OPTIMIZER,
        ALPHA_OPTIMIZER,
        relax,
    )
    if with_context:
        step = search.with_context(step, steps)
    for _ in range(steps):
        state, metrics = step(state, batch(0), batch(1))
    return state._replace(key=jax.random.key_data(state.key)), metrics


def same_bits(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


OFF = {
    "context": relaxation.softmax,
    "temperature": relaxation.tempered_softmax(1.0),
    "edges": relaxation.edge_weighted(relaxation.softmax),
    "mask": relaxation.masked(
        relaxation.softmax, dict.fromkeys(("normal", "reduce"), np.ones((2, 8), bool))
    ),
}


@pytest.fixture(scope="module")
def plain():
    return searched(relaxation.softmax, with_context=False)


@pytest.mark.parametrize("relax", OFF.values(), ids=OFF)
def test_switched_off_is_plain_darts(plain, relax):
    assert same_bits(searched(relax), plain)


@pytest.mark.parametrize("relax", [RANDOM["gumbel"], RANDOM["dirichlet"]], ids=["gumbel", "dir"])
def test_switched_on_is_another_search(plain, relax):
    state, metrics = searched(relax)
    assert np.isfinite(metrics).all()
    assert not same_bits(state.alpha, plain[0].alpha)
    assert same_bits(searched(relax), (state, metrics))


def bilevel(relax):
    """Losses of plain functions; the batch is a context."""
    rng = np.random.default_rng(2)
    values, targets = jnp.asarray(rng.normal(size=(2, 3, 4)))

    def loss(w, alpha, context):
        weights = relax(alpha, context)
        return (jnp.tanh(w * weights).sum(-1) - targets.sum(-1)).var() + (values * w**2).mean()

    return hypergradient.Bilevel(loss, loss), jnp.asarray(rng.normal(size=(3, 4)))


@pytest.mark.parametrize("relax", EACH.values(), ids=EACH)
def test_every_estimator_takes_it(relax, x64):
    problem, w = bilevel(relax)
    batches = [Context(jax.random.key(i), 0.5) for i in range(2)]
    gradient = {
        name: make(problem, W_OPTIMIZER)(
            jnp.asarray(ALPHA[:3]), w, W_OPTIMIZER.init(w), *batches
        ).gradient
        for name, make in ESTIMATORS.items()
    }
    assert all(np.isfinite(found).all() and found.any() for found in gradient.values())
    np.testing.assert_allclose(gradient["unrolled"], gradient["reverse"], rtol=1e-10, atol=1e-12)
    # A difference is of the same draws.
    np.testing.assert_allclose(gradient["finite_difference"], gradient["unrolled"], atol=1e-4)


def test_keys_of_a_step():
    """Another one in each step and for each half, whatever else the key of a step is split in."""
    seen = []

    def step(state, train, val):
        seen.extend([train.context, val.context])
        return state._replace(step=state.step + 1), None

    state = search.SearchState(jnp.int32(0), jax.random.key(0), *[None] * 5)
    for _ in range(3):
        state, _ = search.with_context(step, 4)(state, batch(0), batch(1))
    keys = [tuple(np.asarray(jax.random.key_data(context.key))) for context in seen]
    for i in range(3):
        children = jax.random.split(jax.random.fold_in(jax.random.key(0), i))
        keys += map(tuple, np.asarray(jax.random.key_data(children)))
    assert len(set(keys)) == 12
    assert [float(context.progress) for context in seen] == [0, 0, 0.25, 0.25, 0.5, 0.5]


def test_random_searches_side_by_side():
    """vmap over seeds: each draws its own."""
    network = TinyNetwork(2, 3, 10, nodes=1)
    loss = search.make_loss(network, RANDOM["gumbel"])
    state = search.init(jax.random.key(0), network, W_OPTIMIZER, ALPHA_OPTIMIZER, (4, 4, 1))

    @jax.jit
    def value(key):
        inputs = search.Inputs(batch(0)._replace(context=Context(key, 0.5)), state.carry)
        return loss(state.w, state.alpha, inputs)[0]

    keys = jax.random.split(jax.random.key(0), 3)
    mapped = jax.vmap(value)(keys)
    np.testing.assert_allclose(mapped, [value(key) for key in keys], rtol=1e-5)
    assert len(set(mapped.tolist())) == 3
