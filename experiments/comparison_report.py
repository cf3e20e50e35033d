"""What a comparison of hypergradients leaves behind: lines in two formats, tables and figures.

comparison.jsonl holds one JSON object a line, of five kinds:

    state   step, estimator; cosine, relative_error and norm_ratio against the exact hypergradient,
            of the gradient and of its implicit term; sign_agreement; top_agreement; seconds
    cost    estimator, target, gradient_evaluations, seconds (median), compile_seconds, temp_bytes
    radius  precision, radius (null: the exact product), cosine, relative_error, norm_ratio
    search  estimator, seed, val_loss, genotype, edges_differ, operations_differ
    alpha   estimator, seed, step, alpha as a flat list

comparison.csv holds the same in one table, the last kind left out; what a line has not is empty.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from darts_jax.files import write_text

Line = dict[str, Any]

TEXT = ("estimator", "target", "precision")  # columns of tables that hold no numbers


def write(lines: Sequence[Line], workdir: Path) -> None:
    """Writes comparison.jsonl and comparison.csv."""
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_text(workdir / "comparison.jsonl", text)
    rows = [line for line in lines if line["kind"] != "alpha"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_text(workdir / "comparison.csv", table.getvalue())


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def draw(lines: Sequence[Line], alpha_names: Sequence[str], radius: float, workdir: Path) -> None:
    """Draws the figures cosine, radius, cost and alphas, each as SVG and PNG."""
    from darts_jax import comparison_plots as plots  # matplotlib

    states, searches = _of(lines, "state"), _of(lines, "search")
    names = list(dict.fromkeys(line["estimator"] for line in states))
    steps = list(dict.fromkeys(line["step"] for line in states))
    cosines = {
        title: {
            name: _numbers(states, name, f"{term}_cosine")
            for name in names[1:]  # without the exact one itself
        }
        for title, term in (("whole hypergradient", "gradient"), ("implicit term", "implicit"))
    }
    plots.draw_cosines(steps, cosines, workdir / "cosine")
    costs = {
        line["estimator"]: plots.Cost(line["seconds"], line["temp_bytes"])
        for line in _of(lines, "cost")
    }
    plots.draw_costs(costs, workdir / "cost")
    if swept := _of(lines, "radius"):
        precisions = dict.fromkeys(line["precision"] for line in swept)
        errors = {precision: _errors(swept, precision) for precision in precisions}
        exact = {precision: line.pop(None) for precision, line in errors.items()}
        plots.draw_radius_errors(errors, exact, radius, workdir / "radius")
    seed = searches[0]["seed"]
    trajectories = [line for line in _of(lines, "alpha") if line["seed"] == seed]
    alphas = {
        name: [line["alpha"] for line in trajectories if line["estimator"] == name]
        for name in names
    }
    steps = [line["step"] for line in trajectories if line["estimator"] == names[0]]
    plots.draw_alpha_overlay(steps, alphas, alpha_names, workdir / "alphas")


def tables(lines: Sequence[Line], radius: float) -> Iterator[Table]:
    """The tables that a comparison ends with."""
    states, costs, searches = (_of(lines, kind) for kind in ("state", "cost", "search"))
    yield _agreement_table(states, [line["estimator"] for line in costs])
    yield _cost_table(costs, searches)
    if swept := _of(lines, "radius"):
        yield _radius_table(swept, radius)


def _agreement_table(states: Sequence[Line], names: Sequence[str]) -> Table:
    count = len({line["step"] for line in states})
    table = _table(
        f"Against the exact hypergradient, over {count} states\n"
        "Medians of cosine, relative error and ratio of norms; means of the share of\n"
        "alphas with the same sign, and of edges with the same top operation after a step",
        ("estimator", "cosine", "error", "norm", "implicit", "error", "norm", "sign", "top"),
    )
    columns = [
        f"{term}_{value}"
        for term in ("gradient", "implicit")
        for value in ("cosine", "relative_error", "norm_ratio")
    ]
    for name in names:
        values = [_median(states, name, column) for column in columns]
        shares = [_mean(states, name, share) for share in ("sign_agreement", "top_agreement")]
        table.add_row(
            _words(name),
            *(_text(x, "{:.3g}") for x in values),
            *(_text(x, "{:.0%}") for x in shares),
        )
    return table


def _cost_table(costs: Sequence[Line], searches: Sequence[Line]) -> Table:
    table = _table(
        "Cost of one estimate, and what a search by it ends with\n"
        "Target: what stands for the weights that alpha leads to. Estimators of another one "
        "estimate another number. Compiling: seconds, shared stages counted for each, less from "
        "the cache. MB: scratch memory. Edges, ops: share of the kept ones that differ from those "
        "of the search by the exact one",
        ("estimator", "target", "grads", "ms", "compile", "MB", "val loss", "edges", "ops"),
    )
    for line in costs:
        name = line["estimator"]
        outcome = {
            key: _mean(searches, name, key)
            for key in ("val_loss", "edges_differ", "operations_differ")
        }
        table.add_row(
            _words(name),
            line["target"],
            str(line["gradient_evaluations"]),
            f"{1e3 * line['seconds']:.3g}",
            f"{line['compile_seconds']:.1f}",
            f"{line['temp_bytes'] / 1e6:.2g}",
            _text(outcome["val_loss"], "{:.4g}"),
            _text(outcome["edges_differ"], "{:.0%}"),
            _text(outcome["operations_differ"], "{:.0%}"),
        )
    return table


def _radius_table(swept: Sequence[Line], radius: float) -> Table:
    table = _table(
        "Finite difference: relative error of its implicit term at one state",
        ("precision", "exact product", f"radius nearest {radius:g}", "best", "at radius"),
    )
    for precision in dict.fromkeys(line["precision"] for line in swept):
        errors = _errors(swept, precision)
        exact = errors.pop(None)
        finite = {r: error for r, error in errors.items() if np.isfinite(error)}
        nearest = min(errors, key=lambda r: abs(np.log(r / radius)))
        best = min(finite, key=finite.__getitem__, default=None)
        row = (exact, errors[nearest], finite.get(best), best)
        table.add_row(precision, *(_text(x, "{:.2g}") for x in row))
    return table


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        # Where there is little room, text is wrapped; a number that is cut short says nothing.
        if column in TEXT:
            table.add_column(column)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def _of(lines: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _numbers(lines: Sequence[Line], estimator: str, column: str) -> np.ndarray:
    """A column of an estimator's lines, NaN where there is no number."""
    found = [line.get(column) for line in lines if line["estimator"] == estimator]
    return np.array(found, dtype=float)


def _errors(swept: Sequence[Line], precision: str) -> dict[float | None, float]:
    return {
        line["radius"]: np.nan if line["relative_error"] is None else line["relative_error"]
        for line in swept
        if line["precision"] == precision
    }


def _over(reduce: Callable[[np.ndarray], float]) -> Callable[..., float | None]:
    def reduced(lines: Sequence[Line], estimator: str, column: str) -> float | None:
        values = _numbers(lines, estimator, column)
        values = values[np.isfinite(values)]
        return float(reduce(values)) if len(values) else None

    return reduced


_median, _mean = _over(np.median), _over(np.mean)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _text(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
