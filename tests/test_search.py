"""The search step: determinism, compilation, and what advances when."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict

from darts_jax import hypergradient, relaxation, search
from darts_jax.networks import Supernet
from darts_jax.operations import Operation

NETWORK = Supernet(2, 3, 10, nodes=1)
IMAGE_SHAPE = (8, 8, 1)
STEPS = 8
COMPILATION = "/jax/core/compile/backend_compile_duration"
W_OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(5.0), optax.add_decayed_weights(3e-4), optax.sgd(0.05, momentum=0.9)
)
# A large rate, so that a step at the old alpha differs visibly from one at the new.
ALPHA_OPTIMIZER = optax.adam(0.05, b1=0.5)


def batch(seed):
    rng = np.random.default_rng(seed)
    image = jnp.asarray(rng.standard_normal((4, *IMAGE_SHAPE)), jnp.float32)
    return search.Batch(image, jnp.asarray(rng.integers(0, 10, 4), jnp.int32))


TRAIN, VAL = batch(0), batch(1)


def init(seed=0):
    return search.init(jax.random.key(seed), NETWORK, W_OPTIMIZER, ALPHA_OPTIMIZER, IMAGE_SHAPE)


def make_step(estimator=hypergradient.first_order):
    return search.make_step(NETWORK, estimator, W_OPTIMIZER, ALPHA_OPTIMIZER)


def unrolled(problem):
    return hypergradient.unrolled(problem, W_OPTIMIZER)


def differentiate(w, alpha, image_batch, batch_stats):
    """Of the stages that the steps share: compiled once for this file."""
    function = hypergradient.value_and_grad(search.make_loss(NETWORK, relaxation.softmax), True)
    return function(w, alpha, search.Inputs(image_batch, batch_stats))


def assert_same_bits(a, b):
    def check(a, b):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)

    jax.tree.map(check, a, b)


def differs(a, b):
    return any(
        (np.asarray(x) != np.asarray(y)).any()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def copy(state):
    """For a step, which donates the state that it is given."""
    return jax.device_put(state, may_alias=False)


class Run(NamedTuple):
    states: list
    metrics: list
    compilations: list


@pytest.fixture(scope="module")
def step():
    return make_step()


@pytest.fixture(scope="module")
def run(step):
    """STEPS steps on the same batches: states, metrics, and programs compiled by each step."""
    events, compilations = [], []

    def listen(event, duration, **_):
        events.append(event)

    states, metrics = [init()], []
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for _ in range(STEPS):
            state = copy(states[-1])
            events.clear()
            state, measured = step(state, TRAIN, VAL)
            compilations.append(events.count(COMPILATION))
            states.append(state)
            metrics.append(measured)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return Run(states, metrics, compilations)


def test_compiles_once(run):
    first, *later = run.compilations
    assert first >= 4  # value and gradients, the two updates, and the metrics
    assert later == [0] * (STEPS - 1)


def test_same_seed_same_bits(run, step):
    state = init()
    assert_same_bits(state, run.states[0])
    for expected, expected_metrics in zip(run.states[1:], run.metrics, strict=True):
        state, metrics = step(state, TRAIN, VAL)
        assert_same_bits(state, expected)
        assert_same_bits(metrics, expected_metrics)


def test_donates_the_state(step):
    state = init()
    step(state, TRAIN, VAL)
    moved = (state.step, state.w, state.alpha, state.w_opt_state, state.alpha_opt_state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(moved))


def test_optimizer_state_that_is_the_weights_can_be_donated():
    def update(updates, state, params):
        return jax.tree.map(lambda g: -0.1 * g, updates), optax.apply_updates(state, updates)

    keeps_params = optax.GradientTransformation(lambda params: params, update)
    state = search.init(jax.random.key(0), NETWORK, keeps_params, ALPHA_OPTIMIZER, IMAGE_SHAPE)
    step = search.make_step(NETWORK, hypergradient.first_order, keeps_params, ALPHA_OPTIMIZER)
    state, _ = step(state, TRAIN, VAL)
    assert state.step == 1


def test_other_seed_other_start(run):
    other, state = init(1), run.states[0]
    assert differs(other.w, state.w)
    assert differs(other.alpha, state.alpha)
    assert differs(jax.random.key_data(other.key), jax.random.key_data(state.key))


def test_init(run):
    state = run.states[0]
    assert state.step.dtype == jnp.int32 and state.step.shape == () and state.step == 0
    assert jnp.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    assert set(state.alpha) == {"normal", "reduce"}
    for alpha in state.alpha.values():
        assert alpha.shape == (2, 8) and alpha.dtype == jnp.float32
        assert 0.5e-3 < alpha.std() < 2e-3 and jnp.abs(alpha.mean()) < 0.5e-3
    assert differs(state.alpha["normal"], state.alpha["reduce"])
    floats = jax.tree.leaves((state.w, state.carry))
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    assert state.w["stem"].shape == (3, 3, 1, 6)
    assert state.w["head_kernel"].shape == (8, 10)  # two reductions of 2 channels, 4 nodes
    assert set(state.w) == {"stem", "stem_norm", "head_kernel", "head_bias"} | {
        f"cell_{i}" for i in range(3)
    }
    for leaf in jax.tree.leaves(state.carry):
        assert (leaf == 0).all() or (leaf == 1).all()
    momentum = optax.tree.get(state.w_opt_state, "trace")
    assert jax.tree.structure(momentum) == jax.tree.structure(state.w)
    assert not any(leaf.any() for leaf in jax.tree.leaves(momentum))
    assert optax.tree.get(state.alpha_opt_state, "count") == 0


def test_state_keeps_its_shapes_and_dtypes(run):
    def signature(state):
        return jax.tree.map(jax.typeof, state)  # weak types included

    assert all(signature(state) == signature(run.states[0]) for state in run.states[1:])


def test_counts_steps_and_keeps_the_key(run):
    assert [int(state.step) for state in run.states] == list(range(STEPS + 1))
    for state in run.states:
        assert_same_bits(state.key, run.states[0].key)
        assert optax.tree.get(state.alpha_opt_state, "count") == state.step


def test_alpha_moves_and_stays_finite(run):
    for before, after in zip(run.states, run.states[1:], strict=False):
        for name in ("normal", "reduce"):
            assert np.isfinite(after.alpha[name]).all()
            assert differs(after.alpha[name], before.alpha[name])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((run.states[-1].w, run.metrics)))


def test_one_step_is_alpha_then_weights(run):
    """Alpha by the validation gradient; then w, and the running statistics, at the new alpha."""
    before, after, metrics = run.states[1], run.states[2], run.metrics[1]
    val, (_, hypergradient_) = differentiate(before.w, before.alpha, VAL, before.carry)
    updates, _ = ALPHA_OPTIMIZER.update(hypergradient_, before.alpha_opt_state, before.alpha)
    alpha = optax.apply_updates(before.alpha, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after.alpha, alpha)

    train, (gradient, _) = differentiate(before.w, after.alpha, TRAIN, before.carry)
    assert_same_bits(after.carry, train.aux.batch_stats)
    updates, _ = W_OPTIMIZER.update(gradient, before.w_opt_state, before.w)
    w = optax.apply_updates(before.w, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.w, w)
    # The old alpha would have shown: in the statistics and in the loss.
    stale, _ = differentiate(before.w, before.alpha, TRAIN, before.carry)
    assert differs(stale.aux.batch_stats, after.carry)
    assert stale.value != train.value

    expected = search.Metrics(
        train.value,
        (np.argmax(train.aux.logits, -1) == TRAIN.label).mean(),
        val.value,
        (np.argmax(val.aux.logits, -1) == VAL.label).mean(),
        optax.tree.norm(gradient),
        optax.tree.norm(hypergradient_),
        -1,
    )
    np.testing.assert_allclose(metrics, expected, rtol=1e-6)


def test_lowers_the_training_loss(run):
    losses = [float(metrics.train_loss) for metrics in run.metrics]
    assert losses[-1] < 0.8 * losses[0]


def test_loss_is_the_mean_cross_entropy(run):
    state = run.states[0]
    found, _ = differentiate(state.w, state.alpha, TRAIN, state.carry)
    logits = np.asarray(found.aux.logits, np.float64)
    log_normalizers = np.log(np.exp(logits).sum(-1))
    expected = (log_normalizers - logits[np.arange(4), TRAIN.label]).mean()
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def evaluate():
    return jax.jit(search.make_evaluate(NETWORK))


def test_evaluate_ignores_padding(run, evaluate):
    state = run.states[-1]
    rows = [evaluate(state, TRAIN, jnp.arange(4) == i) for i in range(4)]
    mask = jnp.array([True, True, False, False])
    loss, correct = evaluate(state, TRAIN, mask)
    np.testing.assert_allclose(loss, rows[0][0] + rows[1][0], rtol=1e-6)
    assert correct == rows[0][1] + rows[1][1]
    assert evaluate(state, TRAIN, jnp.zeros(4, bool)) == (0, 0)

    for filler in (0.0, 1e3, jnp.nan):
        image = TRAIN.image.at[2:].set(filler)
        label = TRAIN.label.at[2:].set(0)
        padded = evaluate(state, search.Batch(image, label), mask)
        np.testing.assert_allclose(padded[0], loss, rtol=1e-6)
        assert padded[1] == correct


def test_evaluate_uses_running_statistics(run, evaluate):
    state, mask = run.states[-1], jnp.ones(4, bool)
    loss, correct = evaluate(state, TRAIN, mask)
    alone = [
        evaluate(state, jax.tree.map(lambda x, i=i: jnp.repeat(x[i : i + 1], 4, 0), TRAIN), mask)
        for i in range(4)
    ]  # each image in a batch of its copies: by the batch's moments, all would be different
    np.testing.assert_allclose(loss, sum(losses for losses, _ in alone) / 4, rtol=1e-5)
    assert correct == sum(hits for _, hits in alone) / 4
    other, _ = evaluate(state._replace(carry=run.states[0].carry), TRAIN, mask)
    assert abs(other - loss) > 1e-3


def test_cross_entropy_and_accuracy():
    logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]))
    label = jnp.array([1, 2])
    np.testing.assert_allclose(
        search.cross_entropy(logits, label), [np.log(4), -np.log(0.7)], rtol=1e-6
    )
    assert search.accuracy(logits, label) == 0.5


@pytest.mark.slow
def test_whole_step_compiled_equals_the_stages(run, step):
    """As one program and as stages, the same to rounding: in double precision."""
    with jax.enable_x64(True):

        def double(tree):
            return jax.tree.map(
                lambda x: x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x,
                tree,
            )

        state, train, val = double((run.states[1], TRAIN, VAL))
        staged = step(copy(state), train, val)
        whole = jax.jit(step, donate_argnums=0)(copy(state), train, val)
        for a, b in zip(jax.tree.leaves(staged), jax.tree.leaves(whole), strict=True):
            if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
                continue
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * np.abs(a).max())


@pytest.mark.slow
def test_unrolled_step(run, step):
    """The exact estimator moves alpha elsewhere, and shares everything else with first order."""
    state = run.states[1]
    exact, metrics = make_step(unrolled)(copy(state), TRAIN, VAL)
    first, first_metrics = step(copy(state), TRAIN, VAL)
    assert exact.step == first.step
    assert differs(exact.alpha, first.alpha)
    assert metrics.hypergradient_norm != first_metrics.hypergradient_norm
    train, _ = differentiate(state.w, exact.alpha, TRAIN, state.carry)
    assert_same_bits(exact.carry, train.aux.batch_stats)


def average(params, x, stride, norm):
    """The mean of 2x2 pixels at stride 2, else the pixel: no parameters."""
    n, h, w, c = x.shape
    return x.reshape(n, h // stride, stride, w // stride, stride, c).mean((2, 4))[..., None, :]


@pytest.mark.parametrize(
    ("normalized", "estimator"),
    [
        (True, lambda problem, _: hypergradient.first_order(problem)),
        (False, hypergradient.unrolled),
    ],
)
def test_a_search_whose_operations_have_no_parameters(normalized, estimator, x64):
    """Without a batch norm, too: only stem, preprocessing and head have something to train."""
    average_only = Operation(average, normalized=lambda stride: normalized)
    network = Supernet(
        2, 3, 10, nodes=1, operations=FrozenDict(average=average_only), primitives=("average",)
    )
    optimizer = optax.sgd(0.1)
    state = search.init(jax.random.key(0), network, optimizer, optimizer, (8, 8, 1))
    assert not jax.tree.leaves(state.w["cell_1"].get("edges"))
    step = search.make_step(network, lambda p: estimator(p, optimizer), optimizer, optimizer)
    batch = search.Batch(jax.random.normal(jax.random.key(1), (4, 8, 8, 1)), jnp.arange(4))
    before = state.carry["cell_1"]["edges"].mean
    state, metrics = step(state, batch, batch)
    assert all(jnp.isfinite(metric) for metric in metrics)
    after = state.carry["cell_1"]["edges"].mean
    assert before.shape == after.shape == ((2, 4) if normalized else (0, 4))
    assert metrics.hypergradient_norm < 1e-12  # one candidate has all the weight
    loss, correct = search.make_evaluate(network)(state, batch, jnp.ones(4, bool))
    assert jnp.isfinite(loss) and 0 <= correct <= 4
