"""How far the finite difference is from the exact hypergradient, by what the network is like.

    python -m benchmarks.finite_difference
    python -m benchmarks.finite_difference --variants "C 4" "C 8" --seeds 0 1 2

Along a search of cells on digits whose alpha follows the exact hypergradient, all are evaluated on
the same states and batches, every tenth step. Each variant runs in a process of its own.
"""

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tyro
from flax.core import FrozenDict
from rich.console import Console
from rich.table import Table

from darts_jax import networks, operations
from darts_jax.genotype import CNN_PRIMITIVES
from experiments import command_line, comparison, search_cnn
from experiments.comparison_cells import CnnConfig, cnn
from experiments.comparison_estimators import EXACT, Settings, methods

EVERY = 10  # steps
SETTINGS = Settings(small_radius=1e-5)
ESTIMATORS = ("first_order", "finite_difference", "finite_difference_small")


@dataclass(frozen=True)
class Variant:
    """A search of cells: its size, and what is smooth in it."""

    channels: int = 4
    batch_size: int = 16
    max_pooling: bool = True
    activation: str = "relu"
    epochs: int = 2


VARIANTS = {
    "C 4, batch 16": Variant(),
    "C 8": Variant(channels=8),
    "C 16": Variant(channels=16),
    "batch 64": Variant(batch_size=64, epochs=8),
    "no max pooling": Variant(max_pooling=False),
    "SiLU": Variant(activation="silu"),
    "SiLU, no max pooling": Variant(max_pooling=False, activation="silu"),
}


@dataclass(frozen=True)
class Config:
    """The finite difference against the exact hypergradient."""

    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of them to run."""
    seeds: tuple[int, ...] = (0,)
    """Of the searches."""
    output: Path = Path("benchmarks/results/finite_difference.json")
    """File for all figures."""


def report(name: str, seeds: tuple[int, ...]) -> None:
    """Prints the lines of one variant as JSON: what its process does."""
    command_line.enable_compilation_cache()
    print(json.dumps(run_variant(VARIANTS[name], seeds)))


def run_variant(variant: Variant, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """The lines of `comparison.compare` at every state of the searches."""
    config = CnnConfig()
    config = replace(
        config,
        network=replace(config.network, channels=variant.channels),
        batch_size=variant.batch_size,
        epochs=variant.epochs,
    )
    activation = {"relu": operations.relu, "silu": jax.nn.silu}[variant.activation]
    supernet = search_cnn.supernet

    def without_max_pooling(*args):
        kept = FrozenDict({k: v for k, v in operations.OPERATIONS.items() if k != "max_pool_3x3"})
        primitives = tuple(name for name in CNN_PRIMITIVES if name != "max_pool_3x3")
        return supernet(*args).clone(operations=kept, primitives=primitives)

    make = supernet if variant.max_pooling else without_max_pooling
    lines: list[dict[str, Any]] = []
    with (
        # The library has no use for another activation, so it is put in from outside.
        mock.patch.object(operations, "relu", activation),
        mock.patch.object(networks, "relu", activation),
        mock.patch.object(search_cnn, "supernet", make),
    ):
        problem = cnn(config)
        compiled: comparison.Compiled = {}
        point = comparison.start(problem, seeds[0])
        programs = comparison.make_programs(
            problem, methods(ESTIMATORS, SETTINGS), point, compiled, lambda *_: None
        )
        for seed in seeds:

            def observe(step, state, point, seed=seed):
                if point is not None and step % EVERY == 0:
                    found = comparison.compare(problem, programs, state, point)
                    lines.extend({"seed": seed, "step": step, **line} for line in found)

            comparison.run_search(problem, programs[EXACT], compiled, seed, observe)
    return lines


def table(rows: dict[str, list[dict[str, Any]]]) -> Table:
    """Medians over all states, and the range of the cosine."""
    view = Table("variant", "estimator", "cosine", "of the implicit term", "its norm / exact")
    for name, lines in rows.items():
        for estimator in ESTIMATORS:
            own = [line for line in lines if line["estimator"] == estimator]

            def cell(key, own=own):
                values = [line[key] for line in own if line[key] is not None]
                if not values:
                    return ""
                median, low, high = np.median(values), min(values), max(values)
                return f"{median:.2g} ({low:.2g} to {high:.2g})"

            implicit = [cell("implicit_cosine"), cell("implicit_norm_ratio")]
            if estimator == "first_order":
                implicit = ["", "0"]
            view.add_row(name, estimator, cell("gradient_cosine"), *implicit)
    return view


def main(config: Config) -> None:
    """Measures, writes and shows the figures."""
    console, rows = Console(width=140), {}
    for name in config.variants:
        if name not in VARIANTS:
            sys.exit(f"unknown variant {name!r}; use one of: {', '.join(VARIANTS)}")
    for name in config.variants:
        with console.status(name):
            code = (
                "from benchmarks import finite_difference;"
                f" finite_difference.report({name!r}, {config.seeds!r})"
            )
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
        rows[name] = json.loads(done.stdout)
        config.output.parent.mkdir(parents=True, exist_ok=True)
        config.output.write_text(json.dumps(rows) + "\n")
        console.print(table({name: rows[name]}))
    console.print(f"jax {jax.__version__}, {jax.default_backend()}; written to {config.output}")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.finite_difference"))
