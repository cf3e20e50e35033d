"""The pipeline and the random baseline, with stand-ins for what takes time; the page."""

import base64
import dataclasses
import json
import re
import shlex
from pathlib import Path
from xml.etree import ElementTree

import browser
import numpy as np
import pytest
from cheap_cells import CHEAP

from darts_jax import data, genotype
from experiments import (
    command_line,
    evaluate_cnn,
    pipeline,
    pipeline_report,
    random_search,
    runner,
    search_cnn,
    selection,
)
from experiments.evaluate_cnn import Outcome

ERRORS = {}  # file of cells -> error after a short training


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Searches find random cells, and trainings end with errors that are known."""
    trained = []

    def search_cells(config, dataset, workdir, display):
        workdir.mkdir(parents=True)
        found = genotype.sample(np.random.default_rng(config.seed), config.network.nodes)
        genotype.save(found, workdir / "genotype.json")
        lines = [{"epoch": 1, "seconds": 2.5}]
        return found, runner.Result(None, lines, 0.0)

    def train(config, dataset, workdir, display):
        trained.append((config, workdir))
        assert genotype.load(config.genotype) == config.cells
        error = 0.1 + 0.01 * len(trained) if config.train.portion == 1 else 1 / len(trained)
        ERRORS[config.genotype] = error
        lines = [{"epoch": i, "seconds": 1.0, "eval_accuracy": 1 - error} for i in (1, 2)]
        errors = np.full(config.seeds, error)
        return Outcome(errors, errors, 1234, 5678, runner.Result(None, lines, 0.0))

    monkeypatch.setattr(search_cnn, "search_cells", search_cells)
    monkeypatch.setattr(evaluate_cnn, "train", train)
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    return trained


def parse(line):
    """The config and module that a command line stands for."""
    python, dash, module, *arguments = shlex.split(line)
    assert (python, dash) == ("python", "-m")
    owner = {m.MODULE: m for m in (search_cnn, evaluate_cnn, pipeline)}[module]
    return owner, command_line.parse(owner.PRESETS, arguments, module, "")[1]


def test_pipeline(stand_in, capsys):
    arguments = ["smoke", "--searches", "2", "--random-cells", "3", "--train.w.momentum", "0.8"]
    assert pipeline.main(arguments) == 0
    workdir = Path("runs/pipeline-smoke-seed0")
    brief = [(c, w) for c, w in stand_in if c.train.portion < 1]
    full = [(c, w) for c, w in stand_in if c.train.portion == 1]
    assert len(brief) == 2 * 2 + 3
    assert all(c.seeds == 1 and c.train.epochs == 1 for c, _ in brief)
    assert [w.name for _, w in full] == [
        "DARTS_V2",
        "random",
        "first_order",
        "second_order_exact",
    ]
    # A later training is better here: the last of each kind is the one that is trained fully.
    last = {w.name.rsplit("_", 1)[0]: c.genotype for c, w in brief}
    assert [c.genotype for c, _ in full] == [
        "DARTS_V2",
        last["random"],
        last["first_order"],
        last["unrolled"],
    ]
    dataset = data.load("digits", limit=64)
    budget = selection.parameter_count(full[0][0], dataset)
    for config, _ in full:
        assert config.train.w.momentum == 0.8
        own = selection.parameter_count(config, dataset)
        for channels in (config.network.channels - 1, config.network.channels + 1):
            if channels < 2:
                continue
            network = dataclasses.replace(config.network, channels=channels)
            other = selection.parameter_count(dataclasses.replace(config, network=network), dataset)
            assert abs(own - budget) <= abs(other - budget)

    output = capsys.readouterr().out
    assert "second" in output and "1,234" in output and "report.html" in output
    assert "next: python -m experiments.pipeline smoke" in output

    # Every command on the page stands for what was run.
    page = (workdir / "report.html").read_text()
    commands = re.search("<pre>(.*?)</pre>", page, re.DOTALL)[1].replace("&#x27;", "'").split("\n")
    assert len(commands) == 1 + 4 + 7 + 4
    module, config = parse(commands[0])
    assert module is pipeline and config.searches == 2
    steps = {config.workdir: (module, config) for module, config in map(parse, commands[1:])}
    for ran, folder in stand_in:
        module, config = steps[folder]
        assert module is evaluate_cnn
        config = evaluate_cnn.resolve_genotype(config, folder)
        assert dataclasses.replace(config, workdir=None) == ran
    estimators = [c.search.estimator for m, c in steps.values() if m is search_cnn]
    assert estimators == ["first_order"] * 2 + ["unrolled"] * 2


def small_page():
    lines = [{"epoch": epoch, "eval_accuracy": 1 - 0.5**epoch} for epoch in (1, 2, 3)]
    return pipeline_report.page(
        "Cells <of> digits",
        ("cells", "error"),
        [("a & b", "1.0"), ("c", "2.0")],
        {"a & b": CHEAP, "c": CHEAP},
        {"a & b": lines, "c": lines},
        ["python -m experiments.x '<y>'"],
    )


def test_page_holds_everything():
    text = small_page()
    assert "Cells &lt;of&gt; digits" in text and "<td>a &amp; b</td>" in text
    assert "&#x27;&lt;y&gt;&#x27;" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing is fetched
    pictures = re.findall('src="data:image/svg\\+xml;base64,([^"]*)"', text)
    assert len(pictures) == 1 + 2 * 2
    for picture in pictures:
        ElementTree.fromstring(base64.b64decode(picture))


# Says what is seen once the pictures, which lie in the page, are decoded.
SEEN = """
const all = (selector, see) => [...document.querySelectorAll(selector)].map(see);
addEventListener("load", () => {
  told("table", all("table tr", (row) => row.innerText.split("\\t")));
  told("headings", all("h1, h2, h3", (heading) => heading.innerText));
  told("command", all("pre", (block) => block.innerText));
  told("pictures", all("img", (image) => image.naturalWidth > 99 && image.width > 99));
  told("names", all("img", (image) => image.alt));
  told("wide", document.documentElement.scrollWidth > innerWidth);
});
"""


@browser.needed
def test_page_in_a_browser(tmp_path):
    told = browser.told_by(small_page(), SEEN, tmp_path)
    assert told["table"] == [["cells", "error"], ["a & b", "1.0"], ["c", "2.0"]]
    methods = ["a & b", "c"]
    sections = ["Test error while training", "Cells", *methods, "Commands"]
    assert told["headings"] == ["Cells <of> digits", *sections]
    assert told["command"] == ["python -m experiments.x '<y>'"]
    assert told["pictures"] == [True] * 5
    cells = [f"{kind} cell, {name}" for name in methods for kind in ("normal", "reduce")]
    assert told["names"][1:] == cells and "Test error" in told["names"][0]
    assert not told["wide"]  # nothing has to be scrolled sideways


def test_random_search(stand_in, capsys):
    assert random_search.main(["smoke", "--count", "3", "--seeds", "2"]) == 0
    workdir = Path("runs/random_search-smoke-seed0")
    *brief, (full, folder) = stand_in
    assert [w.name for _, w in brief] == ["random_0", "random_1", "random_2"]
    assert all(c.train.portion == 0.8 and c.seeds == 1 for c, _ in brief)
    assert folder == workdir / "best" and full.train.portion == 1 and full.seeds == 2
    assert full.genotype == brief[-1][0].genotype  # the least error
    assert genotype.load(workdir / "genotype.json") == full.cells
    assert len({c.cells for c, _ in brief}) == 3
    assert (workdir / "normal.png").exists()
    output = capsys.readouterr().out
    assert "33.33, 50.00, 100.00 %" in output
    assert "random_2" in output


def test_random_cells_are_fixed_by_the_seed(tmp_path):
    def cells(folder, seed):
        sources = selection.save_random(2, 3, seed, tmp_path / folder)
        return [genotype.load(path) for path in sources.values()]

    assert cells("a", 0) == cells("b", 0)
    assert cells("c", 1) != cells("a", 0)


def test_flags_make_the_config(tmp_path):
    default = evaluate_cnn.PRESETS["cifar10"][1]
    config = dataclasses.replace(
        default,
        data=dataclasses.replace(default.data, flip=False, crop=2),
        network=dataclasses.replace(default.network, auxiliary=False),
        train=dataclasses.replace(default.train, remat=True, precision="bfloat16"),
        genotype="DARTS_V1",
        workdir=tmp_path / "a b",
    )
    arguments = command_line.flags(config, default)
    found = command_line.parse({"cifar10": ("", default)}, arguments, "m", "")[1]
    assert found == config
    assert command_line.flags(default, default) == []


@pytest.mark.parametrize("module", [pipeline, random_search])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["smok"], "unknown preset 'smok'; use one of: smoke"),
        (["smoke", "--train-portion", "1"], "--train-portion is 1.0; give less than 1"),
        (["smoke", "--brief-epochs", "0"], "--brief-epochs is 0; give at least 1"),
        (["smoke", "--seeds", "0"], "--seeds is 0; give at least 1"),
        (["smoke", "--train.w.clip", "0"], "--train.w.clip is 0.0; give more than 0"),
    ],
)
def test_bad_input_is_one_line(stand_in, capsys, module, arguments, text):
    assert module.main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1
    assert not Path("runs").exists()


def test_workdir_of_another_config(stand_in, capsys):
    assert random_search.main(["smoke", "--workdir", "run"]) == 0
    before = json.loads(Path("run/config.json").read_text())
    assert random_search.main(["smoke", "--workdir", "run", "--count", "5"]) == 2
    assert "count is 2 there, 5 here" in capsys.readouterr().err
    assert json.loads(Path("run/config.json").read_text()) == before
