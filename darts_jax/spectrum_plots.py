"""The dominant eigenvalue in the course of a search, as a picture. Needs Matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from darts_jax.plots import INK, PALE, picture_files, save_figure


def draw_eigenvalues(
    steps: Sequence[int], eigenvalues: Sequence[float], path: str | Path, stop: int | None = None
) -> list[Path]:
    """Draws the eigenvalues of `spectrum.dominant_eigenvalue` over the steps.

    Args:
      steps: where they were measured.
      eigenvalues: as many.
      path: of the picture, without its ending.
      stop: the step that early stopping goes back to, to be marked.

    Returns:
      The files, SVG and PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, eigenvalues, marker=".", linewidth=1.1)
    if stop is not None:
        axes.axvline(stop, color=INK, linestyle="--", linewidth=0.8)
        axes.annotate("early stop", (stop, max(eigenvalues)), size=8, color=INK, va="top")
    axes.set_xlabel("step", size=8, color=INK)
    axes.set_ylabel("largest eigenvalue of the Hessian in α", size=8, color=INK)
    axes.tick_params(labelsize=7, labelcolor=INK, color=PALE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=PALE)
    files = picture_files(path)
    save_figure(figure, files)
    return files
