"""Searches a space whose every architecture is measured, by each method: which finds better cells?

    python -m experiments.regret                                      # all methods, 16 seeds
    python -m experiments.regret --methods first_order exact          # some of them

The workdir then holds regret.json and a picture of regret over the epochs; see
docs/ground_truth.md. The same command resumes, from the last method that was finished.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from darts_jax import data, ground_truth, regret_plots
from darts_jax.dag_network import Network
from darts_jax.files import write_arrays, write_text
from darts_jax.genotype import nearest
from darts_jax.spaces.nasbench201_small import EDGES, PRIMITIVES
from experiments import command_line
from experiments.enumerate_space import ImagesConfig, NetworkConfig, make_images, small_network
from experiments.enumeration import Batch
from experiments.errors import NonFinite
from experiments.metrics import Display
from experiments.regret_methods import METHODS
from experiments.regret_report import (
    Row,
    cells_table,
    curves,
    differences_table,
    make_rows,
    regret_table,
    to_json,
)
from experiments.regret_searches import Found, SearchConfig, run_searches
from experiments.run_config import DeviceConfig, prepare_device
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.regret"
RESULT, PICTURE, FINISHED = "regret.json", "regret", "methods"  # of a workdir; a folder the last


@dataclass(frozen=True)
class Config:
    """All that decides what is searched. Images and network are those of the table."""

    methods: tuple[str, ...] = tuple(METHODS)
    """Which methods, of those that docs/ground_truth.md lists."""
    search: SearchConfig = field(default_factory=SearchConfig)
    seeds: int = 16
    """Searches by each method, side by side in one program."""
    table: str | None = None
    """Accuracies of all architectures, as experiments.enumerate_space writes them; None for the
    package's own."""
    seed: int = 0
    """The first of the seeds."""
    run: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/regret-PRESET-seedSEED."""


PRESETS = {
    "nasbench201_small": ("all methods, 16 searches each", Config()),
    "smoke": (
        "two methods, two short searches each, to see that all works",
        Config(methods=("first_order", "exact"), search=SearchConfig(epochs=1), seeds=2),
    ),
}


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    if not config.methods:
        raise ValueError(f"--methods names none; use some of: {', '.join(METHODS)}")
    for name in config.methods:
        if name not in METHODS:
            raise ValueError(f"unknown method {name!r} of --methods; use: {nearest(name, METHODS)}")
    command_line.check_at_least(
        ("seeds", config.seeds, 2),
        ("search.epochs", config.search.epochs, 1),
        ("search.batch-size", config.search.batch_size, 1),
        ("search.learning-rate", config.search.learning_rate, 0),
        ("search.momentum", config.search.momentum, 0),
        ("search.weight-decay", config.search.weight_decay, 0),
        ("search.alpha-learning-rate", config.search.alpha_learning_rate, 0),
        ("search.alpha-weight-decay", config.search.alpha_weight_decay, 0),
    )
    command_line.check_below_one(("search.momentum", config.search.momentum))
    command_line.check_seed(config.seed, config.seeds)


def load_table(path: str | Path) -> ground_truth.Table:
    """The table, which must hold every architecture of the space.

    Raises:
      ValueError: if it does not.
    """
    table = ground_truth.load(path)
    if (table.edges, table.primitives) != (EDGES, PRIMITIVES):
        raise ValueError(f"{path} is of another space than nasbench201_small; give its table")
    if (table.class_of < 0).any():
        raise ValueError(
            f"{path} lacks architectures; give a table of all, as python -m"
            " experiments.enumerate_space makes it"
        )
    return table


def table_setting(
    table: ground_truth.Table,
) -> tuple[Network, Batch, Batch, dict[str, Any]]:
    """The relaxed network, the images that train w and alpha, and facts: those of the table.

    Raises:
      ValueError: if its config is none, or the data cannot be loaded.
    """
    try:
        config = json.loads(table.config)
        images = ImagesConfig(**config["data"])
        sizes = NetworkConfig(**config["network"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"the table does not say how it was made ({error!r}); make one by python -m"
            " experiments.enumerate_space"
        ) from error
    dataset = data.load(images.name, images.path)
    parts = make_images(images, dataset)
    val = Batch(*(x.reshape(-1, *x.shape[2:])[: images.validation] for x in parts.val))
    facts = {"images": data.fingerprint(dataset.train), "table's data": config["data"]}
    facts["table's network"] = config["network"]
    return small_network(sizes, dataset.num_classes), parts.train, val, facts


def search_all(
    config: Config, network: Network, train: Batch, val: Batch, workdir: Path, display: Display
) -> dict[str, Found]:
    """What every method finds; those that are finished are read."""
    seeds = range(config.seed, config.seed + config.seeds)
    epochs = config.search.epochs
    found = {}
    for name in config.methods:
        path = workdir / FINISHED / f"{name}.npz"
        if not path.exists():
            with display.phase(f"{name}: {METHODS[name].text}"), _naming(name):
                result = run_searches(
                    name,
                    network,
                    config.search,
                    seeds,
                    train,
                    val,
                    lambda done: display.detail(f"epoch {done} of {epochs}"),
                )
            with writing(workdir):
                path.parent.mkdir(exist_ok=True)
                write_arrays(path, result._asdict())
        found[name] = _read(path)
    return found


@contextmanager
def _naming(method: str) -> Iterator[None]:
    """Inside, a NonFinite is made to name the method, and what to do."""
    try:
        yield
    except NonFinite as error:
        raise NonFinite(
            f"{method}, {error}. Finished methods are kept; leave this one out of --methods, or"
            " search anew with lower learning rates in another --workdir"
        ) from error


def _read(path: Path) -> Found:
    with command_line.user_errors():
        try:
            with np.load(path, allow_pickle=False) as file:
                return Found(**{name: file[name] for name in Found._fields})
        except Exception as error:  # a damaged archive raises errors of many types
            raise ValueError(f"{path} cannot be read ({error}); remove it") from error


def report(rows: dict[str, Row], table: ground_truth.Table, workdir: Path) -> list[Path]:
    """Writes regret.json and the picture; returns the files."""
    with writing(workdir):
        content = to_json(rows, table)
        write_text(workdir / RESULT, json.dumps(content, indent=1, allow_nan=False) + "\n")
        panels, levels = curves(rows)
        pictures = regret_plots.draw_regret(panels, levels, workdir / PICTURE)
    return [workdir / RESULT, *pictures]


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        prepare_device(config.run)
        check(config)
        table = load_table(config.table or ground_truth.SHIPPED)
    workdir = config.workdir or Path("runs") / f"regret-{preset}-seed{config.seed}"
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase("loading the images"):
            network, train, val, facts = table_setting(table)
            size = min(len(train.label), len(val.label))
            if config.search.batch_size > size:
                raise ValueError(
                    f"--search.batch-size is {config.search.batch_size}; give at most the {size}"
                    " images of a part"
                )
        with writing(workdir):
            write_config(config, workdir, facts)
        found = search_all(config, network, train, val, workdir, display)
        with display.phase("comparing"):
            rows = make_rows(found, table, config.search.epochs)
            files = report(rows, table, workdir)
    print_report(display.console, rows, len(table.architectures), files)
    display.console.print(
        f"next: {command_line.next_command(MODULE, argv, config.seed + config.seeds)}",
        soft_wrap=True,
        highlight=False,
    )


def print_report(
    console: Console, rows: dict[str, Row], classes: int, files: Sequence[Path]
) -> None:
    """The tables that the experiment ends with; classes are how many a rank is of."""
    console.print(regret_table(rows))
    console.print(cells_table(rows, classes))
    differences = differences_table(rows)
    if differences is not None:
        console.print(differences)
    for file in files:
        console.print(f"written: {file}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
