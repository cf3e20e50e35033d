"""The contract of every estimator, and the recorded toy problem."""

import functools
import re

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
    TOY,
    assert_close,
    assert_closed_form,
    assert_evaluates,
    classifier_inputs,
    classifier_loss,
    inner_step,
    quadratic,
    reverse,
    stack,
    toy_estimate,
)
from jax.sharding import NamedSharding, PartitionSpec

from darts_jax import hypergradient
from darts_jax.hypergradient import Bilevel

pytestmark = pytest.mark.usefixtures("x64")


def three_steps(problem, optimizer, **options):
    """Three steps on the same batch, for the signature of one."""
    estimate = hypergradient.unrolled(problem, optimizer, num_steps=3, **options)

    def on_one_batch(alpha, w, opt_state, train_batch, val_batch):
        train_batch = jax.tree.map(lambda x: jnp.stack([x] * 3), train_batch)
        return estimate(alpha, w, opt_state, train_batch, val_batch)

    return on_one_batch


ONE_STEP = {
    "forward": hypergradient.unrolled,
    "reverse": reverse,
    "finite_difference": hypergradient.finite_difference,
}
THROUGH_WEIGHTS = {
    **ONE_STEP,
    "one_sided": functools.partial(hypergradient.finite_difference, scheme="forward"),
    "three_steps": three_steps,
    "three_steps_remat": functools.partial(three_steps, mode="reverse", remat=True),
    "truncated": functools.partial(three_steps, truncate=2),
    "neumann": hypergradient.neumann,
    # Damped, as the Hessian of the classifier has negative eigenvalues.
    "conjugate_gradient": functools.partial(
        hypergradient.conjugate_gradient, num_steps=3, damping=3.0
    ),
    "t1_t2": hypergradient.t1_t2,
}
ESTIMATORS = {
    "first_order": lambda problem, _: hypergradient.first_order(problem),
    **THROUGH_WEIGHTS,
}
each_estimator = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)
each_unrolled = pytest.mark.parametrize("make", ONE_STEP.values(), ids=ONE_STEP)
each_through_weights = pytest.mark.parametrize(
    "make", THROUGH_WEIGHTS.values(), ids=THROUGH_WEIGHTS
)


@pytest.mark.parametrize("seed", range(2))
@each_unrolled
def test_one_step_on_a_quadratic(make, seed):
    problem, alpha, w, opt_state, closed_form = quadratic(seed)
    estimate = make(problem, SGD)(alpha, w, opt_state, 0.7, None)
    assert_closed_form(estimate, closed_form([0.7]))
    np.testing.assert_allclose(estimate.train.value, problem.train_loss(w, alpha, 0.7), rtol=1e-14)


def test_first_order_on_a_quadratic():
    problem, alpha, w, opt_state, closed_form = quadratic(4)
    value, direct, implicit = closed_form([])
    assert_closed_form(
        hypergradient.first_order(problem)(alpha, w, opt_state, None, None),
        (value, direct, jax.tree.map(jnp.zeros_like, implicit)),
    )


@each_through_weights
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


@pytest.fixture
def compilations():
    """The events of compilation so far, a list that grows."""
    events = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@each_estimator
def test_stages_compile_on_the_first_call_alone(make, compilations):
    """Outside of jit."""
    problem = Bilevel(*(lambda *args, loss=loss: loss(*args) for loss in TOY[:2]))  # not in a cache
    optimizer = optax.sgd(0.1, momentum=0.9)
    estimate, w = make(problem, optimizer), jnp.array(2.0)
    estimate(jnp.array(3.0), w, optimizer.init(w), None, None)
    count = len(compilations)
    assert count > 0
    estimate(jnp.array(-1.0), w, optimizer.init(w), None, None)
    assert len(compilations) == count


@each_estimator
def test_an_optimizer_made_inside_of_jit_is_not_kept(make):
    @jax.jit
    def gradient(xi):
        return toy_estimate(make, xi, 3.0, 2.0).gradient

    with jax.checking_leaks():
        if make is ESTIMATORS["conjugate_gradient"]:
            with pytest.raises(ValueError, match="inner_optimizer holds a traced value, .* of jit"):
                gradient(0.1)
        else:
            expected = toy_estimate(make, 0.1, 3.0, 2.0).gradient
            np.testing.assert_allclose(gradient(0.1), expected, rtol=1e-9)


@jax.tree_util.register_pytree_node_class
class Box:
    """A pytree that compares by identity."""

    def __init__(self, value):
        self.value = value

    def tree_flatten(self):
        return (self.value,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@each_estimator
def test_any_pytree(make):
    boxed = Bilevel(*(lambda w, a, _, loss=loss: loss(w.value, a.value, _) for loss in TOY[:2]))
    optimizer = optax.sgd(0.1, momentum=0.9)
    alpha, w = jnp.array(3.0), jnp.array(2.0)
    estimate = make(boxed, optimizer)
    found = estimate(Box(alpha), Box(w), optimizer.init(Box(w)), None, None)
    expected = make(TOY, optimizer)(alpha, w, optimizer.init(w), None, None)
    np.testing.assert_allclose(found.gradient.value, expected.gradient, rtol=1e-14)


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


@each_estimator
def test_integers_and_empty_subtrees(make):
    """classifier_inputs has scalar and empty alphas, integer labels, and a count in the state."""
    optimizer = OPTIMIZERS["schedule"]
    alpha, *rest = classifier_inputs(optimizer)
    estimate = make(CLASSIFIER, optimizer)(alpha, *rest)
    for part in (estimate.gradient, estimate.direct, estimate.implicit):
        chex.assert_trees_all_equal_shapes_and_dtypes(part, alpha)
    total = jax.tree.map(jnp.add, estimate.direct, estimate.implicit)
    assert_close(estimate.gradient, total, 1e-15)
    assert estimate.aux["prediction"].dtype == jnp.int64


@each_estimator
def test_two_devices_give_the_same(make):
    optimizer = OPTIMIZERS["weight_decay"]
    alpha, w, opt_state, *batches = classifier_inputs(optimizer)
    batches = [jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch) for batch in batches]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    estimate = jax.jit(make(CLASSIFIER, optimizer))
    alone = estimate(alpha, w, opt_state, *batches)
    inputs = (*jax.device_put((alpha, w, opt_state), whole), *jax.device_put(batches, over))
    together = estimate(*inputs)
    assert len(together.aux["logits"].devices()) == 2
    assert_close(jax.device_get(together.gradient), jax.device_get(alone.gradient), 1e-12)


# Mistakes.


@each_through_weights
def test_optimizer_state_must_fit(make):
    momentum, plain = OPTIMIZERS["momentum"], OPTIMIZERS["sgd"]
    alpha, w, _, *batches = classifier_inputs(momentum)
    message = r"opt_state is not of inner_optimizer and w: make it by its init\(w\)"
    with pytest.raises(ValueError, match=message):
        make(CLASSIFIER, momentum)(alpha, w, plain.init(w), *batches)
    other = {**w, "bias": jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        make(CLASSIFIER, momentum)(alpha, w, momentum.init(other), *batches)


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


# The toy problem of the paper's figure 2: L_val = alpha w - 2 alpha + 1, L_train = (w - alpha)^2.


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


@pytest.mark.parametrize("make", [ESTIMATORS["first_order"], *ONE_STEP.values()])
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
