"""One run of many: what it is, what it may use, how it is started, and how it ended."""

import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

POLL = 0.2  # seconds


class Task(NamedTuple):
    """One run.

    Attributes:
      name: of the run.
      command: to run.
      cwd: folder to run it in.
      log: absolute path of the file that takes its output, after what is there.
    """

    name: str
    command: tuple[str, ...]
    cwd: str
    log: Path


class Ended(NamedTuple):
    """How a run ended.

    Attributes:
      code: exit code, 128 and the signal's number if a signal killed it; None if nobody knows.
      seconds: that it took, time in a queue left out; None if nobody knows.
      note: what is known instead of an exit code.
    """

    code: int | None
    seconds: float | None
    note: str = ""


@dataclass(frozen=True)
class Slurm:
    """What Slurm is asked for, for each run."""

    partition: str | None = None
    """Partition; None for the cluster's default."""
    minutes: int = 60
    """Time limit. A run that needs longer is told in time, saves, and queues again to go on."""
    memory: int | None = None
    """GB of memory; None for the cluster's default."""
    options: tuple[str, ...] = ()
    """Other options of sbatch, as account=mine qos=long constraint=a100."""
    setup: tuple[str, ...] = ()
    """Shell commands before the run, as "module load cuda"."""


@dataclass(frozen=True)
class Resources:
    """What the runs may use."""

    jobs: int | None = None
    cpus: int | None = None
    gpus: int = 0
    slurm: Slurm = field(default_factory=Slurm)


Launcher = Callable[[Sequence[Task], Path, Resources, list[int]], Iterator[tuple[Task, Ended]]]


def start(task: Task, **environment: str) -> subprocess.Popen:
    """Starts a run, its output in its log."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log:
        log.write(f"$ {shlex.join(task.command)}\n".encode())
        log.flush()
        return subprocess.Popen(
            task.command,
            cwd=task.cwd,
            # Unbuffered, so that an error comes after what was printed before it.
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C at a terminal goes to whole groups; a run would get it twice, and be killed.
            start_new_session=True,
        )


def ended(process: subprocess.Popen, began: float) -> Ended:
    """How a process that has ended did; `began` by the monotonic clock."""
    code = process.returncode
    return Ended(128 - code if code < 0 else code, time.monotonic() - began)


def run(task: Task) -> Ended:
    """Runs one to its end; a KeyboardInterrupt makes it save and stop."""
    return wait(start(task), time.monotonic())


def wait(process: subprocess.Popen, began: float) -> Ended:
    """Waits as `run` does."""
    while True:
        try:
            # Ray cannot interrupt a wait for a process.
            while process.poll() is None:
                time.sleep(POLL)
            return ended(process, began)
        except KeyboardInterrupt:
            process.terminate()
