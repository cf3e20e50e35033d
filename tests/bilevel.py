"""Bilevel problems that the tests of the estimators share."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from darts_jax import hypergradient
from darts_jax.hypergradient import Bilevel

reverse = functools.partial(hypergradient.unrolled, mode="reverse")


def random_tree(rng, **shapes):
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def numerical_gradient(function, point, step=1e-4):
    """Central differences of fourth order of a scalar function of a pytree."""
    flat, unravel = ravel_pytree(point)
    function_of_flat = jax.jit(lambda flat: function(unravel(flat)))

    def slope(direction):
        at = [function_of_flat(flat + k * step * direction) for k in (-2, -1, 1, 2)]
        return (8 * (at[2] - at[1]) - at[3] + at[0]) / (12 * step)

    return unravel(jnp.stack([slope(direction) for direction in jnp.eye(flat.size)]))


def assert_close(actual, expected, tolerance):
    """Leaf by leaf, relative to the largest entry of the leaf."""
    chex.assert_trees_all_equal_structs(actual, expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(1e-3, np.abs(e).max()))


# Quadratic losses, whose hypergradient has a closed form.
#   L_train = w'Aw/2 + w'Ba + batch b'w        L_val = (w - c)'C(w - c)/2 + w'Da + a'Ea/2

XI, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 0.03
SGD = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(XI, momentum=MOMENTUM))


def quadratic(seed):
    rng = np.random.default_rng(seed)
    w = random_tree(rng, kernel=(2, 3), bias=())
    alpha = {"cells": [random_tree(rng, normal=(2, 2)), {}], "scalar": jnp.asarray(rng.normal())}
    n, m = 7, 5
    A, C, E = (x @ x.T / len(x) for x in (rng.normal(size=(k, k)) for k in (n, n, m)))
    B, D = rng.normal(size=(2, n, m))
    b, c, buffer = rng.normal(size=(3, n))

    def train_loss(w, alpha, batch):
        w, a = ravel_pytree(w)[0], ravel_pytree(alpha)[0]
        return w @ A @ w / 2 + w @ B @ a + batch * (b @ w)

    def val_loss(w, alpha, batch):
        w, a = ravel_pytree(w)[0], ravel_pytree(alpha)[0]
        return (w - c) @ C @ (w - c) / 2 + w @ D @ a + a @ E @ a / 2

    def closed_form(batches):
        """Value, direct and implicit term after a step of SGD on each of the batches."""
        w_k, a = np.asarray(ravel_pytree(w)[0]), np.asarray(ravel_pytree(alpha)[0])
        velocity, w_slope, velocity_slope = buffer, np.zeros((n, m)), np.zeros((n, m))
        for batch in batches:
            velocity = MOMENTUM * velocity + A @ w_k + B @ a + batch * b + WEIGHT_DECAY * w_k
            velocity_slope = MOMENTUM * velocity_slope + A @ w_slope + B + WEIGHT_DECAY * w_slope
            w_k, w_slope = w_k - XI * velocity, w_slope - XI * velocity_slope
        v = C @ (w_k - c) + D @ a
        value = (w_k - c) @ C @ (w_k - c) / 2 + w_k @ D @ a + a @ E @ a / 2
        unravel = ravel_pytree(alpha)[1]
        return value, unravel(D.T @ w_k + E @ a), unravel(w_slope.T @ v)

    opt_state = optax.tree.set(SGD.init(w), trace=ravel_pytree(w)[1](buffer))
    return Bilevel(train_loss, val_loss), alpha, w, opt_state, closed_form


def assert_closed_form(estimate, expected):
    value, direct, implicit = expected
    np.testing.assert_allclose(estimate.value, value, rtol=1e-12)
    assert_close(estimate.direct, direct, 1e-11)
    assert_close(estimate.implicit, implicit, 1e-11)
    assert_close(estimate.gradient, jax.tree.map(jnp.add, direct, implicit), 1e-11)


# A small classifier: smooth, not quadratic, with noise, labels, auxiliary output, and alpha and w
# of every shape.


def classifier_loss(w, alpha, batch):
    hidden = jnp.tanh(batch["x"] @ (w["in"] * alpha["cell"][0]))
    logits = hidden @ w["out"] * jnp.exp(alpha["scale"]) + w["bias"]
    loss = jnp.mean((logits - jax.nn.one_hot(batch["y"], 3)) ** 2)
    loss += jnp.exp(alpha["scale"]) * jnp.sum(w["in"] ** 2) / 10
    return loss, {"logits": logits, "prediction": logits.argmax(-1), "batch": batch}


CLASSIFIER = Bilevel(classifier_loss, classifier_loss, has_aux=True)


def classifier_batch(seed):
    rng = np.random.default_rng(seed)
    x, y = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.integers(3, size=5))
    return {"x": x, "y": y}


def classifier_inputs(optimizer, num_steps=1, seed=0):
    """Alpha, w, a state of the optimizer after two steps of training, and both batches."""
    rng = np.random.default_rng(seed)
    w = random_tree(rng, **{"in": (3, 4), "out": (4, 3), "bias": ()})
    alpha = {
        "cell": [jnp.asarray(rng.normal(size=(3, 4)))],
        "scale": jnp.asarray(0.3),
        "empty": ({}, None),
    }
    opt_state = optimizer.init(w)
    for step in range(2):
        w, opt_state = inner_step(optimizer, alpha, w, opt_state, classifier_batch(90 + step))
    train_batches = [classifier_batch(10 * seed + step + 1) for step in range(num_steps)]
    train_batch = stack(train_batches) if num_steps > 1 else train_batches[0]
    return alpha, w, opt_state, train_batch, classifier_batch(50 + seed)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def inner_step(optimizer, alpha, w, opt_state, batch):
    gradient = jax.grad(classifier_loss, has_aux=True)(w, alpha, batch)[0]
    updates, opt_state = optimizer.update(gradient, opt_state, w)
    return optax.apply_updates(w, updates), opt_state


def loss_after_steps(optimizer, num_steps, alpha, w, opt_state, train_batch, val_batch):
    """L_val(w'(alpha), alpha), written without any of the module under test."""
    if num_steps == 1:  # else the batches of the steps are stacked
        train_batch = jax.tree.map(lambda x: x[None], train_batch)
    (w, _), _ = jax.lax.scan(
        lambda carry, batch: (inner_step(optimizer, alpha, *carry, batch), None),
        (w, opt_state),
        train_batch,
    )
    return classifier_loss(w, alpha, val_batch)[0]


def assert_evaluates(value, aux, w, alpha, batch):
    expected_value, expected_aux = classifier_loss(w, alpha, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    chex.assert_trees_all_close(aux, expected_aux, rtol=1e-11)
    chex.assert_trees_all_equal_dtypes(aux, expected_aux)


OPTIMIZERS = {
    "sgd": optax.sgd(0.3),
    "momentum": optax.sgd(0.3, momentum=0.9),
    "nesterov": optax.sgd(0.3, momentum=0.9, nesterov=True),
    "weight_decay": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.3, momentum=0.9)),
    "active_clip": optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(2.0, momentum=0.9)),
    "schedule": optax.sgd(optax.cosine_decay_schedule(0.5, decay_steps=6), momentum=0.9),
    "adam": optax.adam(0.1),
    "everything": optax.chain(
        optax.clip_by_global_norm(0.1),
        optax.add_decayed_weights(0.1),
        optax.scale_by_adam(nesterov=True),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.2, decay_steps=6)),
    ),
}


# L_val = alpha w - 2 alpha + 1, L_train = (w - alpha)^2: the paper's figure 2.
TOY = Bilevel(lambda w, a, _: (w - a) ** 2, lambda w, a, _: a * w - 2 * a + 1)


def toy_estimate(make, xi, alpha, w, problem=TOY):
    optimizer = optax.sgd(xi)
    return make(problem, optimizer)(alpha, w, optimizer.init(w), None, None)
