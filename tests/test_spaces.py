"""Search spaces through their one interface."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import (
    cells,
    discrete,
    genotype,
    networks,
    relaxation,
    search,
    spaces,
    training,
)
from darts_jax.evaluation import count_parameters
from darts_jax.operations import DISCRETE_OPERATIONS
from darts_jax.spaces import nasbench201, nasbench201_small, s1, s4
from darts_jax.spaces._dag import from_string, to_string

EVERY = pytest.mark.parametrize("name", spaces.NAMES)
DARTS = ("darts", "s1", "s2", "s3", "s4")


def random_alpha(space, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda mask: rng.normal(size=mask.shape), space.allowed)


def test_the_files_are_the_names():
    expected = ("darts", "nasbench201", "nasbench201_small", "recurrent", "s1", "s2", "s3", "s4")
    assert spaces.NAMES == expected


def test_an_unknown_space():
    with pytest.raises(ValueError, match="unknown space 'nasbench'; use one of: nasbench201"):
        spaces.get("nasbench")


@EVERY
def test_shapes_agree(name):
    space = spaces.get(name)
    tables = space.edges.values() if isinstance(space.edges, dict) else [space.edges]
    for edges, mask in zip(tables, jax.tree.leaves(space.allowed), strict=True):
        assert mask.shape == (len(edges), len(space.primitives))
        assert mask.any(1).all()


@EVERY
def test_weights_are_a_distribution_over_what_is_allowed(name):
    space = spaces.get(name)
    weights = space.relax(jax.tree.map(jnp.asarray, random_alpha(space)))
    for values, mask in zip(jax.tree.leaves(weights), jax.tree.leaves(space.allowed), strict=True):
        np.testing.assert_allclose(values.sum(-1), 1, rtol=1e-6)
        np.testing.assert_array_equal(values > 0, mask)


@EVERY
def test_gradients_of_weights_are_finite(name):
    space = spaces.get(name)

    def total(alpha):
        return sum(jnp.square(w).sum() for w in jax.tree.leaves(space.relax(alpha)))

    gradient = jax.grad(total)(jax.tree.map(jnp.asarray, random_alpha(space)))
    for values, mask in zip(jax.tree.leaves(gradient), jax.tree.leaves(space.allowed), strict=True):
        assert np.isfinite(values).all()
        assert not np.asarray(values)[~mask].any()


@EVERY
@pytest.mark.parametrize("seed", range(5))
def test_what_is_encoded_is_derived_again(name, seed):
    space = spaces.get(name)
    found = space.derive(random_alpha(space, seed))
    weights = space.encode(found)
    for values, mask in zip(jax.tree.leaves(weights), jax.tree.leaves(space.allowed), strict=True):
        assert set(np.unique(values)) <= {0, 1}
        assert not values[~mask & (np.array(space.primitives) != "none")].any()
    again = space.derive(jax.tree.map(lambda w: 10.0 * w, weights))
    if name in DARTS:  # the order of a node's two edges is their strength's
        assert sorted(again.normal) == sorted(found.normal)
        assert sorted(again.reduce) == sorted(found.reduce)
    else:
        assert again == found


@pytest.mark.parametrize("name", DARTS)
def test_a_genotype_of_the_space_is_one_of_its_network(name):
    space = spaces.get(name)
    found = space.derive(random_alpha(space))
    assert genotype.validate(found, space.discrete.keywords["operations"]) == found
    network = space.relaxed(channels=2, layers=3, num_classes=3)
    assert {"none", *network.operations} == {"none", *space.primitives}


def test_the_derivation_keeps_to_what_is_allowed():
    alpha = {name: np.zeros((14, len(s1.SPACE.primitives))) for name in ("normal", "reduce")}
    found = s1.SPACE.derive(alpha)
    # The first candidate in the order of DARTS, of the first two edges of a node.
    assert found.normal[:6] == (
        *(("skip_connect", 0), ("skip_connect", 1)),
        *(("skip_connect", 0), ("skip_connect", 1)),
        *(("max_pool_3x3", 0), ("skip_connect", 1)),
    )
    assert found.reduce[:2] == (("max_pool_3x3", 0), ("max_pool_3x3", 1))


def test_s1_has_two_candidates_an_edge():
    for mask in s1.SPACE.allowed.values():
        assert (mask.sum(1) == 2).all()
    assert s1.SPACE.primitives == tuple(
        name for name in genotype.CNN_PRIMITIVES if name not in ("none", "sep_conv_5x5")
    )


def variables_of(network):
    """Shapes of its parameters and running statistics."""
    weights = {name: jnp.zeros(shape) for name, shape in network.weight_shapes.items()}
    image = jnp.zeros((1, 8, 8, 1))
    return jax.eval_shape(lambda: network.init(jax.random.key(0), image, weights, train=True))


@pytest.mark.parametrize("name", DARTS)
def test_an_edge_has_the_parameters_of_its_candidates_alone(name):
    space, layers = spaces.get(name), 4
    network = space.relaxed(channels=4, layers=layers, num_classes=3)
    params, channels = variables_of(network)["params"], 4
    for layer in range(layers):
        reduction = layer in networks.reductions(layers)
        channels *= 2 if reduction else 1
        cell, expected = "reduce" if reduction else "normal", 0
        for (source, _), mask in zip(space.edges[cell], space.allowed[cell], strict=True):
            stride = 2 if reduction and source < 2 else 1
            for candidate in np.array(space.primitives)[mask]:
                if candidate != "none":
                    shapes = network.operations[candidate].shapes(channels, stride)
                    expected += sum(map(math.prod, shapes.values()))
        assert count_parameters(params[f"cell_{layer}"]["edges"]) == expected


def test_s1_is_smaller_than_all_of_its_candidates_on_every_edge():
    network = s1.SPACE.relaxed(channels=4, layers=4, num_classes=3)
    own, full = (
        {kind: count_parameters(tree) for kind, tree in variables_of(of).items()}
        for of in (network, network.clone(candidates=None))
    )
    assert own["params"] < 0.5 * full["params"]
    assert own["batch_stats"] < 0.5 * full["batch_stats"]


def test_an_operation_outside_of_a_space():
    cells = genotype.PUBLISHED["DARTS_V2"]
    with pytest.raises(ValueError, match="not in the space; it has: skip_connect, sep_conv_3x3"):
        spaces.get("s2").encode(cells._replace(reduce=genotype.PUBLISHED["DARTS_V1"].reduce))


def test_noise_is_normal_and_of_its_key_alone():
    x = jax.random.uniform(jax.random.key(0), (4, 16, 16, 8))
    keys = {"key": jax.random.split(jax.random.key(1), 3)}
    y = s4.noise(keys, x, 2, None)
    assert y.shape == (4, 8, 8, 3, 8)
    assert abs(y.mean()) < 0.1 and abs(y.std() - 1) < 0.1
    assert abs(np.corrcoef(np.moveaxis(y, 3, 0).reshape(3, -1)) - np.eye(3)).max() < 0.1
    np.testing.assert_array_equal(y, s4.noise(keys, x + 1, 2, None))
    assert not jax.grad(lambda x: s4.noise(keys, x, 1, None).sum())(x).any()
    assert "noise" not in DISCRETE_OPERATIONS


def relaxed_noise(key):
    """Nodes 2 and 3 of a cell where each passes on the noise of its edge from state 0."""
    groups = cells.groups(5, False, {"noise": s4.NOISE})
    inputs = (jnp.zeros((2, 4, 4, 3)),) * 2
    weights = jnp.array([1.0, 0, 1, 0, 0])[:, None]
    return cells.relaxed({}, None, inputs, weights, groups=groups, columns={"noise": 0}, key=key)[0]


def discrete_noise(key):
    """The same of a discrete cell, and the noise of edges from state 1."""
    cell = discrete.Cell((("noise", 0), ("noise", 1)) * 2, (2, 3), 3, (3, 3), False, False)
    kernels = jax.tree.map(jnp.zeros, discrete.shapes(cell, NOISY), is_leaf=is_shape)
    unit = {"scale": jnp.ones((1, 3)), "bias": jnp.zeros((1, 3))}
    affine = {name: {"norm": unit} for name in discrete.PREPROCESS}
    inputs = (jnp.zeros((2, 4, 4, 3)),) * 2
    return discrete.discrete(kernels, affine, None, inputs, cell, NOISY, key=key)[0]


NOISY = DISCRETE_OPERATIONS.copy({"noise": s4.NOISE})


def is_shape(value):
    return isinstance(value, tuple)


@pytest.mark.parametrize("cell", [relaxed_noise, discrete_noise])
def test_edges_of_one_state_have_noise_of_their_own(cell):
    y = cell(jax.random.key(0))
    first, second = np.split(np.asarray(y), 2, -1)
    assert (first != second).all() and abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.4
    np.testing.assert_array_equal(y, cell(jax.random.key(0)))
    assert (y != cell(jax.random.key(1))).all()


def test_the_noise_of_a_batch_is_the_same_in_every_pass():
    """Of its key alone: where all else has no weight, logits do not depend on what is before."""
    network = s4.SPACE.relaxed(channels=2, layers=3, num_classes=3, nodes=1)
    row = jnp.eye(2)[network.primitives.index("noise")]
    weights = {name: jnp.stack([row, row]) for name in ("normal", "reduce")}
    image = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = network.init(jax.random.key(1), image, weights, train=True)
    loss = jax.jit(search.make_loss(network, relaxation.as_they_are))

    def logits(stem, context):
        w = {**variables["params"], "stem": stem}
        batch = search.Batch(image, jnp.arange(4) % 3, context)
        return loss(w, weights, search.Inputs(batch, variables["batch_stats"]))[1].logits

    stem, context = variables["params"]["stem"], relaxation.Context(jax.random.key(2), 0.5)
    first = logits(stem, context)
    np.testing.assert_array_equal(first, logits(-3 * stem, context))
    assert (first != logits(stem, context._replace(key=jax.random.key(3)))).all()
    with pytest.raises(ValueError, match="has no key: wrap the step by search.with_context"):
        logits(stem, None)
    evaluate = search.make_evaluate(network, relaxation.as_they_are)
    state = search.SearchState(
        0, None, variables["params"], weights, variables["batch_stats"], None, None
    )
    total, _ = evaluate(state, search.Batch(image, jnp.arange(4) % 3), jnp.ones(4, bool))
    assert np.isfinite(total)


def test_a_discrete_network_draws_noise():
    cells_ = genotype.Genotype((("noise", 0),) * 2, (2,), (("noise", 0),) * 2, (2,))
    network = s4.SPACE.discrete(cells_, channels=2, layers=3, num_classes=3)
    optimizer = optax.sgd(0.1)
    state = training.init(jax.random.key(0), network, optimizer, (8, 8, 1))
    batch = search.Batch(jnp.ones((4, 8, 8, 1)), jnp.arange(4) % 3)
    loss = jax.jit(training.make_loss(network))

    def logits(key):
        return loss(state.params, state.batch_stats, batch, None, jax.random.key(key))[1][0]

    np.testing.assert_array_equal(logits(0), logits(0))
    assert (logits(0) != logits(1)).any()
    assert len(np.unique(logits(0)[:, 0])) == 4  # images are equal, their noise is not
    found = training.make_evaluate(network)(state, batch, jnp.ones(4, bool))
    assert np.isfinite(found.loss)


PUBLISHED = (
    "|avg_pool_3x3~0|+|nor_conv_1x1~0|skip_connect~1|+|nor_conv_1x1~0|none~1|skip_connect~2|"
)


def test_a_published_string():
    choice = from_string(PUBLISHED, nasbench201.EDGES, nasbench201.PRIMITIVES)
    assert choice == (4, 2, 1, 2, 0, 1)
    assert to_string(choice, nasbench201.EDGES, nasbench201.PRIMITIVES) == PUBLISHED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unknown operation ''"),
        (PUBLISHED.replace("avg_pool", "avgpool"), "use one of: avg_pool_3x3"),
        (PUBLISHED.replace("none~1", "none~0"), "part 3 is no edge of the cell, or there twice"),
        (PUBLISHED.replace("none~1", "none~x"), "no edge of the cell"),
        (PUBLISHED.replace("|none~1", ""), "part 3 lacks the edge OPERATION~1"),
        (PUBLISHED + "+|none~0|", "no edge of the cell"),
    ],
)
def test_a_string_that_is_no_architecture(text, message):
    with pytest.raises(ValueError, match=message) as error:
        nasbench201.SPACE.encode(text)
    assert "\n" not in str(error.value)


def test_the_small_space_has_strings_of_its_own():
    text = "|none~0|+|skip_connect~0|nor_conv_1x1~1|+|nor_conv_3x3~1|none~2|"
    edges, primitives = nasbench201_small.EDGES, nasbench201_small.PRIMITIVES
    assert from_string(text, edges, primitives) == (0, 1, 2, 3, 0)
    assert to_string((0, 1, 2, 3, 0), edges, primitives) == text


@pytest.mark.parametrize("alpha", [np.zeros((5, 5)), np.full((6, 5), np.nan)])
def test_an_alpha_that_stands_for_nothing(alpha):
    with pytest.raises(ValueError, match="finite numbers of shape"):
        nasbench201.SPACE.derive(alpha)


@pytest.mark.parametrize("name", [name for name in spaces.NAMES if name != "recurrent"])
def test_networks_take_weights_of_the_shape_of_alpha(name):
    space = spaces.get(name)
    layers = {"layers": 3} if name in DARTS else {}
    shapes = space.relaxed(channels=2, num_classes=3, **layers).weight_shapes
    assert shapes == jax.tree.map(lambda mask: mask.shape, space.allowed)
