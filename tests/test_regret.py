"""Regret of searches: measures by hand, and a tiny run."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from scipy import stats

from darts_jax import ground_truth, isomorphism, relaxation
from darts_jax.spaces.nasbench201_small import EDGES, PRIMITIVES
from experiments import enumerate_space, regret, regret_measures, regret_report, regret_searches
from experiments.errors import NonFinite
from experiments.regret_methods import METHODS
from experiments.regret_searches import Found, SearchConfig

NONE, SKIP, SMALL, LARGE = range(4)


def make_table():
    """Accuracies by chance; what the table says of images is small."""
    representatives, class_of = isomorphism.classes(EDGES, PRIMITIVES)
    right = np.random.default_rng(0).integers(0, 200, (len(representatives), 3, 2, 2))
    config = enumerate_space.Config(
        data=enumerate_space.ImagesConfig(name="digits", train=50, validation=50, pool=2),
        network=enumerate_space.NetworkConfig(channels=2),
    )
    fields = dataclasses.asdict(config)
    return ground_truth.Table(
        PRIMITIVES,
        EDGES,
        representatives,
        class_of,
        right.astype(np.uint16),
        np.array([200, 200], np.int32),
        json.dumps({name: fields[name] for name in ("data", "network")}),
    )


TABLE = make_table()
run = regret_searches.run_searches


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ((LARGE, LARGE, LARGE, LARGE, LARGE), False),
        ((SKIP, SKIP, LARGE, SMALL, LARGE), False),  # 2 of 5
        ((SKIP, SKIP, SKIP, LARGE, LARGE), True),
        ((SKIP, SKIP, NONE, NONE, NONE), True),  # nothing to train
        ((NONE, NONE, NONE, NONE, NONE), True),
        ((NONE, NONE, NONE, NONE, SMALL), False),
    ],
)
def test_collapse(choice, expected):
    assert bool(regret_measures.collapsed(np.array(choice), PRIMITIVES)) is expected


def test_rank_counts_the_classes_that_are_better():
    accuracy = TABLE.accuracy[:, :, -1, 1].mean(1)
    ranks = regret_measures.ranks(TABLE)
    for number in (0, 17, 500, 1023):
        own = accuracy[TABLE.class_of[number]]
        assert ranks[number] == 1 + (accuracy > own).sum()
    assert ranks.min() == 1


def test_none_is_chosen_only_where_it_may_be():
    alpha = np.array([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert regret_measures.derive(alpha, PRIMITIVES).tolist() == [NONE, LARGE]
    assert regret_measures.derive(alpha, PRIMITIVES, with_none=False).tolist() == [SMALL, LARGE]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_best_of_some_draws_is_counted(count):
    value = np.array([0.3, 0.1, 0.9, 0.1])
    expected = np.zeros(4)
    for draws in itertools.product(range(4), repeat=count):
        best = max(value[list(draws)])
        winners = np.flatnonzero(value == best)
        expected[winners] += 4.0**-count / len(winners)
    np.testing.assert_allclose(regret_measures.best_of(value, count), expected, atol=1e-12)


def test_random_search_has_the_scores_of_all_draws():
    found = regret_measures.random_search(TABLE, 1)
    every = np.asarray(ground_truth.regret(TABLE, np.arange(1024)), float)
    assert found.mean.test_regret == pytest.approx(every.mean(), rel=1e-6)
    assert found.deviation.test_regret == pytest.approx(every.std(), rel=1e-6)
    more = regret_measures.random_search(TABLE, 20)
    assert more.mean.validation_regret < 0.3 * found.mean.validation_regret


def test_paired_differences():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 16))
    found = regret_measures.paired(first, second)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    assert found.mean == pytest.approx((first - second).mean())
    assert found[1:] == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("progress", "more"), [(0.0, 1.0), (0.75, 0.25), (1.0, 0.0)])
def test_the_auxiliary_skip_connection_adds_to_the_skip_connection(progress, more):
    alpha = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    found = METHODS["auxiliary_skip"].relax(alpha, relaxation.Context(None, progress))
    expected = np.exp(alpha) / np.exp(alpha).sum(-1, keepdims=True) + more * np.eye(4)[SKIP]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_edge_weights_are_a_softmax_into_each_node():
    rng = np.random.default_rng(0)
    alpha, beta = rng.normal(size=(5, 4)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    found = METHODS["edge_weights"].relax({"cell": alpha, "cell_edges": beta})
    operations = np.exp(alpha) / np.exp(alpha).sum(-1, keepdims=True)
    into = np.array([destination for _, destination in EDGES])
    power = np.exp(beta)
    edges = power / np.array([power[into == node].sum() for node in into])
    np.testing.assert_allclose(found["cell"], operations, rtol=1e-5)
    np.testing.assert_allclose(found["cell_edges"], edges, rtol=1e-5)
    network = regret.table_setting(TABLE)[0]
    start = METHODS["edge_weights"].init_alpha(jax.random.key(0), network)
    plain = METHODS["exact"].init_alpha(jax.random.key(0), network)
    np.testing.assert_array_equal(start["cell"], plain)


@pytest.mark.slow
def test_shrinking_takes_the_weakest_away():
    """Nested from stage to stage; each begins anew, and all together have the epochs of one."""
    network, train, val, _ = regret.table_setting(TABLE)
    seen = []
    found = run("shrinking", network, SearchConfig(epochs=3), [3, 4], train, val, seen.append)
    assert seen == [1, 2, 3]
    assert found.alpha.shape == (4, 2, 5, 4) and found.accuracy.shape == (3, 2, 2)
    there = found.alpha > -1e8
    assert there[:2].all()
    np.testing.assert_array_equal(there[2:].sum(-1), np.broadcast_to([[[3]], [[2]]], (2, 2, 5)))
    for before, after in zip(found.alpha[1:], there[2:], strict=False):
        weakest = np.where(before > -1e8, before, np.inf).argmin(-1)
        assert not np.take_along_axis(after, weakest[..., None], -1).any()
    plain = run("exact", network, SearchConfig(epochs=1), [3, 4], train, val, seen.append)
    np.testing.assert_array_equal(found.alpha[:2], plain.alpha)
    np.testing.assert_array_equal(regret_measures.derive(found.alpha[-1], PRIMITIVES).shape, (2, 5))


def test_panels_of_the_picture():
    curve = np.zeros((3, 2))
    rows = {
        name: regret_report.Row(method.text, None, None, curve=curve, final=())
        for name, method in METHODS.items()
    }
    panels, levels = regret_report.curves(rows)
    exact = METHODS["exact"].text
    assert [len(panel) for panel in panels] == [5, 6, 8] and not levels
    assert all(next(iter(panel)) == exact for panel in panels)
    assert set().union(*panels) == {method.text for method in METHODS.values()}
    for names, expected in (
        (["exact"], [[exact]]),
        (["exact", "random"], [[exact, "SmoothDARTS, random"]]),
        (["gumbel"], [[METHODS["gumbel"].text]]),
    ):
        panels, _ = regret_report.curves({name: rows[name] for name in names})
        assert [list(panel) for panel in panels] == expected


def test_early_stopping_goes_back_by_seed():
    epochs = 12
    alpha = np.random.default_rng(0).normal(size=(epochs + 1, 2, 5, 4))
    eigenvalue = np.ones((epochs, 2))
    eigenvalue[7:, 1] = 10.0  # whole windows of 5 are around 2 to 9: around 7 the mean grew
    empty = np.zeros(0)
    found = Found(alpha, empty, empty, np.array(0.0), eigenvalue, empty)
    stopped = regret_report.early_stopped(found)
    np.testing.assert_array_equal(stopped[0], alpha[-1, 0])
    np.testing.assert_array_equal(stopped[1], alpha[3, 1])


@pytest.mark.parametrize(("epochs", "count"), [(1, 2), (2, 5), (3, 7)])
def test_the_budget_of_random_search(epochs, count):
    """The table's networks are trained for 2 epochs at one gradient, a search takes 5."""
    assert regret_report.budget(epochs, TABLE) == count


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_moves_alpha(name):
    network, train, val, _ = regret.table_setting(TABLE)
    config, seeds = SearchConfig(epochs=1), [3, 4]
    found = run(name, network, config, seeds, train, val, lambda done: None)
    assert np.isfinite(found.alpha).all()
    assert (found.alpha[0] != found.alpha[1]).mean() > 0.9
    assert (found.alpha[0, 0] != found.alpha[0, 1]).all()  # of two seeds


@pytest.fixture
def table_path(tmp_path):
    ground_truth.save(TABLE, tmp_path / "table.npz")
    return tmp_path / "table.npz"


@pytest.mark.slow
def test_a_run_and_its_resumption(tmp_path, table_path, capsys):
    workdir = tmp_path / "run"
    command = ["smoke", "--table", str(table_path), "--workdir", str(workdir)]
    assert regret.main(command) == 0
    assert "Test regret of exact minus that of another" in capsys.readouterr().out
    content = json.loads((workdir / "regret.json").read_text())
    assert set(content["rows"]) == {
        "first_order", "exact", "early_stop", "perturbation", "random_1", "random_2",
    }  # fmt: skip
    exact, other = (content["rows"][name] for name in ("exact", "first_order"))
    (found,) = content["test_regret_of_exact_minus"].keys() - {"early_stop", "perturbation"}
    assert found == "first_order"
    for name, column in (("with_none", ""), ("without_none", "_without_none")):
        difference = content["test_regret_of_exact_minus"][found][name]["mean"]
        mean, base = (row[f"test_regret{column}"]["mean"] for row in (exact, other))
        assert difference == pytest.approx(mean - base, abs=1e-6)
    assert np.shape(exact["test_regret_by_epoch"]) == (2, 2)
    assert exact["test_regret_by_epoch"][-1] == exact["test_regret"]["seeds"]
    assert exact["seconds"] > 0
    for suffix in ("svg", "png"):
        assert (workdir / f"regret.{suffix}").stat().st_size > 1000
    with np.load(workdir / "methods" / "exact.npz") as file:
        assert file["eigenvalue"].shape == (1, 2)
        assert file["perturbed"].shape == (2, 5) and (file["perturbed"] != NONE).all()
        exact_start = file["alpha"][0]
    with np.load(workdir / "methods" / "first_order.npz") as file:
        np.testing.assert_array_equal(file["alpha"][0], exact_start)  # paired

    kept = (workdir / "methods" / "exact.npz").stat().st_mtime_ns
    assert regret.main(command) == 0
    assert (workdir / "methods" / "exact.npz").stat().st_mtime_ns == kept
    assert json.loads((workdir / "regret.json").read_text()) == content


def test_methods_may_change_and_one_that_is_not_finite_leaves_the_others(
    tmp_path, table_path, capsys, monkeypatch
):
    def searches(name, network, config, seeds, *_):
        tried.append(name)
        if name == "gumbel":
            raise NonFinite("epoch 1: w.stem of seed 4 is not finite")
        alpha = np.zeros((2, len(seeds), 5, 4), np.float32)
        empty = np.zeros((0, 0), np.int32)
        accuracy = np.zeros((1, len(seeds), 2), np.float32)
        return Found(alpha, accuracy, np.ones(1), np.array(1.0), empty, empty)

    def command(*flags):
        tried.clear()
        where = ("--table", str(table_path), "--workdir", str(tmp_path / "run"))
        return regret.main(["smoke", *where, *flags])

    tried = []
    monkeypatch.setattr(regret, "run_searches", searches)
    assert command("--methods", "first_order", "gumbel", "sigmoid") == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: gumbel, epoch 1: w.stem of seed 4 is not finite. Finished methods are" in line
    assert tried == ["first_order", "gumbel"]
    assert command("--methods", "first_order", "sigmoid") == 0
    assert tried == ["sigmoid"]
    rows = json.loads((tmp_path / "run" / "regret.json").read_text())["rows"]
    assert {"first_order", "sigmoid"} < rows.keys()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    for flags, message in (
        (("--search.epochs", "2"), "search.epochs is 1 there, 2 here. Give"),
        (("--seeds", "3"), "seeds is 2 there, 3 here. Give the fields of that run, or another"),
    ):
        assert command("--methods", "first_order", "sigmoid", *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line and "--fork" not in line
    assert not tried
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}


@pytest.mark.slow
def test_a_search_that_is_not_finite_names_epoch_and_seed():
    network, train, val, _ = regret.table_setting(TABLE)
    config = SearchConfig(epochs=2, learning_rate=1e30)
    with pytest.raises(NonFinite, match=r"^epoch 1: \S+ of seed [34] is not finite$"):
        run("first_order", network, config, [3, 4], train, val, lambda done: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--methods", "exakt"), "unknown method 'exakt' of --methods; use: exact"),
        (("--seeds", "1"), "--seeds is 1; give at least 2"),
        (("--search.batch-size", "51"), "--search.batch-size is 51; give at most the 50 images"),
        (("--table", "nowhere.npz"), "no table nowhere.npz"),
    ],
)
def test_what_is_refused(tmp_path, table_path, capsys, flags, message):
    command = ["smoke", "--table", str(table_path), *flags, "--workdir", str(tmp_path / "run")]
    assert regret.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_table_of_some_architectures_is_refused(tmp_path):
    partial = TABLE._replace(class_of=np.where(TABLE.class_of == 5, -1, TABLE.class_of))
    ground_truth.save(partial, tmp_path / "table.npz")
    with pytest.raises(ValueError, match="lacks architectures; give a table of all"):
        regret.load_table(tmp_path / "table.npz")
