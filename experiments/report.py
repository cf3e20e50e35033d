"""Compares runs on one HTML page: table, configs, curves, cells, alphas over time.

    python -m experiments.report runs/search_cnn-digits-seed0 runs/search_cnn-digits-seed1
    python -m experiments.report runs/* --output comparison.html

The page is one file that fetches nothing. A run may still be going on.
"""

import html
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from darts_jax import genotype
from darts_jax.files import write_text
from experiments import command_line, page
from experiments.errors import UserError
from experiments.metrics import MEASURED, Display
from experiments.recorded import CELLS, Frame, Run, origin, read_runs
from experiments.recurrent_cell import START
from experiments.seeds import OF_SEED
from experiments.workdir import writing

MODULE = "experiments.report"
MAX_POINTS = 1000  # of a curve: more cannot be seen
SCRIPT = Path(__file__).with_suffix(".js")
INPUTS = ("c(k-2)", "c(k-1)")  # states of a convolutional cell
NONE = "-"  # in tables
SVG_DASHES = dict(zip(page.DASHES, ("none", "6 3", "7 2 1.5 2", "1.5 2.5"), strict=True))

# The page may show its own pictures and run its own script, and cannot fetch anything.
HEAD = """<meta http-equiv="Content-Security-Policy" content="default-src 'none';
img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
"""
STYLE = """
h2 { margin-top: 2.5rem; }
td { max-width: 22rem; overflow-wrap: break-word; font-variant-numeric: tabular-nums; }
td:first-child { white-space: nowrap; }
.wide { overflow: auto; }
.fields { width: fit-content; max-width: 100%; max-height: 34rem; border: 1px solid #d0d7de; }
.fields th { position: sticky; top: 0; background: #fff; }
.grid { display: flex; flex-wrap: wrap; gap: .5rem 2rem; }
.chart { flex: 1 1 26rem; max-width: 34rem; margin: .5rem 0; }
.chart svg { width: 100%; display: block; }
.chart output { font-size: .85rem; color: #57606a; }
figcaption { font-weight: 600; }
svg { fill: #24292f; font: 12px system-ui, sans-serif; }
#alphas section, .alpha { display: inline-block; vertical-align: top; max-width: 100%;
                          margin: .5rem 1rem .5rem 0; }
.alpha svg { max-width: 100%; height: auto; }
.bar { position: sticky; top: 0; max-height: 40vh; overflow: auto; z-index: 1;
       padding: .5rem 0; background: #fff; border-bottom: 1px solid #d0d7de; }
.bar label { display: inline-block; margin-right: 1.2rem; }
.bar svg { width: 34px; height: 10px; margin: 0 .3rem; }
.bar button { font: inherit; width: 5rem; }
.bar input[type=range] { width: min(24rem, 50%); vertical-align: middle; margin: 0 1rem; }
"""
# What the script fills.
PLAYER = """<p>Softmax of alpha in percent: a row for each edge, a column for each operation.
White is the least weight that a cell has had at any epoch, blue the largest. Framed are the
operations of the cell that alpha stands for.</p>
<div class="bar"><button type="button" id="play">Play</button><input type="range" id="epoch" min="0"
aria-label="epoch"><output id="shown"></output></div>
<div id="alphas"></div>"""
SEEDS = '<details><summary>Of single seeds</summary><div class="grid" id="seeds"></div></details>'


@dataclass(frozen=True)
class Config:
    """What to compare, and where to write."""

    workdirs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Folders of the runs, at least one."""
    output: Path = Path("runs/report.html")
    """File to write; what was there before is replaced."""


def build(runs: Sequence[Run]) -> str:
    """The page, HTML that needs no other file.

    Args:
      runs: to compare, at least one.
    """
    title = f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    cells = [page.cell_pictures(run.name, run.cells) for run in runs if run.cells is not None]
    data = _data(runs)
    body = f"""<noscript><p>Curves and alphas are drawn by a script, which this browser does not
run.</p></noscript>
<p>Metrics are those of the last epoch. Seconds are those of all epochs, compilation left out.</p>
<div class="wide">{page.table(*_table(runs))}</div>
<h2>Configs</h2>
{_configs(runs)}
<section>
<h2>Curves</h2>
{_legend(runs)}
<div class="grid" id="curves"></div>
{SEEDS if any(chart["place"] == "seeds" for chart in data["charts"]) else ""}
</section>
<h2>Cells</h2>
{chr(10).join(cells) or "<p>No run has cells.</p>"}
<section>
<h2>Alphas over time</h2>
{PLAYER if any(run.frames for run in runs) else "<p>No run has recorded alphas.</p>"}
</section>
<script type="application/json" id="data">{_embedded(data)}</script>
<script>
{SCRIPT.read_text()}</script>"""
    return page.document(title, body, HEAD, STYLE)


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of runs."""
    series = [run.series("epoch") for run in runs]
    metrics = [name for name in _union(series) if name not in MEASURED and OF_SEED not in name]
    columns = ["run", "experiment", "preset", "seed", "epochs", "seconds"]
    skipped = any("skip" in run.lines for run in runs)
    rows = []
    for run, own in zip(runs, series, strict=True):
        experiment, preset = origin(run.fields)
        epochs = len(run.lines.get("epoch", ()))
        planned = run.fields.get("search.epochs", run.fields.get("train.epochs"))
        seconds = [value for _, value in own.get("seconds", ())]
        rows.append(
            [
                run.name,
                experiment or "unknown",
                preset or "unknown",
                _text(run.fields.get("seed", NONE)),
                f"{epochs} of {_text(planned)}" if planned is not None else f"{epochs}",
                f"{sum(seconds):.1f}",
                *([f"{len(run.lines.get('skip', ()))}"] if skipped else []),
                *(_figure(own, name) if name in own else NONE for name in metrics),
            ]
        )
    return [*columns, *(["skipped steps"] if skipped else []), *metrics], rows


def _figure(series: Mapping[str, Sequence[tuple[int, float]]], name: str) -> str:
    """The last value of a metric; with its sample standard deviation where it is of several."""
    (_, last), parts = series[name][-1], [series[n] for n in series if n.startswith(name + OF_SEED)]
    if len(parts) < 2:
        return f"{last:.4g}"
    return f"{last:.4g} ± {np.std([part[-1][1] for part in parts], ddof=1):.2g}"


def _configs(runs: Sequence[Run]) -> str:
    """The fields in which the runs differ, HTML."""
    if len(runs) == 1:
        return "<p>There is one run, and nothing to compare it with.</p>"
    rows = []
    for name in _union([run.fields for run in runs]):
        values = [_text(run.fields.get(name, NONE)) for run in runs]
        # Cells are shown as pictures.
        if len(set(values)) > 1 and name not in CELLS:
            rows.append([name, *values])
    if not rows:
        return "<p>All runs have one config.</p>"
    columns = ["field", *(run.name for run in runs)]
    return f'<p>Fields that differ.</p>\n<div class="wide fields">{page.table(columns, rows)}</div>'


def _legend(runs: Sequence[Run]) -> str:
    """The runs with the style of their curves, to be switched off and on, HTML."""
    labels = []
    for i, run in enumerate(runs):
        colour, dash = page.line_style(i)
        labels.append(
            f'<label><input type="checkbox" checked><svg viewBox="0 0 34 10"><line x1="0" x2="34"'
            f' y1="5" y2="5" stroke="{colour}" stroke-width="2.5"'
            f' stroke-dasharray="{SVG_DASHES[dash]}"/></svg>{html.escape(run.name)}</label>'
        )
    return f"""<div class="bar"><span id="legend">{"".join(labels)}</span>
<label><input type="checkbox" id="logarithmic">logarithmic</label></div>"""


def _data(runs: Sequence[Run]) -> dict[str, Any]:
    """What the script draws."""
    series = {kind: [run.series(kind) for run in runs] for kind in ("epoch", "step")}
    names = [(metric, kind) for kind, own in series.items() for metric in _union(own)]
    names.sort(key=lambda name: name[0] in MEASURED)  # time and memory last
    charts = [
        {
            "metric": metric,
            "kind": kind,
            "place": "seeds" if OF_SEED in metric else "curves",
            "curves": [
                {"run": i, **_curve(own[metric])}
                for i, own in enumerate(series[kind])
                if metric in own
            ],
        }
        for metric, kind in names
    ]
    styles = [page.line_style(i) for i in range(len(runs))]
    return {
        "runs": [
            {"name": run.name, "colour": colour, "dash": SVG_DASHES[dash]}
            for run, (colour, dash) in zip(runs, styles, strict=True)
        ],
        "charts": charts,
        "alphas": [
            {
                "run": i,
                "of": of,
                "epochs": [frame.epoch for frame in frames],
                "cells": [_animation(frames, name) for name in frames[0].weights],
            }
            for i, run in enumerate(runs)
            for of, frames in run.frames.items()
        ],
    }


def _curve(points: Sequence[tuple[int, float]]) -> dict[str, list[float]]:
    """x and y of a curve; of a long one, the least and the largest value of each stretch."""
    shown = range(len(points))
    if len(points) > MAX_POINTS:
        values = np.array([value for _, value in points])
        stretches = np.array_split(np.arange(len(points)), MAX_POINTS // 2)
        ends = [(s[values[s].argmin()], s[values[s].argmax()]) for s in stretches]
        shown = np.unique([0, *np.ravel(ends), len(points) - 1])
    return {
        "x": [points[i][0] for i in shown],
        "y": [float(f"{points[i][1]:.6g}") for i in shown],
    }


def _animation(frames: Sequence[Frame], cell: str) -> dict[str, Any]:
    """One cell over time; `kept` are the edges and operations of the cell it stands for."""
    recurrent = isinstance(frames[0].cells, genotype.RecurrentGenotype)
    kind = genotype.RNN if recurrent else genotype.CNN
    operations = genotype.RNN_PRIMITIVES if recurrent else genotype.CNN_PRIMITIVES
    inputs = (START,) if recurrent else INPUTS
    nodes = genotype.count_nodes(len(frames[0].weights[cell]), kind.num_inputs)
    edges = genotype.edges(nodes, kind.num_inputs)
    kept = [
        [
            (
                edges.index((source, kind.num_inputs + i // kind.edges_per_node)),
                operations.index(operation),
            )
            for i, (operation, source) in enumerate(getattr(frame.cells, cell))
        ]
        for frame in frames
    ]
    return {
        "name": cell,
        "states": [*inputs, *map(str, range(nodes))],
        "edges": edges,
        "operations": operations,
        "weights": [frame.weights[cell].round(4).tolist() for frame in frames],
        "kept": kept,
    }


def _embedded(value: Any) -> str:
    """JSON that can stand in a script element, which ends at the first "</script"."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _union(mappings: Sequence[Any]) -> list[str]:
    """The keys of all of them, in the order of the first that has each."""
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _text(value: Any) -> str:
    """A field of a config as a person reads it."""
    return value if isinstance(value, str) else json.dumps(value)


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    config = tyro.cli(
        Config, args=argv, prog=f"python -m {MODULE}", description=__doc__.splitlines()[0]
    )
    if not config.workdirs:
        raise UserError("no run to show; give the folder of at least one")
    runs = read_runs(config.workdirs)
    with Display() as display:
        for each in runs:
            if each.unfinished:
                display.warn(f"{each.unfinished} has no end yet and is left out")
        with display.phase("drawing"):
            text = build(runs)
    # What no encoding knows, as a file's name may hold it, becomes a question mark.
    text = text.encode(errors="replace").decode()
    with writing(config.output.parent):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(config.output, text)
    display.console.print(f"written to {config.output}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
