"""Training every architecture of a space, at the shell."""

import jax
import numpy as np
import pytest

from darts_jax import data, ground_truth, isomorphism
from darts_jax.spaces.nasbench201_small import EDGES, PRIMITIVES
from experiments import enumerate_space, enumeration, regret
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


def test_another_config(tmp_path, capsys, monkeypatch):
    """More epochs too: a network of some epochs cannot go on to more, as its group is all or
    nothing."""
    workdir = tmp_path / "run"
    monkeypatch.setattr(
        enumerate_space, "make_train_group", lambda *_: lambda group: np.zeros((3, 1, 2), np.uint16)
    )
    monkeypatch.setattr(enumerate_space, "summary", lambda *_: "")
    assert enumerate_space.main([*SMOKE, "--workdir", str(workdir)]) == 0
    before = {path: path.read_bytes() for path in workdir.rglob("*.*")}
    capsys.readouterr()
    assert enumerate_space.main([*SMOKE, "--train.epochs", "2", "--workdir", str(workdir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "another config: train.epochs is 1 there, 2 here. Give the fields of that run, or another"
        " --workdir"
    )
    assert before == {path: path.read_bytes() for path in workdir.rglob("*.*")}


@pytest.mark.parametrize("module", [enumerate_space, regret])
def test_run_options_that_would_do_nothing_are_not_there(module, tmp_path, capsys):
    for name in ("log-every", "save-minutes", "keep", "on-nan", "fork", "profile", "wandb"):
        with pytest.raises(SystemExit) as stopped:
            module.main(["smoke", f"--{name}", "1", "--workdir", str(tmp_path / "run")])
        assert stopped.value.code == 2 and f"--{name}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite(tmp_path, capsys, monkeypatch):
    """Of the second seed alone: the group of the first one is kept."""
    make_train = enumerate_space.make_train

    def poisoned(*args):
        init, epoch = make_train(*args)
        started = []

        def start(keys, weights, image):
            run = init(keys, weights, image)
            started.append(run)
            if len(started) == 2:
                params = jax.tree.map(lambda leaf: leaf.at[1].set(np.nan), run.params)
                run = run._replace(params=params)
            return run

        return start, epoch

    monkeypatch.setattr(enumerate_space, "make_train", poisoned)
    workdir = tmp_path / "run"
    assert enumerate_space.main([*SMOKE, "--workdir", str(workdir)]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    representatives, _ = isomorphism.classes(EDGES, PRIMITIVES)
    config = enumerate_space.PRESETS["smoke"][1]
    second = representatives[groups(config, len(representatives))[1].classes[1]]
    names = " ".join(PRIMITIVES[o] for o in second)
    assert f"epoch 1: the weights of architecture {names}, seed 1 are not finite" in line
    assert [path.name for path in files(workdir)] == ["0000.npy"]
    assert not (workdir / "table.npz").exists()


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
