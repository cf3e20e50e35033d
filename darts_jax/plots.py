"""Pictures: discrete cells as graphs, and alphas over a search, as SVG and PNG.

Everything is drawn on figures of its own, without pyplot: no window, no shared state, and the
same picture gives the same bytes. Matplotlib, and SciPy in `graph_layout`, are imported where they
are used: they take half a second that those who draw nothing should not wait for.
"""

import html
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from darts_jax import genotype as genotypes
from darts_jax.graph_layout import LABEL_HEIGHT, STATE_HEIGHT, DrawnEdge, layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INPUT_NAMES = ("c_{k-2}", "c_{k-1}")
MAX_POINTS = 400  # of a trajectory: more cannot be seen, but make an SVG of many megabytes
DPI = 200
FONT_SIZE = 8.5  # points

INK = "#24292F"
PALE = "#8C959F"
# One hue a family of operations, those of Okabe and Ito (2008), which colour-blind readers can
# tell apart; in trajectories, the members of a family differ by their dash.
HUES = {
    "none": PALE,
    "max_pool": "#0072B2",
    "avg_pool": "#0072B2",
    "skip_connect": "#CC79A7",
    "sep_conv": "#D55E00",
    "dil_conv": "#009E73",
    "conv": "#E69F00",
    "tanh": "#0072B2",
    "relu": "#D55E00",
    "sigmoid": "#009E73",
    "identity": "#CC79A7",
}

# Sizes in inches.
MARGIN = 0.12
TITLE_HEIGHT = 0.3
LEGEND_WIDTH = 1.1  # of an operation in the legend of trajectories


def draw_genotype(
    genotype: genotypes.Genotype,
    directory: str | Path,
    operations: Sequence[str] = genotypes.CNN_OPERATIONS,
) -> list[Path]:
    """Draws both cells of a genotype into an existing directory.

    Uses graphviz's `dot` where it is installed, and matplotlib elsewhere.

    Args:
      genotype: what to draw.
      directory: where to.
      operations: names that the genotype may use.

    Returns:
      The files: normal.svg, normal.png, reduce.svg, reduce.png.

    Raises:
      ValueError: if the genotype is not valid.
    """
    genotype = genotypes.validate(genotype, operations)
    files = []
    for name, title in (("normal", "Normal cell"), ("reduce", "Reduction cell")):
        cell, concat = getattr(genotype, name), getattr(genotype, f"{name}_concat")
        edges = [
            (*edge, genotypes.CNN_NUM_INPUTS + i // genotypes.CNN_EDGES_PER_NODE)
            for i, edge in enumerate(cell)
        ]
        files += draw_cell(edges, concat, Path(directory) / name, title=title)
    return files


def draw_cell(
    edges: Sequence[tuple[str, int, int]],
    concat: Sequence[int],
    path: str | Path,
    *,
    title: str,
    inputs: Sequence[str] = INPUT_NAMES,
    output: str = "c_{k}",
) -> list[Path]:
    """Draws one discrete cell as a directed graph, from left to right.

    Args:
      edges: (operation, source state, destination state); states are numbered inputs first.
      concat: the states that make the output.
      path: of the files, without suffix.
      title: written above the graph.
      inputs, output: names of the input states and of the output; `a_{b}` sets b as a subscript.

    Returns:
      The two files, SVG and PNG.
    """
    num_states = 1 + max(destination for _, _, destination in edges)
    names = [*inputs, *map(str, range(num_states - len(inputs))), output]
    drawn: list[DrawnEdge] = [*edges, *((None, state, num_states) for state in concat)]
    files = picture_files(path)
    if not _run_dot(_dot_source(drawn, names, len(inputs), title), files):
        save_figure(_draw_graph(drawn, names, len(inputs), title), files)
    return files


def draw_alphas(
    steps: ArrayLike,
    alphas: Mapping[str, ArrayLike],
    primitives: Sequence[str],
    path: str | Path,
    *,
    inputs: Sequence[str] = INPUT_NAMES,
) -> list[Path]:
    """Draws softmax(alpha) over a search: one panel per edge, one line per operation.

    The panels of a cell stand in a triangle, one row per destination, one column per source.

    Args:
      steps: [T] increasing, where the alphas were recorded.
      alphas: cell name -> [T, edges, operations] real.
      primitives: names of the operations.
      path: of the files, without suffix.
      inputs: names of the cells' input states; `a_{b}` sets b as a subscript.

    Returns:
      The two files, SVG and PNG.

    Raises:
      ValueError: if an array has another shape, or there is no step.
    """
    steps = np.asarray(steps)
    if not len(steps):
        raise ValueError("no step to draw; record alphas at least once")
    shown = np.unique(np.linspace(0, len(steps) - 1, MAX_POINTS).round().astype(int))
    weights = {}
    for name, alpha in alphas.items():
        alpha = np.asarray(alpha, dtype=np.float64)
        if alpha.ndim != 3 or alpha.shape[::2] != (len(steps), len(primitives)):
            raise ValueError(
                f"alphas[{name!r}] has shape {list(alpha.shape)};"
                f" it needs [{len(steps)} steps, edges, {len(primitives)} operations]"
            )
        power = np.exp(alpha[shown] - alpha[shown].max(axis=2, keepdims=True))
        weights[name] = power / power.sum(axis=2, keepdims=True)
    files = picture_files(path)
    save_figure(_draw_trajectories(steps[shown], weights, primitives, inputs), files)
    return files


def _hue(operation: str | None) -> str:
    return HUES.get(re.sub(r"_\d.*", "", operation or "none"), INK)


def _dash(operation: str) -> str:
    if "7x7" in operation:
        return ":"
    return "--" if "5x5" in operation or operation.startswith("avg") else "-"


def _tint(hue: str) -> str:
    """Returns the hue, mixed with much white."""
    return "#" + "".join(f"{round(0.12 * int(hue[i : i + 2], 16) + 224.4):02X}" for i in (1, 3, 5))


def _math(name: str) -> str:
    """Returns a state's name as matplotlib writes it."""
    return f"${name}$" if "_" in name else name


def picture_files(path: str | Path) -> list[Path]:
    """The two files of a picture, SVG and PNG."""
    return [Path(f"{path}.svg"), Path(f"{path}.png")]


def save_figure(figure: "Figure", files: Sequence[Path]) -> None:
    """Saves a figure; the same picture gives the same bytes."""
    import matplotlib

    # What varies between two runs, ids and dates, is fixed; text stays text, to be searched for.
    with matplotlib.rc_context({"svg.hashsalt": "darts_jax", "svg.fonttype": "none"}):
        for file in files:
            metadata = {"Date": None} if file.suffix == ".svg" else {"Software": None}
            figure.savefig(file, dpi=DPI, metadata=metadata)


# Cells by graphviz.


def _dot_source(
    edges: Sequence[DrawnEdge], names: Sequence[str], num_inputs: int, title: str
) -> str:
    """Returns the graph in graphviz's language; labels are nodes, so that no line crosses one."""

    def text(name: str) -> str:
        return "<" + re.sub(r"_\{(.*?)\}", r"<SUB>\1</SUB>", html.escape(name)) + ">"

    lines = [
        "digraph {",
        f"rankdir=LR nodesep=0.12 ranksep=0.3 pad={MARGIN} label={text(title)} labelloc=t"
        f' labeljust=l fontname="DejaVu Sans Bold" fontcolor="{INK}"',
        f'node [shape=box style="rounded,filled" color="{PALE}" fillcolor="{_tint(PALE)}"'
        f' fontname="DejaVu Sans" fontsize=10 fontcolor="{INK}" height={STATE_HEIGHT} width=0.4'
        ' margin="0.08,0.02"]',
        "edge [arrowsize=0.6 penwidth=1.2]",
        *(f"{state} [label={text(name)}]" for state, name in enumerate(names)),
        # Invisible edges keep the inputs in their order, one above the other.
        f"{{rank=same edge [style=invis] {' -> '.join(map(str, range(num_inputs)))}}}",
    ]
    for index, (operation, source, destination) in enumerate(edges):
        hue = _hue(operation)
        if operation is None:
            lines.append(f'{source} -> {destination} [color="{hue}"]')
            continue
        lines += [
            f'e{index} [label={text(operation)} color="{hue}" fillcolor="{_tint(hue)}"'
            f" height={LABEL_HEIGHT}]",
            f'{source} -> e{index}:w [color="{hue}" dir=none]',
            f'e{index}:e -> {destination} [color="{hue}" weight=4]',
        ]
    return "\n".join([*lines, "}"])


def _run_dot(source: str, files: Sequence[Path]) -> bool:
    """Writes the files with graphviz, and returns whether it could: it is never required."""
    dot = shutil.which("dot")
    if dot is None:
        return False
    try:
        for file in files:
            dpi = DPI if file.suffix == ".png" else 72
            command = [dot, f"-T{file.suffix[1:]}", f"-Gdpi={dpi}"]
            picture = subprocess.run(
                command, input=source.encode(), capture_output=True, check=True, timeout=60
            )
            file.write_bytes(picture.stdout)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


# Cells by matplotlib.


def _draw_graph(
    edges: Sequence[DrawnEdge], names: Sequence[str], num_inputs: int, title: str
) -> "Figure":
    from matplotlib.figure import Figure

    spans, columns, heights, y, ports = layout(edges, num_inputs)
    half = np.array(heights) / 2
    y = y - (y - half).min() + MARGIN + TITLE_HEIGHT
    lines = [
        (source, item, destination, y[source] + leaves, y[destination] + enters)
        for item, ((_, source, destination), (leaves, enters)) in enumerate(
            zip(edges, ports, strict=True), len(names)
        )
    ]
    texts = [*map(_math, names), *(operation or "" for operation, _, _ in edges)]
    widths = [_text_width(text) + 0.18 if text else 0.0 for text in texts]
    widths[: len(names)] = [max(width, STATE_HEIGHT) for width in widths[: len(names)]]

    steepest = np.zeros(len(columns))  # the largest rise of an edge after each column
    for source, item, destination, start, end in lines:
        for c, edge_y in ((spans[source][1], start), (spans[destination][0] - 1, end)):
            steepest[c] = max(steepest[c], abs(edge_y - y[item]))
    sides = np.zeros((len(columns), 2))  # left and right of each column
    right = MARGIN
    for c, column in enumerate(columns):
        left = right + (0.22 + min(0.3 * steepest[c - 1], 0.5) if c else 0.0)
        right = left + max(widths[item] for item in column if spans[item][1] == c)
        sides[c] = left, right

    size = right + MARGIN, (y + half).max() + MARGIN
    figure = Figure(figsize=size)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(size[1], 0))
    axes.axis("off")
    axes.text(MARGIN, MARGIN, title, size=10.5, weight="bold", color=INK, va="top")
    x = [sides[last].mean() for _, last in spans]
    for source, item, destination, start, end in lines:
        first, last = spans[item]
        level = [(sides[first, 0], y[item]), (sides[last, 1], y[item])] if first <= last else []
        start = x[source] + widths[source] / 2, start
        end = x[destination] - widths[destination] / 2, end
        _draw_edge(axes, [start, *level, end], _hue(texts[item]))
    for item, text in enumerate(texts):
        if text:
            hue = _hue(text) if item >= len(names) else PALE
            _draw_box(axes, (x[item], y[item]), (widths[item], heights[item]), text, hue)
    return figure


def _text_width(text: str) -> float:
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=FONT_SIZE).get_extents().width / 72


def _draw_edge(axes: "Axes", points: Sequence[tuple[float, float]], hue: str) -> None:
    """Draws an arrow that is level at all points: curves between them, a line in the middle."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Curve

    vertices, codes = [points[0]], [Curve.MOVETO]
    for i, (start, end) in enumerate(pairwise(points)):
        middle = (start[0] + end[0]) / 2
        vertices += [end] if i == 1 else [(middle, start[1]), (middle, end[1]), end]
        codes += [Curve.LINETO] if i == 1 else [Curve.CURVE4] * 3
    style = "-|>,head_length=3,head_width=1.4"
    curve = Curve(vertices, codes)
    axes.add_patch(
        FancyArrowPatch(path=curve, arrowstyle=style, mutation_scale=1, color=hue, linewidth=1.2)
    )


def _draw_box(
    axes: "Axes", centre: tuple[float, float], size: tuple[float, float], text: str, hue: str
) -> None:
    from matplotlib.patches import FancyBboxPatch

    corner = centre[0] - size[0] / 2, centre[1] - size[1] / 2
    style = "round,pad=0,rounding_size=0.08"
    colors = {"facecolor": _tint(hue), "edgecolor": hue}
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, zorder=3, **colors))
    axes.text(*centre, text, size=FONT_SIZE, color=INK, ha="center", va="center_baseline", zorder=4)


# Alphas.


def _draw_trajectories(
    steps: np.ndarray,
    weights: Mapping[str, np.ndarray],
    primitives: Sequence[str],
    inputs: Sequence[str],
) -> "Figure":
    from matplotlib.figure import Figure

    num_inputs = len(inputs)
    num_nodes = [genotypes.count_nodes(weight.shape[1], num_inputs) for weight in weights.values()]
    names = [*map(_math, inputs), *map(str, range(max(num_nodes)))]
    num_columns = sum(num_nodes) + len(num_nodes) * (num_inputs - 1)
    figure = Figure(
        figsize=(1.2 * num_columns + 0.5, 1.15 * max(num_nodes) + 0.9), layout="constrained"
    )
    parts = figure.subfigures(1, len(weights), squeeze=False)[0]
    for part, (cell, weight), rows in zip(parts, weights.items(), num_nodes, strict=True):
        part.suptitle(cell, x=0.01, ha="left", size=10.5, weight="bold", color=INK)
        part.supxlabel("step", size=8, color=INK)
        grid = part.subplots(rows, rows + num_inputs - 1, sharex=True, sharey=True, squeeze=False)
        for row, column in zip(*np.triu_indices(rows - 1), strict=True):
            grid[row, num_inputs + column].remove()
        for edge, (source, destination) in enumerate(genotypes.edges(rows, num_inputs)):
            axes = grid[destination - num_inputs, source]
            axes.set_title(f"{names[source]} → {names[destination]}", size=8, color=INK, pad=3)
            _draw_panel(axes, steps, weight[:, edge], primitives)
    parts[0].supylabel(r"softmax($\alpha$)", size=8, color=INK)
    panels = figure.get_axes()
    limits = np.array([panel.get_ylim() for panel in panels])
    for panel in panels:
        panel.set_ylim(limits[:, 0].min(), limits[:, 1].max())
    handles, labels = panels[0].get_legend_handles_labels()
    columns = min(len(labels), max(1, int(figure.get_figwidth() / LEGEND_WIDTH)))
    style = {"ncols": columns, "frameon": False, "fontsize": 7.5, "labelcolor": INK}
    figure.legend(handles, labels, loc="outside lower center", **style)
    return figure


def _draw_panel(
    axes: "Axes", steps: np.ndarray, weights: np.ndarray, primitives: Sequence[str]
) -> None:
    axes.axhline(1 / len(primitives), color=_tint(INK), linewidth=0.6, zorder=0)  # all alike
    marker = "." if len(steps) == 1 else None
    for operation, values in zip(primitives, weights.T, strict=True):
        style = {"color": _hue(operation), "linestyle": _dash(operation), "linewidth": 1.1}
        axes.plot(steps, values, marker=marker, label=operation, **style)
    axes.margins(x=0)
    axes.locator_params(nbins=3)
    axes.tick_params(labelsize=6.5, labelcolor=INK, color=PALE, length=2, width=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=PALE, linewidth=0.6)
