"""Estimators by the implicit function theorem: their limit, and the rate at which they reach it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel import CLASSIFIER, OPTIMIZERS, assert_close, classifier_inputs, random_tree
from jax.flatten_util import ravel_pytree
from sklearn.linear_model import Ridge

from darts_jax import hypergradient
from darts_jax.hypergradient import Bilevel

pytestmark = pytest.mark.usefixtures("x64")

# L_train = w'Hw/2 + w'Ba, L_val = (w - c)'(w - c)/2 + w'Da, H of known eigenvalues.
EIGENVALUES = np.array([0.2, 0.5, 0.9, 1.4, 2.0])
RATE, DECAY = 0.3, 0.1


def quadratic(seed):
    """The problem, alpha, w, H, B, and v = grad_w L_val as a vector."""
    rng = np.random.default_rng(seed)
    w = random_tree(rng, kernel=(2, 2), bias=())
    alpha = {"cells": [random_tree(rng, normal=(3,)), {}], "scalar": jnp.asarray(rng.normal())}
    basis = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    H = basis @ np.diag(EIGENVALUES) @ basis.T
    B, D, c = rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), rng.normal(size=5)

    def train_loss(w, alpha, batch):
        w, a = ravel_pytree(w)[0], ravel_pytree(alpha)[0]
        return w @ H @ w / 2 + w @ B @ a

    def val_loss(w, alpha, batch):
        w, a = ravel_pytree(w)[0], ravel_pytree(alpha)[0]
        return (w - c) @ (w - c) / 2 + w @ D @ a

    v = np.asarray(ravel_pytree(w)[0] - c + D @ ravel_pytree(alpha)[0])
    return Bilevel(train_loss, val_loss), alpha, w, H, B, v


def implicit_term(estimator, alpha, w, opt_state):
    return np.asarray(ravel_pytree(estimator(alpha, w, opt_state, None, None).implicit)[0])


SGDS = {
    "sgd": (optax.sgd(RATE), 0.0, RATE),
    "momentum": (optax.sgd(RATE, momentum=0.9), 0.0, RATE),
    "nesterov": (optax.sgd(RATE / 1.9, momentum=0.9, nesterov=True), 0.0, RATE),
    "weight_decay": (
        optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=0.9)),
        DECAY,
        RATE,
    ),
    "flat": (
        optax.flatten(optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE))),
        DECAY,
        RATE,
    ),
    "schedule": (optax.sgd(lambda count: jnp.where(count > 0, RATE, 0.0)), 0.0, RATE),
}
each_sgd = pytest.mark.parametrize("name", SGDS)


def state_after_a_step(optimizer, w):
    """So that a schedule that starts at zero does not stay there."""
    return optimizer.update(jax.tree.map(jnp.zeros_like, w), optimizer.init(w), w)[1]


@each_sgd
@pytest.mark.parametrize("num_terms", [1, 2, 7])
def test_neumann_series(name, num_terms):
    """Term by term: -eta B' sum_j (I - eta (H + decay))^j v."""
    optimizer, decay, rate = SGDS[name]
    problem, alpha, w, H, B, v = quadratic(0)
    jacobian = np.eye(5) - rate * (H + decay * np.eye(5))
    q = sum(np.linalg.matrix_power(jacobian, j) @ v for j in range(num_terms))
    found = implicit_term(
        hypergradient.neumann(problem, optimizer, num_terms),
        alpha,
        w,
        state_after_a_step(optimizer, w),
    )
    np.testing.assert_allclose(found, -rate * B.T @ q, rtol=1e-10)


def test_neumann_converges_at_the_rate_of_the_smallest_eigenvalue():
    problem, alpha, w, H, B, v = quadratic(1)
    optimizer = optax.sgd(RATE)
    limit = -B.T @ np.linalg.solve(H, v)
    counts = np.arange(40, 81, 10)
    errors = [
        np.linalg.norm(
            implicit_term(
                hypergradient.neumann(problem, optimizer, int(n)), alpha, w, optimizer.init(w)
            )
            - limit
        )
        for n in counts
    ]
    rates = np.divide(errors[1:], errors[:-1]) ** 0.1
    np.testing.assert_allclose(rates, 1 - RATE * EIGENVALUES[0], rtol=1e-3)


def test_neumann_is_unrolling_at_a_fixed_point():
    problem, alpha, _, H, B, _ = quadratic(2)
    _, unravel = ravel_pytree(quadratic(2)[2])
    w = unravel(jnp.asarray(-np.linalg.solve(H, B @ ravel_pytree(alpha)[0])))
    optimizer = optax.sgd(RATE)
    inputs = (alpha, w, optimizer.init(w), jnp.zeros(6), None)
    series = hypergradient.neumann(problem, optimizer, 6)(*inputs[:3], jnp.zeros(()), None)
    unrolled = hypergradient.unrolled(problem, optimizer, 6)(*inputs)
    assert_close(series.gradient, unrolled.gradient, 1e-10)


@pytest.mark.parametrize(
    "optimizer",
    [optax.adam(0.5), optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(RATE))],
    ids=["adam", "clip"],
)
def test_neumann_through_any_optimizer_has_one_limit_at_the_minimum(optimizer):
    """Where the gradient is zero: a preconditioner cancels, and clipping is idle."""
    problem, alpha, w, H, B, _ = quadratic(7)
    unravel = ravel_pytree(w)[1]
    opt_state = optimizer.init(w)
    for seed in range(3):  # second moments that differ
        gradient = random_tree(np.random.default_rng(seed), kernel=(2, 2), bias=())
        opt_state = optimizer.update(gradient, opt_state, w)[1]
    w = unravel(jnp.asarray(-np.linalg.solve(H, B @ ravel_pytree(alpha)[0])))
    v = ravel_pytree(jax.grad(problem.val_loss)(w, alpha, None))[0]
    estimate = hypergradient.neumann(problem, optimizer, 1000)
    found = implicit_term(estimate, alpha, w, opt_state)
    np.testing.assert_allclose(found, -B.T @ np.linalg.solve(H, v), rtol=1e-8)


def test_t1_t2_is_the_first_term():
    """-eta H_alpha,w grad_w L_val(w, alpha): Luketina et al., equation (5)."""
    problem, alpha, w, _, B, v = quadratic(3)
    optimizer = optax.sgd(RATE)
    estimate = hypergradient.t1_t2(problem, optimizer)(alpha, w, optimizer.init(w), None, None)
    np.testing.assert_allclose(ravel_pytree(estimate.implicit)[0], -RATE * B.T @ v, rtol=1e-12)
    np.testing.assert_allclose(estimate.value, problem.val_loss(w, alpha, None), rtol=1e-14)
    direct = jax.grad(problem.val_loss, argnums=1)(w, alpha, None)
    assert_close(estimate.direct, direct, 1e-14)
    np.testing.assert_allclose(estimate.train.value, problem.train_loss(w, alpha, None))


@each_sgd
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_conjugate_gradient_is_exact_after_as_many_steps_as_eigenvalues(name, damping):
    optimizer, decay, _ = SGDS[name]
    problem, alpha, w, H, B, v = quadratic(4)
    found = implicit_term(
        hypergradient.conjugate_gradient(problem, optimizer, 5, damping, tolerance=0.0),
        alpha,
        w,
        state_after_a_step(optimizer, w),
    )
    limit = -B.T @ np.linalg.solve(H + (decay + damping) * np.eye(5), v)
    np.testing.assert_allclose(found, limit, rtol=1e-9)


def test_conjugate_gradient_converges_at_its_rate():
    """The error in the norm of H is that of the best polynomial, and under the known bound."""
    _, _, w, H, _, v = quadratic(5)
    # alpha in the place of Ba, to read the solution itself from the implicit term.
    wide = jax.tree.map(jnp.zeros_like, w)

    def train_loss(w, alpha, batch):
        w, a = ravel_pytree(w)[0], ravel_pytree(alpha)[0]
        return w @ H @ w / 2 + w @ a

    problem = Bilevel(train_loss, lambda w, alpha, batch: v @ ravel_pytree(w)[0])
    optimizer, exact = optax.sgd(RATE), np.linalg.solve(H, v)
    condition = EIGENVALUES[-1] / EIGENVALUES[0]
    bound = (np.sqrt(condition) - 1) / (np.sqrt(condition) + 1)
    eigenvalues, basis = np.linalg.eigh(H)
    start = np.sqrt(exact @ H @ exact)
    for steps in range(1, 5):
        make = hypergradient.conjugate_gradient(problem, optimizer, steps, tolerance=0.0)
        error = -implicit_term(make, wide, w, optimizer.init(w)) - exact
        size = np.sqrt(error @ H @ error)
        # min over polynomials p of degree `steps`, p(0) = 1, of |p(H) exact| in the norm of H.
        powers = eigenvalues[:, None] ** np.arange(1, steps + 1)
        weight = np.sqrt(eigenvalues) * (basis.T @ exact)
        residual = np.linalg.lstsq(weight[:, None] * powers, -weight, rcond=None)[0]
        best = np.linalg.norm(weight * (1 + powers @ residual))
        np.testing.assert_allclose(size, best, rtol=1e-6)
        assert size <= 2 * bound**steps * start


@pytest.mark.parametrize("rate", [1.0, 1e-4])
def test_conjugate_gradient_in_single_precision_at_any_rate(rate):
    problem, alpha, w, H, B, v = quadratic(8)
    alpha, w = jax.tree.map(lambda x: x.astype("float32"), (alpha, w))
    optimizer = optax.sgd(rate)
    estimate = hypergradient.conjugate_gradient(problem, optimizer, 5, tolerance=0.0)
    found = implicit_term(estimate, alpha, w, optimizer.init(w))
    np.testing.assert_allclose(found, -B.T @ np.linalg.solve(H, v), rtol=2e-5)


def test_conjugate_gradient_of_weights_of_several_precisions():
    problem, alpha, w, H, B, v = quadratic(9)
    w = {**w, "kernel": w["kernel"].astype("float32")}
    optimizer = optax.sgd(RATE)
    estimate = hypergradient.conjugate_gradient(problem, optimizer, 5)
    found = implicit_term(estimate, alpha, w, optimizer.init(w))
    np.testing.assert_allclose(found, -B.T @ np.linalg.solve(H, v), rtol=1e-4)


@pytest.mark.parametrize("make", [hypergradient.conjugate_gradient, hypergradient.neumann])
def test_a_step_of_zero_has_no_implicit_term(make):
    """At the start of a warm-up, and between the steps of an accumulated gradient."""
    problem, alpha, w, *_ = quadratic(10)
    every_second = optax.MultiSteps(optax.sgd(RATE), 2).gradient_transformation()
    for optimizer in (optax.sgd(optax.linear_schedule(0.0, RATE, 10)), every_second):
        found = implicit_term(make(problem, optimizer), alpha, w, optimizer.init(w))
        np.testing.assert_array_equal(found, 0)


def test_weights_may_be_empty():
    problem = Bilevel(lambda w, a, _: a**2, lambda w, a, _: a**3)
    optimizer = optax.sgd(RATE)
    estimate = hypergradient.conjugate_gradient(problem, optimizer)
    found = estimate(jnp.array(2.0), {}, optimizer.init({}), None, None)
    np.testing.assert_allclose(found.gradient, 12)


@pytest.mark.parametrize("name", ["active_clip", "adam", "everything"])
def test_conjugate_gradient_refuses_an_asymmetric_system(name):
    optimizer = OPTIMIZERS[name]
    estimate = hypergradient.conjugate_gradient(CLASSIFIER, optimizer)
    for call in (estimate, jax.jit(estimate)):
        with pytest.raises(ValueError, match="not symmetric: use neumann or unrolled"):
            call(*classifier_inputs(optimizer))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.1)),
        optax.chain(optax.clip_by_global_norm(1e5), optax.sgd(0.1)),
        optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(),
        optax.lars(0.1),
        optax.sign_sgd(0.1),
        optax.rmsprop(0.1),
        optax.multi_transform(
            {"slow": optax.sgd(0.1), "fast": optax.sgd(0.2)},
            lambda w: {**dict.fromkeys(w, "slow"), "bias": "fast"},
        ),
        optax.sgd(0.0),
    ],
    ids=[
        "clip",
        "wide_clip",
        "adam_every_third",
        "lars",
        "sign",
        "rmsprop",
        "two_rates",
        "no_rate",
    ],
)
def test_conjugate_gradient_refuses_what_is_not_gradient_descent(optimizer):
    alpha, w, _, *batches = classifier_inputs(optax.sgd(0.1))
    with pytest.raises(ValueError, match="does not step by -c"):
        hypergradient.conjugate_gradient(CLASSIFIER, optimizer)(
            alpha, w, optimizer.init(w), *batches
        )


def test_conjugate_gradient_takes_decay_of_some_leaves():
    optimizer = optax.chain(
        optax.add_decayed_weights(0.2, mask=lambda w: {**dict.fromkeys(w, True), "bias": False}),
        optax.sgd(RATE),
    )
    problem, alpha, w, H, B, v = quadratic(6)
    estimate = hypergradient.conjugate_gradient(problem, optimizer, 5, tolerance=0.0)
    found = implicit_term(estimate, alpha, w, optimizer.init(w))
    decay = np.diag(ravel_pytree({"kernel": np.full((2, 2), 0.2), "bias": np.zeros(())})[0])
    np.testing.assert_allclose(found, -B.T @ np.linalg.solve(H + decay, v), rtol=1e-9)


def test_conjugate_gradient_takes_noise_and_accumulation():
    """An optimizer whose state holds a random key, and one that averages two gradients."""
    problem, alpha, w, H, B, v = quadratic(11)
    noisy = optax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), optax.sgd(RATE))
    every_second = optax.MultiSteps(optax.sgd(RATE), 2).gradient_transformation()
    for optimizer in (noisy, every_second):
        estimate = hypergradient.conjugate_gradient(problem, optimizer, 5, tolerance=0.0)
        found = implicit_term(estimate, alpha, w, state_after_a_step(optimizer, w))
        np.testing.assert_allclose(found, -B.T @ np.linalg.solve(H, v), rtol=1e-9)


def test_numbers_must_be_in_range():
    problem, optimizer = quadratic(0)[0], optax.sgd(RATE)
    with pytest.raises(ValueError, match="num_terms must be at least 1, got 0"):
        hypergradient.neumann(problem, optimizer, 0)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        hypergradient.conjugate_gradient(problem, optimizer, 0)
    with pytest.raises(ValueError, match="damping must not be negative, got -1"):
        hypergradient.conjugate_gradient(problem, optimizer, damping=-1)


def test_ridge_regression_with_a_penalty_for_each_feature():
    """d L_val / d log penalty: the closed form, and scikit-learn's solutions at two penalties."""
    rng = np.random.default_rng(0)
    x, x_val = rng.normal(size=(2, 20, 4))
    y, y_val = rng.normal(size=(2, 20))
    penalty = np.exp(rng.normal(size=4))

    def train_loss(w, alpha, _):
        return jnp.sum((x @ w - y) ** 2) / 2 + jnp.sum(jnp.exp(alpha) * w**2) / 2

    def val_loss(w, alpha, _):
        return jnp.sum((x_val @ w - y_val) ** 2) / 2

    H = x.T @ x + np.diag(penalty)
    w = np.linalg.solve(H, x.T @ y)
    expected = -penalty * w * np.linalg.solve(H, x_val.T @ (x_val @ w - y_val))

    def solved_by_sklearn(log_penalty):
        # Its penalty is one number: features divided by the root of theirs have penalty 1.
        scale = np.exp(-log_penalty / 2)
        model = Ridge(alpha=1.0, fit_intercept=False, solver="cholesky").fit(x * scale, y)
        return np.sum((x_val @ (scale * model.coef_) - y_val) ** 2) / 2

    slopes = [
        (solved_by_sklearn(np.log(penalty) + h) - solved_by_sklearn(np.log(penalty) - h)) / 2e-5
        for h in 1e-5 * np.eye(4)
    ]
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)
    optimizer = optax.sgd(1 / np.linalg.eigvalsh(H)[-1])
    inputs = (jnp.log(penalty), jnp.asarray(w), optimizer.init(jnp.asarray(w)), None, None)
    problem = Bilevel(train_loss, val_loss)
    for estimate in (
        hypergradient.conjugate_gradient(problem, optimizer, 4, tolerance=0.0),
        hypergradient.neumann(problem, optimizer, 1000),
        hypergradient.unrolled(problem, optimizer, 1000),  # the batches are None, without leaves
    ):
        np.testing.assert_allclose(estimate(*inputs).gradient, expected, rtol=1e-8)
