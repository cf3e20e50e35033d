import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tiny_network import TinyNetwork

from darts_jax import data, hypergradient, search, text
from experiments import comparison, search_cnn, search_config, search_rnn
from experiments.comparison_estimators import EXACT, Settings, methods
from experiments.comparison_problems import (
    CleaningConfig,
    CnnConfig,
    RidgeConfig,
    RnnConfig,
    ToyConfig,
    check_problem,
    make,
    mislabelled_digits,
)


def end_of_search(problem, name, seed=0):
    point = comparison.start(problem, seed)
    compiled = {}
    programs = comparison.make_programs(
        problem, methods((name,), Settings()), point, compiled, lambda *_: None
    )
    return comparison.run_search(problem, programs[name], compiled, seed, lambda *_: None)


def test_ridge_regression():
    """The implicit gradient at the solution, against the derivative of its closed form."""
    problem = make(RidgeConfig())
    state = problem.init(0)
    _, train, val = problem.prepare(0, state, 0)
    (x, y), (x_val, y_val) = (
        tuple(np.asarray(a, np.float64) for a in batch) for batch in (train, val)
    )
    assert len(x) + len(x_val) == 442
    penalty = np.exp(np.asarray(state.alpha, np.float64))
    hessian = x.T @ x / len(x) + np.diag(penalty)
    w = np.linalg.solve(hessian, x.T @ y / len(x))
    v = x_val.T @ (x_val @ w - y_val) / len(x_val)
    expected = -penalty * w * np.linalg.solve(hessian, v)
    with jax.enable_x64(True):
        optimizer = optax.sgd(0.1)
        estimate = hypergradient.conjugate_gradient(problem.bilevel, optimizer, 50, tolerance=0.0)
        point = jnp.asarray(np.log(penalty)), jnp.asarray(w), optimizer.init(jnp.asarray(w))
        batches = (tuple(map(jnp.asarray, batch)) for batch in ((x, y), (x_val, y_val)))
        found = estimate(*point, *batches)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-8)
    assert problem.alpha_names[2] == "log penalty of bmi"


def test_search_lowers_the_validation_loss_of_ridge_regression():
    problem = make(RidgeConfig())
    losses = {
        name: problem.evaluate(end_of_search(problem, name)) for name in (EXACT, "first_order")
    }
    assert losses[EXACT] < losses["first_order"] < problem.evaluate(problem.init(0))


def test_cleaning_finds_the_wrong_labels():
    config = CleaningConfig()
    problem = make(config)
    (images, labels), (_, val_labels), wrong = mislabelled_digits(config)
    assert (len(labels), len(val_labels), wrong.sum()) == (500, 1297, 150)
    digits, targets = load_digits(return_X_y=True)
    digits = (digits / 16).astype(np.float32)
    right = {row.tobytes(): target for row, target in zip(digits, targets, strict=True)}
    differs = [right[np.asarray(x).tobytes()] != y for x, y in zip(images, labels, strict=True)]
    np.testing.assert_array_equal(differs, wrong)
    alpha = np.asarray(end_of_search(problem, EXACT).alpha)
    assert roc_auc_score(wrong, -alpha) > 0.95
    # The weights of the data are in no direct term: first order cannot move them.
    assert not np.asarray(end_of_search(problem, "first_order").alpha).any()


def test_toy_starts_elsewhere_by_another_seed():
    problem = make(ToyConfig(start=(1.5, -0.5)))
    assert (problem.init(0).w, problem.init(0).alpha) == (1.5, -0.5)
    assert problem.init(1).w not in (1.5, problem.init(2).w)
    assert problem.init(1).w == problem.init(1).w


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(search_cnn, "Supernet", TinyNetwork)


def test_search_of_cells_is_that_of_search_cnn(tiny):
    """The same states after an epoch, by the loop of the comparison and by that of the search."""
    config = dataclasses.replace(
        CnnConfig(), data=dataclasses.replace(search_config.DIGITS.data, limit=128), epochs=1
    )
    found = end_of_search(make(config), EXACT, seed=3)

    whole = dataclasses.replace(
        search_config.DIGITS,
        data=config.data,
        search=dataclasses.replace(search_config.DIGITS.search, epochs=1),
        seed=3,
    )
    job = search_cnn.make_job(whole, data.load("digits", None, 128), Path())
    state = job.init()
    for batch in job.train_batches(0):
        state, _ = job.train_step(state, job.data, batch)
    assert int(state.step) == int(found.step) == 4
    for name in ("alpha", "w", "carry", "w_opt_state"):
        a, b = getattr(found, name), getattr(state, name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


SMALL_RNN = RnnConfig(
    data=search_rnn.TextConfig("pydoc", limit=2000),
    model=search_rnn.ModelConfig(size=4, nodes=2),
    length=20,
)


def test_search_of_a_recurrent_cell_is_that_of_search_rnn():
    found = end_of_search(make(SMALL_RNN), "first_order", seed=3)
    search_config = dataclasses.replace(
        search_rnn.PYDOC.search, estimator="first_order", epochs=1, length=20
    )
    whole = dataclasses.replace(
        search_rnn.PYDOC, data=SMALL_RNN.data, model=SMALL_RNN.model, search=search_config, seed=3
    )
    job = search_rnn.make_job(whole, text.load("pydoc", limit=2000), Path())
    state = job.init()
    for batch in job.train_batches(0):
        state, _ = job.train_step(state, job.data, batch)
    assert int(state.step) == int(found.step) == 12
    assert state.carry.train_hidden.any() and state.carry.val_hidden.any()
    for name in ("alpha", "w", "carry", "w_opt_state"):
        a, b = getattr(found, name), getattr(state, name)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


def test_names_of_the_alphas_of_a_recurrent_cell():
    names = make(SMALL_RNN).alpha_names
    assert len(names) == 3 * 5
    assert (names[0], names[-1]) == ("start → 0 none", "0 → 1 identity")


def test_cells_are_validated_by_running_statistics(tiny):
    config = dataclasses.replace(
        CnnConfig(), data=dataclasses.replace(search_config.DIGITS.data, limit=100)
    )
    problem = make(config)
    state = problem.init(0)
    dataset = data.load("digits", None, 100)
    _, val = data.split_search(dataset.train, 0.5)
    image = (val.images / 255 - np.array(dataset.mean)) / np.array(dataset.std)
    batch = search.Batch(jnp.asarray(image, jnp.float32), jnp.asarray(val.labels))
    loss, _ = search.make_evaluate(TinyNetwork(4, 3, 10))(state, batch, jnp.ones(50, bool))
    assert problem.evaluate(state) == pytest.approx(float(loss) / 50, rel=1e-4)


def test_names_of_the_alphas_of_cells(tiny):
    problem = make(CnnConfig())
    assert len(problem.alpha_names) == 2 * 14 * 8
    assert problem.alpha_names[0] == "normal c_{k-2} → 0 none"
    assert problem.alpha_names[-1] == "reduce 2 → 3 dil_conv_5x5"
    alpha = {"normal": np.zeros((14, 8)), "reduce": np.arange(112).reshape(14, 8)}
    flat = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(alpha)])
    assert flat[-1] == 111  # the order of the names is that of the leaves


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ToyConfig(steps=0), "--problem.steps is 0; give at least 1"),
        (ToyConfig(xi=0.0), "--problem.xi is 0.0; give more than 0"),
        (RidgeConfig(w_rate=float("nan")), "--problem.w-rate is nan; give more than 0"),
        (CleaningConfig(flipped=1.5), "--problem.flipped is 1.5; give a share from 0 to 1"),
        (CleaningConfig(images=0), "--problem.images is 0; give at least 1"),
        (CnnConfig(epochs=0), "--problem.epochs is 0; give at least 1"),
        (
            CnnConfig(network=search_config.NetworkConfig(channels=0)),
            "--problem.network.channels is 0; give at least 1",
        ),
        (CnnConfig(data=search_cnn.DataConfig("digit")), "unknown dataset 'digit'"),
        (RnnConfig(data=search_rnn.TextConfig("pidoc")), "unknown text 'pidoc'"),
        (RnnConfig(length=0), "--problem.length is 0; give at least 1"),
        (
            RnnConfig(dropout=search_rnn.DropoutConfig(hidden=1.0)),
            "--problem.dropout.hidden is 1.0; give less than 1",
        ),
    ],
)
def test_fields_out_of_range(config, text):
    with pytest.raises(ValueError, match=text):
        check_problem(config)


def test_more_images_than_there_are():
    with pytest.raises(ValueError, match="--problem.images is 1797; give less than all 1797"):
        make(CleaningConfig(images=1797))
