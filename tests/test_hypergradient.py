"""The estimators against closed forms, central differences and the recorded toy problem."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from darts_jax import hypergradient
from darts_jax.hypergradient import Bilevel

pytestmark = pytest.mark.usefixtures("x64")

reverse = functools.partial(hypergradient.unrolled, mode="reverse")
ONE_STEP = {
    "forward": hypergradient.unrolled,
    "reverse": reverse,
    "finite_difference": hypergradient.finite_difference,
}
ESTIMATORS = {"first_order": lambda problem, _: hypergradient.first_order(problem), **ONE_STEP}
each_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
each_unrolled = pytest.mark.parametrize("make", ONE_STEP.values(), ids=ONE_STEP)


def random_tree(rng, **shapes):
    return {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def numerical_gradient(function, point, step=2.5e-4):
    """Central differences of fourth order of a scalar function of a pytree."""
    flat, unravel = ravel_pytree(point)

    def slope(direction):
        at = [function(unravel(flat + k * step * direction)) for k in (-2, -1, 1, 2)]
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


@pytest.mark.parametrize("seed", range(2))
@each_unrolled
def test_one_step_on_a_quadratic(make, seed):
    problem, alpha, w, opt_state, closed_form = quadratic(seed)
    estimate = make(problem, SGD)(alpha, w, opt_state, 0.7, None)
    assert_closed_form(estimate, closed_form([0.7]))
    np.testing.assert_allclose(estimate.train.value, problem.train_loss(w, alpha, 0.7), rtol=1e-14)


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_several_steps_on_a_quadratic(mode, remat):
    problem, alpha, w, opt_state, closed_form = quadratic(3)
    batches = jnp.array([0.7, -0.2, 1.1, 0.4])
    make = functools.partial(hypergradient.unrolled, num_steps=4, mode=mode, remat=remat)
    estimate = make(problem, SGD)(alpha, w, opt_state, batches, None)
    assert_closed_form(estimate, closed_form(batches))


def test_first_order_on_a_quadratic():
    problem, alpha, w, opt_state, closed_form = quadratic(4)
    value, direct, implicit = closed_form([])
    assert_closed_form(
        hypergradient.first_order(problem)(alpha, w, opt_state, None, None),
        (value, direct, jax.tree.map(jnp.zeros_like, implicit)),
    )


# A small classifier: smooth, not quadratic, with noise, labels, auxiliary output, and alpha and w
# of every shape.


def classifier_loss(w, alpha, batch):
    hidden = jnp.tanh(batch["x"] @ w["in"] * alpha["cell"][0])
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
        "cell": [jnp.asarray(rng.normal(size=4))],
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
    if num_steps == 1:
        train_batch = jax.tree.map(lambda x: x[None], train_batch)
    (w, _), _ = jax.lax.scan(
        lambda carry, batch: (inner_step(optimizer, alpha, *carry, batch), None),
        (w, opt_state),
        train_batch,
    )
    return classifier_loss(w, alpha, val_batch)[0]


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


@pytest.mark.parametrize(
    ("name", "num_steps"), [(name, 1) for name in OPTIMIZERS] + [("nesterov", 3), ("everything", 3)]
)
def test_unrolled_through_any_optimizer(name, num_steps):
    optimizer = OPTIMIZERS[name]
    alpha, *rest = classifier_inputs(optimizer, num_steps)

    loss = jax.jit(lambda alpha: loss_after_steps(optimizer, num_steps, alpha, *rest))
    forward, backward = [
        hypergradient.unrolled(CLASSIFIER, optimizer, num_steps, mode)(alpha, *rest)
        for mode in ("forward", "reverse")
    ]
    np.testing.assert_allclose(forward.value, loss(alpha), rtol=1e-13)
    assert_close(forward.gradient, numerical_gradient(loss, alpha), 1e-10)
    assert optax.tree.norm(forward.implicit) > 1e-3
    assert_close(backward.implicit, forward.implicit, 1e-12)
    assert_close(backward.direct, forward.direct, 1e-12)


def test_clip_of_the_table_is_active():
    alpha, w, _, batch, _ = classifier_inputs(optax.sgd(0.3))
    gradient = jax.grad(classifier_loss, has_aux=True)(w, alpha, batch)[0]
    assert optax.tree.norm(gradient) > 0.1


def test_adam_with_eps_root_passes_a_gradient_of_zero():
    def with_unused_weight(w, alpha, batch):
        return classifier_loss({**w, "bias": jax.lax.stop_gradient(w["bias"])}, alpha, batch)

    optimizer = optax.adam(0.1, eps_root=1e-8)
    alpha, w, _, *batches = classifier_inputs(optimizer)
    problem = Bilevel(with_unused_weight, classifier_loss, has_aux=True)
    inputs = (alpha, w, optimizer.init(w), *batches)
    forward = hypergradient.unrolled(problem, optimizer)(*inputs)
    chex.assert_tree_all_finite(forward.gradient)
    assert_close(reverse(problem, optimizer)(*inputs).gradient, forward.gradient, 1e-12)


@pytest.mark.parametrize("name", ["weight_decay", "active_clip", "adam"])
def test_finite_difference_converges_at_second_order(name):
    optimizer = OPTIMIZERS[name]
    inputs = classifier_inputs(optimizer)
    exact = hypergradient.unrolled(CLASSIFIER, optimizer)(*inputs)

    def error(radius):
        estimate = hypergradient.finite_difference(CLASSIFIER, optimizer, radius)(*inputs)
        assert_close(estimate.direct, exact.direct, 1e-14)
        return optax.tree.norm(optax.tree.sub(estimate.implicit, exact.implicit))

    errors = [error(radius) for radius in (0.04, 0.02, 0.01)]
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.02)


def test_finite_difference_moves_the_weights_by_the_radius():
    points = []

    def recording_loss(w, alpha, batch):
        jax.debug.callback(lambda w: points.append(ravel_pytree(w)[0]), w)
        return problem.train_loss(w, alpha, batch)

    problem, alpha, w, opt_state, _ = quadratic(5)
    recorded = problem._replace(train_loss=recording_loss)
    hypergradient.finite_difference(recorded, SGD, radius=0.25)(alpha, w, opt_state, 0.7, None)
    jax.effects_barrier()
    distances = sorted(np.linalg.norm(point - ravel_pytree(w)[0]) for point in points)
    np.testing.assert_allclose(distances, [0, 0.25, 0.25], atol=1e-12)


@each_unrolled
def test_implicit_term_is_zero_where_the_validation_loss_ignores_the_weights(make):
    problem, alpha, w, opt_state, _ = quadratic(6)
    problem = problem._replace(val_loss=lambda w, alpha, batch: alpha["scalar"] ** 2)
    estimate = make(problem, SGD)(alpha, w, opt_state, 0.7, None)
    chex.assert_trees_all_equal(estimate.implicit, jax.tree.map(jnp.zeros_like, alpha))
    chex.assert_trees_all_equal(estimate.gradient, estimate.direct)
    np.testing.assert_allclose(estimate.gradient["scalar"], 2 * alpha["scalar"])


# Transformations and auxiliary output.


@each_estimator
def test_compiles_once_for_all_seeds(make):
    traces = []

    def counted_loss(*args):
        traces.append(args)
        return classifier_loss(*args)

    optimizer = OPTIMIZERS["schedule"]
    problem = Bilevel(counted_loss, counted_loss, has_aux=True)
    estimate = make(CLASSIFIER, optimizer)
    estimate_all = jax.jit(jax.vmap(make(problem, optimizer)))
    counts = []
    for seeds in [(0, 1), (2, 3)]:
        inputs = [classifier_inputs(optimizer, seed=seed) for seed in seeds]
        together = estimate_all(*stack(inputs)).gradient
        counts.append(len(traces))
        for i in range(2):
            alone = estimate(*inputs[i]).gradient
            assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-12)
    assert 0 < counts[0] == counts[1]


def test_gradient_is_the_derivative_of_the_value():
    problem, alpha, w, opt_state, _ = quadratic(7)
    estimate = hypergradient.unrolled(problem, SGD)
    slope = jax.grad(lambda alpha: estimate(alpha, w, opt_state, 0.7, None).value)(alpha)
    assert_close(estimate(alpha, w, opt_state, 0.7, None).gradient, slope, 1e-12)


@each_estimator
def test_single_precision_is_kept(make):
    dtypes = set()

    def watched_loss(w, alpha, batch):
        dtypes.update(leaf.dtype for leaf in jax.tree.leaves((w, alpha)))
        return classifier_loss(w, alpha, batch)

    optimizer = OPTIMIZERS["weight_decay"]
    inputs = classifier_inputs(optimizer)
    single = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "float64" else x, inputs)
    watched = make(Bilevel(watched_loss, watched_loss, has_aux=True), optimizer)
    gradient = jax.jit(watched)(*single).gradient
    assert dtypes | {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype("float32")}
    assert_close(gradient, make(CLASSIFIER, optimizer)(*inputs).gradient, 1e-4)


def test_memory_of_several_steps():
    """Reverse mode keeps every layer of every step; remat those of one, forward mode none."""

    def deep_loss(w, alpha, x):
        for _ in range(8):
            x = jnp.tanh(x @ w) + alpha
        return jnp.mean(x**2)

    def peak(mode, remat):
        optimizer, w = optax.sgd(0.1), jnp.eye(4)
        problem = Bilevel(deep_loss, deep_loss)
        estimate = hypergradient.unrolled(problem, optimizer, 6, mode, remat)
        inputs = (jnp.array(0.5), w, optimizer.init(w), jnp.ones((6, 500, 4)), jnp.ones((500, 4)))
        return jax.jit(estimate).lower(*inputs).compile().memory_analysis().temp_size_in_bytes

    assert peak("forward", False) < peak("reverse", True) < peak("reverse", False) / 4


def assert_evaluates(value, aux, w, alpha, batch):
    expected_value, expected_aux = classifier_loss(w, alpha, batch)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    chex.assert_trees_all_close(aux, expected_aux, rtol=1e-11)
    chex.assert_trees_all_equal_dtypes(aux, expected_aux)


def test_values_and_auxiliary_output_are_those_of_the_losses():
    optimizer = OPTIMIZERS["momentum"]
    alpha, w, opt_state, batch, val_batch = inputs = classifier_inputs(optimizer)
    first = hypergradient.first_order(CLASSIFIER)(*inputs)
    assert_evaluates(first.value, first.aux, w, alpha, val_batch)
    assert first.train is None
    unrolled = hypergradient.unrolled(CLASSIFIER, optimizer)(*inputs)
    assert_evaluates(*unrolled.train, w, alpha, batch)
    w_prime, _ = inner_step(optimizer, alpha, w, opt_state, batch)
    assert_evaluates(unrolled.value, unrolled.aux, w_prime, alpha, val_batch)


def test_training_losses_of_several_steps_are_stacked():
    optimizer = OPTIMIZERS["momentum"]
    alpha, w, opt_state, batches, _ = inputs = classifier_inputs(optimizer, num_steps=3)
    train = hypergradient.unrolled(CLASSIFIER, optimizer, num_steps=3)(*inputs).train
    for step in range(3):
        batch, (value, aux) = jax.tree.map(lambda x, step=step: x[step], (batches, train))
        assert_evaluates(value, aux, w, alpha, batch)
        w, opt_state = inner_step(optimizer, alpha, w, opt_state, batch)


@pytest.mark.parametrize("make", [hypergradient.unrolled, reverse], ids=["forward", "reverse"])
def test_random_keys_in_batches_and_auxiliary_output(make):
    def noisy_loss(w, alpha, key):
        return (w - alpha * jax.random.normal(key)) ** 2, key

    def value(alpha):
        w = 2.0
        for key in keys:
            w -= 0.1 * 2 * (w - alpha * jax.random.normal(key))
        return noisy_loss(w, alpha, val_key)[0]

    optimizer = optax.sgd(0.1)
    keys, val_key = jax.random.split(jax.random.key(0)), jax.random.key(1)
    estimate = make(Bilevel(noisy_loss, noisy_loss, has_aux=True), optimizer, num_steps=2)
    found = estimate(jnp.array(3.0), jnp.array(2.0), optimizer.init(0.0), keys, val_key)
    np.testing.assert_allclose(found.value, value(3.0), rtol=1e-14)
    np.testing.assert_allclose(found.gradient, jax.grad(value)(3.0), rtol=1e-13)
    assert found.aux == val_key
    assert all(found.train.aux == keys)


def test_a_custom_vjp_passes_in_both_modes():
    @jax.custom_vjp
    def square(x):
        return x**2

    square.defvjp(lambda x: (square(x), x), lambda x, ct: (2 * x * ct,))

    def implicit(make, square):
        problem = Bilevel(lambda w, a, _: square(w - a), lambda w, a, _: a * w)
        return toy_estimate(make, 0.1, 2.0, 3.0, problem).implicit

    np.testing.assert_allclose(implicit(reverse, square), 2 * 0.1 * 2)
    np.testing.assert_allclose(implicit(hypergradient.unrolled, square), 2 * 0.1 * 2)


# Mistakes.


@pytest.mark.parametrize("num_steps", [0, -1])
def test_num_steps_must_be_positive(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        hypergradient.unrolled(CLASSIFIER, optax.sgd(0.1), num_steps)


def test_mode_must_be_known():
    with pytest.raises(ValueError, match="mode must be 'forward' or 'reverse', got 'backward'"):
        hypergradient.unrolled(CLASSIFIER, optax.sgd(0.1), mode="backward")


@pytest.mark.parametrize("radius", [0, -0.01, float("nan")])
def test_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match=f"radius must be positive, got {radius}"):
        hypergradient.finite_difference(CLASSIFIER, optax.sgd(0.1), radius)


@each_estimator
def test_alpha_and_w_must_be_floating_point(make):
    optimizer = OPTIMIZERS["sgd"]
    alpha, w, *rest = classifier_inputs(optimizer)
    estimate = jax.jit(make(CLASSIFIER, optimizer))
    with pytest.raises(ValueError, match=r"alpha\['scale'\] must be floating-point, got int64\[\]"):
        estimate({**alpha, "scale": jnp.array(1)}, w, *rest)
    with pytest.raises(ValueError, match=r"w\['bias'\] must be floating-point, got bool\[\]"):
        estimate(alpha, {**w, "bias": jnp.array(True)}, *rest)


@pytest.mark.parametrize(
    ("output", "has_aux", "message"),
    [
        (jnp.ones, False, r"must return a floating-point scalar.*, got float64\[3\]"),
        (lambda _: jnp.array(1), False, r"must return a floating-point scalar.*, got int64\[\]"),
        (lambda _: None, False, "must return a floating-point scalar.*, got NoneType"),
        (
            lambda _: (1.0, {}),
            False,
            r"must return .* or \(scalar, aux\) with has_aux=True, got tuple",
        ),
        (lambda _: 1.0, True, r"must return \(scalar, aux\) with has_aux=True, got"),
        (lambda _: (jnp.ones(3), {}), True, r"must return a floating-point scalar, got float64"),
    ],
)
def test_losses_must_return_a_scalar(output, has_aux, message):
    def bad(w, alpha, batch):
        return output(3)

    def good(w, alpha, batch):
        return (w * alpha, None) if has_aux else w * alpha

    def run(train_loss, val_loss):
        problem = Bilevel(train_loss, val_loss, has_aux)
        hypergradient.unrolled(problem, optax.sgd(0.1))(1.0, 1.0, optax.sgd(0.1).init(1.0), 0, 0)

    with pytest.raises(ValueError, match="bad " + message):
        run(bad, good)
    with pytest.raises(ValueError, match="bad " + message):
        run(good, bad)


def test_train_batch_must_have_an_axis_of_steps():
    optimizer = OPTIMIZERS["sgd"]
    inputs = classifier_inputs(optimizer, num_steps=3)
    message = r"train_batch\['\w+'\] must have a leading axis of num_steps=2, got .*\[3"
    with pytest.raises(ValueError, match=message):
        hypergradient.unrolled(CLASSIFIER, optimizer, num_steps=2)(*inputs)


# The toy problem of the paper's figure 2: L_val = alpha w - 2 alpha + 1, L_train = (w - alpha)^2.

TOY = Bilevel(lambda w, a, _: (w - a) ** 2, lambda w, a, _: a * w - 2 * a + 1)


def toy_estimate(make, xi, alpha, w, problem=TOY):
    optimizer = optax.sgd(xi)
    return make(problem, optimizer)(alpha, w, optimizer.init(w), None, None)


def toy_trajectory(make, xi, alpha_rate, w_rate, start, num_steps):
    """(w, alpha) after each iteration: a step of alpha, then one of w with the new alpha."""

    def iteration(point, _):
        w, alpha = point
        alpha -= alpha_rate * toy_estimate(make, xi, alpha, w).gradient
        w -= w_rate * 2 * (w - alpha)
        return (w, alpha), jnp.stack([w, alpha])

    return jax.lax.scan(iteration, tuple(start), None, num_steps)[1]


@each_unrolled
def test_toy_hypergradients(make, oracle):
    recorded = oracle("toy_bilevel.npz")
    xi, alpha, w = (recorded[f"hyper/{name}"] for name in ("xi", "a", "w"))
    estimate = jax.vmap(functools.partial(toy_estimate, make))(xi, alpha, w)
    np.testing.assert_allclose(estimate.gradient, recorded["hyper/grad_a"], rtol=1e-12)
    np.testing.assert_allclose(estimate.implicit, 2 * xi * alpha, rtol=1e-12)
    value, train_value = recorded["hyper/loss_val_at_w_prime"], recorded["hyper/loss_train"]
    np.testing.assert_allclose(estimate.value, value, rtol=1e-12)
    np.testing.assert_allclose(estimate.train.value, train_value, rtol=1e-12)


@each_estimator
def test_toy_trajectories(make, oracle):
    pattern = r"traj/w(?P<w>.+)_a(?P<a>.+)/xi(?P<xi>.+)/lra(?P<lra>.+)_lrw(?P<lrw>.+)"
    recorded = {re.fullmatch(pattern, k): v for k, v in oracle("toy_bilevel.npz").items()}
    recorded = {k: v for k, v in recorded.items() if k}
    assert len(recorded) == 16
    if make is ESTIMATORS["first_order"]:
        recorded = {k: v for k, v in recorded.items() if k["xi"] == "0"}
    w, alpha, xi, alpha_rate, w_rate = np.array([k.groups() for k in recorded], float).T
    start = np.stack([w, alpha], axis=1)
    run = jax.vmap(functools.partial(toy_trajectory, make, num_steps=1000))
    found = jax.jit(run)(xi, alpha_rate, w_rate, start)
    expected = np.stack(list(recorded.values()))
    np.testing.assert_array_equal(expected[:, 0], start)
    np.testing.assert_allclose(found, expected[:, 1:], rtol=1e-10, atol=1e-10)


@each_unrolled
def test_toy_fixed_points(make, oracle):
    recorded = oracle("toy_bilevel.npz")
    xi = recorded["fixed_point/xi"]
    run = functools.partial(toy_trajectory, make, num_steps=2000)
    found = jax.vmap(lambda xi: run(xi, 0.1, 0.5, jnp.array([2.0, -2.0]))[-1])(xi)
    np.testing.assert_allclose(found, np.stack([2 / (1 + 2 * xi)] * 2, axis=1), rtol=1e-10)
    np.testing.assert_allclose(found[:, 0], recorded["fixed_point/w_equals_a"], rtol=1e-10)
