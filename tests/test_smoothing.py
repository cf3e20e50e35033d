"""Perturbed mixing weights: where they lie, which is the worst, and what is differentiated."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import hypergradient, relaxation, smoothing
from darts_jax.relaxation import Context

RNG = np.random.default_rng(0)
ALPHA = {"normal": RNG.normal(size=(5, 4)), "normal_edges": np.zeros(5)}
VALUES = RNG.normal(size=(5, 4))
RADIUS = 0.1


class Batch(NamedTuple):
    context: Context


class Inputs(NamedTuple):
    batch: Batch


INPUTS = Inputs(Batch(Context(jax.random.key(0), 0.5)))
relax = relaxation.edge_weighted(relaxation.softmax)


def loss(w, weights, inputs):
    return (w * VALUES * weights["normal"]).sum() + (w**2).sum(), None


def arrays():
    return jax.tree.map(jnp.asarray, ALPHA)


def test_to_simplex():
    found = smoothing.to_simplex(jnp.array([[0.5, 1.5, -0.2], [-1.0, -0.5, -2.0]]))
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3, 0], [0, 1, 0]], rtol=1e-6)


def test_random_noise_is_uniform_on_the_weights(x64):
    alpha = {"normal": jnp.zeros((5, 4))}
    noisy = smoothing.random(relaxation.softmax, RADIUS)
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda key: noisy(alpha, Context(key, 0.5))["normal"])(keys)
    np.testing.assert_allclose(drawn.sum(-1), 1, rtol=1e-12)
    # Before the division by their sum s, weights are 1/4 + u with u uniform: s (w_0 - w_1) is a
    # difference of two such u, within 2 radius and of variance 2 radius^2 / 3.
    difference = drawn[..., 0] - drawn[..., 1]
    assert abs(difference).max() < 2 * RADIUS / (1 - 4 * RADIUS)
    np.testing.assert_allclose(difference.var(), 2 * RADIUS**2 / 3, rtol=0.1)
    assert (drawn[0] != drawn[1]).any()


def test_the_radius_follows_its_schedule():
    noisy = smoothing.random(relax, relaxation.linear(0, 0.2))
    context = INPUTS.batch.context
    still = noisy(arrays(), context._replace(progress=0.0))
    np.testing.assert_allclose(still["normal"], relax(arrays())["normal"], rtol=1e-6)
    moved = noisy(arrays(), context._replace(progress=1.0))
    assert abs(moved["normal"] - still["normal"]).max() > 0.05
    np.testing.assert_array_equal(moved["normal_edges"], still["normal_edges"])


def test_adversarial_is_the_worst_in_the_ball(x64):
    """Of a loss linear in the weights: the corner of the box by the sign of its slope."""
    alpha = {"normal": jnp.zeros((5, 4))}
    worst = smoothing.adversarial(loss, relaxation.softmax, RADIUS, steps=20)
    found, _ = worst(jnp.asarray(1.0), alpha, INPUTS)
    # The slope of the loss is VALUES, whatever the weights: ascent ends where the projection keeps
    # it, at least as high as any random point.
    noisy = smoothing.random(relaxation.softmax, RADIUS)
    keys = jax.random.split(jax.random.key(1), 500)
    others = jax.vmap(lambda key: loss(jnp.asarray(1.0), noisy(alpha, Context(key, 0.5)), None)[0])(
        keys
    )
    assert found > others.max()
    centre, _ = loss(jnp.asarray(1.0), relaxation.softmax(alpha), None)
    assert found - centre <= RADIUS * 2 * abs(VALUES).sum()


@pytest.mark.parametrize("steps", [1, 7])
def test_the_ascent_step_by_step(steps, x64):
    """Algorithm 1 with projected gradient ascent, by NumPy, of a loss that is not linear."""
    rng = np.random.default_rng(2)
    targets, logits = rng.uniform(0, 0.6, (5, 4)), rng.normal(size=(5, 4))

    def curved(w, weights, inputs):
        return ((w * weights["normal"] - targets) ** 2).sum(), None

    def project(rows):
        rows = np.clip(rows, 0, 1)
        return rows / rows.sum(-1, keepdims=True)

    alpha, w, radius = {"normal": jnp.asarray(logits)}, 0.7, 0.2
    centre = np.asarray(relaxation.softmax(alpha)["normal"])
    start = smoothing.random(relaxation.softmax, radius)(alpha, INPUTS.batch.context)
    at = np.asarray(start["normal"])
    for _ in range(steps):
        slope = 2 * w * (w * at - targets)
        moved = at + 2 * radius / steps * np.sign(slope)
        at = project(centre + np.clip(moved - centre, -radius, radius))
    smooth = smoothing.adversarial(curved, relaxation.softmax, radius, steps)
    found, _ = smooth(jnp.asarray(w), alpha, INPUTS)
    np.testing.assert_allclose(found, ((w * at - targets) ** 2).sum(), rtol=1e-10)


def at_random(w, alpha, inputs):
    return loss(w, smoothing.random(relax, RADIUS)(alpha, inputs.batch.context), inputs)


LOSSES = pytest.mark.parametrize(
    "smooth", [at_random, smoothing.adversarial(loss, relax, RADIUS)], ids=["random", "adversarial"]
)


@LOSSES
def test_the_perturbation_is_a_constant(smooth, x64):
    """Gradients are those of the loss at shifted weights; estimators are exact for that."""
    alpha, w = arrays(), jnp.asarray(0.7)
    gradient_w, gradient = jax.grad(lambda *x: smooth(*x, INPUTS)[0], (0, 1))(w, alpha)
    expected = jax.grad(lambda a: loss(w, relax(a), None)[0])(alpha)  # linear: the same anywhere
    np.testing.assert_allclose(gradient["normal"], expected["normal"], rtol=1e-10, atol=1e-15)
    clean = jax.grad(lambda w: loss(w, relax(alpha), None)[0])(w)
    assert abs(gradient_w - clean) > 1e-3


@LOSSES
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_estimators_take_it(smooth, mode, x64):
    problem = hypergradient.Bilevel(smooth, lambda w, a, i: loss(w, relax(a), i), has_aux=True)
    optimizer, w = optax.sgd(0.1), jnp.asarray(0.7)
    estimate = jax.jit(hypergradient.unrolled(problem, optimizer, mode=mode))
    found = estimate(arrays(), w, optimizer.init(w), INPUTS, INPUTS)
    # d/dalpha of L_val(w - 0.1 dL_train/dw): the mixed derivative is that of the linear term.
    w_prime = w - 0.1 * jax.grad(lambda w: smooth(w, arrays(), INPUTS)[0])(w)
    v = jax.grad(lambda w: loss(w, relax(arrays()), None)[0])(w_prime)
    mixed = jax.grad(lambda a: (VALUES * relax(a)["normal"]).sum())(arrays())["normal"]
    np.testing.assert_allclose(found.implicit["normal"], -0.1 * v * mixed, rtol=1e-9, atol=1e-15)
