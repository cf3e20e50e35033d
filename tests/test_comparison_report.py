import csv
import json

import numpy as np
import pytest
from rich.console import Console

from experiments import comparison_report as report

STATE = {"kind": "state", "seconds": 0.001}
LINES = [
    {
        **STATE,
        "step": step,
        "estimator": name,
        **{f"{term}_cosine": cosine for term in ("gradient", "implicit")},
        **{f"{term}_relative_error": 0.5 for term in ("gradient", "implicit")},
        **{f"{term}_norm_ratio": 2.0 for term in ("gradient", "implicit")},
        "sign_agreement": share,
    }
    for name, cosines, shares in (
        ("exact", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0)),
        ("neumann", (0.9, None, 0.1), (1.0, 1.0, 0.7)),
    )
    for step, cosine, share in zip((0, 10, 20), cosines, shares, strict=True)
]
LINES += [
    {
        "kind": "cost",
        "estimator": name,
        "target": "one step",
        "gradient_evaluations": 4,
        "seconds": 0.0123,
        "compile_seconds": 4.56,
        "temp_bytes": 7_800_000,
    }
    for name in ("exact", "neumann")
]
LINES += [
    {"kind": "radius", "precision": "float32", "radius": radius, "relative_error": error}
    for radius, error in ((None, 1e-6), (1.0, 3.0), (0.0316, 0.25), (0.00316, 0.125), (1e-8, None))
]
LINES += [
    {"kind": "search", "estimator": "exact", "seed": 0, "val_loss": 0.25, "genotype": {"a": [1]}},
    {"kind": "alpha", "estimator": "exact", "seed": 0, "step": 0, "alpha": [1.0, 2.0]},
    {"kind": "search", "estimator": "exact", "seed": 1, "val_loss": 0.75},
    {"kind": "search", "estimator": "neumann", "seed": 0, "val_loss": None, "diverged": "step 1"},
    {"kind": "alpha", "estimator": "neumann", "seed": 0, "step": 0, "alpha": [1.0, 2.0]},
]


def test_lines_are_written_twice(tmp_path):
    report.write(LINES, tmp_path)
    text = (tmp_path / "comparison.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == LINES
    with (tmp_path / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [line for line in LINES if line["kind"] != "alpha"]
    assert [row["kind"] for row in rows] == [line["kind"] for line in kept]
    for row, line in zip(rows, kept, strict=True):
        for name, cell in row.items():
            value = line.get(name)
            if isinstance(value, dict):
                assert json.loads(cell) == value
            else:
                assert cell == ("" if value is None else str(value))


def cells(lines):
    """The rows of the tables, a list of words each, as they are printed."""
    console = Console(width=120)
    with console.capture() as capture:
        for table in report.tables(lines, radius=0.01):
            console.print(table)
    rows = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def test_tables():
    assert cells(LINES) == [
        ["exact", "1", "0.5", "2", "1", "0.5", "2", "100%", "-"],
        ["neumann", "0.5", "0.5", "2", "0.5", "0.5", "2", "90%", "-"],
        ["exact", "one step", "4", "12.3", "4.6", "7.8", "0.5", "-", "-"],
        ["neumann", "one step", "4", "12.3", "4.6", "7.8", "-", "-", "-"],
        ["float32", "1e-06", "0.25", "0.12", "0.0032"],
    ]


def test_no_table_of_radii_without_them():
    assert len(cells([line for line in LINES if line["kind"] != "radius"])) == 4


@pytest.mark.parametrize("swept", [True, False])
def test_figures(tmp_path, swept):
    lines = [line for line in LINES if swept or line["kind"] != "radius"]
    report.draw(lines, ("first", "second"), 0.01, tmp_path)
    names = ["alphas", "cosine", "cost", *(["radius"] if swept else [])]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{name}.{suffix}" for name in names for suffix in ("png", "svg")
    )


def test_numbers_that_are_not_there_are_nan():
    found = report._numbers(report._of(LINES, "state"), "neumann", "gradient_cosine")
    np.testing.assert_array_equal(found, [0.9, np.nan, 0.1])
