"""Several processes as one run: who they are, what they must agree on, and how they end.

All run the same command and the same program. The first one (process 0) alone reads and writes the
workdir and shows the progress; what it finds there the others are sent. Where one of them is lost,
all end with exit code `LOST`, and the same commands go on.
"""

import ctypes
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.experimental import multihost_utils

from experiments.errors import UserError

PyTree = Any

LOST = 4  # exit code
HEARTBEAT = 20  # seconds without a sign of life, after which a process is given up
FINISHING = 3600  # seconds that the others wait for the first one, which writes the results
SINGLE = "--distributed.* is for searches and trainings alone; run this experiment in one process"


@dataclass(frozen=True)
class Distributed:
    """Several processes that are one run, on one host or many."""

    auto: Annotated[bool, tyro.conf.arg(name="distributed.auto")] = False
    """Let Slurm, Open MPI, Kubernetes or a TPU pod say which processes there are."""
    coordinator: Annotated[str | None, tyro.conf.arg(name="distributed.coordinator")] = None
    """HOST:PORT at which the first process can be reached, where nothing else says so."""
    processes: Annotated[int, tyro.conf.arg(name="distributed.processes")] = 1
    """How many there are, with a coordinator."""
    process: Annotated[int, tyro.conf.arg(name="distributed.process")] = 0
    """Which of them this is, from 0 on."""


def check(config: Distributed) -> None:
    """Raises a ValueError for fields that do not go together."""
    given = config.coordinator is not None
    if config.auto and given:
        raise ValueError("--distributed.auto finds the coordinator; leave one of the two out")
    if given and not config.coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--distributed.coordinator is {config.coordinator}; give HOST:PORT")
    if not given and (config.processes, config.process) != (1, 0):
        raise ValueError("--distributed.processes needs --distributed.coordinator HOST:PORT")
    if not 0 <= config.process < config.processes:
        raise ValueError(
            f"--distributed.process is {config.process} of {config.processes}; give one from 0 to"
            f" {config.processes - 1}"
        )


def require_single(config: Distributed) -> None:
    """Raises a ValueError if it asks for several processes."""
    if config != Distributed():
        raise ValueError(SINGLE)


def initialize(config: Distributed) -> None:
    """Joins the other processes, if there are any. Call it before any other use of JAX.

    Raises:
      ValueError: if the config does not fit, or the others cannot be found or reached.
    """
    check(config)
    if not config.auto and config.coordinator is None:
        return
    known = {}
    if not config.auto:
        if config.process == 0:
            _require_free(config.coordinator)
        known = {
            "coordinator_address": config.coordinator,
            "num_processes": config.processes,
            "process_id": config.process,
            "cluster_detection_method": "deactivate",
        }
    # It would take SIGTERM for itself; the runner has a handler of its own.
    jax.config.update("jax_enable_preemption_service", False)
    _end_in_one_line()
    try:
        jax.distributed.initialize(
            **known, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=FINISHING
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the other processes of this run are not found ({error}); name them by"
            " --distributed.coordinator, --distributed.processes and --distributed.process"
        ) from error


def _require_free(coordinator: str) -> None:
    """Raises a ValueError if the port of the coordinator is in use, of which JAX would crash."""
    try:
        socket.create_server(("", int(coordinator.rpartition(":")[2]))).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--distributed.coordinator is {coordinator}, but its port cannot be opened ({error});"
            " give another one to all processes"
        ) from error


# JAX ends a process whose others are lost by `abort`, from a thread of its own, after a page of
# messages; a callback in its place crashes (jax 0.10.2). So the signal of `abort` is answered.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    os.write(2, f"error: {lost('see above')}\n".encode())
    os._exit(LOST)


def _end_in_one_line() -> None:
    libc = ctypes.CDLL(None)
    libc.signal(int(signal.SIGABRT), _aborted)


def lost(reason: str) -> str:
    """What a user is told where the processes cannot go on together."""
    return (
        f"another process of this run has ended or cannot be reached ({reason}); start all of them"
        " again, to go on from the last checkpoint"
    )


def started() -> bool:
    """Whether this process is one of a run of several."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process reads and writes files; true where it is the only one."""
    return not started() or jax.process_index() == 0


def leave(code: int) -> int:
    """Ends this process at once if there are others, which need not end too; or returns the code.

    The ordinary way out waits for them.
    """
    if started():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def largest(value: int) -> int:
    """The largest value that a process gives; all must call it at the same point."""
    if not started():
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


class Opened(NamedTuple):
    """Where a run goes on.

    Attributes:
      step: number of finished steps.
      saved: what the checkpoint after it holds.
      log: a `metrics.Log`, or a `Silent` one.
    """

    step: int
    saved: PyTree
    log: Any


class Silent:
    """Has the interface of `metrics.Log`, and keeps the epochs alone."""

    def __init__(self, epochs: Sequence[dict[str, Any]]) -> None:
        self.epochs = list(epochs)

    def write(
        self, kind: str, step: int, epoch: int, values: Mapping[str, float], **other: Any
    ) -> dict[str, Any]:
        """Returns the line."""
        line = {"kind": kind, "step": step, "epoch": epoch, **values, **other}
        if kind == "epoch":
            self.epochs.append(line)
        return line

    def pictures(self, step: int, files: Sequence[Path]) -> None:
        """Does nothing."""

    def sync(self) -> int:
        """Returns 0."""
        return 0

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def opened(
    open_run: Callable[[], tuple[int, PyTree, Any]],
    fresh: Callable[[], PyTree],
    fields: Mapping[str, Any],
) -> Opened:
    """What the first process opens, in all of them; the others have a silent log.

    Args:
      open_run: returns the fields of `Opened`; called by the first process.
      fresh: makes what is saved before the first step; called by the others.
      fields: of the config, as JSON holds them, that must be the same in all.

    Raises:
      UserError: in all processes, if `open_run` raises one or the fields differ.
    """
    if not started():
        return Opened(*open_run())
    found = None
    header: dict[str, Any] = {"fields": fields}
    if is_first():
        try:
            found = Opened(*open_run())
            header |= {"step": found.step, "epochs": found.log.epochs}
        except UserError as error:
            header["error"] = str(error)
    header = json.loads(_send(json.dumps(header).encode()))
    if "error" in header:
        raise UserError(header["error"])
    _require_same(header["fields"], fields)
    saved = found.saved if found else fresh()
    leaves, treedef = jax.tree.flatten(saved)
    saved = treedef.unflatten(_unpack(_send(_pack(leaves)), leaves))
    return found or Opened(header["step"], saved, Silent(header["epochs"]))


def _require_same(first: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    differing = {name for name in first.keys() | own.keys() if first.get(name) != own.get(name)}
    # All end if one differs.
    if largest(len(differing)):
        texts = [f"{name} is {first.get(name)} there, {own.get(name)} here" for name in differing]
        raise UserError(
            "not all processes were given the same fields as the first:"
            f" {'; '.join(sorted(texts)) or 'see their messages'}; give all of them the same"
        )


def _send(content: bytes) -> bytes:
    """The content that the first process gives, in all of them."""
    broadcast = multihost_utils.broadcast_one_to_all
    size = np.frombuffer(len(content).to_bytes(8, "little"), np.uint8)
    size = int.from_bytes(np.asarray(broadcast(size)).tobytes(), "little")
    own = np.frombuffer(content, np.uint8) if is_first() else np.zeros(size, np.uint8)
    return np.asarray(broadcast(own)).tobytes()


def _pack(leaves: Sequence[Any]) -> bytes:
    return b"".join(np.asarray(_bits(leaf)).tobytes() for leaf in leaves)


def _unpack(content: bytes, like: Sequence[Any]) -> list[Any]:
    """Bit for bit, unlike a sum of floats with zeros: that has no negative zero."""
    found, start = [], 0
    for leaf in like:
        bits = np.asarray(_bits(leaf))
        array = np.frombuffer(content, bits.dtype, bits.size, start).reshape(bits.shape)
        start += bits.nbytes
        if not isinstance(leaf, jax.Array):
            found.append(type(leaf)(array) if np.isscalar(leaf) else array)
        elif jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            found.append(jax.random.wrap_key_data(array, impl=jax.random.key_impl(leaf)))
        else:
            found.append(jax.numpy.asarray(array))
    return found


def _bits(leaf: Any) -> Any:
    is_key = jax.dtypes.issubdtype(getattr(leaf, "dtype", None), jax.dtypes.prng_key)
    return jax.random.key_data(leaf) if is_key else leaf
