"""Batch norm by slices of a batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_cells import CHEAP
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from darts_jax import evaluation, grouped, networks, search, training


def batch(seed, size=8):
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.standard_normal((size, 8, 8, 1)))
    return search.Batch(image, jnp.asarray(rng.integers(0, 10, size)))


def halves(batch):
    return [jax.tree.map(lambda x, part=part: x[part], batch) for part in (slice(4), slice(4, 8))]


def assert_mean_of(whole, parts):
    means = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(means), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def double(tree):
    return jax.tree.map(lambda x: x.astype(float), tree)


@pytest.fixture
def discrete(x64):
    network = evaluation.EvaluationNetwork(CHEAP, 2, 3, 10)
    variables = double(network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True))

    def run(groups, batch):
        loss = training.make_loss(network.clone(batch_norm_groups=groups))
        function = jax.jit(jax.value_and_grad(loss, has_aux=True))
        arguments = variables["params"], variables["batch_stats"], batch, None, jax.random.key(1)
        (value, (logits, stats)), gradient = function(*arguments)
        return logits, (value, stats, gradient)

    return run


def test_training(discrete):
    """Two slices: the mean of two losses, gradients and statistics."""
    logits, whole = discrete(2, batch(0))
    parts = [discrete(1, half) for half in halves(batch(0))]
    np.testing.assert_allclose(logits, jnp.concatenate([part[0] for part in parts]), rtol=1e-9)
    assert_mean_of(whole, [part[1] for part in parts])
    _, together = discrete(1, batch(0))
    assert abs(together[0] - whole[0]) > 1e-3


@pytest.mark.slow
def test_search(x64):
    network = networks.Supernet(2, 3, 10, nodes=1)
    alpha = {name: jnp.zeros((2, 8)) for name in ("normal", "reduce")}
    image = jnp.zeros((1, 8, 8, 1))
    variables = double(network.init(jax.random.key(0), image, alpha, train=True))

    def run(groups, batch):
        loss = search.make_loss(network.clone(batch_norm_groups=groups))
        function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        inputs = search.Inputs(batch, variables["batch_stats"])
        (value, aux), gradients = function(variables["params"], alpha, inputs)
        return value, aux.batch_stats, gradients

    assert_mean_of(run(2, batch(0)), [run(1, half) for half in halves(batch(0))])


@pytest.mark.parametrize("groups", [1, 2])
def test_devices_normalise_their_own(groups):
    """As many slices as devices, and nothing is summed over these in the network."""
    network = evaluation.EvaluationNetwork(CHEAP, 2, 3, 10)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True)

    def forward(image):
        return network.apply(variables, image, train=True, mutable=["batch_stats"])

    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data"))
    image = jax.device_put(np.ones((8, 8, 8, 1), np.float32), sharding)
    logits = jax.jit(lambda image: grouped.by_slices(forward, groups)(image)[0].main)
    text = logits.lower(image).compile().as_text()
    assert ("all-reduce" in text) == (groups == 1)
    assert "all-gather" not in text


def test_drop_path_differs_from_slice_to_slice():
    network = evaluation.EvaluationNetwork(CHEAP, 2, 3, 10, batch_norm_groups=4)
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=True)
    one = jax.tree.map(lambda x: jnp.concatenate([x[:2]] * 4), batch(0))
    _, (logits, _) = jax.jit(training.make_loss(network))(
        variables["params"], variables["batch_stats"], one, 0.5, jax.random.key(1)
    )
    assert len({bytes(np.asarray(part)) for part in np.split(np.asarray(logits), 4)}) > 1


def test_a_network_without_the_field_has_one_slice():
    assert grouped.count(object()) == 1
