"""Pictures: discrete cells as graphs, and alphas over a search, as SVG and PNG.

Everything is drawn on figures of its own, without pyplot: no window, no shared state, and the
same picture gives the same bytes. Matplotlib and SciPy are imported where they are used, because
they take half a second that those who draw nothing should not wait for.
"""

import html
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from darts_jax import genotype as genotypes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# An edge as it is drawn: operation, source and destination state. No operation: a plain line.
DrawnEdge = tuple[str | None, int, int]

INPUT_NAMES = ("c_{k-2}", "c_{k-1}")
MAX_POINTS = 400  # of a trajectory: more cannot be seen, but make an SVG of many megabytes
DPI = 200

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
}

# Sizes in inches, of text in points.
FONT_SIZE = 8.5
LABEL_HEIGHT = 0.22
STATE_HEIGHT = 0.34
PORT = 0.13  # between the ends of edges that meet at a state
GAP = 0.1  # between what stands in one column, twice between states
MARGIN = 0.12
TITLE_HEIGHT = 0.3


def draw_genotype(genotype: genotypes.Genotype, directory: str | Path) -> list[Path]:
    """Draws both cells of a genotype into an existing directory.

    Uses graphviz's `dot` where it is installed, and matplotlib elsewhere.

    Returns:
      The files: normal.svg, normal.png, reduce.svg, reduce.png.

    Raises:
      ValueError: if the genotype is not valid.
    """
    genotype = genotypes.validate(genotype)
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
    files = _files(path)
    if not _run_dot(_dot_source(drawn, names, len(inputs), title), files):
        _save(_draw_graph(drawn, names, len(inputs), title), files)
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
    files = _files(path)
    _save(_draw_trajectories(steps[shown], weights, primitives, inputs), files)
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


def _files(path: str | Path) -> list[Path]:
    return [Path(f"{path}.svg"), Path(f"{path}.png")]


def _save(figure: "Figure", files: Sequence[Path]) -> None:
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


# Cells by matplotlib: a layered layout (Sugiyama, Tagawa and Toda 1981) of items, which are the
# states and then the edges. An edge runs level through all columns between its states, and its
# label stands in the last: so no line can cross a label or a state.


class _Layout(NamedTuple):
    spans: list[tuple[int, int]]  # of each item: first and last column; an edge may have none
    columns: list[list[int]]  # items in each column, from top to bottom
    heights: list[float]  # of each item in its last column; an edge's is that of its label
    y: np.ndarray  # [items] of the centre, downwards
    ports: np.ndarray  # [edges, 2] where an edge leaves and enters, from the centre of the state


def _layout(edges: Sequence[DrawnEdge], num_inputs: int) -> _Layout:
    num_states = 1 + max(destination for _, _, destination in edges)
    column = [0] * num_states
    for _, source, destination in sorted(edges, key=lambda edge: edge[2]):
        column[destination] = max(column[destination], column[source] + 2)
    column[-1] -= 1  # no label stands before the output
    spans = [(c, c) for c in column] + [(column[s] + 1, column[d] - 1) for _, s, d in edges]
    rank = _ranking(edges, column, num_inputs)
    columns = [
        sorted((i for i, (first, last) in enumerate(spans) if first <= c <= last), key=rank.item)
        for c in range(1 + max(column))
    ]
    ports = np.zeros((len(edges), 2))
    heights = [STATE_HEIGHT] * num_states
    heights += [LABEL_HEIGHT if operation else 0.0 for operation, _, _ in edges]
    for state, side in product(range(num_states), (0, 1)):
        # What an edge that meets the state meets next: its own level part, or another state.
        onward = {
            edge: num_states + edge if column[ends[1]] - column[ends[0]] > 1 else ends[1 - side]
            for edge, (_, *ends) in enumerate(edges)
            if ends[side] == state
        }
        meeting = sorted(onward, key=lambda edge, onward=onward: rank[onward[edge]])
        ports[meeting, side] = PORT * (np.arange(len(meeting)) - (len(meeting) - 1) / 2)
        heights[state] = max(heights[state], PORT * len(meeting) + 0.04)
    y = _levels(edges, ports, columns, spans, heights)
    return _Layout(spans, columns, heights, y, ports)


def _ranking(edges: Sequence[DrawnEdge], column: Sequence[int], num_inputs: int) -> np.ndarray:
    """Returns the rank of each item, from top to bottom, for which few edges cross.

    One ranking serves all columns. It is the best of a few local optima under moves of one item,
    from a fixed seed; inputs keep their order.
    """
    num_items = len(column) + len(edges)
    # Edges as lines from an item of one column to an item of the next.
    gap, left, right = np.array(
        [
            (c, s if c == column[s] else item, d if c + 1 == column[d] else item)
            for item, (_, s, d) in enumerate(edges, len(column))
            for c in range(column[s], column[d])
        ]
    ).T
    one, other = np.nonzero(np.triu(gap[:, None] == gap, 1))

    def ranks(order: np.ndarray) -> np.ndarray:
        rank = np.argsort(order, axis=-1)
        rank[..., :num_inputs].sort(axis=-1)
        return rank

    def cost(order: np.ndarray) -> np.ndarray:
        a, b = ranks(order)[..., left], ranks(order)[..., right]
        crossed = (a[..., one] - a[..., other]) * (b[..., one] - b[..., other]) < 0
        return crossed.sum(axis=-1) + 1e-3 * np.abs(a - b).sum(axis=-1)

    def local_optimum(order: np.ndarray) -> np.ndarray:
        lowest, before = cost(order), np.inf
        while lowest < before:
            before = lowest
            for item in range(num_items):
                rest = order[order != item]
                moved = np.stack([np.insert(rest, place, item) for place in range(num_items)])
                costs = cost(moved)
                if costs.min() < lowest:
                    order, lowest = moved[costs.argmin()], costs.min()
        return order

    rng = np.random.default_rng(0)
    return ranks(min((local_optimum(rng.permutation(num_items)) for _ in range(8)), key=cost))


def _levels(
    edges: Sequence[DrawnEdge],
    ports: np.ndarray,
    columns: Sequence[Sequence[int]],
    spans: Sequence[tuple[int, int]],
    heights: Sequence[float],
) -> np.ndarray:
    """Returns the y of each item for which edges rise least while nothing in a column overlaps.

    A linear program: minimise the sum of |rise| at both ends of the edges, given minimal distances
    between neighbours in a column (Gansner et al. 1993).
    """
    from scipy.optimize import linprog

    num_items, num_states = len(heights), len(heights) - len(edges)

    def room(item: int, column: int) -> float:
        own = heights[item] if column == spans[item][1] else 0.0
        return own + (2 * GAP if item < num_states else GAP)

    def differences(pairs: Sequence[tuple[int, int]]) -> np.ndarray:
        """Returns the matrix that maps y to y[second] - y[first]."""
        first, second = np.eye(num_items)[np.array(pairs, int).reshape(-1, 2).T]
        return second - first

    neighbours = [(c, *pair) for c, column in enumerate(columns) for pair in pairwise(column)]
    apart = differences([pair for _, *pair in neighbours])
    least = np.array([room(above, c) + room(below, c) for c, above, below in neighbours]) / 2
    rise = differences(
        [(s, item) for item, (_, s, _) in enumerate(edges, num_states)]
        + [(item, d) for item, (_, _, d) in enumerate(edges, num_states)]
    )
    level = np.concatenate([ports[:, 0], -ports[:, 1]])  # the difference that is no rise
    slack = np.eye(len(rise))
    solution = linprog(
        # A slight pull keeps neighbours together where no edge does.
        np.concatenate([1e-3 * apart.sum(axis=0), np.ones(len(rise))]),
        A_ub=np.block(
            [[-apart, np.zeros((len(apart), len(rise)))], [rise, -slack], [-rise, -slack]]
        ),
        b_ub=np.concatenate([-least, level, -level]),
        bounds=(None, None),
    )
    return solution.x[:num_items]


def _draw_graph(
    edges: Sequence[DrawnEdge], names: Sequence[str], num_inputs: int, title: str
) -> "Figure":
    from matplotlib.figure import Figure

    spans, columns, heights, y, ports = _layout(edges, num_inputs)
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
    style = {"ncols": len(labels), "frameon": False, "fontsize": 7.5, "labelcolor": INK}
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
