"""Pictures of hypergradient estimators side by side, as SVG and PNG.

An estimator has one colour, marker and dash in all of them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from darts_jax.plots import INK, PALE, picture_files, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 12  # of alphas
LABEL = {"size": 8.5, "color": INK}

# The colours of Okabe and Ito (2008).
STYLES = {
    "exact": {"color": "#000000", "marker": "o", "linestyle": "-"},
    "first_order": {"color": "#E69F00", "marker": "s", "linestyle": "-"},
    "finite_difference": {"color": "#D55E00", "marker": "^", "linestyle": "-"},
    "finite_difference_small": {"color": "#CC79A7", "marker": "v", "linestyle": "--"},
    "t1_t2": {"color": "#009E73", "marker": "D", "linestyle": "-."},
    "neumann": {"color": "#0072B2", "marker": "P", "linestyle": "--"},
    "conjugate_gradient": {"color": "#56B4E9", "marker": "X", "linestyle": ":"},
}
OTHERS = {"color": PALE, "marker": "*", "linestyle": "--"}
PRECISIONS = {  # where two of them agree, both are seen
    "float32": {"color": "#D55E00", "linestyle": "--", "zorder": 2.2},
    "float64": {"color": "#0072B2", "linestyle": "-", "zorder": 2.1},
    "bfloat16": {"color": "#009E73", "linestyle": "-.", "zorder": 2.3},
}


class Cost(NamedTuple):
    """What one call of an estimator needs."""

    seconds: float
    temp_bytes: int


def draw_cosines(
    steps: ArrayLike, cosines: Mapping[str, Mapping[str, ArrayLike]], path: str | Path
) -> list[Path]:
    """Draws the cosine with the exact hypergradient over a search: one panel a term.

    Args:
      steps: [T] increasing.
      cosines: term -> estimator -> [T] in [-1, 1]; NaN is left out.
      path: of the files, without suffix.

    Returns:
      The two files, SVG and PNG.
    """
    figure, panels = _grid(1, len(cosines), (3.4, 2.9))
    lowest = 0.0
    for axes, (term, lines) in zip(panels, cosines.items(), strict=True):
        axes.axhline(0, color=PALE, linewidth=0.6, zorder=0)
        for index, (name, line) in enumerate(lines.items()):
            values = np.asarray(line, float)
            if np.isfinite(values).any():
                lowest = min(lowest, np.nanmin(values))
                axes.plot(steps, values, label=name, **_line(name, len(values), index))
        axes.set_title(term, **_title())
        axes.set_xlabel("step", **LABEL)
    for axes in panels:
        axes.set_ylim(lowest - 0.05, 1.05)
    panels[0].set_ylabel("cosine with the exact one", **LABEL)
    _legend(figure, panels)
    return _write(figure, path)


def draw_radius_errors(
    errors: Mapping[str, Mapping[float, float]],
    exact: Mapping[str, float],
    radius: float,
    path: str | Path,
) -> list[Path]:
    """Draws the finite difference's error against its radius, log-log, one line a precision.

    Args:
      errors: precision -> radius -> relative error of the implicit term; NaN and 0 are left out.
      exact: precision -> that of the exact estimator, a dotted level.
      radius: the paper's, marked.
      path: of the files, without suffix.

    Returns:
      The two files, SVG and PNG.
    """
    figure, (axes,) = _grid(1, 1, (4.6, 3.5))
    for precision, line in errors.items():
        style = {**PRECISIONS[precision], "marker": "o", "markersize": 3, "linewidth": 1.3}
        values = np.array([line[r] for r in sorted(line)], float)
        values[values <= 0] = np.nan
        axes.plot(sorted(line), values, label=precision, **style)
        if exact.get(precision):
            axes.axhline(exact[precision], color=style["color"], linestyle=":", linewidth=1)
    axes.plot([], [], color=INK, linestyle=":", linewidth=1, label="exact, that precision")
    axes.axvline(radius, color=PALE, linewidth=0.8, zorder=0)
    axes.annotate(
        f"radius {radius:g}",
        (radius, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="center",
        size=7.5,
        color=INK,
    )
    axes.axhline(1, color=PALE, linewidth=0.6, linestyle="--", zorder=0)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("radius (global norm of the movement of w)", **LABEL)
    axes.set_ylabel("relative error of the implicit term", **LABEL)
    _legend(figure, [axes])
    return _write(figure, path)


def draw_costs(costs: Mapping[str, Cost], path: str | Path) -> list[Path]:
    """Draws time against scratch memory, one point an estimator.

    Args:
      costs: by estimator.
      path: of the files, without suffix.

    Returns:
      The two files, SVG and PNG.
    """
    figure, (axes,) = _grid(1, 1, (4.6, 3.2))
    for name, (seconds, size) in costs.items():
        style = _style(name)
        axes.scatter(
            1e3 * seconds, size / 1e6, s=46, label=name, marker=style["marker"],
            facecolor="none", edgecolor=style["color"], linewidth=1.4, clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set_xlim(0, 1.1e3 * max(cost.seconds for cost in costs.values()))
    axes.set_ylim(0, 1.15e-6 * max(1, *(cost.temp_bytes for cost in costs.values())))
    axes.set_xlabel("time of one estimate, ms", **LABEL)
    axes.set_ylabel("scratch memory, MB", **LABEL)
    _legend(figure, [axes])
    return _write(figure, path)


def draw_alpha_overlay(
    steps: ArrayLike,
    alphas: Mapping[str, ArrayLike],
    names: Sequence[str],
    path: str | Path,
) -> list[Path]:
    """Draws the alphas of searches overlaid: a panel for each of those that end farthest apart.

    Args:
      steps: [T] increasing.
      alphas: estimator -> [t, n] real, t at most T where a search ended early.
      names: of the n alphas.
      path: of the files, without suffix.

    Returns:
      The two files, SVG and PNG.
    """
    steps = np.asarray(steps)
    values = {name: np.asarray(alpha, float) for name, alpha in alphas.items()}
    last = np.stack([alpha[-1] for alpha in values.values()])
    shown = np.argsort(-np.ptp(last, axis=0), kind="stable")[:MAX_PANELS]
    columns = min(4, len(shown))
    panel = (2.2, 1.6) if columns > 1 else (4.0, 2.6)
    figure, panels = _grid(-(-len(shown) // columns), columns, panel)
    for place, (axes, index) in enumerate(zip(panels, shown, strict=False)):
        for name, alpha in values.items():
            # The exact one is broad, to be seen beneath those that follow it.
            style = _style(name) | {"marker": None, "linewidth": 2.6 if name == "exact" else 1.2}
            axes.plot(steps[: len(alpha)], alpha[:, index], label=name, **style)
        axes.set_title(_math(names[index]), **_title(7))
        axes.locator_params(nbins=3)
        if place % columns == 0:
            axes.set_ylabel("alpha", **LABEL)
        if place + columns >= len(shown):
            axes.set_xlabel("step", **LABEL)
    for axes in panels[len(shown) :]:
        axes.remove()
    _legend(figure, panels)
    return _write(figure, path)


def _style(estimator: str) -> dict[str, str]:
    return STYLES.get(estimator, OTHERS)


def _line(estimator: str, count: int, index: int) -> dict[str, object]:
    """The style of a line of so many points; the markers of several lines take turns."""
    spaced = 1 + count // 8
    every = (index % spaced, spaced)
    return {**_style(estimator), "linewidth": 1.3, "markersize": 4, "markevery": every}


def _math(name: str) -> str:
    return " ".join(f"${word}$" if "_{" in word else word for word in name.split(" "))


def _title(size: float = 9.5) -> dict[str, object]:
    return {"size": size, "color": INK, "loc": "left", "pad": 4}


def _grid(rows: int, columns: int, panel: tuple[float, float]) -> "tuple[Figure, list[Axes]]":
    """A figure and its panels, row by row."""
    from matplotlib.figure import Figure

    size = panel[0] * columns + 0.4, panel[1] * rows + 0.7
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.tick_params(labelsize=7, labelcolor=INK, color=PALE, length=2.5, width=0.6)
        axes.tick_params(which="minor", color=PALE, length=1.5, width=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=PALE, linewidth=0.6)
    return figure, panels


def _legend(figure: "Figure", panels: "Sequence[Axes]") -> None:
    found = {}
    for axes in panels:
        found |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    columns = max(1, min(len(found), int(figure.get_figwidth() // 1.75)))
    style = {"frameon": False, "fontsize": 7.5, "labelcolor": INK}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, **style)


def _write(figure: "Figure", path: str | Path) -> list[Path]:
    files = picture_files(path)
    save_figure(figure, files)
    return files
