"""The exact estimators against closed forms and central differences."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel import (
    CLASSIFIER,
    OPTIMIZERS,
    SGD,
    assert_close,
    assert_closed_form,
    assert_evaluates,
    classifier_inputs,
    classifier_loss,
    inner_step,
    loss_after_steps,
    numerical_gradient,
    quadratic,
    reverse,
    toy_estimate,
)

from darts_jax import hypergradient
from darts_jax.hypergradient import Bilevel

pytestmark = pytest.mark.usefixtures("x64")

both_modes = pytest.mark.parametrize("mode", ["forward", "reverse"])


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_several_steps_on_a_quadratic(mode, remat):
    problem, alpha, w, opt_state, closed_form = quadratic(3)
    batches = jnp.array([0.7, -0.2, 1.1, 0.4])
    make = functools.partial(hypergradient.unrolled, num_steps=4, mode=mode, remat=remat)
    estimate = make(problem, SGD)(alpha, w, opt_state, batches, None)
    assert_closed_form(estimate, closed_form(batches))


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


def test_gradient_is_the_derivative_of_the_value():
    problem, alpha, w, opt_state, _ = quadratic(7)
    estimate = hypergradient.unrolled(problem, SGD)
    slope = jax.grad(lambda alpha: estimate(alpha, w, opt_state, 0.7, None).value)(alpha)
    assert_close(estimate(alpha, w, opt_state, 0.7, None).gradient, slope, 1e-12)


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


@pytest.mark.parametrize("num_steps", [0, -1])
def test_num_steps_must_be_positive(num_steps):
    with pytest.raises(ValueError, match=f"num_steps must be at least 1, got {num_steps}"):
        hypergradient.unrolled(CLASSIFIER, optax.sgd(0.1), num_steps)


def test_mode_must_be_known():
    with pytest.raises(ValueError, match="mode must be 'forward' or 'reverse', got 'backward'"):
        hypergradient.unrolled(CLASSIFIER, optax.sgd(0.1), mode="backward")


def test_train_batch_must_have_an_axis_of_steps():
    optimizer = OPTIMIZERS["sgd"]
    inputs = classifier_inputs(optimizer, num_steps=3)
    message = r"train_batch\['\w+'\] must have a leading axis of num_steps=2, got .*\[3"
    with pytest.raises(ValueError, match=message):
        hypergradient.unrolled(CLASSIFIER, optimizer, num_steps=2)(*inputs)


@both_modes
@pytest.mark.parametrize("truncate", [1, 2, 4])
def test_truncated_to_the_last_steps(mode, truncate):
    """The steps before the last `truncate` ones move w, and are constant in alpha."""
    optimizer = OPTIMIZERS["everything"]
    alpha, w, opt_state, train_batch, val_batch = inputs = classifier_inputs(optimizer, num_steps=4)
    split = 4 - truncate
    for step in range(split):
        batch = jax.tree.map(lambda x, step=step: x[step], train_batch)
        w, opt_state = inner_step(optimizer, alpha, w, opt_state, batch)
    last = jax.tree.map(lambda x: x[split:], train_batch)

    @jax.jit
    def loss(alpha):
        return loss_after_steps(optimizer, 0, alpha, w, opt_state, last, val_batch)

    estimate = hypergradient.unrolled(CLASSIFIER, optimizer, 4, mode, truncate=truncate)(*inputs)
    np.testing.assert_allclose(estimate.value, loss(alpha), rtol=1e-12)
    assert_close(estimate.gradient, numerical_gradient(loss, alpha), 1e-10)
    whole = hypergradient.unrolled(CLASSIFIER, optimizer, 4, mode)(*inputs)
    chex.assert_trees_all_close(estimate.train, whole.train, rtol=1e-12)
    assert (truncate == 4) == np.allclose(estimate.gradient["scale"], whole.gradient["scale"])


@pytest.mark.parametrize("truncate", [0, 4])
def test_truncate_must_be_a_number_of_steps(truncate):
    with pytest.raises(ValueError, match=f"truncate must be from 1 to num_steps=3, got {truncate}"):
        hypergradient.unrolled(CLASSIFIER, optax.sgd(0.1), 3, truncate=truncate)


def test_a_rule_that_is_not_the_derivative_needs_reverse_mode():
    """Forward mode takes the Hessian for symmetric; a scaled gradient makes it another."""

    @jax.custom_vjp
    def tenth_of_the_gradient(x):
        return x

    tenth_of_the_gradient.defvjp(lambda x: (x, None), lambda _, ct: (ct / 10,))
    problem = Bilevel(
        lambda w, a, _: (tenth_of_the_gradient(w) - a) ** 2, lambda w, a, _: (w - 1) ** 2
    )
    rate, alpha, w = 0.1, 2.0, 3.0

    def after_step(alpha):
        return (w - rate * 2 * (w - alpha) / 10 - 1) ** 2

    found = toy_estimate(reverse, rate, alpha, w, problem).gradient
    np.testing.assert_allclose(found, jax.grad(after_step)(alpha), rtol=1e-12)
