"""What the HTML pages share: their frame and style, tables, pictures inside of the page."""

import base64
import html
import tempfile
from collections.abc import Sequence
from pathlib import Path

from darts_jax import plots
from darts_jax.genotype import AnyGenotype, Genotype
from experiments.recurrent_cell import draw_cell

# Of Okabe and Ito (2008), which colour-blind readers can tell apart.
COLOURS = ("#000000", "#E69F00", "#0072B2", "#D55E00", "#009E73", "#CC79A7")
DASHES = ("-", "--", "-.", ":")

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #24292f; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { padding: .3rem .9rem; border-bottom: 1px solid #d0d7de; text-align: right; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1rem 0; }
img { max-width: 100%; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; }
"""


def document(title: str, body: str, head: str = "", style: str = "") -> str:
    """A whole page.

    Args:
      title: of the page, text.
      body: what stands below the title, HTML.
      head: what else its head holds, HTML.
      style: in addition to `STYLE`, CSS.
    """
    name = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{head}<title>{name}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<h1>{name}</h1>
{body}
</body>
</html>
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts, HTML."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows
    )
    return f"""<table>
<thead><tr>{head}</tr></thead>
<tbody>
{body}
</tbody>
</table>"""


def picture(svg: bytes, text: str) -> str:
    """A picture with the text that stands for it, HTML."""
    # As an image, so that ids inside of one picture do not meet those of another.
    data = base64.b64encode(svg).decode()
    alt = html.escape(text)
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{alt}"></figure>'


def cell_pictures(name: str, found: AnyGenotype) -> str:
    """The pictures of cells below their name, HTML."""
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(found, Genotype):
            plots.draw_genotype(found, folder)
        else:
            draw_cell(found, Path(folder, "recurrent"))
        images = "\n".join(
            picture(path.read_bytes(), f"{path.stem} cell, {name}")
            for path in sorted(Path(folder).glob("*.svg"))
        )
    return f"<h3>{html.escape(name)}</h3>\n{images}"


def line_style(index: int) -> tuple[str, str]:
    """Colour and dash of a curve, of `COLOURS` and `DASHES`; 24 of them differ."""
    rounds = index // len(COLOURS)
    return COLOURS[index % len(COLOURS)], DASHES[(index + rounds) % len(DASHES)]
