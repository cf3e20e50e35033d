"""Several devices in one process: what is spread, and that the numbers stay the same."""

import json
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spread_runs
from jax.sharding import NamedSharding, PartitionSpec
from meshes import use

from experiments import devices, evaluate_cnn, evaluate_rnn, search_cnn, search_rnn

ROWS = np.arange(12.0).reshape(4, 3)
COLUMNS = PartitionSpec(None, devices.DATA)
BOTH = PartitionSpec(devices.SEED, devices.DATA)


@pytest.fixture
def mesh(two_devices):
    return devices.mesh()


def test_spread(mesh):
    found = devices.spread(mesh, {"rows": ROWS, "columns": ROWS.T}, devices.BATCH)
    np.testing.assert_array_equal(found["rows"], ROWS)
    first, second = (shard.data for shard in found["rows"].addressable_shards)
    np.testing.assert_array_equal(first, ROWS[:2])
    np.testing.assert_array_equal(second, ROWS[2:])
    assert found["columns"].is_fully_replicated  # three rows
    for spec in (COLUMNS, BOTH):  # of the first axis there is one device
        across = devices.spread(mesh, ROWS.T, spec)
        np.testing.assert_array_equal(across.addressable_shards[1].data, ROWS.T[:, 2:])
        assert across.sharding == NamedSharding(mesh, COLUMNS)


def test_whole(mesh):
    key = jax.random.key(3)
    tree = {"array": jnp.asarray(ROWS), "number": np.int32(2), "key": key}
    found = devices.spread(mesh, tree)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(found))
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(found))
    assert found["number"].dtype == jnp.int32
    np.testing.assert_array_equal(found["array"], ROWS)
    np.testing.assert_array_equal(jax.random.key_data(found["key"]), jax.random.key_data(key))
    assert devices.gather(found)["array"] is found["array"]
    single = devices.collect(found)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(single))
    np.testing.assert_array_equal(single["array"], ROWS)
    np.testing.assert_array_equal(jax.random.key_data(single["key"]), jax.random.key_data(key))


def test_one_device_changes_nothing():
    mesh = devices.mesh(4)
    assert mesh.size == 1
    tree = {"array": jnp.asarray(ROWS), "host": ROWS, "key": jax.random.key(0)}
    for spec in (devices.WHOLE, devices.BATCH, BOTH):
        assert devices.spread(mesh, tree["host"], spec) is ROWS
        for name, leaf in devices.spread(mesh, tree, spec).items():
            assert leaf is tree[name]
    assert devices.collect(tree["array"]) is tree["array"]
    assert devices.constrain(mesh, tree["array"], devices.BATCH) is tree["array"]
    assert devices.spread_share(mesh, ROWS, devices.BATCH) is ROWS
    assert devices.within(mesh, len) is len
    assert len(devices.keep(mesh, ROWS).sharding.device_set) == 1


def test_constrain(mesh):
    found = jax.jit(lambda x: devices.constrain(mesh, 2 * x, devices.BATCH))(
        devices.spread(mesh, ROWS)
    )
    np.testing.assert_array_equal(found.addressable_shards[1].data, 2 * ROWS[2:])
    found = jax.jit(lambda x: devices.constrain(mesh, x, COLUMNS))(ROWS)  # three columns
    np.testing.assert_array_equal(found, ROWS)


def test_share_of_one_process_is_all(mesh):
    assert devices.share(mesh, 8) == slice(0, 8)
    spread = devices.spread(mesh, ROWS, devices.BATCH)
    np.testing.assert_array_equal(devices.spread_share(mesh, ROWS, devices.BATCH), spread)


@pytest.mark.parametrize(
    ("count", "seeds", "at_once", "shape"),
    [
        (4, 1, None, (1, 4)),
        (4, 4, None, (4, 1)),
        (4, 8, None, (4, 1)),
        (4, 2, None, (2, 2)),
        (4, 6, None, (2, 2)),
        (4, 3, None, (1, 4)),
        (4, 4, 2, (2, 2)),
        (4, 4, 1, (1, 4)),
        (4, 5, 2, (1, 4)),
        (1, 4, None, (1, 1)),
    ],
)
def test_groups_of_devices(count, seeds, at_once, shape):
    """As many as have the same number of seeds in each step."""
    with use(count):
        mesh = devices.mesh(seeds, at_once)
    assert mesh.axis_names == (devices.SEED, devices.DATA)
    assert mesh.devices.shape == shape
    assert list(mesh.devices.flat) == jax.devices()[:count]


def test_draws_do_not_depend_on_the_devices(mesh):
    """Each image of a batch is augmented as on one device."""
    draw = jax.jit(lambda key, like: jax.random.uniform(key, like.shape) + 0 * like)
    spread = draw(jax.random.key(0), devices.spread(mesh, ROWS, devices.BATCH))
    assert not spread.is_fully_replicated
    np.testing.assert_array_equal(spread, draw(jax.random.key(0), ROWS))


@pytest.mark.parametrize("name", spread_runs.RUNS)
def test_two_devices_do_what_one_does(name):
    spread_runs.compare(name, 2, spread_runs.run(name, 1), spread_runs.run(name, 2))


alone = cache(partial(spread_runs.run, count=1))


@pytest.mark.parametrize("name", ["search_cnn first_order", "search_rnn unrolled", "evaluate_cnn"])
@pytest.mark.parametrize("seeds", [4, 2])
def test_seeds_on_devices_of_their_own(name, seeds):
    """One seed on each of four devices; or each of two on two devices, and they share its batch."""
    many = spread_runs.run(name, 4, seeds)
    spread_runs.compare(name, 4, alone(name, seeds=seeds), many, groups=seeds)


@pytest.mark.parametrize("name", ["search_cnn first_order", "evaluate_cnn"])
@pytest.mark.parametrize("at_once", [2, 4])
def test_seeds_of_a_device_in_turn_and_at_once(name, at_once):
    """Two devices have two seeds each."""
    many = spread_runs.run(name, 2, 4, at_once)
    spread_runs.compare(name, 2, alone(name, seeds=4), many, groups=2)


@pytest.mark.slow
def test_4_and_8_devices_do_what_one_does():
    script = Path(__file__).parent / "spread_runs.py"
    command = [sys.executable, str(script), "1", "4", "8"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=script.parents[1], env=env())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(spread_runs.RUNS) + 1


def env() -> dict[str, str]:
    """For a process with the modules of this one, and its compilation cache."""
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }


@pytest.mark.parametrize(
    ("module", "flag"),
    [
        (search_cnn, "search.batch-size"),
        (search_rnn, "search.batch-size"),
        (evaluate_cnn, "train.batch-size"),
        (evaluate_rnn, "train.batch-size"),
    ],
)
def test_a_batch_that_cannot_be_spread_is_refused(
    module, flag, two_devices, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert module.main(["smoke", f"--{flag}", "7"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: a batch of 7 cannot be spread evenly over 2 devices; give a"
        f" --{flag} that is a multiple of 2"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("module", [search_cnn, evaluate_cnn])
@pytest.mark.parametrize("groups", [0, 3])
def test_slices_of_batch_norm_are_equal(module, groups, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert module.main(["smoke", "--network.batch-norm-groups", str(groups)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --network.batch-norm-groups is {groups}; give ")


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_goes_on_with_other_devices(seeds, tmp_path, monkeypatch):
    """From two to one and back to two: the curve of one device all along."""
    monkeypatch.setattr(search_cnn, "supernet", spread_runs.tiny)
    monkeypatch.setattr(search_cnn, "draw", lambda *_: [])
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)

    def run(folder: str, epochs: int, count: int) -> list[dict]:
        with use(count):
            arguments = ["smoke", "--seeds", str(seeds), "--workdir", str(tmp_path / folder)]
            assert search_cnn.main([*arguments, "--search.epochs", str(epochs)]) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == "epoch"]

    run("other", 1, 2)
    run("other", 2, 1)
    other = run("other", 3, 2)
    # The learning rate follows the number of epochs, so the single run stops where the other does.
    for epochs in (1, 2, 3):
        single = run("single", epochs, 1)
    names = ["alpha"] if seeds == 1 else [f"alpha_of_seed_{seed}" for seed in range(seeds)]
    for a, b in zip(single, other, strict=True):
        np.testing.assert_allclose(a["eval_loss"], b["eval_loss"], rtol=1e-5)
        for name in names:
            for cell in ("normal", "reduce"):
                np.testing.assert_allclose(a[name][cell], b[name][cell], atol=1e-5)
