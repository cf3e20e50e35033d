"""Training on a stream of images, from files to the summary."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_cells import CHEAP
from meshes import use
from small_imagenet import expect, prepare

from darts_jax import checkpoint, genotype, prediction, stream
from experiments import devices, evaluate_cnn
from experiments.evaluation_config import PRESETS, NetworkConfig, StreamConfig, TrainConfig


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Runs in an empty folder, with a file of cheap cells there."""
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)
    monkeypatch.chdir(tmp_path)
    genotype.save(CHEAP, "cells.json")


def lines_of(kind):
    lines = map(json.loads, Path("run", "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


IMAGENET = (
    "imagenet --genotype cells.json --network.channels 2 --network.layers 3 --stream.size 32"
    " --network.no-auxiliary --train.batch-size 8 --stream.workers 1 --log-every 1 --workdir run"
)


@pytest.fixture
def imagenet(folder, tmp_path, monkeypatch):
    expect(monkeypatch)
    prepare(tmp_path / "tfds")
    return [*IMAGENET.split(), "--data.path", str(tmp_path / "tfds")]


@pytest.mark.filterwarnings("ignore")  # TensorFlow Datasets' own, and Grain's
def test_imagenet_from_prepared_files(imagenet, two_devices, capsys):
    """Read by a worker process, and spread over two devices."""
    assert devices.mesh().size == 2
    assert evaluate_cnn.main([*imagenet, "--train.epochs", "1"]) == 0
    assert [line["step"] for line in lines_of("step")] == [1, 2, 3]
    epochs = lines_of("epoch")
    assert 0 <= epochs[-1]["eval_accuracy"] <= epochs[-1]["eval_top5_accuracy"] <= 1
    assert "test error, top 5" in capsys.readouterr().out
    facts = json.loads(Path("run", "config.json").read_text())["facts"]
    assert re.fullmatch("26 of [0-9a-f]{16}", facts["train images"])
    assert facts["test images"] == facts["train images"].replace("26", "9")
    state = prediction.load("run")
    logits = state.apply(state.variables, np.zeros((2, 32, 32, 3), np.uint8))
    assert logits.shape == (2, 1000)


def test_a_batch_spread_over_devices_is_that_of_one(folder):
    """Batch norm by all of it, and the same loss, gradient and weights."""
    rng = np.random.default_rng(0)
    samples = [
        {"image": rng.integers(0, 255, (32, 32, 3), np.uint8), "label": i % 3} for i in range(8)
    ]
    dataset = stream.Stream("imagenet2012", samples, samples[:3], 8, 3, 10, 32)
    config = evaluate_cnn.with_cells(
        dataclasses.replace(
            PRESETS["imagenet"][1],
            network=NetworkConfig(2, 3, auxiliary=False, stem="imagenet"),
            train=TrainConfig(epochs=1, batch_size=4, drop_path=0.0),
            stream=StreamConfig(size=32, workers=0),
        ),
        "cells.json",
    )

    def run():
        job = evaluate_cnn.make_job(config, dataset)
        state = job.place(job.init())
        for items in job.train_batches(0):
            with checkpoint.open_saver("checkpoints") as saver:  # as if the run went on from there
                checkpoint.save(saver, checkpoint.next_step(saver), state)
            state = job.place(checkpoint.restore_latest("checkpoints", state).state)
            state, metrics = job.train_step(state, job.data, items)
        sums, count = job.eval_step(state, job.data, job.eval_batches[0])
        assert count == 3
        return state, metrics, sums

    single = run()
    with use(2):
        spread = run()
    placed = jax.tree.leaves(spread[0].params)[0].sharding
    assert len(placed.device_set) == 2
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(single), strict=True):
        if not jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--train.batch-size 7", "a batch of 7 cannot be spread evenly over 2 devices"),
        ("--seeds 2", "imagenet2012 is read as a stream"),
        ("--train.portion 0.5", "leave --seeds and --train.portion at 1"),
        ("--stream.workers -1", "--stream.workers is -1; give at least 0"),
        ("--train.batch-size 64", "26 images fill no batch of 64"),
    ],
)
def test_imagenet_refuses(imagenet, two_devices, capsys, arguments, message):
    capsys.readouterr()
    assert evaluate_cnn.main([*imagenet, *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("error: ")
    assert not Path("run").exists()
