"""Counts the arithmetic of one iteration of the search, as the compiler is given it.

    python -m benchmarks.arithmetic
    python -m benchmarks.arithmetic --sizes S C16-L8-B64 --estimators unrolled

Nothing is compiled or run, so any size can be counted on any machine; tracing takes a minute.
"""

from dataclasses import dataclass

import jax
import tyro
from rich import box, print
from rich.table import Table

from benchmarks.processes import LIBRARY, Case
from benchmarks.search_step import Estimator, jax_search, size_of
from darts_jax.evaluation import count_parameters


@dataclass(frozen=True)
class Config:
    """Counts the arithmetic of one iteration of the search, as the compiler is given it."""

    sizes: tuple[str, ...] = ("S", "L", "C16-L8-B64")
    """As those of `benchmarks.search_step`; the last one is the paper's."""
    estimators: tuple[Estimator, ...] = ("first_order", "unrolled")
    """Hypergradient estimators."""


def main(config: Config) -> None:
    """Counts case after case, and prints a table."""
    view = Table(title="One iteration, alpha then w", box=box.SIMPLE)
    view.add_column("")
    view.add_column("estimator")
    for name in ("GFLOP", "GFLOP an image", "parameters", "state, MB"):
        view.add_column(name, justify="right")
    for name in config.sizes:
        for estimator in config.estimators:
            step, state, train, val = jax_search(Case(name, LIBRARY, estimator))
            flops = jax.jit(step).lower(state, train, val).cost_analysis()["flops"] / 1e9
            view.add_row(
                name,
                estimator,
                f"{flops:.0f}",
                f"{flops / size_of(name).batch:.1f}",
                f"{count_parameters(state.w):,}",
                f"{sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6:.1f}",
            )
    print(view)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.arithmetic"))
