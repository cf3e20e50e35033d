import struct
from xml.etree import ElementTree

import numpy as np
import pytest

from darts_jax import comparison_plots as plots

STEPS = [0, 10, 20]
NAN = float("nan")


def draw_cosines(path):
    lines = {"first_order": [0.9, -0.5, 0.1], "neumann": [NAN, NAN, NAN], "unrolled_5": [1, 1, NAN]}
    return plots.draw_cosines(STEPS, {"whole": lines, "implicit term": lines}, path)


def draw_radius_errors(path):
    errors = {"float32": {1e-8: 1.0, 1e-2: 0.1, 1.0: 0.0}, "float64": {1e-8: NAN, 1.0: 0.5}}
    return plots.draw_radius_errors(errors, {"float32": 1e-6, "float64": 0.0}, 0.01, path)


def draw_costs(path):
    costs = {"exact": plots.Cost(0.1, 2_000_000), "first_order": plots.Cost(0.05, 0)}
    return plots.draw_costs(costs, path)


def draw_alpha_overlay(path):
    alphas = {"exact": np.zeros((3, 20)), "neumann": np.arange(40.0).reshape(2, 20)}
    names = [f"normal c_{{k-2}} → {index} none" for index in range(20)]
    return plots.draw_alpha_overlay(STEPS, alphas, names, path)


FIGURES = {
    draw_cosines: ("whole", "implicit term", "first_order", "unrolled_5", "step"),
    draw_radius_errors: ("float32", "float64", "radius 0.01", "exact, that precision"),
    draw_costs: ("exact", "first_order", "scratch memory, MB", "time of one estimate, ms"),
    draw_alpha_overlay: ("exact", "neumann", "step", "alpha"),
}


def texts(svg):
    return {"".join(node.itertext()).strip() for node in ElementTree.parse(svg).iter() if node.text}


@pytest.mark.parametrize("draw", FIGURES, ids=lambda draw: draw.__name__)
def test_figures(tmp_path, draw):
    svg, png = draw(tmp_path / "figure")
    assert (svg.name, png.name) == ("figure.svg", "figure.png")
    assert set(FIGURES[draw]) <= texts(svg)
    width, height = struct.unpack(">II", png.read_bytes()[16:24])
    assert 600 < width < 2500
    assert 300 < height < 2500
    again = draw(tmp_path / "again")
    assert [path.read_bytes() for path in again] == [svg.read_bytes(), png.read_bytes()]


def test_what_has_no_number_is_not_in_the_legend(tmp_path):
    svg, _ = draw_cosines(tmp_path / "figure")
    assert "neumann" not in texts(svg)


def test_alphas_that_end_farthest_apart_are_shown(tmp_path):
    alphas = {"exact": np.zeros((3, 20)), "neumann": np.tile(np.arange(20.0), (3, 1))}
    names = [f"panel {index}" for index in range(20)]
    svg, _ = plots.draw_alpha_overlay(STEPS, alphas, names, tmp_path / "figure")
    shown = {text for text in texts(svg) if text.startswith("panel")}
    assert shown == {f"panel {index}" for index in range(20 - plots.MAX_PANELS, 20)}


def test_one_alpha_is_one_panel(tmp_path):
    alphas = {"exact": np.zeros((3, 1))}
    svg, _ = plots.draw_alpha_overlay(STEPS, alphas, ["alpha"], tmp_path / "figure")
    assert "alpha" in texts(svg)
