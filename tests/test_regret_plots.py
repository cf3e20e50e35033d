"""The picture of regret over the epochs."""

import numpy as np
import pytest

from darts_jax import regret_plots


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """`drawn(panels, levels)`, the figure that would be saved."""

    def draw(panels, levels):
        figures = []
        with monkeypatch.context() as patched:
            patched.setattr(regret_plots, "save_figure", lambda figure, _: figures.append(figure))
            regret_plots.draw_regret(panels, levels, tmp_path / "regret")
        return figures[0]

    return draw


def test_lines_are_means_in_bands_of_one_standard_error(drawn):
    regret = np.random.default_rng(0).uniform(0, 0.1, (4, 5))
    (axes,) = drawn([{"a": regret}], {"level": 0.02}).axes
    line, level = axes.lines
    np.testing.assert_allclose(line.get_ydata(), 100 * regret.mean(1))
    np.testing.assert_allclose(level.get_ydata(), 2)
    (band,) = axes.collections
    edge = band.get_paths()[0].vertices
    error = 100 * regret.std(1, ddof=1) / 5**0.5
    for epoch, (mean, own) in enumerate(zip(100 * regret.mean(1), error, strict=True)):
        heights = edge[edge[:, 0] == epoch, 1]
        np.testing.assert_allclose([heights.min(), heights.max()], [mean - own, mean + own])


@pytest.mark.parametrize("order", [1, -1])
def test_every_panel_shows_all_of_its_curves(drawn, order):
    curves = [{"low": np.full((3, 2), 0.01)}, {"high": np.full((3, 2), 0.6)}][::order]
    for axes in drawn(curves, {}).axes:
        low, high = axes.get_ylim()
        assert low == 0 and high > 60


def test_zero_and_a_hundredth_of_the_first_epoch_are_told_apart(drawn):
    curve = np.array([[0.4, 0.4], [0.004, 0.004], [0.0, 0.0]])
    axes = drawn([{"a": curve}], {}).axes[0]
    height = axes.transAxes.inverted().transform(
        axes.transData.transform(axes.lines[0].get_xydata())
    )
    assert height[2, 1] == pytest.approx(0, abs=1e-6) and height[1, 1] > 0.05
