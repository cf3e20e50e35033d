import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.config import AlphaConfig, WConfig, alpha_optimizer, w_optimizer, w_schedule


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("search_cnn", WConfig()),
        ("eval_cifar", WConfig(learning_rate_min=0.0)),
        ("eval_imagenet", WConfig(0.1, schedule="step", decay=0.97)),
    ],
)
def test_learning_rate_of_each_epoch(oracle, x64, name, config):
    recorded = oracle("misc.npz")[f"lr/{name}"]
    schedule = w_schedule(config, epochs=len(recorded), steps_per_epoch=390)
    epochs = jnp.arange(len(recorded))
    for step in (0, 200, 389):  # constant within an epoch
        rates = jax.vmap(schedule)(390 * epochs + step)
        np.testing.assert_allclose(rates, recorded, rtol=1e-12, atol=1e-17)


def test_learning_rate_falls_every_few_epochs():
    config = WConfig(1.0, schedule="step", decay=0.1, decay_epochs=3)
    schedule = w_schedule(config, epochs=9, steps_per_epoch=2)
    rates = [schedule(jnp.int32(step)) for step in (0, 5, 6, 11, 12)]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01], rtol=1e-6)


def test_a_learning_rate_of_zero_stays_zero():
    assert w_schedule(WConfig(0.0), epochs=2, steps_per_epoch=1)(jnp.int32(1)) == 0


def replay(optimizer, recorded):
    """Parameters after each recorded gradient."""
    params = jnp.asarray(recorded("p0"))
    state, visited = optimizer.init(params), []
    for gradient in jnp.asarray(recorded("grads")):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return visited


def test_w_optimizer_is_the_recorded_one(oracle, x64):
    def recorded(name):
        return oracle("misc.npz")[f"opt/sgd_lr0.025_m0.9_wd3e-4/{name}"]

    optimizer = w_optimizer(WConfig(clip=1e9), 0.025)
    np.testing.assert_allclose(replay(optimizer, recorded), recorded("p"), rtol=1e-12)


def test_alpha_optimizer_is_the_recorded_one(oracle, x64):
    def recorded(name):
        return oracle("misc.npz")[f"opt/adam_lr3e-4_b0.5_0.999_wd1e-3/{name}"]

    optimizer = alpha_optimizer(AlphaConfig())
    np.testing.assert_allclose(replay(optimizer, recorded), recorded("p"), rtol=1e-12)


def test_w_optimizer_clips_before_it_decays(x64):
    w, gradient = {"a": jnp.array([3.0]), "b": jnp.array([1.0])}, {"a": 30.0, "b": 40.0}
    gradient = jax.tree.map(lambda g: jnp.array([g]), gradient)
    optimizer = w_optimizer(WConfig(weight_decay=0.1), learning_rate=1.0)
    updates, _ = optimizer.update(gradient, optimizer.init(w), w)
    # The gradient's norm is 50, and 5 after clipping: (3, 4).
    np.testing.assert_allclose(updates["a"], [-(3 + 0.1 * 3)], rtol=1e-12)
    np.testing.assert_allclose(updates["b"], [-(4 + 0.1 * 1)], rtol=1e-12)
