"""Saving and restoring a state, by Orbax, behind one small door.

A state is any pytree of arrays, typed PRNG keys and numbers. It comes back bit for bit.
"""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

PyTree = Any

KEEP = 2  # checkpoints: the newest, and the one to fall back to


def save(directory: str | Path, step: int, state: PyTree) -> Path:
    """Saves the state in `directory/step`, whole or not at all, and keeps the one before it.

    What the directory holds of this step or a later one is replaced: a run that saves an earlier
    step went back before it, because it could not be read.

    Returns:
      The checkpoint.
    """
    import orbax.checkpoint as ocp

    directory = Path(directory).resolve()
    directory.mkdir(parents=True, exist_ok=True)
    checkpoint = directory / str(step)
    # Orbax writes beside it and renames: what has a plain number for a name is complete.
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(checkpoint, _to_arrays(state), force=True)
    earlier = [path for path in _checkpoints(directory) if int(path.name) < step]
    for path in directory.iterdir():
        # A number, or a number with Orbax's suffix for what was cut short; nothing else is ours.
        ours = path.is_dir() and path.name.split(".")[0].isdigit()
        if ours and path not in (checkpoint, *earlier[: KEEP - 1]):
            shutil.rmtree(path)
    return checkpoint


def restore_latest(directory: str | Path, like: PyTree) -> tuple[int, PyTree] | None:
    """Restores the newest checkpoint that can be read.

    Args:
      directory: where the checkpoints are.
      like: a state of the same structure, whose values do not matter.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints, but none can be read or none is of this structure: it
        is not for a program to decide that what was computed is worth nothing.
    """
    directory = Path(directory).resolve()
    checkpoints = _checkpoints(directory)
    reason = ""
    for checkpoint in checkpoints:
        try:
            return int(checkpoint.name), _restore(checkpoint, like)
        # What a damaged file raises depends on where it is damaged, so anything may come.
        except Exception as error:
            reason = reason or f"{checkpoint.name}: {str(error).splitlines()[0]}"
    if checkpoints:
        raise ValueError(
            f"no checkpoint in {directory} can be restored ({reason}); move the folder away to"
            " start anew"
        )
    return None


def _restore(checkpoint: Path, like: PyTree) -> PyTree:
    import orbax.checkpoint as ocp

    expected = _to_arrays(like)
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(checkpoint, expected)
        saved = checkpointer.metadata(checkpoint).item_metadata
    for name, array in expected.items():
        if (saved[name].shape, saved[name].dtype) != (array.shape, array.dtype):
            raise ValueError(
                f"{name} is {saved[name].dtype}{list(saved[name].shape)}, not"
                f" {array.dtype}{list(array.shape)}"
            )

    def leaf(path: tuple, like: Any) -> Any:
        array = np.asarray(arrays[jax.tree_util.keystr(path)])
        if not isinstance(like, jax.Array):
            return type(like)(array) if np.isscalar(like) else array
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
        return jax.numpy.asarray(array)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _to_arrays(state: PyTree) -> dict[str, np.ndarray]:
    """The leaves by their path in the state; keys as their bits.

    Flat, because Orbax changes what a tree is made of (tuples, empty nodes) and `like` knows it.
    """

    def array(leaf: Any) -> np.ndarray:
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf)

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): array(leaf) for path, leaf in leaves}


def _checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, newest first."""
    if not directory.is_dir():
        return []
    numbered = [path for path in directory.iterdir() if path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)
