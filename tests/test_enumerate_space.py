"""Training every architecture of a space, at the shell."""

import numpy as np
import pytest

from darts_jax import data, ground_truth
from experiments import enumerate_space, enumeration
from experiments.enumerate_space import groups

SMOKE = ("smoke", "--data.name", "digits", "--data.pool", "2")


def files(workdir):
    return sorted((workdir / enumerate_space.FINISHED).iterdir())


def test_a_run_that_is_resumed_gives_the_same_table(tmp_path, capsys):
    for name in ("whole", "resumed"):
        assert enumerate_space.main([*SMOKE, "--workdir", str(tmp_path / name)]) == 0
        assert "Enumeration finished" in capsys.readouterr().out
    first, second = (files(tmp_path / name) for name in ("whole", "resumed"))
    assert len(first) == 2  # a group for each seed
    second[1].unlink()
    kept = second[0].stat().st_mtime_ns
    assert enumerate_space.main([*SMOKE, "--workdir", str(tmp_path / "resumed")]) == 0
    assert "2 of 2 groups" in (out := capsys.readouterr().out) and "1 of 2 groups" not in out
    assert second[0].stat().st_mtime_ns == kept
    tables = [ground_truth.load(tmp_path / name / "table.npz") for name in ("whole", "resumed")]
    for one, other in zip(*tables, strict=True):
        np.testing.assert_array_equal(one, other)
    assert tables[0].right.shape == (3, 2, 1, 2)
    assert (tables[0].class_of >= -1).all() and set(tables[0].class_of) == {-1, 0, 1, 2}
    assert tables[0].sizes.tolist() == [100, 360]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--seeds", "1"), "--seeds is 1; give at least 2"),
        (("--architectures", "2"), "--architectures is 2; give at least 3"),
        (("--train.batch-size", "101"), "--train.batch-size is 101; give at most the 100 images"),
        (("--data.pool", "3"), "--pool is 3; give a divisor of the images' 8x8"),
        (("--data.validation", "1400"), "digits has 1437 training images: give fewer"),
        (("--data.name", "digit"), "unknown dataset 'digit'; use one of: digits"),
    ],
)
def test_what_is_refused(tmp_path, capsys, flags, message):
    assert enumerate_space.main([*SMOKE, *flags, "--workdir", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_damaged_group(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert enumerate_space.main([*SMOKE, "--workdir", str(workdir)]) == 0
    files(workdir)[0].write_bytes(b"")
    assert enumerate_space.main([*SMOKE, "--workdir", str(workdir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "0000.npy cannot be read" in line and "remove it" in line


def test_groups_hold_every_network_once():
    config = enumerate_space.PRESETS["nasbench201_small"][1]
    found = groups(config, 306)
    pairs = [(group.seed, c) for group in found for c in group.classes]
    assert sorted(pairs) == [(seed, c) for seed in range(config.seeds) for c in range(306)]


def test_the_last_group_is_filled_up():
    config = enumerate_space.Config(together=100, seeds=2)
    assert {len(group.classes) for group in groups(config, 306)} == {100}
    assert {c for group in groups(config, 306) for c in group.classes} == set(range(306))


def test_images_are_pooled_and_filled_up():
    dataset = data.load("digits")
    split = data.Split(dataset.train.images[:5], dataset.train.labels[:5])
    batch = enumeration.pooled(split, dataset, 2)
    expected = split.images[3, 2:4, 4:6, 0].mean() / 255
    found = batch.image[3, 1, 2, 0] * dataset.std[0] + dataset.mean[0]
    assert found == pytest.approx(expected, abs=1e-6)
    parts = enumeration.batched(batch, 3)
    assert parts.image.shape == (2, 3, 4, 4, 1)
    np.testing.assert_array_equal(parts.label.ravel(), [*split.labels, enumeration.PADDING])
