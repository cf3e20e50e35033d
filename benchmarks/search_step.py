"""Times one iteration of the search, a step of alpha and a step of w, beside its rivals.

    python -m benchmarks.search_step
    python -m benchmarks.search_step --sizes S --estimators unrolled --against torch --repeats 1

The rivals are the same network written the ordinary way in JAX, and in PyTorch where that is
installed. Every figure is taken in a process of its own. The first one compiles, into an empty
compilation cache of its own. The others load from that cache, so that their peak memory is that of
stepping and not the compiler's; they take turns, so that a disturbance does not hit one rival only.
"""

import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from experiments.memory import peak_memory

LIBRARY = "darts_jax"
PACKAGES = (LIBRARY, "jax", "jaxlib", "flax", "optax", "numpy", "torch")
NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)

Estimator = Literal["first_order", "unrolled", "finite_difference"]
Rival = Literal["ordinary", "torch"]
SizeName = Literal["S", "M", "L"]


class Size(NamedTuple):
    """A supernet and its batch."""

    channels: int
    layers: int
    batch: int


SIZES: dict[str, Size] = {"S": Size(4, 4, 16), "M": Size(8, 5, 32), "L": Size(16, 8, 8)}


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


@dataclass(frozen=True)
class Config:
    """Times one iteration of the search beside its rivals."""

    sizes: tuple[SizeName, ...] = ("S", "M", "L")
    """S: 4 channels, 4 layers, batch 16; M: 8, 5, 32; L: 16, 8, 8; images of 32x32x3."""
    estimators: tuple[Estimator, ...] = ("first_order", "unrolled", "finite_difference")
    """Hypergradient estimators. PyTorch has no unrolled one."""
    against: tuple[Rival, ...] = ("ordinary", "torch")
    """Rivals; torch is left out where it is not installed."""
    repeats: int = 3
    """Processes that step, for each case."""
    iterations: int = 5
    """Iterations that each of them times, after one that it does not."""
    output: Path = Path("benchmarks/results/search_step.json")
    """File for the figures."""

    def cases(self, size: str) -> Iterator[Case]:
        """The cases of one size."""
        for estimator, implementation in itertools.product(
            self.estimators, (LIBRARY, *self.against)
        ):
            if implementation == "torch" and (
                estimator == "unrolled" or importlib.util.find_spec("torch") is None
            ):
                continue
            yield Case(size, implementation, estimator)


def jax_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step of a search in JAX, and waits for it."""
    import jax
    import numpy as np
    import optax

    from benchmarks import ordinary
    from darts_jax import hypergradient, networks, search

    size = SIZES[case.size]
    module = networks if case.implementation == LIBRARY else ordinary
    network = module.Supernet(size.channels, size.layers, NUM_CLASSES)
    sgd = optax.chain(optax.add_decayed_weights(3e-4), optax.sgd(0.025, momentum=0.9))
    w_optimizer = optax.flatten(optax.chain(optax.clip_by_global_norm(5.0), sgd))
    alpha_optimizer = optax.chain(
        optax.add_decayed_weights(1e-3), optax.adam(3e-4, b1=0.5, b2=0.999)
    )

    def estimator(problem):
        factory = getattr(hypergradient, case.estimator)
        return factory(problem, *(() if case.estimator == "first_order" else (w_optimizer,)))

    step = search.make_step(network, estimator, w_optimizer, alpha_optimizer)
    state = search.init(jax.random.key(0), network, w_optimizer, alpha_optimizer, IMAGE_SHAPE)
    rng = np.random.default_rng(0)
    train, val = (
        search.Batch(
            jax.numpy.asarray(rng.normal(size=(size.batch, *IMAGE_SHAPE)), "float32"),
            jax.numpy.asarray(rng.integers(NUM_CLASSES, size=size.batch)),
        )
        for _ in range(2)
    )

    def iterate():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, train, val))
        return metrics.train_loss

    return iterate


def torch_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step of a search in PyTorch."""
    import torch

    from benchmarks import torch_reference

    size = SIZES[case.size]
    torch.manual_seed(0)
    network = torch_reference.Supernet(size.channels, size.layers, NUM_CLASSES)
    step = torch_reference.make_step(network, case.estimator == "finite_difference")
    height, width, channels = IMAGE_SHAPE
    train, val = (
        (
            torch.randn(size.batch, channels, height, width),
            torch.randint(NUM_CLASSES, (size.batch,)),
        )
        for _ in range(2)
    )
    return lambda: step(train, val)


def run(case: Case, iterations: int, cache: str) -> Run:
    """Measure in this process, which must be a new one. `cache` is a folder for compiled code."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA's remarks on slow compilation
    if case.implementation == "torch":
        iterate = torch_iteration(case)
    else:
        import jax

        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        iterate = jax_iteration(case)

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
    if case.implementation == "torch":
        return None
    import jax

    programs = jax.devices()[0].client.live_executables()
    return max(p.get_compiled_memory_stats().temp_size_in_bytes for p in programs)


def in_new_process(*args: Any) -> Run:
    """`run` in a process that nothing has run in before."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(run, *args).result()


def measure(cases: list[Case], config: Config, say: Callable[[str], None]) -> list[dict[str, Any]]:
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
                result = in_new_process(case, iterations, caches[case])
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


def table(measurements: list[dict[str, Any]]) -> Table:
    """The figures as a person reads them."""
    view = Table(
        title="Seconds of one iteration, alpha then w", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for name in ("", "estimator", "code"):
        view.add_column(name, no_wrap=True)
    for name in ("compile", "median", "min", "CPU", "peak MB", "XLA MB"):
        view.add_column(name, justify="right")
    for m in measurements:
        names = (m["size"], m["estimator"], m["implementation"])
        if "error" in m:
            view.add_row(*names, "failed")
            continue
        wall, cpu = m["iteration_seconds"], m["iteration_cpu_seconds"]
        peak, temp = (
            "" if m[name] is None else f"{m[name] / 1e6:.0f}"
            for name in ("peak_bytes", "temp_bytes")
        )
        view.add_row(
            *names,
            f"{m['compile_seconds']:.1f}",
            f"{wall['median']:.2f}",
            f"{wall['min']:.2f}",
            f"{cpu['median']:.2f}",
            peak,
            temp,
        )
    return view


def main(config: Config) -> None:
    """Measure size after size; the file is complete for the sizes that are done."""
    for name in ("repeats", "iterations"):
        if getattr(config, name) < 1:
            sys.exit(f"--{name} {getattr(config, name)}: it must be at least 1")
    console = Console()
    report: dict[str, Any] = {
        "environment": environment(),
        "settings": {"repeats": config.repeats, "iterations": config.iterations},
        "sizes": {name: SIZES[name]._asdict() for name in config.sizes},
        "measurements": [],
    }
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for name in config.sizes:
        with console.status("") as status:
            report["measurements"] += measure(list(config.cases(name)), config, status.update)
        report["environment"]["load_average_after"] = os.getloadavg()
        config.output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(table(report["measurements"]))
    for m in report["measurements"]:
        if "error" in m:
            console.print(f"{m['size']} {m['estimator']} {m['implementation']}: {m['error']}")
    details = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in details["versions"].items())
    before, after = details["load_average"][0], details["load_average_after"][0]
    console.print(f"{details['cpu_count']} CPUs, load average {before:.1f} to {after:.1f}")
    console.print(f"Python {details['python']}, {versions}")
    console.print(f"written to {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.search_step"))
