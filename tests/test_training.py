"""Training steps: the loss against recorded and hand-written ones, sums, keys, drop path."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import training
from darts_jax.evaluation import Logits
from darts_jax.search import Batch


class Fixed(nn.Module):
    """Returns logits that are its parameters; notes the drop path that it is given."""

    logits: tuple
    auxiliary: bool = False

    @nn.compact
    def __call__(self, x, train, drop_path=None):
        main = self.param("logits", lambda key: jnp.asarray(self.logits))
        seen = self.variable("batch_stats", "drop_path", lambda: jnp.zeros(()))
        if train and drop_path is not None:
            seen.value = jnp.asarray(drop_path, main.dtype) + jax.random.uniform(
                self.make_rng("drop_path")
            )
        return Logits(main, 2 * main if self.auxiliary and train else None)


STATS = {"drop_path": jnp.zeros(())}


def fixed(logits, **options):
    return Fixed(tuple(map(tuple, np.asarray(logits).tolist())), **options)


@pytest.mark.parametrize("auxiliary", [False, True])
def test_loss_with_label_smoothing(oracle, x64, auxiliary):
    recorded = {
        key: oracle("misc.npz")[f"label_smooth/{key}"]
        for key in ("logits", "target", "epsilon", "loss")
    }
    network = fixed(recorded["logits"], auxiliary=auxiliary)
    smoothing = float(recorded["epsilon"])
    loss = training.make_loss(network, smoothing, auxiliary_weight=0.4)
    batch = Batch(jnp.zeros((5, 4, 4, 1)), jnp.asarray(recorded["target"]))
    params = {"logits": jnp.asarray(recorded["logits"])}
    value, (logits, _) = loss(params, {}, batch, None, jax.random.key(0))
    expected = recorded["loss"]
    if auxiliary:  # the same loss, of twice the logits
        targets = optax.smooth_labels(jax.nn.one_hot(batch.label, 7), smoothing)
        log_probabilities = jax.nn.log_softmax(2 * params["logits"])
        expected = expected - 0.4 * (targets * log_probabilities).sum(-1).mean()
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_array_equal(logits, recorded["logits"])


def test_evaluation_sums_over_what_is_not_padding():
    logits = np.array([[5, 4, 3, 2, 1, 0.0]] * 5)
    labels = jnp.array([0, 4, 5, 1, 0])
    state = training.TrainState(None, None, {"logits": jnp.asarray(logits)}, STATS, None)
    evaluate = training.make_evaluate(fixed(logits))
    mask = jnp.array([True, True, True, True, False])
    sums = evaluate(state, Batch(jnp.zeros((5, 1, 1, 1)), labels), mask)
    assert (int(sums.accuracy), int(sums.top5_accuracy)) == (1, 3)
    expected = -np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))[np.arange(4), labels[:4]].sum()
    np.testing.assert_allclose(sums.loss, expected, rtol=1e-6)


def test_equal_logits_count_for_the_first_class():
    """As `argmax` has it: a network that says nothing must not look right."""
    state = training.TrainState(None, None, {"logits": jnp.zeros((2, 10))}, STATS, None)
    batch = Batch(jnp.zeros((2, 1, 1, 1)), jnp.array([0, 9]))
    sums = training.make_evaluate(fixed(np.zeros((2, 10))))(state, batch, jnp.ones(2, bool))
    assert (int(sums.accuracy), int(sums.top5_accuracy)) == (1, 1)


def test_step_is_the_optimizers(x64):
    logits = np.random.default_rng(0).normal(size=(3, 4))
    network, optimizer = fixed(logits), optax.sgd(0.5, momentum=0.9)
    batch = Batch(jnp.zeros((3, 1, 1, 1)), jnp.array([0, 1, 2]))
    state = training.init(jax.random.key(0), network, optimizer, (1, 1, 1))
    step = jax.jit(chex.assert_max_traces(training.make_step(network, optimizer), n=1))
    params, velocity = logits, 0
    for count in range(3):
        softmax = np.exp(params) / np.exp(params).sum(1, keepdims=True)
        gradient = (softmax - np.eye(3, 4)) / 3
        velocity = 0.9 * velocity + gradient
        state, metrics = step(state, batch, None)
        np.testing.assert_allclose(metrics.gradient_norm, np.linalg.norm(gradient), rtol=1e-12)
        loss = -np.log(softmax[np.arange(3), np.arange(3)]).mean()
        np.testing.assert_allclose(metrics.train_loss, loss, rtol=1e-12)
        accuracy = (params.argmax(1) == np.arange(3)).mean()
        np.testing.assert_allclose(metrics.train_accuracy, accuracy, rtol=1e-6)
        params = params - 0.5 * velocity
        np.testing.assert_allclose(state.params["logits"], params, rtol=1e-12)
        assert state.step == count + 1


def test_drop_path_is_drawn_anew_in_each_step():
    network, optimizer = fixed(np.zeros((2, 3))), optax.sgd(0.1)
    batch = Batch(jnp.zeros((2, 1, 1, 1)), jnp.array([0, 1]))
    state = training.init(jax.random.key(0), network, optimizer, (1, 1, 1))
    step = jax.jit(training.make_step(network, optimizer))
    seen = []
    for _ in range(3):
        state, _ = step(state, batch, jnp.float32(10.0))
        seen.append(float(state.batch_stats["drop_path"]))
    assert len(set(seen)) == 3
    assert all(10 <= value < 11 for value in seen)
