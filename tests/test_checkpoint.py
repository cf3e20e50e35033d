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


def numbers(directory):
    return sorted(path.name for path in Path(directory).iterdir())


def test_state_comes_back_bit_for_bit(tmp_path):
    state = make_state(7)
    checkpoint.save(tmp_path, 7, state)
    step, restored = checkpoint.restore_latest(tmp_path, like=make_state(1))
    assert step == 7
    assert bits(restored) == bits(state)
    draws = [jax.random.normal(s.key["rbg"][1], (3,)) for s in (restored, state)]
    np.testing.assert_array_equal(*draws)


def test_double_precision_comes_back_bit_for_bit(tmp_path, x64):
    state = {"x": jnp.linspace(0, 1, 7, dtype=jnp.float64)}
    checkpoint.save(tmp_path, 1, state)
    assert bits(checkpoint.restore_latest(tmp_path, state)[1]) == bits(state)


def test_nothing_to_restore(tmp_path):
    assert checkpoint.restore_latest(tmp_path, make_state(1)) is None
    assert checkpoint.restore_latest(tmp_path / "missing", make_state(1)) is None


def test_the_last_two_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        checkpoint.save(tmp_path, step, make_state(step))
    assert numbers(tmp_path) == ["10", "11"]
    assert checkpoint.restore_latest(tmp_path, make_state(1))[0] == 11


def damage_nothing_left(directory):
    for file in directory.rglob("*"):
        if file.is_file():
            file.unlink()


def damage_cut_short(directory):
    for file in directory.rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def damage_no_metadata(directory):
    (directory / "_METADATA").unlink()


@pytest.mark.parametrize("damage", [damage_nothing_left, damage_cut_short, damage_no_metadata])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, make_state(step))
    damage(tmp_path / "2")
    step, restored = checkpoint.restore_latest(tmp_path, make_state(0))
    assert step == 1
    assert bits(restored) == bits(make_state(1))
    # The run that goes on from there replaces it.
    checkpoint.save(tmp_path, 2, make_state(2))
    assert numbers(tmp_path) == ["1", "2"]
    assert bits(checkpoint.restore_latest(tmp_path, make_state(0))[1]) == bits(make_state(2))


def test_going_back_drops_what_came_later(tmp_path):
    for step in (1, 5):
        checkpoint.save(tmp_path, step, make_state(step))
    damage_nothing_left(tmp_path / "5")
    checkpoint.save(tmp_path, 2, make_state(2))
    assert numbers(tmp_path) == ["1", "2"]


def test_if_none_can_be_read_it_says_so_and_touches_nothing(tmp_path):
    checkpoint.save(tmp_path, 3, make_state(3))
    damage_nothing_left(tmp_path / "3")
    match = r"^no checkpoint in .* can be restored \(3: .*\); move the folder away to start anew$"
    with pytest.raises(ValueError, match=match):
        checkpoint.restore_latest(tmp_path, make_state(3))
    assert numbers(tmp_path) == ["3"]


def test_a_state_of_another_shape_or_dtype_is_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"w": jnp.zeros((2, 3))})
    with pytest.raises(ValueError, match=r"\['w'\] is float32\[2, 3\], not float32\[3, 2\]"):
        checkpoint.restore_latest(tmp_path, {"w": jnp.zeros((3, 2))})
    with pytest.raises(ValueError, match=r"is float32\[2, 3\], not int32\[2, 3\]"):
        checkpoint.restore_latest(tmp_path, {"w": jnp.zeros((2, 3), jnp.int32)})
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint.restore_latest(tmp_path, {"v": jnp.zeros((2, 3))})


def test_a_save_that_was_cut_short_is_not_seen(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    checkpoint.save(tmp_path, 1, make_state(1))
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    assert checkpoint.restore_latest(tmp_path, make_state(0))[0] == 1

    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ocp.StandardCheckpointer, "save", fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(tmp_path, 2, make_state(2))
    assert checkpoint.restore_latest(tmp_path, make_state(0))[0] == 1
    checkpoint.save(tmp_path, 3, make_state(3))
    assert numbers(tmp_path) == ["1", "3"]


def test_orbax_is_imported_only_when_needed():
    import subprocess
    import sys

    code = "import sys, darts_jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
