"""The table of a small space."""

import jax
import numpy as np
import pytest

from darts_jax import ground_truth, isomorphism
from darts_jax.spaces import nasbench201_small

EDGES, PRIMITIVES = nasbench201_small.EDGES, nasbench201_small.PRIMITIVES


def make_table(seeds=3, epochs=2):
    representatives, class_of = isomorphism.classes(EDGES, PRIMITIVES)
    rng = np.random.default_rng(0)
    right = rng.integers(0, 200, (len(representatives), seeds, epochs, 2)).astype(np.uint16)
    sizes = np.array([200, 400], np.int32)
    return ground_truth.Table(PRIMITIVES, EDGES, representatives, class_of, right, sizes, "{}")


TABLE = make_table()


def test_a_table_is_read_as_it_was_written(tmp_path):
    ground_truth.save(TABLE, tmp_path / "table.npz")
    found = ground_truth.load(tmp_path / "table.npz")
    for name, value in TABLE._asdict().items():
        np.testing.assert_array_equal(getattr(found, name), value)
    assert found.right.dtype == np.uint16


def test_the_index_is_that_of_the_choices():
    every = isomorphism.choices(len(EDGES), len(PRIMITIVES))
    np.testing.assert_array_equal(ground_truth.index(every, len(PRIMITIVES)), np.arange(1024))


@pytest.mark.parametrize("part", ground_truth.PARTS)
def test_accuracy_and_regret_under_jit(part):
    choice = np.array([[0, 1, 2, 3, 0], [3, 3, 3, 3, 3]])

    @jax.jit
    def both(choice):
        numbers = ground_truth.index(choice, len(PRIMITIVES))
        return ground_truth.accuracy(TABLE, numbers, part), ground_truth.regret(
            TABLE, numbers, part
        )

    accuracy, regret = both(choice)
    column = ground_truth.PARTS.index(part)
    final = (TABLE.right[:, :, -1, column] / TABLE.sizes[column]).mean(1)
    rows = [TABLE.class_of[int("".join(map(str, c)), 4)] for c in choice]
    np.testing.assert_allclose(accuracy, final[rows], rtol=1e-6)
    np.testing.assert_allclose(regret, final.max() - final[rows], rtol=1e-5)


def test_the_best_has_no_regret_and_the_same_have_the_same():
    numbers = np.arange(1024)
    regret = np.asarray(ground_truth.regret(TABLE, numbers))
    assert regret.min() == 0
    for c in (0, 17, 305):
        assert len(set(regret[TABLE.class_of == c])) == 1


def test_what_was_not_trained_is_nan():
    partial = TABLE._replace(class_of=np.where(TABLE.class_of == 5, -1, TABLE.class_of))
    regret = np.asarray(ground_truth.regret(partial, np.arange(1024)))
    np.testing.assert_array_equal(np.isnan(regret), TABLE.class_of == 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": EDGES[:-1]}, "array 'edges' has the wrong shape"),
        ({"class_of": TABLE.class_of[:-1]}, "array 'class_of' has the wrong"),
        ({"class_of": TABLE.class_of + 1}, "array 'class_of' has the wrong"),
        ({"right": TABLE.right[..., :1]}, "array 'right' has the wrong"),
        ({"sizes": TABLE.sizes[:1]}, "array 'sizes' has the wrong"),
    ],
)
def test_a_table_that_is_none(tmp_path, change, message):
    path = tmp_path / "table.npz"
    ground_truth.save(TABLE._replace(**change), path)
    with pytest.raises(ValueError, match=message) as error:
        ground_truth.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_tables(tmp_path):
    path = tmp_path / "table.npz"
    with pytest.raises(ValueError, match="no table .*; make one by python -m experiments"):
        ground_truth.load(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="is no table"):
        ground_truth.load(path)
    np.savez(path, edges=np.array([object()]))  # a pickle
    with pytest.raises(ValueError, match="is no table"):
        ground_truth.load(path)


def test_agreement():
    rng = np.random.default_rng(0)
    count, seeds = 4000, 4
    accuracy = rng.normal(0, 3, (count, 1)) + rng.normal(0, 1, (count, seeds))
    found = ground_truth.agreement(accuracy)
    assert found.between == pytest.approx(9, rel=0.1)
    assert found.within == pytest.approx(1, rel=0.1)
    # Pearson's would be 9 / 10; of normal numbers, Spearman's is 6 / pi arcsin(rho / 2).
    assert found.rank_correlation == pytest.approx(6 / np.pi * np.arcsin(0.45), abs=0.02)


def test_architectures_that_differ_by_less_than_seeds():
    assert ground_truth.agreement(np.array([[1.0, 2.0], [2.0, 1.0], [1.5, 1.5]])).between == 0


def test_the_table_of_the_package():
    assert ground_truth.SHIPPED.stat().st_size < 1_000_000
    table = ground_truth.load()
    assert (table.edges, table.primitives) == (EDGES, PRIMITIVES)
    representatives, class_of = isomorphism.classes(EDGES, PRIMITIVES)
    np.testing.assert_array_equal(table.architectures, representatives)
    np.testing.assert_array_equal(table.class_of, class_of)
    for column in range(len(ground_truth.PARTS)):
        final = table.accuracy[:, :, -1, column]
        # Also without those that guess, as all do that connect nothing to the output.
        for rows in (final, final[final.mean(1) > 0.2]):
            found = ground_truth.agreement(rows)
            assert found.between > 5 * found.within
            assert found.rank_correlation > 0.8
