import json
from pathlib import Path

import numpy as np
import pytest
from tiny_network import TinyNetwork

from darts_jax import genotype
from experiments import compare_hypergradients, search_cnn
from experiments.comparison import top_operations
from experiments.comparison_estimators import Settings, methods

TINY = (
    "smoke --problem.epochs 1 --problem.data.limit 128 --every 3 --precisions float64"
    " --radii-per-decade 1"
).split()
FIGURES = ("cosine", "cost", "radius", "alphas")


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Runs there, and leaves the compilation cache as it is."""
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_cnn, "Supernet", TinyNetwork)


def lines_of(workdir, kind):
    lines = map(json.loads, Path(workdir, "comparison.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def test_toy(capsys):
    arguments = ["toy", "--problem.steps", "25", "--num-seeds", "2", "--radii-per-decade", "1"]
    assert compare_hypergradients.main(arguments) == 0
    workdir = Path("runs/compare_hypergradients-toy-seed0")
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "comparison.jsonl",
        "comparison.csv",
        *(f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")),
    }
    names = ["exact", *compare_hypergradients.PRESETS["toy"][1].estimators]
    states = lines_of(workdir, "state")
    assert [(line["step"], line["estimator"]) for line in states] == [
        (step, name) for step in (0, 10, 20) for name in names
    ]
    assert [line["estimator"] for line in lines_of(workdir, "cost")] == names
    radii = lines_of(workdir, "radius")
    assert len(radii) == 3 * 10
    assert {line["precision"] for line in radii} == {"float32", "float64", "bfloat16"}
    assert [line["radius"] for line in radii[:10]] == [
        None,
        *(pytest.approx(10.0**-k) for k in range(9)),
    ]
    searches = lines_of(workdir, "search")
    assert [(line["seed"], line["estimator"]) for line in searches] == [
        (seed, name) for seed in (0, 1) for name in names
    ]
    assert all(np.isfinite(line["val_loss"]) for line in searches)
    alphas = [line for line in lines_of(workdir, "alpha") if line["estimator"] == "neumann"]
    assert [(line["seed"], line["step"]) for line in alphas] == [
        (seed, step) for seed in (0, 1) for step in (0, 10, 20, 25)
    ]
    assert alphas[0]["alpha"] == [-2]
    output = capsys.readouterr().out
    assert "Against the exact hypergradient, over 3 states" in output
    command = "experiments.compare_hypergradients toy --problem.steps 25 --num-seeds 2"
    assert f"{command} --radii-per-decade 1 --seed 2" in output


def test_cells():
    assert compare_hypergradients.main([*TINY, "--workdir", "run", "--seed", "1"]) == 0
    states = lines_of("run", "state")
    names = ["exact", "first_order", "finite_difference", "t1_t2"]
    assert [(line["step"], line["estimator"]) for line in states] == [
        (step, name) for step in (0, 3) for name in names
    ]
    exact = states[0]
    assert exact["gradient_cosine"] == pytest.approx(1)
    assert exact["implicit_relative_error"] == 0
    assert exact["sign_agreement"] == exact["top_agreement"] == 1
    for line in states:
        assert 0 <= line["top_agreement"] <= 1
    # A smooth network: the finite difference is near, the first-order gradient is not.
    errors = {line["estimator"]: line["gradient_relative_error"] for line in states[:4]}
    assert errors["finite_difference"] < 0.02 < errors["first_order"]
    searches = lines_of("run", "search")
    assert [line["seed"] for line in searches] == [1] * 4
    assert searches[0]["edges_differ"] == searches[0]["operations_differ"] == 0
    last = {line["estimator"]: line["alpha"] for line in lines_of("run", "alpha")}
    for line in searches:
        normal, reduce = np.reshape(last[line["estimator"]], (2, 5, 8))
        found = genotype.derive({"normal": normal, "reduce": reduce})
        assert json.loads(json.dumps(found._asdict())) == line["genotype"]
        assert (
            len(top_operations({"normal": normal, "reduce": reduce}, genotype.CNN_PRIMITIVES)) == 10
        )
        assert 0 <= line["edges_differ"] <= line["operations_differ"] <= 1
        assert 1 < line["val_loss"] < 4


@pytest.mark.slow
def test_recurrent_cell():
    arguments = (
        "text_rnn --problem.data.limit 1000 --problem.model.size 3 --problem.model.nodes 2"
        " --problem.length 20 --every 3 --precisions"
        " --estimators first_order finite_difference_small --workdir run"
    )
    assert compare_hypergradients.main(arguments.split()) == 0
    errors = {
        line["estimator"]: line["gradient_relative_error"] for line in lines_of("run", "state")
    }
    assert errors["finite_difference_small"] < 0.1 < errors["first_order"]
    for line in lines_of("run", "search"):
        assert len(line["genotype"]["recurrent"]) == 2
        assert 0 <= line["edges_differ"] <= line["operations_differ"] <= 1
    alphas = [line for line in lines_of("run", "alpha") if line["estimator"] == "exact"]
    found = genotype.derive_recurrent(np.reshape(alphas[-1]["alpha"], (3, 5)))
    assert found.recurrent == tuple(
        map(tuple, lines_of("run", "search")[0]["genotype"]["recurrent"])
    )


def test_the_same_command_gives_the_same_numbers():
    def run():
        arguments = ["toy", "--workdir", "run", "--problem.steps", "10", "--precisions"]
        assert compare_hypergradients.main(arguments) == 0
        return [
            {name: value for name, value in line.items() if "seconds" not in name}
            for kind in ("state", "search", "alpha", "cost")
            for line in lines_of("run", kind)
        ]

    assert run() == run()


def test_a_search_that_diverges_is_a_result(capsys):
    """At this rate of alpha, the exact search is a contraction; conjugate gradients are not."""
    arguments = (
        "toy --problem.alpha-rate 2.2 --problem.steps 200 --precisions --num-seeds 1"
        " --estimators conjugate_gradient --workdir run"
    )
    assert compare_hypergradients.main(arguments.split()) == 0
    exact, other = lines_of("run", "search")
    assert exact["val_loss"] == pytest.approx((2 / 1.2) ** 2 - 2 * (2 / 1.2) + 1, rel=1e-3)
    assert other["val_loss"] is None
    assert "the training loss is" in other["diverged"]


def assert_refused(capsys, arguments, *texts):
    """Exit code 2, one line on stderr that holds the texts, and nothing written."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    assert compare_hypergradients.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    for text in texts:
        assert text in error
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("digits", "unknown preset 'digits'; use one of: digits_cnn"),
        ("toy --estimators newmann", "unknown estimator 'newmann'"),
        ("toy --estimators newmann", "one of: neumann"),
        ("toy --estimators unrolled_1", "unrolled_K with K from 2"),
        ("toy --every 0", "--every is 0; give at least 1"),
        ("toy --num-seeds 0", "--num-seeds is 0; give at least 1"),
        ("toy --seed -1", "--seed is -1; give at least 0"),
        ("toy --seed 4294967295 --num-seeds 2", "less than 2**32, all seeds included"),
        ("toy --settings.radius 0", "--settings.radius is 0.0; give more than 0"),
        ("toy --settings.small-radius nan", "--settings.small-radius is nan; give more than 0"),
        ("toy --settings.neumann-terms 0", "--settings.neumann-terms is 0; give at least 1"),
        ("toy --settings.cg-damping -1", "--settings.cg-damping is -1.0; give at least 0"),
        ("toy --problem.steps 0", "--problem.steps is 0; give at least 1"),
        ("cleaning --problem.images 2000", "give less than all 1797 digits"),
        ("smoke --problem.data.name digit", "unknown dataset 'digit'; use one of: digits"),
        ("smoke --problem.batch-size 65", "64 images fill no batch of 65"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, text):
    assert_refused(capsys, arguments, text)


def test_images_that_do_not_fit_the_network(capsys, monkeypatch):
    def refuse(self, x, weights, train):
        raise ValueError(f"images of {x.shape[1]}x{x.shape[2]} do not halve twice")

    monkeypatch.setattr(TinyNetwork, "__call__", refuse)
    assert_refused(capsys, "smoke", "images of 8x8 do not halve twice")


def test_workdir_of_another_config(capsys):
    arguments = "toy --problem.steps 2 --precisions --num-seeds 1 --workdir run"
    assert compare_hypergradients.main(arguments.split()) == 0
    capsys.readouterr()
    assert_refused(
        capsys,
        f"{arguments} --every 3",
        "run holds a run with another config",
        "every is 10 there, 3 here",
    )


def test_workdir_that_cannot_be_written(capsys):
    Path("file").touch()
    assert_refused(capsys, "toy --problem.steps 2 --precisions --workdir file/run", "file/run")


def test_exact_search_that_diverges(capsys):
    assert compare_hypergradients.main("toy --problem.xi 30 --workdir run".split()) == 3
    error = capsys.readouterr().err
    assert error.startswith("error: step ")
    assert "the training loss is" in error
    assert error.endswith("; lower the learning rates\n")
    assert error.count("\n") == 1
    assert not Path("run/comparison.jsonl").exists()


def test_every_preset_has_its_estimators():
    for _, config in compare_hypergradients.PRESETS.values():
        compare_hypergradients.check(config)
        assert list(methods(config.estimators, config.settings)) == ["exact", *config.estimators]


def test_exact_is_always_compared_and_once():
    assert list(methods(("t1_t2", "exact"), Settings())) == ["exact", "t1_t2"]
