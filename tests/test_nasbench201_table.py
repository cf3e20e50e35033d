"""The published accuracies, from files as the user has them."""

import bz2
import os
import pickle
from collections import OrderedDict

import jax
import numpy as np
import pytest

from darts_jax import ground_truth, isomorphism, nasbench201_table
from darts_jax.spaces import nasbench201
from darts_jax.spaces._dag import to_string

SHAPE = (15625, 3, 2)


def percentages():
    return np.random.default_rng(0).uniform(10, 95, SHAPE).astype(np.float32)


def test_an_array_file(tmp_path):
    path = tmp_path / "accuracies.npy"
    np.save(path, percentages())
    found = nasbench201_table.load(path)
    np.testing.assert_allclose(found.accuracy, percentages() / 100, rtol=1e-6)
    nasbench201_table.save(found, path)
    np.testing.assert_allclose(nasbench201_table.load(path).accuracy, found.accuracy, rtol=1e-6)


def test_regret_under_jit(tmp_path):
    path = tmp_path / "accuracies.npy"
    np.save(path, percentages())
    table = nasbench201_table.load(path)
    choice = np.array([[[4, 2, 1, 2, 0, 1]], [[0, 0, 0, 0, 0, 0]]])
    found = jax.jit(lambda c: nasbench201_table.regret(table, c, "cifar100", "validation"))(choice)
    column = percentages()[:, 1, 0] / 100
    rows = [int("421201", 5), 0]
    np.testing.assert_allclose(found[:, 0], column.max() - column[rows], rtol=1e-5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros((15625, 3)), r"holds float64\[15625, 3\]; it needs real numbers"),
        (np.zeros(SHAPE, int), "it needs real numbers"),
        (percentages() / 100, "does not hold percentages"),
        (percentages() - 20, "does not hold percentages"),
        (np.full(SHAPE, np.nan), "does not hold percentages"),
        (np.array([{}]), "is no array file"),
    ],
    ids=["shape", "integers", "fractions", "negative", "nan", "pickle"],
)
def test_files_that_are_something_else(tmp_path, content, message):
    path = tmp_path / "accuracies.npy"
    np.save(path, content)
    with pytest.raises(ValueError, match=message) as error:
        nasbench201_table.load(path)
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        nasbench201_table.load(tmp_path / "nothing.npy")


class Evil:
    """A pickle that would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


ORDER = (3, 0, 2, 1)  # the authors number architectures in an order of their own


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder as NATS-Bench has it, of four architectures instead of 15625."""
    monkeypatch.setattr(nasbench201_table, "SIZE", 4)
    every = isomorphism.choices(6, 5)[list(ORDER)]
    strings = [to_string(c, nasbench201.EDGES, nasbench201.PRIMITIVES) for c in every]
    path = tmp_path / "NATS-tss-v1_0-3ffb9-simple"
    path.mkdir()
    evil = Evil(str(tmp_path / "made"))
    write(path / "meta.pickle.pbz2", {"meta_archs": strings, "other": evil})
    for number, row in enumerate(ORDER):
        results = OrderedDict()
        for dataset, parts in (
            ("cifar10-valid", ("x-valid", "ori-test")),
            ("cifar10", ("ori-test",)),
            ("cifar100", ("x-valid", "x-test")),
            ("ImageNet16-120", ("x-valid", "x-test")),
        ):
            for seed, number_type in ((777, float), (888, np.float64)):
                accuracies = {
                    f"{part}@199": number_type(10.0 * row + len(dataset) + i + (seed == 888))
                    for i, part in enumerate(parts)
                }
                results[dataset, seed] = {"eval_acc1es": accuracies, "net_state_dict": evil}
        write(path / f"{number:06}.pickle.pbz2", {"200": {"all_results": results}})
    return path


def write(path, content):
    with bz2.open(path, "wb") as file:
        pickle.dump(content, file, protocol=4)


def test_the_folder(folder, tmp_path):
    found = np.asarray(nasbench201_table.load(folder, allow_pickle=True).accuracy)
    lengths = {"cifar10-valid": 13, "cifar10": 7, "cifar100": 8, "ImageNet16-120": 14}
    for row in range(4):
        expected = (
            10 * row
            + 0.5
            + np.array(
                [
                    [lengths["cifar10-valid"], lengths["cifar10"]],
                    [lengths["cifar100"], lengths["cifar100"] + 1],
                    [lengths["ImageNet16-120"], lengths["ImageNet16-120"] + 1],
                ]
            )
        )
        np.testing.assert_allclose(100 * found[row], expected, rtol=1e-6)
    assert not (tmp_path / "made").exists()  # nothing that a pickle names was run


def test_pickles_need_a_flag(folder):
    with pytest.raises(ValueError, match="holds pickles; set allow_pickle"):
        nasbench201_table.load(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no file .*000002.pickle.pbz2"),
        ({"12": {}}, "lacks '200'"),
        ({"200": {"all_results": {}}}, "lacks x-valid@199 of cifar10-valid"),
        ({"200": {"all_results": [1]}}, "lacks x-valid@199"),
        (b"", "lacks '200'"),
    ],
    ids=["missing", "short", "empty", "list", "bytes"],
)
def test_a_damaged_folder(folder, content, message):
    path = folder / "000002.pickle.pbz2"
    path.unlink() if content is None else write(path, content)
    with pytest.raises(ValueError, match=message) as error:
        nasbench201_table.load(folder, allow_pickle=True)
    assert "\n" not in str(error.value)


def test_rows_are_by_the_index():
    assert nasbench201_table.SIZE == 15625
    assert int(ground_truth.index(np.array([4, 2, 1, 2, 0, 1]), 5)) == int("421201", 5)
