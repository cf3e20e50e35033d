"""Runs on Slurm, by submitit: as an array of jobs, which outlive who submits them.

Submitit hands a job what it is to run in a pickle, and a sweep what came of it in another. That is
not read: a job writes how its run ended as JSON, in the same folder.
"""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from darts_jax.files import read_json, write_text
from experiments.errors import UserError
from experiments.tasks import POLL, Ended, Resources, Task, start, wait

SLURM = ".slurm"  # folder of what Slurm is told and answers
JOBS = "jobs.json"  # in it: the jobs whose end has not been seen
NOTICE = 120  # seconds before a time limit, for a run to save
TIME_LIMITS = 10  # of one run, one after the other
LATE = 40  # seconds; Slurm gives a cancelled run 30 to save, a shared file system takes its time
MAX_END_BYTES = 1000  # of a file that tells how a job's run ended
JOB_ID = re.compile(r"\d+(_\d+)?", re.ASCII)


class Requeued:
    """A run that submitit queues again if its time is over or it has to make room.

    Submitit calls `checkpoint` from a signal's handler, and runs what that returns next time.
    """

    def __init__(self, task: Task) -> None:
        self._task, self._process = task, None

    def __call__(self) -> None:
        from submitit import JobEnvironment

        began = time.monotonic()
        # Slurm warns every process of a job, and would so kill one that does not know the signal.
        handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        self._process = start(self._task)
        signal.signal(signal.SIGUSR2, handler)
        ended = wait(self._process, began)
        end = {"exit_code": ended.code, "seconds": ended.seconds}
        write_text(_end_path(JobEnvironment().paths), json.dumps(end))

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
    over: dict[str, float] = {}  # name -> when its job was first seen to be over
    while left:
        for _ in signals[handed:]:
            handed += 1
            for task in left:  # a run is sent SIGTERM, and SIGKILL half a minute later
                jobs[task.name].cancel(check=False)
        for task in list(left):
            if not jobs[task.name].done():
                continue
            since = over.setdefault(task.name, time.monotonic())
            ended = _of_job(jobs[task.name], time.monotonic() - since)
            if ended is None:
                continue
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
    ended = _read_end(job.paths)
    if ended is not None:
        return ended.code == 0
    return bool(job.get_info()) and not job.done()


def _of_job(job: Any, waited: float) -> Ended | None:
    """How the run of a job that is over ended; where Slurm ended it, what Slurm says.

    None if its end may yet be seen. None comes from a job that never began.

    Args:
      job: of submitit. Only its state is asked for: its result is a pickle.
      waited: seconds since it was first seen to be over.
    """
    ended = _read_end(job.paths)
    if ended is None and (waited > LATE or not job.paths.stdout.exists()):
        return Ended(None, None, f"Slurm: job {job.job_id} {job.state}, see {job.paths.stderr}")
    return ended


def _end_path(paths: Any) -> Path:
    """The file that tells how the run of a job ended, by submitit's paths of that job."""
    return paths.folder / f"{paths.job_id}_ended.json"


def _read_end(paths: Any) -> Ended | None:
    """What a job has written of its run's end; None if it has not."""
    path = _end_path(paths)
    try:
        found = read_json(path, MAX_END_BYTES)
        code, seconds = found.get("exit_code"), found.get("seconds")
        if type(code) is not int or not 0 <= code < 256:
            raise ValueError("its exit_code is no exit code")
        if type(seconds) is not float or not 0 <= seconds < math.inf:
            raise ValueError("its seconds are no seconds")
    except FileNotFoundError:
        return None
    except ValueError as error:
        return Ended(None, None, f"{path} cannot be read ({error})")
    return Ended(code, seconds)


def _read_jobs(folder: Path) -> dict[str, Any]:
    """name -> {"job", "command"} of what was submitted; what is no such entry is left out."""
    try:
        found = read_json(folder / JOBS)
    except (FileNotFoundError, ValueError):
        return {}
    return {
        name: entry
        for name, entry in found.items()
        if isinstance(entry, dict)
        and isinstance(entry.get("job"), str)
        and JOB_ID.fullmatch(entry["job"])
        and "command" in entry
    }
