"""Times a search by several seeds together against one after the other, compiling included.

    python -m benchmarks.seeds
    python -m benchmarks.seeds --preset digits --seeds 4 --at-once 1

Searches in turn are processes of their own: with an empty compilation cache each, and with one that
they share, so that the first compiles for all. Searches together are one process, with an empty
cache.

By how much losses differ is what the steps make of rounding, which is not the same in a batch of
seeds. In float64 the searches are the same (tests/test_seeds.py), but the steps of some presets,
such as search_rnn smoke, multiply a difference several times each.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.processes import environment
from experiments.seeds import OF_SEED


@dataclass(frozen=True)
class Config:
    """Times a search by several seeds together against one after the other."""

    experiment: Literal["search_cnn", "search_rnn"] = "search_cnn"
    """Which search."""
    preset: str = "smoke"
    """Its preset."""
    seeds: int = 8
    """Searches."""
    at_once: tuple[int, ...] = (1, 8)
    """Searches together: with so many in one batch of arrays, divisors of --seeds."""
    options: tuple[str, ...] = ()
    """Further options of the search, as "--search.estimator=first_order"."""
    output: Path = Path("benchmarks/results/seeds.json")
    """File for the figures."""


class Case(NamedTuple):
    """How the searches are run.

    Attributes:
      name: of the case.
      commands: one after the other, as options of the search.
      shared: whether they share a compilation cache.
    """

    name: str
    commands: list[list[str]]
    shared: bool


def cases(config: Config) -> Iterator[Case]:
    """The ways of running the searches."""
    alone = [["--seed", str(seed)] for seed in range(config.seeds)]
    yield Case("in turn, each compiles", alone, shared=False)
    yield Case("in turn, the first compiles", alone, shared=True)
    for at_once in config.at_once:
        own = ["--seeds", str(config.seeds), "--seeds-at-once", str(at_once)]
        yield Case(f"together, {at_once} at once", [own], shared=True)


def measure(config: Config, case: Case) -> dict[str, Any]:
    """Seconds on the clock and of processors of all searches, and the loss that each ends with."""
    search = [sys.executable, "-m", f"experiments.{config.experiment}", config.preset]
    losses: list[float] = []
    with tempfile.TemporaryDirectory() as root:
        cpu, wall = _cpu_of_children(), time.perf_counter()
        for i, options in enumerate(case.commands):
            workdir = Path(root) / f"run{i}"
            cache = Path(root) / ("cache" if case.shared else f"cache{i}")
            subprocess.run(
                [*search, *options, *config.options, "--workdir", str(workdir)],
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
                stdout=subprocess.DEVNULL,
                check=True,
            )
            losses += _losses(workdir / "metrics.jsonl", config.seeds)
        wall, cpu = time.perf_counter() - wall, _cpu_of_children() - cpu
    return {"case": case.name, "seconds": wall, "cpu_seconds": cpu, "losses": losses}


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _losses(metrics: Path, count: int) -> list[float]:
    """The validation loss at the end: of each seed or, of a search by one, its own."""
    last = [line for line in map(json.loads, metrics.open()) if line["kind"] == "epoch"][-1]
    each = [last.get(f"eval_loss{OF_SEED}{seed}") for seed in range(count)]
    return [last["eval_loss"]] if each[0] is None else each


def table(measurements: list[dict[str, Any]]) -> Table:
    """The figures as a person reads them; speed and losses against the first case."""
    view = Table(title="All searches", box=box.SIMPLE, padding=(0, 1, 0, 0))
    view.add_column("case", no_wrap=True)
    for name in ("seconds", "CPU seconds", "times faster", "losses differ by"):
        view.add_column(name, justify="right")
    first = measurements[0]
    for m in measurements:
        pairs = zip(m["losses"], first["losses"], strict=True)
        view.add_row(
            m["case"],
            f"{m['seconds']:.0f}",
            f"{m['cpu_seconds']:.0f}",
            f"{first['seconds'] / m['seconds']:.1f}",
            f"{max(abs(a - b) for a, b in pairs):.1e}",
        )
    return view


def main(config: Config) -> None:
    """Measures case after case, into a file that is complete for those that are done."""
    if any(n < 1 or config.seeds % n for n in config.at_once):
        sys.exit(f"--at-once {config.at_once}: give divisors of {config.seeds}")
    console = Console()
    figures: dict[str, Any] = {"environment": environment(), "measurements": []}
    figures["settings"] = {"experiment": config.experiment, "preset": config.preset}
    figures["settings"] |= {"seeds": config.seeds, "options": list(config.options)}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(config):
        with console.status(case.name):
            figures["measurements"].append(measure(config, case))
        figures["environment"]["load_average_after"] = os.getloadavg()
        config.output.write_text(json.dumps(figures, indent=1) + "\n")
    console.print(table(figures["measurements"]))
    console.print(f"written to {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.seeds"))
