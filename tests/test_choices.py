"""How far genotypes agree, counted by hand."""

import numpy as np
import pytest

from darts_jax import choices
from darts_jax.genotype import Genotype, RecurrentGenotype

NODE = (("max_pool_3x3", 0), ("skip_connect", 1))
SWAPPED = (("skip_connect", 1), ("max_pool_3x3", 0))
OTHER = (("sep_conv_3x3", 1), ("max_pool_3x3", 0))
FOUND = [Genotype(cell, (2,), NODE, (2,)) for cell in (NODE, SWAPPED, OTHER)]
CELLS = [RecurrentGenotype(c, (1, 2)) for c in ((("tanh", 0), ("relu", 1)), (("tanh", 0),) * 2)]


def test_convolutional_cells():
    assert choices.edges(FOUND, "normal") == ((0, 2), (1, 2))
    assert choices.distinct(FOUND) == {"normal": 2, "reduce": 1}
    names, counts = choices.operations(FOUND), choices.count(FOUND)
    assert "none" not in names
    assert counts["normal"].shape == counts["reduce"].shape == (2, len(names))
    named = {name: counts["normal"][:, i].tolist() for i, name in enumerate(names)}
    assert named["max_pool_3x3"] == [3, 0]
    assert named["skip_connect"] == [0, 2]
    assert named["sep_conv_3x3"] == [0, 1]
    assert counts["normal"].sum() == 6
    table = choices.table(FOUND)
    assert table["genotypes"] == 3
    assert table["cells"]["reduce"] == {
        "distinct": 1,
        "operations": {"max_pool_3x3": 3, "skip_connect": 3},
        "edges": [
            {"source": 0, "destination": 2, "chosen": {"max_pool_3x3": 3}},
            {"source": 1, "destination": 2, "chosen": {"skip_connect": 3}},
        ],
    }


def test_recurrent_cells():
    assert choices.edges(CELLS, "recurrent") == ((0, 1), (0, 2), (1, 2))
    assert choices.distinct(CELLS) == {"recurrent": 2}
    counts = choices.count(CELLS)["recurrent"]
    tanh, relu = (choices.operations(CELLS).index(name) for name in ("tanh", "relu"))
    np.testing.assert_array_equal(counts[:, tanh], [2, 1, 0])
    np.testing.assert_array_equal(counts[:, relu], [0, 0, 1])


@pytest.mark.parametrize("found", [FOUND, CELLS])
def test_picture(found, tmp_path):
    files = choices.draw(found, tmp_path / "choices", ("a", "b")[: 2 if found is FOUND else 1])
    assert [file.name for file in files] == ["choices.svg", "choices.png"]
    svg = files[0].read_text()
    assert f"distinct of {len(found)}" in svg
    assert "a → 0" in svg
