"""Which operations survive."""

import numpy as np
import pytest

from darts_jax import relaxation, shrinking

ALPHA = {"normal": [[0.3, 0.1, 0.2, 0.4], [0.5, 0.5, 0.5, 0.0]]}


def test_survivors_of_several_searches():
    several = {"normal": np.stack([ALPHA["normal"], np.negative(ALPHA["normal"])])}
    found = shrinking.survivors(several, 2)["normal"]
    for i, values in enumerate(several["normal"]):
        alone = shrinking.survivors({"normal": values}, 2)["normal"]
        np.testing.assert_array_equal(found[i], alone)


def test_survivors_are_the_largest():
    first = shrinking.survivors(ALPHA, 3)
    np.testing.assert_array_equal(first["normal"], [[1, 0, 1, 1], [1, 1, 1, 0]])
    second = shrinking.survivors({"normal": [[0.0, 9.0, 1.0, 2.0]] * 2}, 2, first)
    np.testing.assert_array_equal(second["normal"], [[0, 0, 1, 1], [0, 1, 1, 0]])


def test_the_next_search_is_confined_to_them():
    mask = shrinking.survivors(ALPHA, 2)
    alpha = {"normal": np.zeros((2, 4), np.float32)}
    weights = relaxation.masked(relaxation.softmax, mask)(alpha)["normal"]
    np.testing.assert_array_equal(weights, [[0.5, 0, 0, 0.5], [0.5, 0.5, 0, 0]])


@pytest.mark.parametrize("keep", [0, 4])
def test_too_few_or_many(keep):
    mask = shrinking.survivors(ALPHA, 3)
    with pytest.raises(ValueError, match=f"keep is {keep}.* 1 to 3"):
        shrinking.survivors(ALPHA, keep, mask)
