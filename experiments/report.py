"""A page that holds a comparison of cells, in one file: table, cells, curves, commands."""

import base64
import html
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from darts_jax import plots
from darts_jax.files import write_text
from darts_jax.genotype import Genotype

# Of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; max-width: 70rem;
       margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d0d7de; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; }
"""


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
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    pictures = "\n".join(_cell_pictures(name, found) for name, found in cells.items())
    name = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p>Mean and sample standard deviation over seeds. All networks have as many channels as bring them
nearest to one number of parameters. Seconds leave compilation out; a search is all searches of
its method, choosing is the short trainings by which one of their cells was chosen.</p>
<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>
<h2>Test error while training</h2>
{_picture(_curves(epochs), "Test error in percent after each epoch, by method")}
<h2>Cells</h2>
{pictures}
<h2>Commands</h2>
<p>The first one makes all of this; each of the others does one step of it, or continues it.</p>
<pre>{html.escape(chr(10).join(commands))}</pre>
</body>
</html>
"""


def write(text: str, path: Path) -> None:
    """Writes the page, whole or not at all."""
    write_text(path, text)


def _cell_pictures(name: str, found: Genotype) -> str:
    with tempfile.TemporaryDirectory() as folder:
        files = [path for path in plots.draw_genotype(found, folder) if path.suffix == ".svg"]
        images = "\n".join(
            _picture(path.read_bytes(), f"{path.stem} cell, {name}") for path in files
        )
    return f"<h3>{html.escape(name)}</h3>\n{images}"


def _picture(svg: bytes, text: str) -> str:
    # As an image, so that ids inside of one picture do not meet those of another.
    data = base64.b64encode(svg).decode()
    alt = html.escape(text)
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{alt}"></figure>'


def _curves(epochs: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, lines) in enumerate(epochs.items()):
        axes.plot(
            [line["epoch"] for line in lines],
            [100 * (1 - line["eval_accuracy"]) for line in lines],
            color=COLOURS[i % len(COLOURS)],
            linestyle=DASHES[i % len(DASHES)],
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
