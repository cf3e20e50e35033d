"""The page that compares runs: what it holds, what a browser makes of it, and bad input."""

import dataclasses
import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest

from darts_jax import genotype
from experiments import evaluate_rnn, recorded, report, search_cnn, search_rnn
from experiments.errors import UserError
from experiments.workdir import write_config

NASTY = "</script><script>alert('&amp;')</script><!--"


def write_run(folder, config, epochs, alpha=None, cells=None, alphas=("alpha",)):
    """A run of two steps an epoch; `alpha` makes what a line holds by each name in `alphas`."""
    rng = np.random.default_rng(0)
    write_config(config, folder)
    lines = []
    for epoch in range(1, epochs + 1):
        for step in (2 * epoch - 1, 2 * epoch):
            lines.append({"kind": "step", "step": step, "epoch": epoch, "train_loss": 2.5 / step})
        values = {"eval_loss": 3 / epoch, "averaged": False, "seconds": 1.5}
        own = {name: alpha(rng) for name in alphas} if alpha else {}
        lines.append({"kind": "epoch", "step": 2 * epoch, "epoch": epoch, **values, **own})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if cells:
        genotype.save(cells, folder / "genotype.json")
    return lines


def conv_alpha(rng):
    return {name: rng.normal(size=(5, 8)).tolist() for name in ("normal", "reduce")}


def rnn_alpha(rng):
    return rng.normal(size=(3, 5)).tolist()


@pytest.fixture
def workdirs(tmp_path):
    """Two searches and a training without alphas."""
    smoke, rnn = search_cnn.PRESETS["smoke"][1], search_rnn.PRESETS["smoke"][1]
    data = dataclasses.replace(smoke.data, path=NASTY)
    conv = tmp_path / "runs" / "conv <b>&"
    lines = write_run(conv, dataclasses.replace(smoke, data=data, seed=3), 3, conv_alpha)
    genotype.save(genotype.derive(lines[-1]["alpha"]), conv / "genotype.json")
    write_run(tmp_path / "runs" / "rnn", rnn, 2, rnn_alpha)
    cell = genotype.PUBLISHED_RECURRENT["DARTS_V2"]
    train = dataclasses.replace(evaluate_rnn.PRESETS["smoke"][1], size=9, cell=cell)
    write_run(tmp_path / "runs" / "trained", train, 1, cells=cell)
    return [conv, tmp_path / "runs" / "rnn", tmp_path / "runs" / "trained"]


class Page(HTMLParser):
    """The texts in cells of tables, row by row, and what else a test asks of a page."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self.scripts, self._inside = [], [], [], ""
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self._inside = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside in ("td", "th"):
            self.rows[-1][-1] += data
        if self._inside == "script":
            self.scripts[-1] += data


def test_page_holds_the_runs(workdirs, tmp_path, capsys):
    output = tmp_path / "new" / "page.html"
    assert report.main([*map(str, workdirs), "--output", str(output)]) == 0
    assert f"written to {output}" in capsys.readouterr().out
    text = output.read_text()
    page = Page(text)
    head, conv, rnn, trained, *fields = page.rows
    assert head == ["run", "experiment", "preset", "seed", "epochs", "seconds", "eval_loss"]
    assert conv == ["conv <b>&", "search_cnn", "smoke", "3", "3 of 2", "4.5", "1"]
    assert rnn == ["rnn", "search_rnn", "smoke", "0", "2 of 2", "3.0", "1.5"]
    assert trained[1:5] == ["evaluate_rnn", "smoke, 1 field changed", "0", "1 of 2"]

    fields = {name: values for name, *values in fields}
    assert fields["data.path"] == [NASTY, "null", "null"]
    assert fields["seed"] == ["3", "0", "0"]
    assert fields["data.name"] == ["digits", "pydoc", "pydoc"]
    assert fields["size"] == ["-", "-", "9"]
    assert "facts.version" not in fields and "cell" not in fields  # the same; pictures

    # Names of runs and fields end no script, and nothing is fetched.
    assert len(page.scripts) == 2 and NASTY not in text and html.escape(NASTY) in text
    sources = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(sources) == 2 + 1 and all(source.startswith("data:image/") for source in sources)
    assert set(re.findall(r"\w+://[^\s\"'<]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|import\(", text)


def test_data_of_the_script(workdirs):
    data = Page(report.build(recorded.read_runs(workdirs))).data
    assert [run["name"] for run in data["runs"]] == ["conv <b>&", "rnn", "trained"]
    assert len({(run["colour"], run["dash"]) for run in data["runs"]}) == 3
    charts = {chart["metric"]: chart for chart in data["charts"]}
    assert list(charts) == ["eval_loss", "train_loss", "seconds"]
    assert charts["train_loss"]["curves"][1] == {
        "run": 1,
        "x": [1, 2, 3, 4],
        "y": [2.5, 1.25, 0.833333, 0.625],
    }
    conv, rnn = data["alphas"]
    assert conv["epochs"] == [1, 2, 3] and rnn["epochs"] == [1, 2]
    assert [cell["name"] for cell in conv["cells"]] == ["normal", "reduce"]
    for cell in (*conv["cells"], *rnn["cells"]):
        np.testing.assert_allclose(np.sum(cell["weights"], axis=2), 1, atol=1e-3)

    # What is framed is the cell that was saved.
    normal = conv["cells"][0]
    framed = {
        (normal["operations"][operation], *normal["edges"][edge])
        for edge, operation in normal["kept"][-1]
    }
    cells = genotype.load(workdirs[0] / "genotype.json")
    assert framed == {(name, source, 2 + i // 2) for i, (name, source) in enumerate(cells.normal)}


@pytest.fixture
def several(tmp_path):
    """A search from two seeds."""
    config = dataclasses.replace(search_cnn.PRESETS["smoke"][1], seed=7, seeds=2)
    names = "alpha_of_seed_7", "alpha_of_seed_8"
    return write_run(tmp_path / "several", config, 3, conv_alpha, alphas=names)


def test_alphas_of_each_seed(several, workdirs, tmp_path):
    runs = recorded.read_runs([workdirs[1], tmp_path / "several"])
    rnn, *seeds = Page(report.build(runs)).data["alphas"]
    assert (rnn["run"], rnn["of"]) == (0, "")
    assert [(each["run"], each["of"]) for each in seeds] == [(1, "seed 7"), (1, "seed 8")]
    for seed, shown in zip((7, 8), seeds, strict=True):
        assert shown["epochs"] == [1, 2, 3]
        for cell in shown["cells"]:
            alpha = [line[f"alpha_of_seed_{seed}"][cell["name"]] for line in several[2::3]]
            expected = np.exp(alpha) / np.exp(alpha).sum(axis=2, keepdims=True)
            np.testing.assert_allclose(cell["weights"], expected, atol=1e-4)


@pytest.mark.parametrize("count", [1, 16])
def test_any_number_of_runs(tmp_path, count):
    config = evaluate_rnn.PRESETS["smoke"][1]
    for seed in range(count):
        write_run(tmp_path / f"{seed}", dataclasses.replace(config, seed=seed), 1)
    text = report.build(recorded.read_runs([tmp_path / f"{seed}" for seed in range(count)]))
    page = Page(text)
    assert len({(run["colour"], run["dash"]) for run in page.data["runs"]}) == count
    assert page.data["alphas"] == [] and "No run has recorded alphas" in text
    assert "No run has cells" in text
    if count == 1:
        assert "nothing to compare" in text
    else:
        assert ["seed", *map(str, range(count))] in page.rows


def test_long_curves_keep_their_extremes():
    points = [(step, 1.0) for step in range(100_000)]
    points[7777], points[50_001] = (7777, 9.0), (50_001, -3.0)
    curve = report._curve(points)
    assert len(curve["x"]) <= report.MAX_POINTS + 2
    assert curve["x"][0] == 0 and curve["x"][-1] == 99_999 and curve["x"] == sorted(curve["x"])
    assert curve["y"][curve["x"].index(7777)] == 9 and curve["y"][curve["x"].index(50_001)] == -3


def test_runs_are_named_by_what_their_paths_do_not_share(workdirs, monkeypatch):
    copy = workdirs[1].parents[1] / "other" / "rnn"
    shutil.copytree(workdirs[1], copy)
    monkeypatch.chdir(workdirs[1])
    names = [run.name for run in recorded.read_runs([Path("."), workdirs[1], copy])]
    assert names == ["runs/rnn", "other/rnn"]


def test_skipped_steps_and_a_line_without_end(workdirs, tmp_path, capsys):
    with (workdirs[1] / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "skip", "step": 5, "epoch": 3, "leaf": "alpha"}\n{"kind": "ep')
    output = tmp_path / "page.html"
    assert report.main([*map(str, workdirs[:2]), "--output", str(output)]) == 0
    assert "metrics.jsonl, line 8 has no end yet and is left out" in capsys.readouterr().out
    head, *rows = Page(output.read_text()).rows[:3]
    assert [row[head.index("skipped steps")] for row in rows] == ["0", "1"]


LINE = '{"kind": "epoch", "step": 4, "epoch": 2'


@pytest.mark.parametrize("content", ["", LINE])
def test_a_run_without_a_line_is_in_the_table(workdirs, tmp_path, content):
    """As one of a sweep that failed at its first step: the others are still to be compared."""
    (workdirs[1] / "metrics.jsonl").write_text(content)
    output = tmp_path / "page.html"
    for chosen in (workdirs[:2], workdirs[1:2]):
        assert report.main([*map(str, chosen), "--output", str(output)]) == 0
        head, *rows = Page(output.read_text()).rows[: len(chosen) + 1]
        assert rows[-1][head.index("epochs")] == "0 of 2"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", None, "is no run (it has no config.json)"),
        ("metrics.jsonl", None, "is no run (it has no metrics.jsonl)"),
        ("config.json", '{"seed": 0,\n', "config.json, line 2: cannot be read"),
        ("config.json", "[1]", "config.json: cannot be read (not an object)"),
        ("config.json", '{"a":' * 5000, "config.json: cannot be read"),
        ("config.json", '{"seed": NaN}', "config.json: cannot be read (NaN is no number of JSON)"),
        ("config.json", "\udcff", "config.json: cannot be read ('utf-8' codec"),
        ("metrics.jsonl", LINE + "}\n{\n", "metrics.jsonl, line 2: cannot be read (Expecting"),
        ("metrics.jsonl", "\n", "metrics.jsonl, line 1: cannot be read (Expecting"),
        ("metrics.jsonl", "3\n", "line 1: cannot be read (no object with a kind)"),
        ("metrics.jsonl", '{"kind": "epoch", "step": 1}\n', "(epoch is no whole number)"),
        ("metrics.jsonl", LINE + ', "x": NaN}\n', "(x is not finite)"),
        ("metrics.jsonl", LINE + f', "x": 1{"0" * 400}}}\n', "line 1: cannot be read"),
        ("metrics.jsonl", LINE + ', "alpha": [1, 2]}\n', "metrics.jsonl, line 1: cannot be read"),
        ("metrics.jsonl", LINE + ', "alpha": {"normal": 1}}\n', "needs 'normal' and 'reduce'"),
        (
            "metrics.jsonl",
            LINE + ', "alpha": [[0,0,0,0,0]]}\n' + LINE + f', "alpha": {[[0] * 5] * 3}}}\n',
            "line 2: cannot be read (alpha has another shape",
        ),
        (
            "metrics.jsonl",
            LINE + ', "alpha_of_seed_3": [1, 2]}\n',
            "metrics.jsonl, line 1: cannot be read",
        ),
        ("genotype.json", "{}", "genotype.json: cannot be read (field 'normal' is missing"),
        ("genotype.json", "[1]", "genotype.json: cannot be read (not an object)"),
        ("genotype.json", '{"recurrent": 1}', "(field 'concat' is missing"),
    ],
)
def test_bad_input_is_one_line(workdirs, tmp_path, capsys, file, content, message):
    path = workdirs[0] / file
    path.unlink()
    if content is not None:
        path.write_bytes(content.encode(errors="surrogateescape"))
    output = tmp_path / "page.html"
    assert report.main([*map(str, workdirs), "--output", str(output)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {workdirs[0]}") and message in error
    assert error.count("\n") == 1 and "Traceback" not in error
    assert not output.exists()


def test_no_folder(tmp_path, capsys):
    assert report.main([]) == 2
    assert "give the folder of at least one" in capsys.readouterr().err
    with pytest.raises(UserError, match="nowhere is no folder; give"):
        recorded.read_runs([tmp_path / "nowhere"])


def test_output_that_cannot_be_written(workdirs, tmp_path, capsys):
    assert report.main([str(workdirs[1]), "--output", str(tmp_path)]) == 2
    assert "cannot write to" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["digits", "paper", "smoke"])
def test_origin_is_the_nearest_preset(name):
    config = search_cnn.PRESETS[name][1]
    fields = recorded.flatten(json.loads(json.dumps(dataclasses.asdict(config), default=str)))
    fields = {k: v for k, v in fields.items() if not k.startswith(("run.", "workdir"))}
    assert recorded.origin({**fields, "seed": 5, "facts.x": 1}) == ("search_cnn", name)
    changed = {**fields, "search.w.clip": 7, "search.radius": 8}
    assert recorded.origin(changed) == ("search_cnn", f"{name}, 2 fields changed")
    assert recorded.origin({"seed": 0}) == ("", "")


# Moves the slider to the first epoch, hides a run, and has the epochs played to the end.
USER = """
const labels = () => [...document.querySelectorAll("#alphas h3")].map((each) => each.textContent);
const curves = () => document.querySelectorAll("#curves polyline").length;
told("at_first", [labels(), curves(), document.querySelectorAll("#alphas rect").length]);
const slider = document.getElementById("epoch");
slider.value = 0;
slider.dispatchEvent(new Event("input"));
told("moved", [labels(), document.getElementById("shown").textContent]);
document.querySelector("#legend input").click();
document.getElementById("logarithmic").click();
told("hidden", curves());
document.getElementById("play").click();
told("playing", document.getElementById("play").textContent);
const ended = setInterval(() => {
  if (document.getElementById("play").textContent !== "Play") return;
  clearInterval(ended);
  told("played", labels());
}, 100);
"""


@browser.needed
def test_in_a_browser(workdirs, tmp_path):
    told = browser.told_by(report.build(recorded.read_runs(workdirs)), USER, tmp_path)
    names = ["conv <b>&, after epoch {}", "rnn, after epoch {}"]
    last = [names[0].format(3), names[1].format(2)]
    boxes = 2 * 5 * 8 + 3 * 5
    assert told["at_first"] == [last, 3 * 3, boxes]
    assert told["moved"] == [[name.format(1) for name in names], "epoch 1 of 3"]
    assert told["hidden"] == 2 * 3
    assert told["playing"] == "Pause"
    assert told["played"] == last


@browser.needed
def test_seeds_in_a_browser(several, tmp_path):
    told = browser.told_by(report.build(recorded.read_runs([tmp_path / "several"])), USER, tmp_path)
    names = ["several, seed 7, after epoch {}", "several, seed 8, after epoch {}"]
    assert told["at_first"][0] == [name.format(3) for name in names]
    assert told["at_first"][2] == 2 * 2 * 5 * 8
    assert told["moved"][0] == [name.format(1) for name in names]
