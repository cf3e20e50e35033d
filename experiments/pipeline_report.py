"""A page that holds a comparison of cells, in one file: table, cells, curves, commands."""

import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darts_jax import plots
from darts_jax.genotype import Genotype
from experiments.page import cell_pictures, document, line_style, picture, table


def page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    cells: Mapping[str, Genotype],
    epochs: Mapping[str, Sequence[Mapping[str, Any]]],
    commands: Sequence[str],
) -> str:
    """The page, HTML with its pictures inside.

    Args:
      title: of the page.
      columns: heads of the table.
      rows: of the table, text by text.
      cells: that were trained, by method.
      epochs: the lines of kind "epoch" of each training, by method.
      commands: that made it, the one for all of it first.
    """
    pictures = "\n".join(cell_pictures(name, found) for name, found in cells.items())
    body = f"""<p>Mean and sample standard deviation over seeds. All networks have as many channels
as bring them nearest to one number of parameters. Seconds leave compilation out; a search is all
searches of its method, choosing is the short trainings by which one of their cells was chosen.</p>
{table(columns, rows)}
<h2>Test error while training</h2>
{picture(_curves(epochs), "Test error in percent after each epoch, by method")}
<h2>Cells</h2>
{pictures}
<h2>Commands</h2>
<p>The first one makes all of this; each of the others does one step of it, or continues it.</p>
<pre>{html.escape(chr(10).join(commands))}</pre>"""
    return document(title, body)


def _curves(epochs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, lines) in enumerate(epochs.items()):
        colour, dash = line_style(i)
        axes.plot(
            [line["epoch"] for line in lines],
            [100 * (1 - line["eval_accuracy"]) for line in lines],
            color=colour,
            linestyle=dash,
            label=name,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel("test error, %")
    axes.set_yscale("log")
    axes.locator_params(axis="x", integer=True)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "curves.svg")
        plots.save_figure(figure, [file])
        return file.read_bytes()
