"""Many runs of one experiment: every combination of some values, from several seeds.

    python -m experiments.sweep search_cnn digits --seeds 3 \\
        --grid search.estimator=first_order,unrolled
    python -m experiments.sweep evaluate_cnn --grid genotype=DARTS_V1,DARTS_V2 --jobs 2 \\
        -- --train.epochs 50

What follows -- is given to every run. All combinations are checked before the first one starts.
They run here, on Slurm or on Ray; each has a folder of its own in the workdir, its output beside
it, and a row of results.csv. The same command goes on: it leaves finished runs alone and tries the
others again, each of which resumes.
"""

import dataclasses
import hashlib
import importlib
import io
import itertools
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import tyro
from rich.console import Console

from darts_jax.genotype import nearest
from experiments import command_line, distributed, sweep_results
from experiments.errors import Interrupted, RunsFailed, UserError
from experiments.launchers import LAUNCHERS, require
from experiments.tasks import Resources, Slurm, Task
from experiments.workdir import check as check_workdir
from experiments.workdir import flatten, locked, writing

MODULE = "experiments.sweep"
# Those that have a --seed and a --workdir, and resume or start anew in it.
EXPERIMENTS = {
    name: f"experiments.{name}"
    for name in (
        "search_cnn",
        "evaluate_cnn",
        "search_rnn",
        "evaluate_rnn",
        "random_search",
        "pipeline",
        "recurrent_baselines",
        "compare_hypergradients",
    )
}
OURS = ("seed", "workdir", "fork")  # fields that a sweep sets, or that make no sense in one
MAX_NAME = 150  # characters; a file system takes 255 bytes


@dataclass(frozen=True)
class Config:
    """What to run, and where."""

    experiment: tyro.conf.Positional[str]
    """Name of the experiment, as search_cnn."""
    preset: tyro.conf.Positional[str | None] = None
    """Of the experiment; None for its first one."""
    grid: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """FIELD=VALUE,VALUE,... to run with each of the values; of several, with every combination."""
    seeds: int = 1
    """Runs of each combination: by --seed and the seeds that follow it."""
    seed: int = 0
    """The first one."""
    launcher: Literal["local", "slurm", "ray"] = "local"
    """Where to run: on this machine, on Slurm by submitit, or on Ray."""
    jobs: int | None = None
    """Runs at a time; None for one, or on Slurm and Ray for as many as there is room for."""
    cpus: int | None = None
    """Cores for each run, on Slurm and Ray; here all runs share all cores."""
    gpus: int = 0
    """GPUs for each run; with 0, a run here uses all that it sees, and on Ray none."""
    slurm: Slurm = field(default_factory=Slurm)
    workdir: Path | None = None
    """Folder to write to, and to go on in; None for runs/sweep-EXPERIMENT-PRESET."""


class Run(NamedTuple):
    """One run.

    Attributes:
      fields: what it has of its own: {"search.estimator": "unrolled", "seed": "0"}.
      folder: its workdir.
      command: that does it alone, as a shell reads it.
      task: the same for a launcher.
    """

    fields: dict[str, str]
    folder: Path
    command: str
    task: Task


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The config, and the arguments for every run."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    config = tyro.cli(
        Config,
        args=argv[:end],
        prog=f"python -m {MODULE}",
        description=f"{__doc__.splitlines()[0]}\n\nExperiments: {', '.join(EXPERIMENTS)}.\n"
        "What follows -- is given to every run.",
    )
    return config, argv[end + 1 :]


def check(config: Config) -> None:
    """Raises a ValueError for a field out of range."""
    if config.experiment not in EXPERIMENTS:
        known = nearest(config.experiment, EXPERIMENTS)
        raise ValueError(f"unknown experiment {config.experiment!r}; use one of: {known}")
    command_line.check_at_least(
        ("seeds", config.seeds, 1),
        ("jobs", 1 if config.jobs is None else config.jobs, 1),
        ("cpus", 1 if config.cpus is None else config.cpus, 1),
        ("gpus", config.gpus, 0),
        ("slurm.minutes", config.slurm.minutes, 1),
    )
    command_line.check_seed(config.seed, config.seeds)
    if config.launcher == "local" and config.cpus is not None:
        raise ValueError("--cpus is for --launcher slurm and ray; leave it out here")
    if config.launcher != "slurm" and config.slurm != Slurm():
        raise ValueError("--slurm.* is for --launcher slurm; leave it out, or give that")


def plan(config: Config, rest: Sequence[str]) -> tuple[Path, list[Run]]:
    """The folder of the sweep, and its runs, each checked as its experiment would.

    Args:
      config: of the sweep.
      rest: arguments for every run.

    Raises:
      UserError, ValueError: for the first run that would be refused.
    """
    module = importlib.import_module(EXPERIMENTS[config.experiment])
    preset = config.preset or next(iter(module.PRESETS))
    if preset not in module.PRESETS:
        known = nearest(preset, module.PRESETS)
        raise UserError(f"unknown preset {preset!r}; use one of: {known}")
    defaults = {
        name.removeprefix("run."): value
        for name, value in flatten(dataclasses.asdict(module.PRESETS[preset][1])).items()
    }
    grid = read_grid(config.grid, defaults)
    _check_rest(rest, grid)
    workdir = config.workdir or Path("runs") / f"sweep-{config.experiment}-{preset}"
    runs = []
    for values in itertools.product(*grid.values()):
        fields = dict(zip(grid, values, strict=True))
        own = [_flag(name, value, defaults[name]) for name, value in fields.items()]
        parsed = _parsed(module, [preset, *own, *rest])
        for seed in range(config.seed, config.seed + config.seeds):
            named = {**fields, "seed": str(seed)}
            folder = workdir / folder_name(named)
            _check_run(module, replace(parsed, seed=seed), folder)
            argv = [preset, *own, *rest, "--seed", str(seed), "--workdir", str(folder)]
            log = workdir.resolve() / f"{folder.name}.log"
            process = (sys.executable, "-m", module.MODULE, *argv)
            task = Task(folder.name, process, os.getcwd(), log)
            runs.append(Run(named, folder, command_line.command(module.MODULE, argv), task))
    return workdir, runs


def read_grid(texts: Sequence[str], defaults: Mapping[str, Any]) -> dict[str, list[str]]:
    """Field -> its values.

    Args:
      texts: as given, "search.train-portion=0.5,0.8".
      defaults: the fields that there are, by the names that they have in a config.

    Raises:
      ValueError: for one that is no field, is given twice or with a value twice, or has no value.
    """
    grid: dict[str, list[str]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        name, values = name.replace("-", "_"), listed.split(",")
        if not all(values):
            raise ValueError(f"--grid {text} lacks a value; give FIELD=VALUE,VALUE")
        if name == "seed":
            raise ValueError("--grid has no seed; give --seeds and --seed")
        if name not in defaults or name in OURS:
            known = [field for field in defaults if field not in OURS]
            raise ValueError(f"--grid has no field {name!r}; use one of: {nearest(name, known)}")
        if name in grid or len(set(values)) < len(values):
            raise ValueError(f"--grid {text} is there twice, or a value of it; give each once")
        grid[name] = values
    return grid


def folder_name(fields: Mapping[str, str]) -> str:
    """The name of a run's folder, "search.estimator=unrolled,seed=0", safe for file systems.

    What is not safe is replaced, and a digest tells such names apart.
    """
    name = ",".join(f"{field}={value}" for field, value in fields.items())
    safe = re.sub(r"[^\w.,=+-]", "_", name, flags=re.ASCII)[:MAX_NAME]
    return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _flag(name: str, value: str, default: Any) -> str:
    """The argument that gives a field a value."""
    name = name.replace("_", "-")
    if not isinstance(default, bool):
        return f"--{name}={value}"
    if value.lower() not in ("true", "false"):
        raise ValueError(f"--grid has {name}={value}; give true or false")
    inside, dot, leaf = name.rpartition(".")
    return f"--{inside}{dot}{'no-' if value.lower() == 'false' else ''}{leaf}"


def _check_rest(rest: Sequence[str], grid: Mapping[str, Any]) -> None:
    """Raises a ValueError if every run is given what it has of its own."""
    taken = {name.replace("_", "-"): "--grid" for name in grid}
    taken |= {"seed": "--seed", "workdir": "--workdir", "fork": "no --fork"}
    for argument in rest:
        name = argument.removeprefix("--").partition("=")[0].replace("_", "-")
        inside, dot, leaf = name.rpartition(".")
        for each in (name, f"{inside}{dot}{leaf.removeprefix('no-')}"):
            if argument.startswith("--") and each in taken:
                raise ValueError(f"--{name} after -- differs from run to run; give {taken[each]}")


def _parsed(module: ModuleType, argv: Sequence[str]) -> Any:
    """The config that a command line stands for; what tyro says of it becomes one line."""
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            return command_line.parse(module.PRESETS, argv, module.MODULE, "")[1]
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        framed = (line.strip("│ ") for line in errors.getvalue().splitlines() if line[:1] == "│")
        text = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), framed))
        raise UserError(text or " ".join(errors.getvalue().split())) from None


def _check_run(module: ModuleType, config: Any, folder: Path) -> None:
    """Raises a ValueError or a UserError for what an experiment would refuse at its start."""
    if hasattr(config, "run"):
        distributed.require_single(config.run.distributed)
    module.check(config)
    if hasattr(config, "genotype"):
        if config.genotype is None:  # a search that ends meanwhile would change it
            raise ValueError(
                "the runs of a sweep share no newest search; name the cells, by --grid genotype=..."
                " or by -- --genotype"
            )
        config = module.resolve_genotype(config, folder)
    check_workdir(folder, config)


@contextmanager
def received() -> Iterator[list[int]]:
    """Yields a list to which SIGINT and SIGTERM are added as they come."""
    signals: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {n: signal.signal(n, lambda number, _: signals.append(number)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_all(config: Config, workdir: Path, runs: Sequence[Run], console: Console) -> None:
    """Runs those that are not done yet, and writes and shows what came of all.

    Raises:
      Interrupted: by a signal, once all runs have stopped.
      RunsFailed: if any has failed.
    """
    rows = sweep_results.read(workdir)
    by_name = {run.folder.name: run for run in runs}
    for name, run in by_name.items():
        fresh = sweep_results.row(name, run.fields, run.command)
        if rows.get(name, fresh)[sweep_results.COMMAND] != run.command or not run.folder.is_dir():
            rows[name] = fresh
        rows.setdefault(name, fresh)
    todo = [run.task for name, run in by_name.items() if sweep_results.state(rows[name]) != "done"]
    fields = list(runs[0].fields)
    sweep_results.write(workdir, rows, fields)
    done = len(runs) - len(todo)
    console.print(f"{len(runs)} runs, {done} of them done; logs: {workdir}/*.log", style="bold")
    resources = Resources(config.jobs, config.cpus, config.gpus, config.slurm)
    launch = LAUNCHERS[config.launcher if todo else "local"]  # for nothing, no cluster is asked
    with received() as signals, writing(workdir):
        for task, end in launch(todo, workdir, resources, signals):
            folder = by_name[task.name].folder
            row = sweep_results.ended(rows[task.name], end, folder, task.log)
            rows[task.name] = row
            sweep_results.write(workdir, rows, fields)
            done += sweep_results.state(row) == "done"
            text = f"{task.name}: {sweep_results.state(row)}, {row['wall_seconds'] or '?'} s"
            console.print(f"{text}; {done} of {len(runs)} done", soft_wrap=True, highlight=False)
    found = [rows[name] for name in by_name]
    console.print(sweep_results.table(found))
    console.print(f"written to {workdir}/{sweep_results.RESULTS}", soft_wrap=True, highlight=False)
    if signals:
        raise Interrupted(signals[0])
    if len(runs) > done:
        raise RunsFailed(f"{len(runs) - done} of {len(runs)} runs have failed, see the table")


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    config, rest = parse(argv)
    # Devices are for the runs; checking their configs must not take one.
    jax.config.update("jax_platforms", "cpu")
    with command_line.user_errors():
        check(config)
        workdir, runs = plan(config, rest)
    require(config.launcher)
    with locked(workdir):
        run_all(config, workdir, runs, Console())


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
