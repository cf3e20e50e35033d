"""A searched recurrent cell beside the paper's, random ones and an LSTM, at one budget.

    python -m experiments.recurrent_baselines                  # the cell searched last
    python -m experiments.recurrent_baselines --genotype ENAS --seeds 5

All are trained from scratch by the same recipe, each at the size that brings it nearest to one
number of parameters. The workdir then holds a folder for each training (see
`experiments.evaluate_rnn`) and baselines.json. The same command resumes.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.table import Table

from darts_jax import genotype, text
from darts_jax.files import write_text
from darts_jax.text import Corpus
from experiments import command_line, evaluate_rnn, texts
from experiments.evaluate_rnn import DEFAULT_GENOTYPE, LSTM, TrainConfig
from experiments.metrics import Display
from experiments.run_config import RunConfig, prepare, require_alone
from experiments.selection import nearest_size
from experiments.sources import newest_search, saved_genotype
from experiments.texts import DropoutConfig, TextConfig
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.recurrent_baselines"
MAX_SIZE = 4096  # to which a budget is searched


@dataclass(frozen=True)
class Config:
    """All that decides what is trained."""

    data: TextConfig
    genotype: str | None = None
    """Cell: a JSON file or a published name; None for that of the newest search in runs/."""
    size: int = 850
    """Length of its embeddings and hidden states, which fixes the budget."""
    dropout: DropoutConfig = field(default_factory=DropoutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seeds: int = 3
    """Trainings of each; of the random ones, each with a cell of its own."""
    seed: int = 0
    """Of the first training, and of the random cells."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/recurrent_baselines-PRESET-seedSEED."""


def _preset(name: str, **options) -> tuple[str, Config]:
    about, own = evaluate_rnn.PRESETS[name]
    config = Config(own.data, None, own.size, own.dropout, own.train, run=own.run)
    return about, replace(config, **options)


PRESETS = {
    "pydoc": _preset(
        "pydoc", size=64, train=replace(evaluate_rnn.PRESETS["pydoc"][1].train, epochs=15)
    ),
    "ptb": _preset("ptb"),
    "paper": _preset("paper"),
    "wikitext2": _preset("wikitext2"),
    "smoke": _preset("smoke", seeds=1),
}


class Row(NamedTuple):
    """A line of the table: perplexities a word, one for each seed."""

    name: str
    size: int
    parameters: int
    valid: list[float]
    test: list[float]


def train_config(config: Config, name: str, seed: int) -> evaluate_rnn.Config:
    """One training, at the size of the config."""
    whole = evaluate_rnn.Config(
        config.data,
        size=config.size,
        dropout=config.dropout,
        train=config.train,
        seed=seed,
        run=config.run,
    )
    return evaluate_rnn.with_cell(whole, name)


def parameter_count(config: evaluate_rnn.Config, corpus: Corpus) -> int:
    """Parameters of the model of a config."""
    init = texts.recurrence(config.cell, config.size).init
    shapes = jax.eval_shape(lambda: init(jax.random.key(0), len(corpus.vocabulary)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def fit_budget(config: evaluate_rnn.Config, corpus: Corpus, parameters: int) -> evaluate_rnn.Config:
    """The config at the size that brings it nearest to a number of parameters."""

    def count(size: int) -> int:
        return parameter_count(replace(config, size=size), corpus)

    return replace(config, size=nearest_size(count, parameters, range(1, MAX_SIZE)))


def save_random(config: Config, nodes: int, folder: Path) -> list[str]:
    """Draws a cell for each seed, into files."""
    rng, paths = np.random.default_rng(config.seed), []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(config.seeds):
            paths.append(folder / f"random_{i}.json")
            genotype.save(genotype.sample_recurrent(rng, nodes), paths[-1])
    return list(map(str, paths))


def compare(config: Config, corpus: Corpus, workdir: Path, display: Display) -> list[Row]:
    """Every training; the lines of the table."""
    first = train_config(config, config.genotype, config.seed)
    budget = parameter_count(first, corpus)
    cells = {config.genotype: [config.genotype] * config.seeds}
    cells.setdefault(DEFAULT_GENOTYPE, [DEFAULT_GENOTYPE] * config.seeds)
    cells["random"] = save_random(config, len(first.cell.recurrent), workdir / "cells")
    cells[LSTM] = [LSTM] * config.seeds
    rows = []
    for index, (name, sources) in enumerate(cells.items()):
        row = None
        for i, source in enumerate(sources):
            seed = config.seed + i
            own = fit_budget(train_config(config, source, seed), corpus, budget)
            display.console.print(f"training {name}, seed {seed}", highlight=False)
            outcome = evaluate_rnn.train(own, corpus, workdir / f"{index}_{seed}", display)
            row = row or Row(name, own.size, outcome.parameters, [], [])
            for split, loss in outcome.losses.items():
                getattr(row, split).append(float(np.exp(loss)))
        jax.clear_caches()
        rows.append(row)
    return rows


def spread(values: Sequence[float]) -> str:
    """Mean and, of more than one, standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def summary(rows: Sequence[Row], corpus: Corpus, seeds: int) -> Table:
    """The table that the experiment ends with."""
    title = f"Perplexity a word over {seeds} seeds, at one budget of parameters"
    table = Table(title=title, title_justify="left")
    table.add_column("cell", overflow="fold")
    for column in ("validation", "test", "parameters", "size"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row.name, spread(row.valid), spread(row.test), f"{row.parameters:,}", str(row.size)
        )
    baselines = {"pairs of words": text.bigram_perplexity, "words": text.unigram_perplexity}
    for name, perplexity in baselines.items():
        values = (f"{perplexity(corpus, split):.1f}" for split in ("valid", "test"))
        table.add_row(name, *values, "-", "-")
    return table


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    command_line.check_seed(config.seed, config.seeds)
    command_line.check_at_least(("seeds", config.seeds, 1))
    evaluate_rnn.check(train_config(config, DEFAULT_GENOTYPE, config.seed))


def resolve_genotype(config: Config, workdir: Path) -> Config:
    """The config with its cell named, which is not the LSTM."""
    name = config.genotype or saved_genotype(workdir) or newest_search("search_rnn")
    genotype.load(name or DEFAULT_GENOTYPE, kind=genotype.RNN)
    return replace(config, genotype=name or DEFAULT_GENOTYPE)


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        require_alone(config.run)
        prepare(config.run)
        check(config)
        default = Path("runs") / f"recurrent_baselines-{preset}-seed{config.seed}"
        workdir = config.workdir or default
        config = resolve_genotype(config, workdir)
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            corpus = text.load(config.data.name, config.data.path, config.data.limit)
        with writing(workdir):
            write_config(config, workdir)
        rows = compare(config, corpus, workdir, display)
        with writing(workdir):
            content = json.dumps([row._asdict() for row in rows], indent=2) + "\n"
            write_text(workdir / "baselines.json", content)
    display.console.print(summary(rows, corpus, config.seeds))
    display.console.print(f"written to {workdir}", soft_wrap=True, highlight=False)
    command = command_line.next_command(MODULE, argv, config.seed + config.seeds)
    display.console.print(f"next: {command}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
