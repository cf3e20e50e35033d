"""The comparison of recurrent cells at one budget of parameters."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from darts_jax import genotype, text
from experiments import evaluate_rnn, recurrent_baselines
from experiments.selection import nearest_size


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """What was trained, each to a loss that tells its seed."""
    seen = []

    def train(config, corpus, workdir, display):
        seen.append((config, workdir))
        losses = {"valid": math.log(100 + config.seed), "test": math.log(200 + config.seed)}
        parameters = recurrent_baselines.parameter_count(config, corpus)
        return evaluate_rnn.Outcome(SimpleNamespace(), losses, parameters)

    monkeypatch.setattr(evaluate_rnn, "train", train)
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return seen


def test_the_same_budget_for_all(trained, capsys):
    arguments = "smoke --genotype ENAS --size 30 --seeds 2 --seed 5 --workdir run"
    assert recurrent_baselines.main(arguments.split()) == 0
    names = [config.genotype for config, _ in trained]
    assert names[:4] == ["ENAS", "ENAS", "DARTS_V2", "DARTS_V2"] and names[6:] == ["LSTM", "LSTM"]
    assert [config.seed for config, _ in trained] == [5, 6] * 4
    assert len({path for _, path in trained}) == 8
    cells = [config.cell for config, _ in trained]
    nodes = len(genotype.PUBLISHED_RECURRENT["ENAS"].recurrent)
    assert cells[4] != cells[5] and len(cells[4].recurrent) == len(cells[5].recurrent) == nodes
    rows = json.loads((recurrent_baselines.Path("run") / "baselines.json").read_text())
    sizes = {row["name"]: row["size"] for row in rows}
    assert sizes["ENAS"] == sizes["random"] == 30 < sizes["DARTS_V2"]
    vocabulary = len(text.load("pydoc", limit=2000).vocabulary)
    size = sizes["LSTM"]  # four gates, each of input, output and bias
    lstm = vocabulary * (size + 1) + 4 * size * (2 * size + 1)
    assert rows[-1]["parameters"] == lstm
    for row in rows:
        np.testing.assert_allclose(row["parameters"], rows[0]["parameters"], rtol=0.02)
        np.testing.assert_allclose(row["valid"], [105, 106])
        np.testing.assert_allclose(row["test"], [205, 206])
    output = capsys.readouterr().out
    assert "105.5 ± 0.7" in output and "205.5 ± 0.7" in output
    unigram = text.unigram_perplexity(text.load("pydoc", limit=2000))
    assert f"{unigram:.1f}" in output and "--seed 7" in output


def test_the_paper_s_cell_is_not_trained_twice(trained):
    assert recurrent_baselines.main(["smoke", "--seeds", "1"]) == 0  # nothing was searched
    assert [config.genotype.split("/")[-1] for config, _ in trained] == [
        "DARTS_V2",
        "random_0.json",
        "LSTM",
    ]


@pytest.mark.parametrize(
    ("parameters", "expected"), [(0, 3), (9, 3), (12, 3), (13, 4), (20, 4), (21, 5), (999, 8)]
)
def test_nearest_size(parameters, expected):
    assert nearest_size(lambda size: size * size, parameters, range(3, 9)) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("smoke --seeds 0", "--seeds is 0; give at least 1"),
        ("smoke --genotype LSTM", "no genotype file or published cell"),
        ("ptb", "text 'ptb' is read from a folder"),
    ],
)
def test_bad_input_is_one_line(trained, capsys, arguments, message):
    assert recurrent_baselines.main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not trained and not recurrent_baselines.Path("runs").exists()
