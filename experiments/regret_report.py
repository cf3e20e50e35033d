"""The rows of the regret table: methods, selections after a search, random search."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from rich import box
from rich.table import Table

from darts_jax import ground_truth, spectrum
from darts_jax.spaces._dag import to_string
from experiments.regret_measures import (
    Interval,
    Score,
    derive,
    make_score,
    paired,
    random_search,
    standard_error,
)
from experiments.regret_methods import EXACT, METHODS
from experiments.regret_searches import Found

FIRST = "first_order"
# Panels of the picture, beside a last one of other remedies; the exact method is in all.
ESTIMATORS = (EXACT, FIRST, "finite_difference", "t1_t2", "neumann")
RELAXATIONS = (EXACT, "temperature", "concrete", "gumbel", "sigmoid", "dirichlet")
# Gradients of a step by the exact method: two and a mixed product, worth two more, for the
# hypergradient, and one of the weights.
GRADIENTS = 5


class Row(NamedTuple):
    """A row of the table.

    Attributes:
      text: what it is.
      mean: the mean over seeds of each score.
      error: its standard error. Of random search both are exact, the error that of as many seeds.
      final: the scores, arrays [seeds]; None of random search.
      without_none: test regret where none cannot be chosen, [seeds]; None where that says nothing.
      choice: the architectures, [seeds, edges].
      curve: test regret, [epochs + 1, seeds]; None of what comes after a search.
      seconds: of one search, compilation left out.
      compile_seconds: of all seeds together.
    """

    text: str
    mean: Score
    error: Score
    final: Score | None = None
    without_none: np.ndarray | None = None
    choice: np.ndarray | None = None
    curve: np.ndarray | None = None
    seconds: float | None = None
    compile_seconds: float | None = None


def make_rows(found: Mapping[str, Found], table: ground_truth.Table, epochs: int) -> dict[str, Row]:
    """All rows, by name.

    Args:
      found: by method.
      table: the accuracies.
      epochs: of a search.
    """
    score = make_score(table)
    rows = {name: _method_row(name, one, table, score) for name, one in found.items()}
    if EXACT in found:
        one = found[EXACT]
        early = _choice_row("RobustDARTS, early stop", early_stopped(one), table, score)
        rows["early_stop"] = early
        final = score(one.perturbed)
        rows["perturbation"] = _row("DARTS-PT selection", final, choice=one.perturbed)
    seeds = next(iter(found.values())).alpha.shape[1]
    for count in sorted({1, budget(epochs, table)}):
        random = random_search(table, count)
        error = jax.tree.map(lambda x: x / seeds**0.5, random.deviation)
        text = f"best of {count} random" if count > 1 else "one random architecture"
        rows[f"random_{count}"] = Row(text, random.mean, error)
    return rows


def budget(epochs: int, table: ground_truth.Table) -> int:
    """How many architectures a search by the exact method could train as the table's were.

    A pass of either over the training images costs its gradients: `GRADIENTS`, and one.
    """
    return max(1, GRADIENTS * epochs // table.right.shape[2])


def _method_row(
    name: str, found: Found, table: ground_truth.Table, score: Callable[[Array], Score]
) -> Row:
    row = _choice_row(METHODS[name].text, found.alpha[-1], table, score)
    curve = np.asarray(score(derive(found.alpha, table.primitives)).test_regret)
    # What else the machine does can only add to the time of an epoch.
    seconds = found.seconds.min() * len(found.seconds) / found.alpha.shape[1]
    return row._replace(
        curve=curve, seconds=float(seconds), compile_seconds=float(found.compile_seconds)
    )


def _choice_row(text: str, alpha: np.ndarray, table: ground_truth.Table, score: Callable) -> Row:
    choice = np.asarray(derive(alpha, table.primitives))
    without = score(derive(alpha, table.primitives, with_none=False)).test_regret
    return _row(text, score(choice), choice=choice, without_none=np.asarray(without))


def _row(text: str, final: Score, **others: Any) -> Row:
    final = jax.tree.map(lambda x: np.asarray(x, float), final)
    mean = jax.tree.map(lambda x: float(x.mean()), final)
    return Row(text, mean, jax.tree.map(standard_error, final), final, **others)


def early_stopped(found: Found) -> np.ndarray:
    """The alphas of the epoch that early stopping goes back to, else the last: [seeds, ...]."""
    stops = [spectrum.early_stop(values) for values in found.eigenvalue.T]
    epochs = [-1 if stop is None else stop + 1 for stop in stops]
    return found.alpha[epochs, np.arange(len(epochs))]


def curves(rows: Mapping[str, Row]) -> tuple[list[dict[str, np.ndarray]], dict[str, float]]:
    """Panels and levels of `regret_plots.draw_regret`."""
    drawn = {name: row.curve for name, row in rows.items() if row.curve is not None}
    others = [name for name in drawn if name not in {*ESTIMATORS, *RELAXATIONS}]
    panels = [
        {rows[name].text: drawn[name] for name in group if name in drawn}
        for group in (ESTIMATORS, RELAXATIONS, (EXACT, *others))
    ]
    # The exact method is in each for comparison, and alone says nothing.
    panels = [panel for panel in panels if panel.keys() - {METHODS[EXACT].text}] or panels[:1]
    levels = {row.text: row.mean.test_regret for row in rows.values() if row.final is None}
    return panels, levels


def to_json(rows: Mapping[str, Row], table: ground_truth.Table) -> dict[str, Any]:
    """What regret.json holds: regrets and accuracies in [0, 1], ranks from 1, seconds."""
    found: dict[str, Any] = {}
    for name, row in rows.items():
        entry: dict[str, Any] = {"text": row.text}
        for field in Score._fields:
            entry[field] = {
                "mean": getattr(row.mean, field),
                "standard_error": getattr(row.error, field),
            }
            if row.final is not None:
                entry[field]["seeds"] = getattr(row.final, field).tolist()
        if row.without_none is not None:
            entry["test_regret_without_none"] = {
                "mean": float(row.without_none.mean()),
                "standard_error": standard_error(row.without_none),
                "seeds": row.without_none.tolist(),
            }
        if row.choice is not None:
            entry["architectures"] = [
                to_string(choice, table.edges, table.primitives) for choice in row.choice
            ]
        if row.curve is not None:
            entry["test_regret_by_epoch"] = row.curve.tolist()
        if row.seconds is not None:
            entry |= {"seconds": row.seconds, "compile_seconds": row.compile_seconds}
        found[name] = entry
    best = {
        part: float(ground_truth.accuracy(table, np.arange(len(table.class_of)), part).max())
        for part in ground_truth.PARTS
    }
    compared = differences(rows)
    return {
        "rows": found,
        "classes": len(table.architectures),
        "best_accuracy": best,
        "test_regret_of_exact_minus": {
            name: {selection: interval._asdict() for selection, interval in own.items()}
            for name, own in compared.items()
        },
    }


def differences(rows: Mapping[str, Row]) -> dict[str, dict[str, Interval]]:
    """Test regret of the exact method minus that of others, seed by seed.

    Row -> {"with_none", and "without_none" where the row has it}; empty without the exact method.
    """
    if EXACT not in rows:
        return {}
    exact, found = rows[EXACT], {}
    for name, row in rows.items():
        if row.final is None or name == EXACT:
            continue
        found[name] = {"with_none": paired(exact.final.test_regret, row.final.test_regret)}
        if row.without_none is not None:
            found[name]["without_none"] = paired(exact.without_none, row.without_none)
    return found


def regret_table(rows: Mapping[str, Row]) -> Table:
    """Mean and standard error of the regrets, in percentage points."""
    shown = _table("Regret, percentage points", "method", "test", "without none", "validation")
    for row in rows.values():
        without = ""
        if row.without_none is not None:
            without = _percent(row.without_none.mean(), standard_error(row.without_none))
        shown.add_row(
            row.text,
            _percent(row.mean.test_regret, row.error.test_regret),
            without,
            _percent(row.mean.validation_regret, row.error.validation_regret),
        )
    shown.add_row("best possible", "0", "", "0")
    return shown


def cells_table(rows: Mapping[str, Row], classes: int) -> Table:
    """Mean and standard error of what the cells are, and what they cost."""
    shown = _table(
        "Cells and cost", "method", f"rank of {classes}", "collapsed, %", "s/search", "cost"
    )
    first = rows[FIRST].seconds if FIRST in rows else None
    for row in rows.values():
        shown.add_row(
            row.text,
            f"{row.mean.rank:.1f} ± {row.error.rank:.1f}",
            f"{100 * row.mean.collapsed:.0f} ± {100 * row.error.collapsed:.0f}",
            "" if row.seconds is None else f"{row.seconds:.1f}",
            "" if row.seconds is None or first is None else f"{row.seconds / first:.2f}",
        )
    shown.add_row("best possible", "1", "", "", "")
    return shown


def _table(title: str, first: str, *others: str) -> Table:
    """A table for 80 columns: the first's texts stay whole, the others' go on in the next line."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    shown.add_column(first, no_wrap=True)
    for name in others:
        shown.add_column(name, justify="right", overflow="fold")
    return shown


def differences_table(rows: Mapping[str, Row]) -> Table | None:
    """Paired differences of test regret from the exact method; None without it."""
    found = differences(rows)
    if not found:
        return None
    title = "Test regret of exact minus that of another: mean, 95% interval"
    shown = _table(title, "other", "with none", "without none")
    for name, own in found.items():
        texts = (_interval(interval) for interval in own.values())
        shown.add_row(rows[name].text, *texts)
    return shown


def _interval(interval: Interval) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*(100 * x for x in interval))


def _percent(mean: float, error: float) -> str:
    return f"{100 * mean:.2f} ± {100 * error:.2f}"
