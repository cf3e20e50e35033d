"""Regret in the course of searches, as a picture. Needs Matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from darts_jax.plots import INK, PALE, picture_files, save_figure

# The colours of Okabe and Ito (2008); with the dashes, 21 lines.
COLOURS = ("#000000", "#E69F00", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
DASHES = ("-", "--", ":")
LINEAR = 1  # percentage points: above, the axis is logarithmic, so that it shows a first epoch, too
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50)
LABEL = {"size": 8.5, "color": INK}


def draw_regret(
    panels: Sequence[Mapping[str, ArrayLike]], levels: Mapping[str, float], path: str | Path
) -> list[Path]:
    """Draws mean regret over epochs, in percentage points, in bands of one standard error.

    The axis is logarithmic above one percentage point, and linear below.

    Args:
      panels: of each, name -> regret in [0, 1], [epochs + 1, seeds], at least 2 seeds.
      levels: name -> regret in [0, 1], to be drawn across, such as that of random search.
      path: of the picture, without its ending.

    Returns:
      The files, SVG and PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3 * len(panels), 4.2), layout="constrained")
    for axes, curves in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for i, (name, regret) in enumerate(curves.items()):
            values = 100 * np.asarray(regret, float)
            mean = values.mean(1)
            error = values.std(1, ddof=1) / np.sqrt(values.shape[1])
            colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS)]
            epochs = np.arange(len(mean))
            axes.plot(epochs, mean, color=colour, linestyle=dash, linewidth=1.3, label=name)
            axes.fill_between(epochs, mean - error, mean + error, color=colour, alpha=0.12, lw=0)
        for dash, (name, level) in zip(("--", ":", "-."), levels.items(), strict=False):
            axes.axhline(100 * level, color=PALE, linestyle=dash, linewidth=1, label=name)
        axes.set_xlabel("epoch", **LABEL)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=7, labelcolor=INK, color=PALE)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=PALE)
        axes.legend(
            frameon=False, fontsize=7, labelcolor=INK, ncols=2, loc="lower center",
            bbox_to_anchor=(0.5, 1),
        )  # fmt: skip
    # All panels share this axis, whose limits are to hold the curves of each.
    axes = figure.axes[0]
    axes.set_ylabel("test regret, percentage points", **LABEL)
    axes.set_yscale("symlog", linthresh=LINEAR, linscale=1)
    axes.set_yticks(TICKS, map(str, TICKS))
    axes.set_ylim(bottom=0)
    files = picture_files(path)
    save_figure(figure, files)
    return files
