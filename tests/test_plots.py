import shutil
import struct
import subprocess
import sys
import warnings
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import pytest

from darts_jax import genotype, plots
from darts_jax.genotype import CNN_PRIMITIVES, PUBLISHED, Genotype

DARTS_V2 = PUBLISHED["DARTS_V2"]

# Each node hangs on the one before it; in the reduction cell two edges join the same states, an
# input is unused, and one node makes the output.
CHAIN = Genotype(
    normal=(
        *(("sep_conv_5x5", 0), ("dil_conv_3x3", 1), ("dil_conv_5x5", 2), ("max_pool_3x3", 0)),
        *(("skip_connect", 3), ("sep_conv_3x3", 2), ("sep_conv_3x3", 4), ("avg_pool_3x3", 1)),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(
        *(("sep_conv_5x5", 0), ("sep_conv_3x3", 0), ("dil_conv_5x5", 2), ("max_pool_3x3", 2)),
        *(("skip_connect", 3), ("dil_conv_3x3", 0), ("none", 4), ("conv_7x1_1x7", 0)),
    ),
    reduce_concat=(5,),
)
CELLS = {**PUBLISHED, "chain": CHAIN}


@pytest.fixture
def no_dot(monkeypatch):
    monkeypatch.setenv("PATH", "")


def fake_dot(directory, monkeypatch, script):
    dot = directory / "dot"
    dot.write_text(f"#!/bin/sh\n{script}\n")
    dot.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def texts(svg):
    return Counter(
        "".join(element.itertext()).strip()
        for element in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    )


def png_size(png):
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def check_pictures(cell, directory):
    files = plots.draw_genotype(cell, directory)
    names = ["normal.svg", "normal.png", "reduce.svg", "reduce.png"]
    assert files == [directory / name for name in names]
    assert sorted(directory.iterdir()) == sorted(files)
    for edges, svg, png in [(cell.normal, *files[:2]), (cell.reduce, *files[2:])]:
        labels = Counter(operation for operation, _ in edges)
        assert Counter({label: texts(svg)[label] for label in genotype.CNN_OPERATIONS}) == labels
        nodes = {str(i) for i in range(len(edges) // 2)}
        assert nodes <= set(texts(svg))
        width, height = png_size(png)
        assert width > 600 and height > 200


@pytest.mark.parametrize("name", ["DARTS_V2", "AmoebaNet", "chain"])
def test_cells_are_drawn_without_graphviz(name, tmp_path, no_dot):
    check_pictures(CELLS[name], tmp_path)


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz")
@pytest.mark.parametrize("name", ["DARTS_V2", "AmoebaNet", "chain"])
def test_cells_are_drawn_with_graphviz(name, tmp_path):
    check_pictures(CELLS[name], tmp_path)
    assert b"graphviz" in (tmp_path / "normal.svg").read_bytes()


def test_graphviz_is_given_the_whole_graph(tmp_path, monkeypatch):
    fake_dot(tmp_path, monkeypatch, "exec /bin/cat")
    _, _, reduce, _ = plots.draw_genotype(CHAIN, tmp_path)
    graph = reduce.read_text()
    for index, (operation, source) in enumerate(CHAIN.reduce):
        assert f"e{index} [label=<{operation}> " in graph
        assert f"\n{source} -> e{index}:w " in graph
        assert f"\ne{index}:e -> {2 + index // 2} " in graph
    assert graph.count("\n5 -> 6 ") == 1
    assert "0 [label=<c<SUB>k-2</SUB>>]" in graph


def test_a_graphviz_that_fails_is_replaced(tmp_path, monkeypatch):
    fake_dot(tmp_path, monkeypatch, "echo no plugin >&2; exit 1")
    assert "max_pool_3x3" in texts(plots.draw_genotype(DARTS_V2, tmp_path)[2])


def test_the_same_picture_has_the_same_bytes(tmp_path, no_dot):
    steps, alphas = np.arange(3), {"normal": np.arange(3 * 14 * 8).reshape(3, 14, 8) % 7}
    first, second = tmp_path / "first", tmp_path / "second"
    for directory in (first, second):
        directory.mkdir()
        plots.draw_genotype(DARTS_V2, directory)
        plots.draw_alphas(steps, alphas, CNN_PRIMITIVES, directory / "alphas")
    files = sorted(file.name for file in first.iterdir())
    assert len(files) == 6
    for file in files:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_an_invalid_genotype_is_not_drawn(tmp_path):
    with pytest.raises(ValueError, match="'reduce', edge 7: source 5"):
        plots.draw_genotype(DARTS_V2._replace(reduce=(("none", 0),) * 7 + (("none", 5),)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_operations_are_drawn_where_they_are_named(tmp_path, no_dot):
    found = DARTS_V2._replace(normal=(("conv_1x1", 0), ("conv_1x1", 1)), normal_concat=(2,))
    with pytest.raises(ValueError, match="unknown operation 'conv_1x1'"):
        plots.draw_genotype(found, tmp_path)
    assert not list(tmp_path.iterdir())
    svg, *_ = plots.draw_genotype(found, tmp_path, (*CNN_PRIMITIVES, "conv_1x1"))
    assert texts(svg)["conv_1x1"] == 2


@pytest.fixture
def figure_of(monkeypatch, tmp_path):
    def draw(*args, **kwargs):
        figures = []
        monkeypatch.setattr(plots, "save_figure", lambda figure, files: figures.append(figure))
        plots.draw_alphas(*args, path=tmp_path / "alphas", **kwargs)
        return figures[0]

    return draw


def test_alphas_are_drawn_as_svg_and_png(tmp_path):
    alphas = {
        "normal": np.random.default_rng(0).normal(size=(5, 14, 8)),
        "reduce": np.zeros((5, 14, 8)),
    }
    svg, png = plots.draw_alphas(np.arange(5), alphas, CNN_PRIMITIVES, tmp_path / "alphas")
    assert (svg.name, png.name) == ("alphas.svg", "alphas.png")
    found = texts(svg)
    assert all(found[operation] == 1 for operation in CNN_PRIMITIVES)  # one legend
    assert found["normal"] == found["reduce"] == 1 and found["2 → 3"] == 2
    assert sum("→" in text for text in found.elements()) == 2 * 14
    width, height = png_size(png)
    assert width > 1500 and height > 600


@pytest.mark.parametrize(
    ("num_nodes", "inputs", "primitives"),
    [(4, ("c_{k-2}", "c_{k-1}"), CNN_PRIMITIVES), (3, ("x",), ("none", "tanh", "relu"))],
)
def test_each_panel_shows_the_softmax_of_its_edge(num_nodes, inputs, primitives, figure_of):
    edges = genotype.edges(num_nodes, len(inputs))
    alpha = np.random.default_rng(0).normal(size=(6, len(edges), len(primitives)))
    steps = np.arange(6) * 10
    figure = figure_of(steps, {"cell": alpha}, primitives, inputs=inputs)
    names = [
        *(f"${name}$" if "_" in name else name for name in inputs),
        *map(str, range(num_nodes)),
    ]
    panels = {panel.get_title(): panel for panel in figure.get_axes()}
    assert set(panels) == {f"{names[s]} → {names[d]}" for s, d in edges}
    weights = np.exp(alpha) / np.exp(alpha).sum(axis=2, keepdims=True)
    for edge, (source, destination) in enumerate(edges):
        panel = panels[f"{names[source]} → {names[destination]}"]
        lines = {line.get_label(): line for line in panel.get_lines()}
        for column, operation in enumerate(primitives):
            np.testing.assert_array_equal(lines[operation].get_xdata(), steps)
            np.testing.assert_allclose(lines[operation].get_ydata(), weights[:, edge, column])
        assert panel.get_ylim() == figure.get_axes()[0].get_ylim()
        low, high = panel.get_ylim()
        assert low <= weights.min() and weights.max() <= high


def test_operations_of_the_search_space_look_different():
    assert len({(plots._hue(name), plots._dash(name)) for name in CNN_PRIMITIVES}) == 8


def test_a_long_search_is_thinned_to_what_can_be_seen(figure_of):
    figure = figure_of(np.arange(10_000), {"normal": np.zeros((10_000, 2, 8))}, CNN_PRIMITIVES)
    steps = figure.get_axes()[0].get_lines()[-1].get_xdata()
    assert len(steps) == plots.MAX_POINTS and steps[0] == 0 and steps[-1] == 9_999


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_one_step_and_missing_values_are_drawn_without_a_warning(value, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alphas = {"normal": np.full((1, 5, 8), value)}
        svg, _ = plots.draw_alphas([0], alphas, CNN_PRIMITIVES, tmp_path / "alphas")
    assert texts(svg)["0 → 1"] == 1


@pytest.mark.parametrize(
    ("steps", "shape", "message"),
    [
        ([], (0, 14, 8), "no step to draw"),
        ([0, 1], (3, 14, 8), r"alphas\['normal'\] has shape \[3, 14, 8\]; it needs \[2 steps"),
        ([0, 1], (2, 14, 7), r"has shape \[2, 14, 7\].*8 operations"),
        ([0, 1], (14, 8), r"has shape \[14, 8\]"),
        ([0, 1], (2, 13, 8), "13 edges fit no cell with 2 inputs"),
    ],
)
def test_alphas_of_another_shape_are_refused(steps, shape, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plots.draw_alphas(steps, {"normal": np.zeros(shape)}, CNN_PRIMITIVES, tmp_path / "alphas")
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_no_global_state_and_importing_loads_no_matplotlib(tmp_path):
    code = """
import sys
from darts_jax import genotype, plots
assert "matplotlib" not in sys.modules
import matplotlib
before = matplotlib.rcParams.copy()
plots.draw_genotype(genotype.load("DARTS_V1"), sys.argv[1])
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    subprocess.run(command, check=True, env={"PATH": "", "PYTHONPATH": ":".join(sys.path)})
