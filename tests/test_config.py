import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import AlphaConfig, WConfig, alpha_optimizer, w_optimizer, w_schedule


def test_learning_rate_of_each_epoch(oracle, x64):
    schedule = w_schedule(WConfig(), epochs=50, steps_per_epoch=390)
    recorded = oracle("misc.npz")["lr/search_cnn"]
    for step in (0, 200, 389):  # constant within an epoch
        rates = [schedule(jnp.int32(390 * epoch + step)) for epoch in range(50)]
        np.testing.assert_allclose(rates, recorded, rtol=1e-12)


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
