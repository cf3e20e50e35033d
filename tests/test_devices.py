"""Several devices in one process: what is spread, and that the numbers stay the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import spread_runs
from meshes import use

from experiments import devices, evaluate_cnn, evaluate_rnn, search_cnn, search_rnn

ROWS = np.arange(12.0).reshape(4, 3)


def test_spread(two_devices):
    found = devices.spread({"rows": ROWS, "columns": ROWS.T}, 0)
    np.testing.assert_array_equal(found["rows"], ROWS)
    first, second = (shard.data for shard in found["rows"].addressable_shards)
    np.testing.assert_array_equal(first, ROWS[:2])
    np.testing.assert_array_equal(second, ROWS[2:])
    assert found["columns"].is_fully_replicated  # three rows
    across = devices.spread(ROWS.T, 1)
    np.testing.assert_array_equal(across.addressable_shards[1].data, ROWS.T[:, 2:])


def test_replicate(two_devices):
    key = jax.random.key(3)
    found = devices.replicate({"array": jnp.asarray(ROWS), "number": np.int32(2), "key": key})
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
    assert devices.mesh().size == 1
    tree = {"array": jnp.asarray(ROWS), "host": ROWS, "key": jax.random.key(0)}
    for placed in (devices.spread(tree["host"], 0), devices.replicate(tree["host"])):
        assert placed is ROWS
    for name, leaf in devices.replicate(tree).items():
        assert leaf is tree[name]
    assert devices.constrain(tree["array"], 0) is tree["array"]
    assert devices.spread_share(ROWS, 0) is ROWS
    assert len(devices.keep(ROWS).sharding.device_set) == 1


def test_constrain(two_devices):
    found = jax.jit(lambda x: devices.constrain(2 * x, 0))(devices.replicate(ROWS))
    np.testing.assert_array_equal(found.addressable_shards[1].data, 2 * ROWS[2:])
    np.testing.assert_array_equal(jax.jit(lambda x: devices.constrain(x, 1))(ROWS), ROWS)


def test_share_of_one_process_is_all(two_devices):
    assert devices.share(8) == slice(0, 8)
    np.testing.assert_array_equal(devices.spread_share(ROWS, 0), devices.spread(ROWS, 0))


def test_draws_do_not_depend_on_the_devices(two_devices):
    """Each image of a batch is augmented as on one device."""
    draw = jax.jit(lambda key, like: jax.random.uniform(key, like.shape) + 0 * like)
    spread = draw(jax.random.key(0), devices.spread(ROWS, 0))
    assert not spread.is_fully_replicated
    np.testing.assert_array_equal(spread, draw(jax.random.key(0), ROWS))


@pytest.mark.parametrize("name", spread_runs.RUNS)
def test_two_devices_do_what_one_does(name):
    spread_runs.compare(name, 2, spread_runs.run(name, 1), spread_runs.run(name, 2))


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


def test_a_run_goes_on_with_other_devices(tmp_path, monkeypatch):
    """From two to one and back to two: the curve of one device all along."""
    monkeypatch.setattr(search_cnn, "supernet", spread_runs.tiny)
    monkeypatch.setattr("experiments.command_line.enable_compilation_cache", lambda: None)

    def run(folder: str, epochs: int, count: int) -> list[dict]:
        with use(count):
            arguments = ["smoke", "--workdir", str(tmp_path / folder), "--search.epochs"]
            assert search_cnn.main([*arguments, str(epochs)]) == 0
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        return [line for line in map(json.loads, lines) if line["kind"] == "epoch"]

    run("other", 1, 2)
    run("other", 2, 1)
    other = run("other", 3, 2)
    # The learning rate follows the number of epochs, so the single run stops where the other does.
    for epochs in (1, 2, 3):
        single = run("single", epochs, 1)
    for a, b in zip(single, other, strict=True):
        np.testing.assert_allclose(a["eval_loss"], b["eval_loss"], rtol=1e-5)
        for cell in ("normal", "reduce"):
            np.testing.assert_allclose(a["alpha"][cell], b["alpha"][cell], atol=1e-5)
