"""The whole of the paper's experiment: search, choose, train, and compare at one budget.

    python -m experiments.pipeline           # digits, minutes
    python -m experiments.pipeline mnist5k

Cells are searched by the first-order and by the exact hypergradient, each from several seeds, and
drawn at random. Each is trained briefly; the best of each kind by held-out images, and those of the
paper, are then trained fully, with as many channels as bring them nearest to one number of
parameters. The workdir then holds report.html and a folder for each step, as its own experiment
would write it. The same command resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import tyro
from rich.table import Table

from darts_jax import data
from darts_jax.files import write_text
from experiments import (
    command_line,
    evaluate_cnn,
    evaluation_config,
    pipeline_report,
    search_cnn,
)
from experiments.config import DataConfig
from experiments.evaluation_config import TrainConfig
from experiments.metrics import Display
from experiments.run_config import RunConfig, prepare, require_alone
from experiments.search_config import SearchConfig
from experiments.selection import (
    Candidate,
    fit_budget,
    parameter_count,
    save_random,
    train_briefly,
)
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.pipeline"
# Estimator of a search -> what the paper calls it.
ESTIMATORS = {"first_order": "first order", "unrolled": "second order, exact"}
BASELINE = "DARTS_V2"


@dataclass(frozen=True)
class Config:
    """All that decides what is searched and trained."""

    data: DataConfig
    supernet: search_cnn.NetworkConfig
    search: SearchConfig
    """The estimator is set by the pipeline."""
    network: evaluation_config.NetworkConfig
    """Its channels fix the budget: the parameters of the paper's cells with so many."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Of the cells that were chosen."""
    searches: int = 2
    """Searches by each estimator."""
    random_cells: int = 4
    """Cells to draw at random."""
    brief_epochs: int = 5
    """Epochs of the short training of each, on train_portion of the training images."""
    train_portion: float = 0.8
    """The other images choose the best cells."""
    seeds: int = 3
    """Networks of the chosen cells to train side by side."""
    seeds_at_once: int | None = None
    """Of these networks, how many to compute at a time, to save memory; None for all."""
    seed: int = 0
    """Of everything random."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/pipeline-PRESET-seedSEED."""


def _preset(name: str, **options: int) -> tuple[str, Config]:
    searched, trained = search_cnn.PRESETS[name][1], evaluate_cnn.PRESETS[name][1]
    return evaluate_cnn.PRESETS[name][0], Config(
        trained.data,
        searched.network,
        searched.search,
        trained.network,
        trained.train,
        run=trained.run,
        **options,
    )


PRESETS = {
    "digits": _preset("digits"),
    "mnist5k": _preset("mnist5k", brief_epochs=3),
    "cifar10": _preset("cifar10", brief_epochs=10),
    # 4 searches, 24 random cells, 100 epochs to choose by, 10 networks: section 3 of arXiv
    # 1806.09055v2, and its code.
    "paper": _preset("paper", searches=4, random_cells=24, brief_epochs=100, seeds=10),
    "smoke": _preset("smoke", searches=1, random_cells=1, brief_epochs=1, seeds=2),
}


class Method(NamedTuple):
    """One row of the comparison.

    Attributes:
      name: of the method.
      candidates: its cells after the short trainings, best first; none for published cells.
      source: published name, or file, of the chosen cells.
      search_seconds: of all its searches, compilation left out.
      folder: of the full training.
      config: of the full training.
      outcome: of the full training.
    """

    name: str
    candidates: list[Candidate]
    source: str
    search_seconds: float
    folder: Path
    config: evaluate_cnn.Config
    outcome: evaluate_cnn.Outcome


class Pipeline(NamedTuple):
    """What all steps share; `commands` collects what would do each of them alone."""

    preset: str
    config: Config
    dataset: data.Dataset
    workdir: Path
    display: Display
    commands: list[str]


def search_config(config: Config, estimator: str, seed: int) -> search_cnn.Config:
    """One search. Its images are augmented as the supernet's preset has it: without cutout."""
    images = replace(config.data, cutout=0)
    search = replace(config.search, estimator=estimator)
    return search_cnn.Config(images, config.supernet, search, seed, run=config.run)


def train_config(config: Config) -> evaluate_cnn.Config:
    """The full training, without its cells."""
    return evaluate_cnn.Config(
        config.data,
        network=config.network,
        train=config.train,
        seeds=config.seeds,
        seeds_at_once=config.seeds_at_once,
        seed=config.seed,
        run=config.run,
    )


def brief_config(config: Config) -> evaluate_cnn.Config:
    """The short training, without its cells."""
    train = replace(config.train, epochs=config.brief_epochs, portion=config.train_portion)
    return replace(train_config(config), train=train, seeds=1)


def search_all(pipeline: Pipeline, estimator: str) -> tuple[dict[str, str], float]:
    """Searches from every seed: name -> file of the cells, and the seconds of all searches."""
    config, sources, seconds = pipeline.config, {}, 0.0
    for seed in range(config.seed, config.seed + config.searches):
        name = f"{estimator}_{seed}"
        folder = pipeline.workdir / f"search_{name}"
        own = search_config(config, estimator, seed)
        _note(pipeline, search_cnn, own, folder)
        pipeline.display.console.print(f"searching by {estimator}, seed {seed}", highlight=False)
        _, result = search_cnn.search_cells(own, pipeline.dataset, folder, pipeline.display)
        sources[name] = str(folder / "genotype.json")
        seconds += result.seconds
    return sources, seconds


def _note(pipeline: Pipeline, module, own, folder: Path) -> None:
    """Adds the command that would do a step."""
    default = module.PRESETS[pipeline.preset][1]
    arguments = command_line.flags(replace(own, workdir=folder), default)
    pipeline.commands.append(command_line.command(module.MODULE, [pipeline.preset, *arguments]))


def compare(pipeline: Pipeline) -> list[Method]:
    """Every step of the pipeline; the methods in the order of the table."""
    config, workdir, display = pipeline.config, pipeline.workdir, pipeline.display
    kinds = {name: search_all(pipeline, estimator) for estimator, name in ESTIMATORS.items()}
    jax.clear_caches()  # the programs of the supernet are not needed again
    cells = save_random(config.random_cells, config.supernet.nodes, config.seed, workdir / "random")
    kinds = {"random": (cells, 0.0), **kinds}
    chosen = {BASELINE: ([], BASELINE, 0.0)}
    for name, (sources, seconds) in kinds.items():
        brief = brief_config(config)
        for each, source in sources.items():
            own = evaluate_cnn.with_cells(brief, source)
            _note(pipeline, evaluate_cnn, own, workdir / "brief" / each)
        ranked = train_briefly(sources, brief, pipeline.dataset, workdir / "brief", display)
        chosen[name] = (ranked, ranked[0].source, seconds)

    full = evaluate_cnn.with_cells(train_config(config), BASELINE)
    budget = parameter_count(full, pipeline.dataset)
    methods = []
    for name, (ranked, source, seconds) in chosen.items():
        own = fit_budget(evaluate_cnn.with_cells(full, source), pipeline.dataset, budget)
        folder = workdir / "full" / "_".join(name.replace(",", "").split())
        _note(pipeline, evaluate_cnn, own, folder)
        display.console.print(f"training the cells of: {name}", highlight=False)
        outcome = evaluate_cnn.train(own, pipeline.dataset, folder, display)
        methods.append(Method(name, ranked, source, seconds, folder, own, outcome))
        jax.clear_caches()
    return methods


COLUMNS = ("cells", "test error, %", "parameters", "multiply-adds", "search, s", "choosing, s")


def rows(methods: Sequence[Method]) -> list[tuple[str, ...]]:
    """The cells of the table, row by row."""
    return [
        (
            method.name,
            evaluate_cnn.percent(method.outcome.errors),
            f"{method.outcome.parameters:,}",
            f"{method.outcome.multiply_adds:,}",
            f"{method.search_seconds:.0f}" if method.search_seconds else "-",
            f"{sum(c.seconds for c in method.candidates):.0f}" if method.candidates else "-",
        )
        for method in methods
    ]


def summary(methods: Sequence[Method], seeds: int) -> Table:
    """The table on the terminal."""
    title = f"Test error over {seeds} seeds, at one budget of parameters"
    table = Table(*COLUMNS, title=title, title_justify="left")
    for row in rows(methods):
        table.add_row(*row)
    return table


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    command_line.check_at_least(
        ("searches", config.searches, 1),
        ("random-cells", config.random_cells, 1),
        ("brief-epochs", config.brief_epochs, 1),
    )
    command_line.check_positive(("train-portion", config.train_portion))
    command_line.check_below_one(("train-portion", config.train_portion))
    command_line.check_seed(config.seed, max(config.seeds, config.searches))
    search_cnn.check(search_config(config, "unrolled", config.seed))
    evaluate_cnn.check(train_config(config))


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        require_alone(config.run)
        prepare(config.run)
        check(config)
    workdir = config.workdir or Path("runs") / f"pipeline-{preset}-seed{config.seed}"
    command = command_line.command(MODULE, argv)
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path, config.data.limit)
        with writing(workdir):
            write_config(config, workdir)
        pipeline = Pipeline(preset, config, dataset, workdir, display, [command])
        with command_line.user_errors():
            methods = compare(pipeline)
        with display.phase("writing the report"), writing(workdir):
            page = pipeline_report.page(
                f"Cells on {config.data.name}",
                COLUMNS,
                rows(methods),
                {method.name: method.config.cells for method in methods},
                {method.name: method.outcome.result.epochs for method in methods},
                pipeline.commands,
            )
            write_text(workdir / "report.html", page)
    display.console.print(summary(methods, config.seeds))
    display.console.print(f"written to {workdir}, report.html", soft_wrap=True, highlight=False)
    following = command_line.next_command(MODULE, argv, config.seed + 1)
    display.console.print(f"next: {following}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
