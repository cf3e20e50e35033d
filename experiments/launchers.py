"""Where many runs go: to this machine, to Slurm, or to Ray.

A launcher takes the runs, the folder that they share, what they may use, and a list to which
signals are added as they come; it yields each run as it ends. After a signal it starts no more, and
hands the signal on: a run saves and stops at the first, and is killed by the second.
"""

import logging
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.errors import UserError
from experiments.slurm import on_slurm
from experiments.tasks import POLL, Ended, Launcher, Resources, Task, ended, run, start


def on_local(
    tasks: Sequence[Task], workdir: Path, resources: Resources, signals: list[int]
) -> Iterator[tuple[Task, Ended]]:
    """Runs on this machine: `jobs` at a time, one if none is given, each with GPUs of its own."""
    places = _places(resources)
    waiting, handed = list(reversed(tasks)), 0
    running: dict[int, tuple[Task, subprocess.Popen, float]] = {}
    try:
        while running or (waiting and not signals):
            for place, environment in enumerate(places):
                if waiting and not signals and place not in running:
                    task = waiting.pop()
                    running[place] = task, start(task, **environment), time.monotonic()
            for signum in signals[handed:]:
                handed += 1
                for _, process, _ in running.values():
                    process.send_signal(signum)
            for place, (task, process, began) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    yield task, ended(process, began)
            time.sleep(POLL)
    finally:  # none are left but after an error here
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()


def _places(resources: Resources) -> list[dict[str, str]]:
    """The environment of each run at a time: which GPUs it sees, if it is to have its own."""
    jobs, gpus = resources.jobs or 1, resources.gpus
    if not gpus:
        return [{}] * jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    ids = visible.split(",") if visible else list(map(str, range(jobs * gpus)))
    if len(ids) < jobs * gpus:
        raise UserError(
            f"{jobs} jobs of {gpus} GPUs do not fit into CUDA_VISIBLE_DEVICES={visible}; give less"
            " --jobs or --gpus"
        )
    return [{"CUDA_VISIBLE_DEVICES": ",".join(ids[i * gpus : (i + 1) * gpus])} for i in range(jobs)]


def on_ray(
    tasks: Sequence[Task], workdir: Path, resources: Resources, signals: list[int]
) -> Iterator[tuple[Task, Ended]]:
    """Runs on the cluster at RAY_ADDRESS or, if that is not set, on one that is started here."""
    ray = _ray()
    remote = ray.remote(run).options(
        num_cpus=resources.cpus or 1, num_gpus=resources.gpus, max_retries=0
    )
    waiting, handed = list(reversed(tasks)), 0
    running: dict[Any, Task] = {}
    try:
        while running or (waiting and not signals):
            while waiting and not signals and len(running) < (resources.jobs or len(tasks)):
                task = waiting.pop()
                running[remote.remote(task)] = task
            for _ in signals[handed:]:
                handed += 1
                for reference in running:
                    ray.cancel(reference, force=False)
            for reference in ray.wait(list(running), timeout=POLL)[0]:
                task = running.pop(reference)
                try:
                    end = ray.get(reference)
                except ray.exceptions.TaskCancelledError:  # it had not begun
                    continue
                except ray.exceptions.RayError as error:
                    end = Ended(None, None, f"Ray: {' '.join(str(error).split())}")
                yield task, end
    finally:
        for reference in running:  # none are left but after an error here
            ray.cancel(reference, force=False)
        if running:
            ray.wait(list(running), num_returns=len(running))
        ray.shutdown()


def _ray() -> ModuleType:
    """Ray, connected to its cluster."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)  # which Ray replaces
    try:
        with warnings.catch_warnings():
            # Processes that Ray starts use nothing of JAX, which checking the runs has set up.
            warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # Ray raises this very class where its processes are too slow
        text = " ".join(str(error).split())
        raise UserError(f"Ray does not start ({text}); see RAY_ADDRESS") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    return ray


def require(launcher: str) -> None:
    """Raises a UserError if the package that a launcher needs is missing."""
    package = {"slurm": "submitit", "ray": "ray"}.get(launcher)
    if package and find_spec(package) is None:
        raise UserError(f"--launcher {launcher} needs its package: pip install -e '.[{launcher}]'")


LAUNCHERS: dict[str, Launcher] = {"local": on_local, "slurm": on_slurm, "ray": on_ray}
