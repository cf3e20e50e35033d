"""Where many runs go: to this machine, to Slurm, or to Ray.

A launcher takes the runs, the folder that they share, what they may use, and a list to which
signals are added as they come; it yields each run as it ends. After a signal it starts no more, and
hands the signal on: a run saves and stops at the first, and is killed by the second.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from darts_jax.files import read_json, write_text
from experiments.errors import UserError

POLL = 0.2  # seconds
SLURM = ".slurm"  # folder of what Slurm is told and answers
JOBS = "jobs.json"  # in it: the jobs whose end has not been seen
NOTICE = 120  # seconds before a time limit, for a run to save
TIME_LIMITS = 10  # of one run, one after the other


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


def _ended(process: subprocess.Popen, began: float) -> Ended:
    code = process.returncode
    return Ended(128 - code if code < 0 else code, time.monotonic() - began)


def run(task: Task) -> Ended:
    """Runs one to its end; a KeyboardInterrupt makes it save and stop."""
    return _wait(start(task), time.monotonic())


def _wait(process: subprocess.Popen, began: float) -> Ended:
    while True:
        try:
            # Ray cannot interrupt a wait for a process.
            while process.poll() is None:
                time.sleep(POLL)
            return _ended(process, began)
        except KeyboardInterrupt:
            process.terminate()


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
                    yield task, _ended(process, began)
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


class Requeued:
    """A run that submitit queues again if its time is over or it has to make room.

    Submitit calls `checkpoint` from a signal's handler, and runs what that returns next time.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._process = task, None

    def __call__(self) -> Ended:
        began = time.monotonic()
        # Slurm warns every process of a job, and would so kill one that does not know the signal.
        handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._process = start(self._task)
        signal.signal(signal.SIGUSR2, handler)
        return _wait(self._process, began)

    def checkpoint(self) -> Any:
        """Makes the run save and stop; returns what goes on."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            with suppress(ChildProcessError):  # it had ended
                # Unlike `wait`, this needs no lock, which who was interrupted may hold.
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Requeued(self._task))


def on_slurm(
    tasks: Sequence[Task],
    workdir: Path,
    resources: Resources,
    signals: list[int],
    cluster: str = "slurm",
) -> Iterator[tuple[Task, Ended]]:
    """Runs as an array of jobs, all submitted at once, of which `jobs` run at a time.

    They outlive this process: what the same command finds submitted, it waits for.
    """
    import submitit

    folder = workdir / SLURM
    known = _read_jobs(folder)
    jobs = {}
    for task in tasks:
        before = known.get(task.name)
        if before and before["command"] == [*task.command]:
            job = submitit.SlurmJob(folder, before["job"])
            if _goes_on(job):
                jobs[task.name] = job
    new = [task for task in tasks if task.name not in jobs]
    if new:
        jobs |= _submit(new, folder, resources, cluster)
    known |= {t.name: {"job": jobs[t.name].job_id, "command": [*t.command]} for t in tasks}
    write_text(folder / JOBS, json.dumps(known, indent=2))
    left, handed = list(tasks), 0
    while left:
        for _ in signals[handed:]:
            handed += 1
            for task in left:  # a run is sent SIGTERM, and SIGKILL half a minute later
                jobs[task.name].cancel(check=False)
        for task in [task for task in left if jobs[task.name].done()]:
            ended = _of_job(jobs[task.name])
            left.remove(task)
            if not signals or ended.code is not None:  # else it had not begun
                yield task, ended
            # Once the end has been taken down; so that it is seen twice rather than never.
            del known[task.name]
            write_text(folder / JOBS, json.dumps(known, indent=2))
        time.sleep(POLL)


def _submit(
    tasks: Sequence[Task], folder: Path, resources: Resources, cluster: str
) -> dict[str, Any]:
    """Submits runs: name -> job."""
    import submitit
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    slurm = resources.slurm
    try:
        executor = submitit.AutoExecutor(folder, cluster, slurm_max_num_timeout=TIME_LIMITS)
    except RuntimeError as error:
        raise UserError(
            "--launcher slurm finds no srun here; start it where jobs are submitted"
        ) from error
    executor.update_parameters(
        name=folder.parent.name,
        timeout_min=slurm.minutes,
        mem_gb=slurm.memory,
        cpus_per_task=resources.cpus,
        gpus_per_node=resources.gpus or None,
        slurm_partition=slurm.partition,
        slurm_array_parallelism=resources.jobs or len(tasks),
        slurm_signal_delay_s=NOTICE,
        slurm_setup=list(slurm.setup) or None,
        slurm_additional_parameters=dict(map(_option, slurm.options)),
    )
    try:
        with executor.batch():
            jobs = [executor.submit(Requeued(task)) for task in tasks]
    except (FailedSubmissionError, UncompletedJobError) as error:
        raise UserError(f"sbatch refuses: {' '.join(str(error).split())}") from error
    return {task.name: job for task, job in zip(tasks, jobs, strict=True)}


def _option(text: str) -> tuple[str, str | bool]:
    name, given, value = text.partition("=")
    return name.lstrip("-"), value if given else True


def _goes_on(job: Any) -> bool:
    """Whether a job of before has yet to end, or ended well unseen."""
    if job.paths.result_pickle.exists():
        return _of_job(job).code == 0
    return bool(job.get_info()) and not job.done()


def _of_job(job: Any) -> Ended:
    """How a job's run ended; where Slurm ended it, what Slurm says."""
    from submitit.core.utils import UncompletedJobError

    paths = job.paths
    # A result may be seen later than the end of its job; none comes from one that never began.
    if paths.result_pickle.exists() or paths.stdout.exists():
        with suppress(UncompletedJobError):
            return job.result()
    return Ended(None, None, f"Slurm: job {job.job_id} {job.state}, see {paths.stderr}")


def _read_jobs(folder: Path) -> dict[str, Any]:
    """name -> {"job", "command"} of what was submitted; what is no such entry is left out."""
    try:
        found = read_json(folder / JOBS)
    except (FileNotFoundError, ValueError):
        return {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, dict) and isinstance(entry.get("job"), str) and "command" in entry
    }


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
                    ended = ray.get(reference)
                except ray.exceptions.TaskCancelledError:  # it had not begun
                    continue
                except ray.exceptions.RayError as error:
                    ended = Ended(None, None, f"Ray: {' '.join(str(error).split())}")
                yield task, ended
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
