"""Times what a checkpoint costs the search that goes on while it is written.

    python -m benchmarks.saving
    python -m benchmarks.saving --sizes S --rounds 2

Windows of iterations with one save at their start take turns with windows without. The difference
is what a save costs, its writing in the background included.
"""

import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from rich import box, print
from rich.table import Table

from benchmarks.processes import LIBRARY, Case
from benchmarks.search_step import jax_search
from darts_jax import checkpoint


@dataclass(frozen=True)
class Config:
    """Times what a checkpoint costs the search that goes on while it is written."""

    sizes: tuple[str, ...] = ("S", "L")
    """As those of `benchmarks.search_step`."""
    rounds: int = 5
    """Windows of each kind."""
    iterations: int = 5
    """Iterations of a window; the write must end within them."""


class Cost(NamedTuple):
    """Seconds, medians over the rounds.

    Attributes:
      plain, saving: of a window.
      blocked: until the call that saves returns.
      written: until the checkpoint is on the disk.
      size: of a checkpoint, bytes.
    """

    plain: float
    saving: float
    blocked: float
    written: float
    size: int


def measure(size: str, config: Config, directory: Path) -> Cost:
    """The cost at one size, of checkpoints in a folder."""
    step, state, train, val = jax_search(Case(size, LIBRARY, "first_order"))
    state, _ = jax.block_until_ready(step(state, train, val))  # compiles
    plain, saving, blocked, written = [], [], [], []
    with checkpoint.open_saver(directory, keep=1) as saver:
        for index in range(2 * config.rounds):
            start = time.perf_counter()
            if index % 2:
                checkpoint.save(saver, index, state)
                blocked.append(time.perf_counter() - start)
            for _ in range(config.iterations):
                state, _ = jax.block_until_ready(step(state, train, val))
            (saving if index % 2 else plain).append(time.perf_counter() - start)
            if index % 2:
                checkpoint.finish(saver)
                written.append(time.perf_counter() - start)
    found = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return Cost(*map(statistics.median, (plain, saving, blocked, written)), found)


def main(config: Config) -> None:
    """Measure size after size, and print a table."""
    view = Table(title="What a save costs a search", box=box.SIMPLE)
    for name in ("", "MB", "blocked, ms", "longer, ms", "of a minute, %", "written within, s"):
        view.add_column(name, justify="right")
    for size in config.sizes:
        directory = Path(tempfile.mkdtemp())
        try:
            cost = measure(size, config, directory / "checkpoints")
        finally:
            shutil.rmtree(directory)
        longer = cost.saving - cost.plain
        view.add_row(
            size,
            f"{cost.size / 1e6:.1f}",
            f"{1e3 * cost.blocked:.0f}",
            f"{1e3 * longer:.0f}",
            f"{100 * longer / 60:.2f}",
            f"{cost.written:.2f}",
        )
    print(view)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.saving"))
