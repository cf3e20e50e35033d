"""Saving and restoring a state, by Orbax, behind one small door.

A state is any pytree of arrays, typed PRNG keys and numbers. It comes back bit for bit, or not at
all: a digest of its bytes is saved beside it. Of several processes that are one run, the first one
saves; in the others, saving does nothing.
"""

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from darts_jax import __version__

if TYPE_CHECKING:
    from orbax.checkpoint import CheckpointManager
    from orbax.checkpoint.options import MultiprocessingOptions

PyTree = Any

KEEP = 2  # checkpoints: the newest, and the one to fall back to
MAX_REASON = 200  # characters of another library's error
ITEM = "default"  # where Orbax puts the one thing that a checkpoint holds
DIGEST, VERSION = "digest", "version"  # beside the leaves, whose names begin with a bracket or dot
DAMAGED = ".damaged"  # ends the name of a checkpoint that was set aside


class SaveError(OSError):
    """A checkpoint cannot be written; those before it are kept."""


class Restored(NamedTuple):
    """A state that was restored.

    Attributes:
      step: of the checkpoint.
      state: what was saved.
      damaged: newer checkpoints that could not be read, where they were moved to.
    """

    step: int
    state: PyTree
    damaged: tuple[Path, ...]


class Saver(NamedTuple):
    """An open folder of checkpoints.

    Attributes:
      manager: writes them, in a thread; None where another process does.
      best: the metric of which the smallest is kept.
    """

    manager: "CheckpointManager | None"
    best: str | None


@contextmanager
def open_saver(directory: str | Path, keep: int = KEEP, best: str | None = None) -> Iterator[Saver]:
    """Opens a folder to save in, and makes it if need be; at the end, waits for what is written.

    Args:
      directory: the folder.
      keep: how many checkpoints to keep, the newest ones.
      best: a metric; the checkpoint with its smallest value is kept, too.

    Raises:
      SaveError: if the folder cannot be made, or what is still being written fails.
    """
    if jax.process_index():
        yield Saver(None, best)
        return
    import orbax.checkpoint as ocp

    policies = ocp.checkpoint_managers
    kept = [policies.LatestN(keep)]
    if best is not None:
        kept.append(
            policies.BestN(
                get_metric_fn=lambda metrics: metrics[best],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        best_fn=None if best is None else lambda metrics: metrics[best],
        best_mode="min",
        cleanup_tmp_directories=True,
        multiprocessing_options=_alone(),
        create=False,
    )
    with _writing(directory):
        Path(directory).mkdir(parents=True, exist_ok=True)
        manager = ocp.CheckpointManager(Path(directory).resolve(), options=options)
    saver = Saver(manager, best)
    try:
        yield saver
    except BaseException:
        with suppress(Exception):  # the error that is on its way counts
            manager.close()
        raise
    finish(saver)
    manager.close()


def finish(saver: Saver) -> None:
    """Waits until what was saved is on the disk.

    Raises:
      SaveError: if it cannot be written.
    """
    if saver.manager is None:
        return
    with _writing(saver.manager.directory):
        saver.manager.wait_until_finished()


def save(
    saver: Saver, step: int, state: PyTree, metrics: Mapping[str, float] | None = None
) -> None:
    """Starts to save a state as the checkpoint of a step, whole or not at all.

    Returns when the state has been copied, and may be donated; waits for the save before.

    Args:
      saver: of the folder.
      step: larger than those saved before.
      state: to save.
      metrics: of the state; without the saver's `best` among them it is never the best.

    Raises:
      SaveError: if the save before this one failed, or this one cannot begin.
    """
    if saver.manager is None:
        return
    import orbax.checkpoint as ocp

    arrays = _to_arrays(state)
    value = (metrics or {}).get(saver.best)
    with _writing(saver.manager.directory):
        saver.manager.wait_until_finished()
        saver.manager.save(
            step,
            args=ocp.args.StandardSave(_signed(arrays)),
            metrics=None if value is None else {saver.best: value},
            force=True,
        )


def next_step(saver: Saver) -> int:
    """A step larger than those saved before."""
    latest = saver.manager.latest_step()
    return 0 if latest is None else latest + 1


def _alone() -> "MultiprocessingOptions":
    """Options by which Orbax does not wait for other processes."""
    import orbax.checkpoint as ocp

    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(own, {own}, barrier_sync_key_prefix=f"process{own}")


@contextmanager
def _writing(directory: str | Path) -> Iterator[None]:
    """Inside, whatever goes wrong is a SaveError: what is raised depends on which file fails."""
    try:
        yield
    except Exception as error:
        first = " ".join(str(error).split())
        raise SaveError(f"cannot save a checkpoint in {directory}: {first[:MAX_REASON]}") from error


def restore_latest(directory: str | Path, like: PyTree) -> Restored | None:
    """Restores the newest checkpoint that is whole, and sets newer ones aside that are not.

    Args:
      directory: where the checkpoints are.
      like: a state of the same structure, whose values do not matter.

    Returns:
      What was restored, or None if there is no checkpoint.

    Raises:
      ValueError: if there are checkpoints, but none is whole: it is not for a program to decide
        that what was computed is worth nothing. Or if the newest that is whole has another
        structure. Nothing is moved then.
    """
    damaged: list[tuple[Path, str]] = []
    for checkpoint in _checkpoints(Path(directory).resolve()):
        with warnings.catch_warnings():
            # Where it fails, Orbax leaves coroutines that were never awaited.
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                arrays, version = _read(checkpoint)
            # What a damaged file raises depends on where it is damaged, so anything may come.
            except Exception as error:
                reason = (str(error) or repr(error)).splitlines()[0][:MAX_REASON]
                damaged.append((checkpoint, reason))
                continue
        state = _from_arrays(checkpoint, arrays, version, like)
        aside = tuple(_set_aside(path) for path, _ in damaged)
        return Restored(int(checkpoint.name), state, aside)
    if damaged:
        newest, reason = damaged[0]
        raise ValueError(
            f"no checkpoint in {newest.parent} can be restored ({newest.name}: {reason}); move the"
            " folder away to start anew"
        )
    return None


def _read(checkpoint: Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a checkpoint and the version that wrote it, checked by their digest."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
        arrays = checkpointer.restore(checkpoint / ITEM)
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    signature, version = (arrays.pop(name) for name in (DIGEST, VERSION))
    if _digest(arrays) != signature.tobytes():
        raise ValueError("its bytes are not those that were saved")
    return arrays, version.tobytes().decode()


def _from_arrays(
    checkpoint: Path, arrays: Mapping[str, np.ndarray], version: str, like: PyTree
) -> PyTree:
    """The state of flat arrays; a ValueError if it is of another structure than `like`."""

    def describe(name: str, arrays: Mapping[str, np.ndarray]) -> str:
        if name not in arrays:
            return "missing"
        return f"{arrays[name].dtype}{list(arrays[name].shape)}"

    expected = _to_arrays(like)
    for name in sorted(expected.keys() | arrays.keys()):
        there, here = describe(name, arrays), describe(name, expected)
        if there != here:
            by = "" if version == __version__ else f" by darts_jax {version}, this is {__version__}"
            raise ValueError(
                f"{checkpoint} holds another state{by}: {name} is {there} there, {here} here; go"
                " on with what wrote it, or start anew in another folder"
            )

    def leaf(path: tuple, like: Any) -> Any:
        array = arrays[jax.tree_util.keystr(path)]
        if not isinstance(like, jax.Array):
            return type(like)(array) if np.isscalar(like) else array
        if jax.dtypes.issubdtype(like.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
        return jax.numpy.asarray(array)

    return jax.tree_util.tree_map_with_path(leaf, like)


def _to_arrays(state: PyTree) -> dict[str, np.ndarray]:
    """The leaves by their path in the state, copied; keys as their bits.

    Flat, because Orbax changes what a tree is made of (tuples, empty nodes) and `like` knows it.
    """

    def array(leaf: Any) -> np.ndarray:
        if jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.array(leaf)

    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): array(leaf) for path, leaf in leaves}


def _signed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays with their digest and the version of this library, as bytes."""
    texts = {DIGEST: _digest(arrays), VERSION: __version__.encode()}
    return {**arrays, **{name: np.frombuffer(text, np.uint8) for name, text in texts.items()}}


def _digest(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Of names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return digest.digest()


def _set_aside(checkpoint: Path) -> Path:
    """Renames a damaged checkpoint, so that it is kept and not seen; returns its new place."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)  # of the same step, from an earlier time
    return checkpoint.rename(aside)


def _checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints, newest first.

    Orbax writes beside it and renames: what has a plain number for a name is complete.
    """
    if not directory.is_dir():
        return []
    numbered = [path for path in directory.iterdir() if path.name.isdecimal()]
    return sorted(numbered, key=lambda path: int(path.name), reverse=True)
