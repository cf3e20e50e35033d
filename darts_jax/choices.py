"""How far several searches agree: how often each operation was chosen for each edge of a cell."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from darts_jax import genotype as genotypes
from darts_jax.genotype import CNN, RNN, AnyGenotype, Kind, RecurrentGenotype

CELL_SIZE = 0.3  # of one number in the picture, inches


def kind_of(found: Sequence[AnyGenotype]) -> Kind:
    """What some genotypes, all of one type, are."""
    return RNN if isinstance(found[0], RecurrentGenotype) else CNN


def operations(found: Sequence[AnyGenotype]) -> list[str]:
    """The operations that a search chooses from, and others that the genotypes name."""
    kind = kind_of(found)
    named = {name for each in found for cell, _ in kind.cells for name, _ in getattr(each, cell)}
    primitives = genotypes.RNN_PRIMITIVES if kind is RNN else genotypes.CNN_PRIMITIVES
    known = [name for name in primitives if name != "none"]
    return [*known, *sorted(named - {*known})]


def edges(found: Sequence[AnyGenotype], cell: str) -> tuple[tuple[int, int], ...]:
    """All edges (source, destination) that a cell can have."""
    kind = kind_of(found)
    nodes = len(getattr(found[0], cell)) // kind.edges_per_node
    return tuple(genotypes.edges(nodes, kind.num_inputs))


def count(found: Sequence[AnyGenotype]) -> dict[str, np.ndarray]:
    """How many of some genotypes have chosen what.

    Args:
      found: at least one, all of one type and number of nodes.

    Returns:
      Cell -> [edges, operations], integers: rows as in `edges`, columns as in `operations`.
    """
    kind, names = kind_of(found), operations(found)
    counts = {}
    for cell, _ in kind.cells:
        rows = edges(found, cell)
        counts[cell] = np.zeros((len(rows), len(names)), int)
        for each in found:
            for i, (name, source) in enumerate(getattr(each, cell)):
                edge = rows.index((source, kind.num_inputs + i // kind.edges_per_node))
                counts[cell][edge, names.index(name)] += 1
    return counts


def distinct(found: Sequence[AnyGenotype]) -> dict[str, int]:
    """Cell -> how many different ones there are, whatever the order of a node's edges."""
    kind = kind_of(found)
    step = kind.edges_per_node

    def canonical(cell: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(tuple(sorted(cell[i : i + step])) for i in range(0, len(cell), step))

    return {cell: len({canonical(getattr(each, cell)) for each in found}) for cell, _ in kind.cells}


def table(found: Sequence[AnyGenotype]) -> dict[str, Any]:
    """The counts by name, for JSON: of each cell, distinct ones, operations, and edges."""
    names, number = operations(found), distinct(found)

    def chosen(row: np.ndarray) -> dict[str, int]:
        return {name: int(n) for name, n in zip(names, row, strict=True) if n}

    return {
        "genotypes": len(found),
        "cells": {
            cell: {
                "distinct": number[cell],
                "operations": chosen(counts.sum(0)),
                "edges": [
                    {"source": source, "destination": destination, "chosen": chosen(row)}
                    for (source, destination), row in zip(edges(found, cell), counts, strict=True)
                ],
            }
            for cell, counts in count(found).items()
        },
    }


def draw(found: Sequence[AnyGenotype], path: str | Path, inputs: Sequence[str]) -> list[Path]:
    """Draws the counts: a table for each cell, a row for each edge, a column for each operation.

    Args:
      found: as for `count`.
      path: of the files, without suffix.
      inputs: names of the cells' input states.

    Returns:
      The two files, SVG and PNG.
    """
    from matplotlib.figure import Figure

    from darts_jax import plots

    counts, names = count(found), operations(found)
    rows = max(len(counts) for counts in counts.values())
    size = (len(counts) * (CELL_SIZE * len(names) + 1.2), CELL_SIZE * rows + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (cell, values) in zip(
        figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True
    ):
        states = [*inputs, *map(str, range(len(values)))]
        labels = [f"{states[source]} → {states[node]}" for source, node in edges(found, cell)]
        axes.imshow(values, cmap="Blues", vmin=0, vmax=len(found), aspect="auto")
        axes.set_title(f"{cell}: {distinct(found)[cell]} distinct of {len(found)}", size=9)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", size=7)
        axes.set_yticks(range(len(labels)), labels, size=7)
        axes.tick_params(length=0)
        for (row, column), number in np.ndenumerate(values):
            if number:
                dark = number > 0.6 * len(found)
                style = {"ha": "center", "va": "center", "size": 7}
                axes.text(column, row, str(number), color="white" if dark else plots.INK, **style)
    files = plots.picture_files(path)
    plots.save_figure(figure, files)
    return files
