"""How a recurrent cell is shown, in tables and as a picture."""

from pathlib import Path

from darts_jax import genotype

START = "start"  # name of its first state


def draw_cell(found: genotype.RecurrentGenotype, path: Path) -> None:
    """Draws a recurrent cell, as SVG and PNG."""
    from darts_jax import plots  # matplotlib

    edges = [(name, source, i + 1) for i, (name, source) in enumerate(found.recurrent)]
    plots.draw_cell(
        edges, found.concat, path, title="Recurrent cell", inputs=(START,), output="h_{t}"
    )


def describe(found: genotype.RecurrentGenotype) -> str:
    """The nodes of a cell, one a line."""
    names = (START, *map(str, range(len(found.recurrent))))
    return "\n".join(
        f"{node} = {activation}({names[source]})"
        for node, (activation, source) in enumerate(found.recurrent)
    )
