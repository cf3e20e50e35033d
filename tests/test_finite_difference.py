"""The finite difference: its order, its radius, its best radius."""

import jax
import numpy as np
import optax
import pytest
from bilevel import (
    CLASSIFIER,
    OPTIMIZERS,
    SGD,
    assert_close,
    classifier_inputs,
    quadratic,
)
from jax.flatten_util import ravel_pytree

from darts_jax import hypergradient

pytestmark = pytest.mark.usefixtures("x64")


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


@pytest.mark.parametrize("radius", [0, -0.01, float("nan")])
def test_radius_must_be_positive(radius):
    with pytest.raises(ValueError, match=f"radius must be positive, got {radius}"):
        hypergradient.finite_difference(CLASSIFIER, optax.sgd(0.1), radius)


def implicit_error(estimate, exact):
    difference = optax.tree.sub(estimate.implicit, exact.implicit)
    return float(optax.tree.norm(difference) / optax.tree.norm(exact.implicit))


def test_one_sided_difference_converges_at_first_order():
    optimizer = OPTIMIZERS["weight_decay"]
    inputs = classifier_inputs(optimizer)
    exact = hypergradient.unrolled(CLASSIFIER, optimizer)(*inputs)
    errors = []
    for radius in (0.004, 0.002, 0.001):
        one_sided = hypergradient.finite_difference(CLASSIFIER, optimizer, radius, scheme="forward")
        errors.append(implicit_error(one_sided(*inputs), exact))
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 2, rtol=0.02)


def test_relative_radius_is_in_units_of_the_norm_of_w():
    optimizer = OPTIMIZERS["momentum"]
    alpha, w, *rest = classifier_inputs(optimizer)
    norm = float(optax.tree.norm(w))
    relative = hypergradient.finite_difference(CLASSIFIER, optimizer, 0.05, relative=True)
    absolute = hypergradient.finite_difference(CLASSIFIER, optimizer, 0.05 * norm)
    expected = absolute(alpha, w, *rest).implicit
    assert_close(relative(alpha, w, *rest).implicit, expected, 1e-9)
    assert abs(norm - 1) > 0.1


def test_relative_radius_at_weights_of_zero_is_absolute():
    problem, alpha, w, opt_state, _ = quadratic(8)
    inputs = (alpha, jax.tree.map(lambda x: 0 * x, w), opt_state, 0.7, None)
    relative = hypergradient.finite_difference(problem, SGD, 0.05, relative=True)(*inputs)
    exact = hypergradient.unrolled(problem, SGD)(*inputs)
    assert optax.tree.norm(exact.implicit) > 0.1
    assert_close(relative.implicit, exact.implicit, 1e-11)


@pytest.mark.parametrize("scheme", ["central", "forward"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_best_radius(dtype, scheme):
    """Truncation falls with the radius, rounding rises; the radius of None is near the best."""
    optimizer = OPTIMIZERS["weight_decay"]
    inputs = classifier_inputs(optimizer)
    exact = hypergradient.unrolled(CLASSIFIER, optimizer)(*inputs)
    cast = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == "float64" else x, inputs)

    def error(radius):
        estimate = hypergradient.finite_difference(CLASSIFIER, optimizer, radius, scheme=scheme)
        return implicit_error(estimate(*cast), exact)

    radii = 10.0 ** np.arange(-12, 1)
    errors = [error(float(radius)) for radius in radii]
    best = int(np.argmin(errors))
    epsilon = np.finfo(dtype).eps
    order = 1 / 3 if scheme == "central" else 1 / 2
    # Within a decade and a half of where theory puts it, and worse on both sides.
    assert abs(np.log10(radii[best]) - order * np.log10(epsilon)) < 1.5
    assert errors[0] > 30 * errors[best] < errors[-1]
    # The smallest error is of the order of epsilon ** (2/3) or ** (1/2).
    share = 2 / 3 if scheme == "central" else 1 / 2
    assert 0.01 * epsilon**share < errors[best] < 100 * epsilon**share
    assert error(None) < 10 * errors[best]


def test_unknown_scheme_and_relative_without_radius():
    with pytest.raises(ValueError, match="scheme must be 'central' or 'forward', got 'backward'"):
        hypergradient.finite_difference(CLASSIFIER, optax.sgd(0.1), scheme="backward")
    with pytest.raises(ValueError, match="relative needs a radius"):
        hypergradient.finite_difference(CLASSIFIER, optax.sgd(0.1), None, relative=True)
