import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from darts_jax import checkpoint


class State(NamedTuple):
    step: jax.Array
    key: jax.Array
    w: Any
    opt_state: optax.OptState
    size: int
    seconds: float


def make_state(seed):
    key = jax.random.key(seed)
    w = {"cell.0/a": jax.random.normal(key, (3, 4)), "b": [jnp.float32(seed) / 3, jnp.zeros((2,))]}
    w["half"] = jax.random.normal(key, (5,), jnp.bfloat16)
    optimizer = optax.chain(
        optax.clip_by_global_norm(5.0), optax.add_decayed_weights(0.1), optax.adam(lambda _: 0.1)
    )
    opt_state = optimizer.update(w, optimizer.init(w), w)[1]
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 2)
    return State(jnp.int32(seed), {"threefry": key, "rbg": keys}, w, opt_state, 2**40 + 1, 0.1)


def bits(tree):
    def of(leaf):
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            return str(jax.random.key_impl(leaf)), np.asarray(jax.random.key_data(leaf)).tobytes()
        return type(leaf), str(np.asarray(leaf).dtype), np.asarray(leaf).tobytes()

    leaves, structure = jax.tree.flatten(tree)
    return structure, [of(leaf) for leaf in leaves]


def save(directory, *steps, keep=2, best=None, metrics=None):
    with checkpoint.open_saver(directory, keep, best) as saver:
        for step in steps:
            checkpoint.save(saver, step, make_state(step), (metrics or {}).get(step))


def save_tree(directory, tree):
    with checkpoint.open_saver(directory) as saver:
        checkpoint.save(saver, 1, tree)


def numbers(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def test_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(7)
    save(tmp_path, 7)
    step, restored, damaged = checkpoint.restore_latest(tmp_path, like=make_state(1))
    assert (step, damaged) == (7, ())
    assert bits(restored) == bits(state)
    draws = [jax.random.normal(s.key["rbg"][1], (3,)) for s in (restored, state)]
    np.testing.assert_array_equal(*draws)


def test_double_precision_comes_back_bit_for_bit(tmp_path, x64):
    state = {"x": jnp.linspace(0, 1, 7, dtype=jnp.float64)}
    save_tree(tmp_path, state)
    assert bits(checkpoint.restore_latest(tmp_path, state).state) == bits(state)


def test_a_state_may_be_donated_once_it_is_saved(tmp_path):
    state = {"x": jnp.arange(1000.0)}
    expected = np.array(state["x"])
    with checkpoint.open_saver(tmp_path) as saver:
        checkpoint.save(saver, 1, state)
        jax.jit(lambda x: x * 0 + 5, donate_argnums=0)(state["x"]).block_until_ready()
    like = {"x": jnp.zeros(1000)}
    np.testing.assert_array_equal(checkpoint.restore_latest(tmp_path, like).state["x"], expected)


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore_latest(tmp_path, make_state(1)) is None
    assert checkpoint.restore_latest(tmp_path / "missing", make_state(1)) is None


@pytest.mark.parametrize(("keep", "kept"), [(1, ["11"]), (2, ["10", "11"]), (3, ["10", "11", "9"])])
def test_the_last_are_kept(tmp_path, keep, kept):
    save(tmp_path, 8, 9, 10, 11, keep=keep)
    assert numbers(tmp_path) == kept
    assert checkpoint.restore_latest(tmp_path, make_state(1)).step == 11


def test_the_best_is_kept_beside_the_last(tmp_path):
    """By the metric that is named; a state without it is never the best."""
    losses = {1: 3.0, 2: 1.0, 4: 2.0, 5: 1.5}
    metrics = {step: {"loss": loss, "other": -loss} for step, loss in losses.items()}
    save(tmp_path, 1, 2, 3, 4, 5, 6, best="loss", metrics=metrics)
    assert numbers(tmp_path) == ["2", "5", "6"]
    save(tmp_path, 7, best="loss", metrics={7: {"loss": 0.5}})  # known over a restart
    assert numbers(tmp_path) == ["6", "7"]


def test_steps_go_on(tmp_path):
    with checkpoint.open_saver(tmp_path) as saver:
        assert checkpoint.next_step(saver) == 0
        checkpoint.save(saver, 3, make_state(3))
        assert checkpoint.next_step(saver) == 4


def damage_nothing_left(directory):
    for file in directory.rglob("*"):
        if file.is_file():
            file.unlink()


def damage_cut_short(directory):
    for file in directory.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_no_metadata(directory):
    (directory / "default" / "_METADATA").unlink()


def damage_every_file(directory):
    for file in directory.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def damage_flip(directory, at=0.5):
    """One bit of each file of data."""
    for file in directory.rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[int(at * len(content))] ^= 1
        file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        damage_nothing_left,
        damage_cut_short,
        damage_no_metadata,
        damage_every_file,
        *(partial(damage_flip, at=at) for at in (0.1, 0.3, 0.5, 0.7, 0.9)),
    ],
)
def test_a_damaged_checkpoint_is_set_aside(tmp_path, damage):
    save(tmp_path, 1, 2)
    damage(tmp_path / "2")
    step, restored, damaged = checkpoint.restore_latest(tmp_path, make_state(0))
    assert step == 1
    assert bits(restored) == bits(make_state(1))
    assert damaged == (tmp_path / "2.damaged",)
    # The run that goes on from there saves the step again.
    save(tmp_path, 2)
    assert numbers(tmp_path) == ["1", "2", "2.damaged"]
    assert bits(checkpoint.restore_latest(tmp_path, make_state(0)).state) == bits(make_state(2))


def test_no_bit_can_be_flipped_unseen(tmp_path):
    """Anywhere in the files of a checkpoint: it is set aside, or what is read is what was saved."""
    whole = tmp_path / "whole"
    save(whole, 1, 2)
    rng = np.random.default_rng(0)
    files = [path for path in (whole / "2").rglob("*") if path.is_file() and path.stat().st_size]
    aside = 0
    for i, file in enumerate(files * 3):
        shutil.copytree(whole, tmp_path / str(i))
        copy = tmp_path / str(i) / file.relative_to(whole)
        content = bytearray(copy.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        copy.write_bytes(content)
        step, restored, damaged = checkpoint.restore_latest(tmp_path / str(i), make_state(0))
        assert bits(restored) == bits(make_state(step))
        assert step == 2 - len(damaged)
        aside += len(damaged)
    assert aside > 3


def test_if_none_can_be_read_it_says_so_and_touches_nothing(tmp_path):
    save(tmp_path, 3)
    damage_nothing_left(tmp_path / "3")
    match = r"^no checkpoint in .* can be restored \(3: .*\); move the folder away to start anew$"
    with pytest.raises(ValueError, match=match):
        checkpoint.restore_latest(tmp_path, make_state(3))
    assert numbers(tmp_path) == ["3"]


def test_a_state_of_another_structure_is_refused(tmp_path):
    save_tree(tmp_path, {"w": jnp.zeros((2, 3))})
    for like, message in [
        ({"w": jnp.zeros((3, 2))}, r"\['w'\] is float32\[2, 3\] there, float32\[3, 2\] here"),
        ({"w": jnp.zeros((2, 3), jnp.int32)}, r".*is float32\[2, 3\] there, int32\[2, 3\] here"),
        ({"v": jnp.zeros((2, 3))}, r"\['v'\] is missing there, float32\[2, 3\] here"),
        ({}, r"\['w'\] is float32\[2, 3\] there, missing here"),
    ]:
        with pytest.raises(ValueError, match=rf"{tmp_path}/1 holds another state: {message}"):
            checkpoint.restore_latest(tmp_path, like)
    assert numbers(tmp_path) == ["1"]


def test_a_state_of_an_older_version_names_it(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "__version__", "0.0.9")
        save_tree(tmp_path, {"w": jnp.zeros(2)})
    assert checkpoint.restore_latest(tmp_path, {"w": jnp.ones(2)}).step == 1  # if it can, it loads
    with pytest.raises(ValueError, match=r"by darts_jax 0\.0\.9, this is "):
        checkpoint.restore_latest(tmp_path, {"w": jnp.zeros(3)})


def test_a_save_that_was_cut_short_is_not_seen(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.restore_latest(tmp_path, make_state(0)).step == 1
    save(tmp_path, 3)
    assert numbers(tmp_path) == ["1", "3"]


def test_a_full_disk_loses_nothing_saved_before(tmp_path, full_disk):
    large = {"x": jnp.asarray(np.random.default_rng(0).normal(size=10_000))}
    save_tree(tmp_path, large)
    with pytest.raises(checkpoint.SaveError, match=f"cannot save a checkpoint in {tmp_path}: "):
        with checkpoint.open_saver(tmp_path) as saver:
            full_disk(10_000)
            checkpoint.save(saver, 2, large)
    full_disk(None)
    step, restored, damaged = checkpoint.restore_latest(tmp_path, large)
    assert (step, damaged) == (1, ())
    assert bits(restored) == bits(large)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(checkpoint.SaveError, match="cannot save a checkpoint in .*file/x"):
        save(tmp_path / "file" / "x", 1)


def test_orbax_is_imported_only_when_needed():
    code = "import sys, darts_jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
