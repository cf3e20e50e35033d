"""Timing rivals in processes of their own, in turns.

The first process of a case compiles, into an empty compilation cache of its own. The others load
from that cache, so that their peak memory is that of stepping and not the compiler's; they take
turns, so that a disturbance does not hit one rival only.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.table import Table

from experiments.memory import peak_memory

LIBRARY, TORCH = "darts_jax", "torch"
PACKAGES = (LIBRARY, "jax", "jaxlib", "flax", "optax", "numpy", TORCH)


class Case(NamedTuple):
    """What is measured."""

    size: str
    implementation: str
    estimator: str


class Iteration(NamedTuple):
    """Seconds of one iteration: on the clock, and of processors, summed over this process."""

    wall: float
    cpu: float


class Run(NamedTuple):
    """What one process reports. Bytes are the most memory that it held, and that XLA asks for."""

    first: Iteration
    iterations: list[Iteration]
    peak_bytes: int | None
    temp_bytes: int | None


MakeIteration = Callable[[Case], Callable[[], Any]]


class Settings(Protocol):
    """How a benchmark measures."""

    repeats: int
    iterations: int
    output: Path


def with_torch(rivals: Sequence[str]) -> tuple[str, ...]:
    """The rivals, PyTorch only where it is installed."""
    installed = importlib.util.find_spec(TORCH) is not None
    return tuple(rival for rival in rivals if rival != TORCH or installed)


def megabytes(size: int | None) -> str:
    """A number of bytes for a table."""
    return "" if size is None else f"{size / 1e6:.0f}"


def run(make_iteration: MakeIteration, case: Case, iterations: int, cache: str) -> Run:
    """Measure in this process, which must be a new one. `cache` is a folder for compiled code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on slow compilation
    if case.implementation != TORCH:
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    iterate = make_iteration(case)

    def timed() -> Iteration:
        wall, cpu = time.perf_counter(), time.process_time()
        loss = float(iterate())
        seconds = Iteration(time.perf_counter() - wall, time.process_time() - cpu)
        if not math.isfinite(loss):
            raise ValueError(f"the training loss of {case} is {loss}: its figures mean nothing")
        return seconds

    first, *others = [timed() for _ in range(1 + iterations)]
    return Run(first, others, peak_memory(), temp_bytes(case))


def temp_bytes(case: Case) -> int | None:
    """The largest scratch memory of any program that is loaded, as XLA planned it."""
    if case.implementation == TORCH:
        return None
    import jax

    programs = jax.devices()[0].client.live_executables()
    return max(p.get_compiled_memory_stats().temp_size_in_bytes for p in programs)


def in_new_process(*args: Any) -> Run:
    """`run` in a process that nothing has run in before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run, *args).result()


def measure(
    make_iteration: MakeIteration, cases: list[Case], config: Settings, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """All figures of some cases, which take turns."""
    with tempfile.TemporaryDirectory() as root:
        caches = {case: tempfile.mkdtemp(dir=root) for case in cases}
        cold: dict[Case, Run] = {}
        warm: dict[Case, list[Run]] = {case: [] for case in cases}
        errors: dict[Case, str] = {}
        turns = [(case, turn) for turn in range(1 + config.repeats) for case in cases]
        for case, turn in turns:
            if case in errors:
                continue
            say(f"{' '.join(case)}: {f'repeat {turn}' if turn else 'compile'}")
            iterations = config.iterations if turn else 1
            try:
                result = in_new_process(make_iteration, case, iterations, caches[case])
            except BrokenProcessPool:
                errors[case] = "the process was killed, most likely for want of memory"
            else:
                if turn:
                    warm[case].append(result)
                else:
                    cold[case] = result
    return [
        case._asdict()
        | ({"error": errors[case]} if case in errors else summarize(cold[case], warm[case]))
        for case in cases
    ]


def summarize(cold: Run, warm: list[Run]) -> dict[str, Any]:
    """The figures of one case. Compiling is what a first iteration takes longer than a second."""
    iterations = [iteration for run in warm for iteration in run.iterations]
    excess = Iteration(*(a - b for a, b in zip(cold.first, cold.iterations[0], strict=True)))

    def spread(values: list[float]) -> dict[str, Any]:
        return {"median": statistics.median(values), "min": min(values), "all": values}

    return {
        "compile_seconds": excess.wall,
        "compile_cpu_seconds": excess.cpu,
        "compile_peak_bytes": cold.peak_bytes,
        "cached_start_seconds": statistics.median(run.first.wall for run in warm),
        "iteration_seconds": spread([iteration.wall for iteration in iterations]),
        "iteration_cpu_seconds": spread([iteration.cpu for iteration in iterations]),
        "peak_bytes": warm[0].peak_bytes and max(run.peak_bytes for run in warm),
        "temp_bytes": warm[0].temp_bytes,
    }


def environment() -> dict[str, Any]:
    """What the figures depend on, and when they were taken."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "python": platform.python_version(),
        "versions": found,
        "load_average": os.getloadavg(),
    }


def report(
    make_iteration: MakeIteration,
    sizes: dict[str, Any],
    cases: Callable[[str], Iterable[Case]],
    config: Settings,
    table: Callable[[list[dict[str, Any]]], Table],
) -> None:
    """Measures size after size, into a file that is complete for the sizes that are done.

    Args:
      make_iteration: case -> function that takes the next step and waits for it, in a new process.
      sizes: those to measure, by name, as JSON takes them.
      cases: name of a size -> what to measure of it.
      config: how often, and where to write to.
      table: all figures -> what to print.
    """
    for name in ("repeats", "iterations"):
        if getattr(config, name) < 1:
            sys.exit(f"--{name} {getattr(config, name)}: it must be at least 1")
    console = Console()
    figures: dict[str, Any] = {
        "environment": environment(),
        "settings": {"repeats": config.repeats, "iterations": config.iterations},
        "sizes": sizes,
        "measurements": [],
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for name in sizes:
        with console.status("") as status:
            figures["measurements"] += measure(
                make_iteration, list(cases(name)), config, status.update
            )
        figures["environment"]["load_average_after"] = os.getloadavg()
        config.output.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(table(figures["measurements"]))
    for m in figures["measurements"]:
        if "error" in m:
            console.print(f"{m['size']} {m['estimator']} {m['implementation']}: {m['error']}")
    details = figures["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    before, after = details["load_average"][0], details["load_average_after"][0]
    console.print(f"{details['cpu_count']} CPUs, load average {before:.1f} to {after:.1f}")
    console.print(f"Python {details['python']}, {versions}")
    console.print(f"written to {config.output}")
