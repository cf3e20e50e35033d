"""The baseline of random cells: drawn uniformly, trained briefly, the best of them trained fully.

    python -m experiments.random_search                       # digits, minutes
    python -m experiments.random_search --count 24 --seeds 5

The workdir then holds a folder for each training (see `experiments.evaluate_cnn`) and the best
cells. The same command resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tyro
from rich.table import Table
from rich.text import Text

from darts_jax import data, genotype, plots
from experiments import command_line, evaluate_cnn
from experiments.config import DataConfig
from experiments.evaluation_config import NetworkConfig, TrainConfig
from experiments.metrics import Display
from experiments.run_config import RunConfig, prepare, require_alone
from experiments.selection import Candidate, save_random, train_briefly
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.random_search"


@dataclass(frozen=True)
class Config:
    """All that decides what is drawn and trained."""

    data: DataConfig
    network: NetworkConfig
    train: TrainConfig
    """Of the best cells."""
    count: int = 8
    """Pairs of cells to draw."""
    nodes: int = 4
    """Intermediate nodes of each cell."""
    brief_epochs: int = 5
    """Epochs of the short training of each, on train_portion of the training images."""
    train_portion: float = 0.8
    """The other images choose the best cells."""
    seeds: int = 1
    """Networks of the best cells to train side by side."""
    seeds_at_once: int | None = None
    """Of these networks, how many to compute at a time, to save memory; None for all."""
    seed: int = 0
    """Of everything random, the cells included."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/random_search-PRESET-seedSEED."""


def _preset(name: str, **options: int) -> tuple[str, Config]:
    text, own = evaluate_cnn.PRESETS[name]
    return text, Config(own.data, own.network, own.train, run=own.run, **options)


PRESETS = {
    "digits": _preset("digits"),
    "mnist5k": _preset("mnist5k", brief_epochs=3),
    "cifar10": _preset("cifar10", brief_epochs=10),
    # 24 cells, and 100 epochs for each: section 3.1 of arXiv 1806.09055v2, and its code.
    "paper": _preset("paper", count=24, brief_epochs=100),
    "smoke": _preset("smoke", count=2, nodes=1, brief_epochs=1),
}


def brief_config(config: Config) -> evaluate_cnn.Config:
    """The short training that a config stands for, without its cells."""
    train = replace(config.train, epochs=config.brief_epochs, portion=config.train_portion)
    return evaluate_cnn.Config(
        config.data, None, config.network, train, seed=config.seed, run=config.run
    )


def full_config(config: Config, source: str) -> evaluate_cnn.Config:
    """The training of the best cells."""
    whole = evaluate_cnn.Config(
        config.data,
        network=config.network,
        train=config.train,
        seeds=config.seeds,
        seeds_at_once=config.seeds_at_once,
        seed=config.seed,
        run=config.run,
    )
    return evaluate_cnn.with_cells(whole, source)


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    command_line.check_at_least(
        ("count", config.count, 1),
        ("nodes", config.nodes, 1),
        ("brief-epochs", config.brief_epochs, 1),
    )
    command_line.check_positive(("train-portion", config.train_portion))
    command_line.check_below_one(("train-portion", config.train_portion))
    evaluate_cnn.check(full_config(config, evaluate_cnn.DEFAULT_GENOTYPE))


def summary(
    ranked: Sequence[Candidate], outcome: evaluate_cnn.Outcome, workdir: Path, command: str
) -> Table:
    """The table that the experiment ends with."""
    table = Table(title="Random search finished", show_header=False, title_justify="left")
    errors = ", ".join(f"{100 * candidate.error:.2f}" for candidate in ranked)
    table.add_row("held-out errors", f"{errors} %, after the short trainings")
    table.add_row("best", ranked[0].name)
    table.add_row("its test error", f"{evaluate_cnn.percent(outcome.errors)} %")
    table.add_row("parameters", f"{outcome.parameters:,}")
    table.add_row("written to", Text(str(workdir)))
    table.add_row("next", Text(command))
    return table


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        require_alone(config.run)
        prepare(config.run)
        check(config)
    workdir = config.workdir or Path("runs") / f"random_search-{preset}-seed{config.seed}"
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path, config.data.limit)
        with writing(workdir):
            write_config(config, workdir)
        candidates = save_random(config.count, config.nodes, config.seed, workdir / "cells")
        brief = brief_config(config)
        ranked = train_briefly(candidates, brief, dataset, workdir / "brief", display)
        best = ranked[0]
        display.console.print(f"training {best.name}", highlight=False)
        full = full_config(config, best.source)
        outcome = evaluate_cnn.train(full, dataset, workdir / "best", display)
        with display.phase("drawing"), writing(workdir):
            genotype.save(full.cells, workdir / "genotype.json")
            plots.draw_genotype(full.cells, workdir)
    command = command_line.next_command(MODULE, argv, config.seed + 1)
    display.console.print(summary(ranked, outcome, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
