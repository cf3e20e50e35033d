"""Training of found cells from the command line."""

import dataclasses
import functools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_cells import CHEAP

from darts_jax import data, genotype, prediction, training
from experiments import evaluate_cnn
from experiments.config import DataConfig
from experiments.evaluation_config import PRESETS, Config, NetworkConfig, TrainConfig

REASON = "RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\nAllocator (GPU_0_bfc)"


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """Runs in an empty folder, with a file of cheap cells there."""
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    genotype.save(CHEAP, "cells.json")
    return "cells.json"


def epochs_of(workdir):
    lines = map(json.loads, Path(workdir, "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "epoch"]


def test_paper_preset():
    """Section 3.2 and appendix A.2 of arXiv 1806.09055, and what the released code adds."""
    paper = dataclasses.asdict(PRESETS["paper"][1])
    assert paper["network"] == {
        "channels": 36,
        "layers": 20,
        "auxiliary": True,
        "stem": "cifar",
        "batch_norm_groups": 1,
    }
    assert paper["data"] == {
        "name": "cifar10",
        "path": None,
        "limit": None,
        "crop": 4,
        "flip": True,
        "cutout": 16,
    }
    expected = {
        "epochs": 600,
        "batch_size": 96,
        "accumulate": 1,
        "portion": 1.0,
        "drop_path": 0.2,
        "auxiliary_weight": 0.4,
        "label_smoothing": 0.0,
        "precision": "float32",
        "remat": False,
        "w": {
            "learning_rate": 0.025,
            "schedule": "cosine",
            "learning_rate_min": 0.0,
            "decay": 0.97,  # of a schedule that is not used
            "decay_epochs": 1,
            "momentum": 0.9,
            "weight_decay": 3e-4,
            "clip": 5.0,
        },
    }
    assert paper["train"] == expected
    assert {k: v for k, v in dataclasses.asdict(PRESETS["cifar100"][1]).items() if k != "data"} == {
        k: v for k, v in paper.items() if k != "data"
    }


def test_imagenet_preset():
    """Section 3.2.3 and appendix A.2.3, and train_imagenet.py of the released code."""
    paper = PRESETS["imagenet"][1]
    assert paper.network == NetworkConfig(48, 14, auxiliary=True, stem="imagenet")
    assert (paper.train.epochs, paper.train.batch_size, paper.train.drop_path) == (250, 128, 0)
    assert (paper.train.label_smoothing, paper.train.auxiliary_weight) == (0.1, 0.4)
    w = paper.train.w
    assert (w.schedule, w.learning_rate, w.decay, w.decay_epochs) == ("step", 0.1, 0.97, 1)
    assert (w.momentum, w.weight_decay, w.clip) == (0.9, 3e-5, 5)
    assert (paper.stream.size, paper.stream.colours, paper.stream.hue) == (224, 0.4, 0.2)
    assert (paper.data.flip, paper.data.crop, paper.data.cutout) == (True, 0, 0)


def test_presets():
    assert list(PRESETS) == [
        "digits",
        "mnist5k",
        "cifar10",
        "paper",
        "cifar100",
        "imagenet",
        "smoke",
    ]
    for _, config in PRESETS.values():
        evaluate_cnn.check(config)


def test_training_from_the_command_line(cells, capsys):
    arguments = ["smoke", "--genotype", cells, "--seeds", "2"]
    assert evaluate_cnn.main(arguments) == 0
    workdir = Path("runs/evaluate_cnn-smoke-seed0")
    assert genotype.load(workdir / "genotype.json") == CHEAP
    *_, last = epochs_of(workdir)
    output = capsys.readouterr().out
    errors = 100 * (1 - np.array([last[f"eval_accuracy_of_seed_{seed}"] for seed in (0, 1)]))
    top5 = 100 * (1 - np.array([last[f"eval_top5_accuracy_of_seed_{seed}"] for seed in (0, 1)]))
    for values in (errors, top5):
        assert f"{values.mean():.2f} ± {values.std(ddof=1):.2f} %" in output
    np.testing.assert_allclose(last["eval_accuracy"], 1 - errors.mean() / 100)

    # The networks that are saved are those whose errors were told.
    test = data.load("digits", limit=64).test
    for index, error in enumerate(errors):
        trained = prediction.load(workdir, index)
        wrong = trained.apply(trained.variables, test.images).argmax(-1) != test.labels
        np.testing.assert_allclose(100 * wrong.mean(), error)
    params = sum(x.size for x in jax.tree.leaves(trained.variables["params"]))
    assert f"{params:,}" in output
    assert (workdir / "model.export").stat().st_size > 0

    # The same command on the same workdir has nothing left to do, and needs no --genotype.
    before = (workdir / "metrics.jsonl").read_bytes()
    assert evaluate_cnn.main(["smoke", "--seeds", "2"]) == 0
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert f"{errors.mean():.2f} ± " in capsys.readouterr().out


def test_a_seed_is_the_same_alone_and_beside_others(cells):
    for name, options in (("both", ["--seeds", "2"]), ("alone", ["--seed", "1"])):
        arguments = ["smoke", "--genotype", cells, "--workdir", name, *options]
        assert evaluate_cnn.main(arguments) == 0
    pair = prediction.load("both", 1), prediction.load("alone")
    leaves = (jax.tree.leaves(trained.variables) for trained in pair)
    for both, alone in zip(*leaves, strict=True):
        np.testing.assert_allclose(both, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2])
def test_seeds_in_parts_are_those_all_at_once(cells, at_once):
    """Of 3 seeds: one after the other, or two and then one."""
    _, config = evaluate_cnn.PRESETS["smoke"]
    config = dataclasses.replace(evaluate_cnn.with_cells(config, cells), seeds=3)
    dataset = data.load("digits", limit=64)

    def trained(config):
        job = evaluate_cnn.make_job(config, dataset)
        states = job.init()
        for batch in job.train_batches(1):
            states, metrics = job.train_step(states, job.data, batch)
        evaluation, _ = job.eval_step(states, job.data, job.eval_batches[0])
        return states.params, states.batch_stats, metrics, evaluation

    found, expected = trained(dataclasses.replace(config, seeds_at_once=at_once)), trained(config)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)


def test_memory_that_is_not_enough_is_one_line(cells, capsys, monkeypatch):
    """The same command goes on, with what the line names."""
    command = ["smoke", "--genotype", cells, "--seeds", "3", "--workdir", "run"]

    def exhausted(*_):
        raise jax.errors.JaxRuntimeError(REASON)

    with monkeypatch.context() as patch:
        patch.setattr("experiments.runner._train", exhausted)
        assert evaluate_cnn.main(command) == 2
    error = capsys.readouterr().err
    assert f"the memory is not enough ({REASON.splitlines()[0]}); go on with" in error
    assert error.count("\n") == 1
    flags = error.split("go on with ")[1].split()
    assert flags == ["--seeds-at-once", "1"]
    assert evaluate_cnn.main([*command, *flags]) == 0
    assert len(epochs_of("run")) == 2


def test_newest_cells_are_taken(cells):
    config = Config(data.Split)  # never read

    def resolved():
        return evaluate_cnn.resolve_genotype(config, Path("run")).genotype

    assert resolved() == "DARTS_V2"
    for age, name in ((20, "search_cnn-a"), (10, "search_cnn-b"), (0, "evaluate_cnn-c")):
        folder = Path("runs", name)
        folder.mkdir(parents=True)
        genotype.save(CHEAP, folder / "genotype.json")
        os.utime(folder / "genotype.json", (1e9 - age, 1e9 - age))
    assert resolved() == "runs/search_cnn-b/genotype.json"
    Path("run").mkdir()
    Path("run/config.json").write_text('{"genotype": "NASNet"}')
    assert resolved() == "NASNet"  # a run goes on with its own


def numbered_job(monkeypatch, train=None, seeds=1, size=20):
    """A job whose step only notes its batch and drop path."""
    images = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None, None], (size, 8, 8, 1))
    split = data.Split(np.ascontiguousarray(images), np.arange(size, dtype=np.int32) % 10)
    dataset = data.Dataset("numbered", split, split, 10, (0.0,), (1.0,))

    def make_step(*_, **__):
        def step(state, batch, drop_path):
            numbers = jnp.round(batch.image[:, 0, 0, 0] * 255)
            probability = jnp.float32(-1 if drop_path is None else drop_path)
            metrics = training.Metrics(probability, probability, probability, jnp.int32(-1))
            return state._replace(step=state.step + 1, params=numbers), metrics

        return step

    def init(key, *_):
        zero = jnp.zeros((), jnp.int32)
        return training.TrainState(zero, key, jnp.zeros(4), zero, zero)

    monkeypatch.setattr(training, "make_step", make_step)
    monkeypatch.setattr(training, "init", init)
    config = Config(
        DataConfig("digits", crop=0, flip=False),
        network=NetworkConfig(2, 3, auxiliary=False),
        train=train or TrainConfig(epochs=4, batch_size=4, drop_path=0.0),
        seeds=seeds,
        cells=CHEAP,
    )
    return evaluate_cnn.make_job(config, dataset)


def test_batches_hold_each_image_once_an_epoch_in_an_order_of_each_seed(monkeypatch):
    job = numbered_job(monkeypatch, seeds=2)
    states, seen = job.init(), []
    for batch in job.train_batches(0):
        states, _ = job.train_step(states, job.data, batch)
        seen.append(np.asarray(states.params))
    orders = np.concatenate(seen, axis=1)
    assert orders.shape == (2, 20)
    for order in orders:
        assert sorted(order) == list(range(20))
    assert (orders[0] != orders[1]).any()


def test_drop_path_rises_with_the_epochs(monkeypatch, oracle):
    recorded = oracle("misc.npz")["drop_path_prob/eval_cifar"]
    train = TrainConfig(epochs=600, batch_size=10, drop_path=0.2)
    job = numbered_job(monkeypatch, train)
    states, batch = job.init(), job.train_batches(0)[0]
    for epoch in (0, 1, 300, 599):
        for step in (0, 1):  # of two in an epoch
            at = states._replace(step=jnp.array([2 * epoch + step], jnp.int32))
            copy = jax.device_put(at, may_alias=False)
            _, metrics = job.train_step(copy, job.data, batch)
            np.testing.assert_allclose(metrics.train_loss, recorded[epoch], rtol=1e-6)


def test_without_drop_path_there_is_none(monkeypatch):
    job = numbered_job(monkeypatch)
    _, metrics = job.train_step(job.init(), job.data, job.train_batches(0)[0])
    assert metrics.train_loss == -1


def test_gradients_are_accumulated(monkeypatch):
    """The weights move at every second step, by the mean gradient of two."""
    split = data.Split(np.zeros((16, 8, 8, 1), np.uint8), np.arange(16, dtype=np.int32) % 10)
    dataset = data.Dataset("numbered", split, split, 10, (0.0,), (1.0,))
    config = Config(
        DataConfig("digits", crop=0, flip=False),
        network=NetworkConfig(2, 3, auxiliary=False),
        train=TrainConfig(epochs=1, batch_size=4, drop_path=0.0, accumulate=2),
        cells=CHEAP,
    )
    job = evaluate_cnn.make_job(config, dataset)
    state, moved = job.init(), []
    for batch in job.train_batches(0):
        before = [np.array(leaf) for leaf in jax.tree.leaves(state.params)]
        state, _ = job.train_step(state, job.data, batch)
        after = jax.tree.leaves(state.params)
        moved.append(any((a != b).any() for a, b in zip(after, before, strict=True)))
    assert moved == [False, True, False, True]
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulate=3))
    with pytest.raises(ValueError, match="accumulate is 3, of which the 4 batches .* divisors"):
        evaluate_cnn.make_job(config, dataset)


def test_part_of_the_training_images_can_be_held_out(monkeypatch):
    train = TrainConfig(epochs=1, batch_size=4, portion=0.8, drop_path=0.0)
    job = numbered_job(monkeypatch, train)
    assert job.steps_per_epoch == 4
    held_out = np.asarray(job.data.test.images)[:, 0, 0, 0]
    np.testing.assert_array_equal(held_out, np.arange(16, 20))
    np.testing.assert_array_equal(np.asarray(job.data.train.images)[:, 0, 0, 0], np.arange(16))


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["didgits"], "unknown preset 'didgits'; use one of: digits"),
        (["smoke", "--genotype", "DARTS_V3"], "no genotype file or published cell 'DARTS_V3'"),
        (["smoke", "--network.layers", "2"], "at least 3 layers"),
        (["smoke", "--network.auxiliary"], "the auxiliary head cannot pool 2x2 features"),
        (["smoke", "--network.channels", "1"], "--network.channels is 1; give at least 2"),
        (["smoke", "--train.batch-size", "65"], "64 images fill no batch of 65"),
        (["smoke", "--train.batch-size", "0"], "--train.batch-size is 0; give at least 1"),
        (["smoke", "--train.portion", "0"], "--train.portion is 0.0; give more than 0"),
        (["smoke", "--train.portion", "1.5"], "--train.portion is 1.5; give 1 at most"),
        (["smoke", "--train.drop-path", "1"], "--train.drop-path is 1.0; give less than 1"),
        (["smoke", "--train.w.decay", "0"], "--train.w.decay is 0.0; give more than 0"),
        (["smoke", "--seeds", "0"], "--seeds is 0; give at least 1"),
        (["smoke", "--seeds-at-once", "0"], "--seeds-at-once is 0; give at least 1"),
        (["smoke", "--seed", "4294967295", "--seeds", "2"], "give less than 2**32"),
    ],
)
def test_bad_input_is_one_line(cells, capsys, arguments, text):
    if "--genotype" not in arguments:
        arguments = [*arguments, "--genotype", cells]
    assert evaluate_cnn.main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not Path("runs").exists()


def test_genotype_file_that_does_not_fit(cells, capsys):
    Path("bad.json").write_text(Path(cells).read_text().replace("skip_connect", "skip_conect"))
    assert evaluate_cnn.main(["smoke", "--genotype", "bad.json"]) == 2
    error = capsys.readouterr().err
    assert "bad.json: field 'normal', edge 0: unknown operation 'skip_conect'" in error
    assert "skip_connect" in error.split("use one of")[1]


def test_workdir_of_other_cells(cells, capsys):
    arguments = ["smoke", "--workdir", "run"]
    assert evaluate_cnn.main([*arguments, "--genotype", cells]) == 0
    genotype.save(genotype.PUBLISHED["NASNet"], "cells.json")  # the same name, other cells
    assert evaluate_cnn.main([*arguments, "--genotype", cells]) == 2
    error = capsys.readouterr().err
    assert "run holds a run with another config: cells" in error


@pytest.mark.slow
def test_digits_are_learned(cells, optimized):
    """Measured over 5 seeds: 0.78 % with a deviation of 0.41 %, of 360 test images."""
    assert evaluate_cnn.main(["digits", "--genotype", "DARTS_V2"]) == 0
    last = epochs_of("runs/evaluate_cnn-digits-seed0")[-1]
    assert last["eval_accuracy"] > 0.97
