"""Searches the normal and reduction cell of a convolutional network (DARTS, arXiv 1806.09055).

    python -m experiments.search_cnn                    # handwritten digits, a few minutes
    python -m experiments.search_cnn paper              # CIFAR-10, as in the paper
    python -m experiments.search_cnn --search.estimator first_order --workdir runs/first_order
    python -m experiments.search_cnn --seeds 4          # four searches as one program

The workdir then holds genotype.json, a picture of each cell, one of the alphas over time, and what
`experiments.runner` writes. The same command resumes it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax
import tyro
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table
from rich.text import Text

from darts_jax import data, genotype, hypergradient, search
from darts_jax.networks import Supernet
from experiments import command_line, devices, runner, seeds
from experiments.config import (
    AlphaConfig,
    DataConfig,
    WConfig,
    alpha_optimizer,
    check_data,
    check_groups,
    check_w,
    w_optimizer,
    w_schedule,
)
from experiments.images import make_augment, plain_batch
from experiments.memory import peak_memory
from experiments.metrics import Display
from experiments.run_config import RunConfig, check_run, prepare
from experiments.workdir import opened

MODULE = "experiments.search_cnn"


@dataclass(frozen=True)
class NetworkConfig:
    """The supernet."""

    channels: int = 16
    """Channels of each node in the first cell."""
    layers: int = 8
    """Cells, at least 3: those at 1/3 and 2/3 of the depth are reduction cells."""
    nodes: int = 4
    """Intermediate nodes of each cell."""
    batch_norm_groups: int = 1
    """Slices of a batch, each normalised by itself; as many as devices: each device's own part."""


@dataclass(frozen=True)
class SearchConfig:
    """The bilevel optimization."""

    estimator: Literal["first_order", "unrolled", "finite_difference"] = "unrolled"
    """Hypergradient: at constant weights; exact through one step of w; or the paper's
    approximation of that, by a finite difference."""
    radius: float = 0.01
    """How far the finite difference moves the weights, as a global norm."""
    train_portion: float = 0.5
    """Share of the training images that trains w; the others train alpha."""
    epochs: int = 50
    """Passes over the images that train w."""
    batch_size: int = 64
    """Images in a batch, for w and for alpha alike."""
    w: WConfig = field(default_factory=WConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)


@dataclass(frozen=True)
class Config:
    """All that decides what a search does."""

    data: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    seed: int = 0
    """Of everything random: parameters, order of the images, augmentation."""
    seeds: int = 1
    """Searches to run side by side: by this seed and those that follow it."""
    seeds_at_once: int | None = None
    """Of these, so many in one batch of arrays, which bounds memory; None for all, on CPUs for one
    on each device."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/search_cnn-PRESET-seedSEED."""


# Digits are not mirror symmetric, and an 8x8 image loses a stroke to a shift of more than a pixel.
DIGITS = Config(
    data=DataConfig("digits", crop=1, flip=False),
    network=NetworkConfig(channels=4, layers=3),
    search=SearchConfig(epochs=10, batch_size=16, alpha=AlphaConfig(learning_rate=3e-3)),
)
# "paper:" is section 3.1.1 and appendix A.1.1 of arXiv 1806.09055v2, "code:" train_search.py of
# quark0/darts where the paper is silent or differs.
PAPER = Config(
    data=DataConfig(
        "cifar10",
        crop=4,  # code: RandomCrop(32, padding=4), for both halves
        flip=True,  # code: RandomHorizontalFlip, for both halves
        cutout=0,  # code: off in the search unless asked for
    ),
    network=NetworkConfig(
        channels=16,  # paper: initial number of channels
        layers=8,  # paper: a small network of 8 cells
        nodes=4,  # paper: 7 nodes, the two inputs and the output among them
    ),
    search=SearchConfig(
        train_portion=0.5,  # paper: half of the training data each
        estimator="unrolled",  # paper: second order; exact here, `finite_difference` is the paper's
        radius=0.01,  # paper: epsilon = 0.01 / norm
        epochs=50,  # paper
        batch_size=64,  # paper: for both the training and validation sets
        w=WConfig(
            learning_rate=0.025,  # paper
            learning_rate_min=0.001,  # code; the paper anneals to zero
            momentum=0.9,  # paper
            weight_decay=3e-4,  # paper
            clip=5.0,  # code
        ),
        alpha=AlphaConfig(
            learning_rate=3e-4,  # paper
            b1=0.5,  # paper
            b2=0.999,  # paper
            weight_decay=1e-3,  # paper
        ),
    ),
    run=RunConfig(log_every=50),  # code: report_freq
)
PRESETS = {
    "digits": ("8x8 handwritten digits (embedded), minutes on two cores", DIGITS),
    "mnist5k": (
        "5000 images of MNIST (embedded)",
        replace(
            DIGITS,
            data=DataConfig("mnist5k", crop=2, flip=False),
            search=replace(DIGITS.search, epochs=5, batch_size=32),
        ),
    ),
    "cifar10": (
        "CIFAR-10, a small network",
        replace(
            PAPER,
            network=NetworkConfig(channels=8, layers=5),
            search=replace(PAPER.search, epochs=25),
        ),
    ),
    "paper": ("CIFAR-10, the values of the paper", PAPER),
    "smoke": (
        "a few steps on a few digits, to see that all works",
        replace(
            DIGITS,
            data=replace(DIGITS.data, limit=128),
            network=NetworkConfig(channels=2, layers=3, nodes=2),
            search=replace(DIGITS.search, epochs=2),
            run=RunConfig(log_every=1),
        ),
    ),
}


class Images(NamedTuple):
    """What lives on the device: the two halves of the training images."""

    train: data.Split
    val: data.Split


class Indices(NamedTuple):
    """Of the images in the two batches of one iteration, int32 [batch] each."""

    train: np.ndarray
    val: np.ndarray


def supernet(config: NetworkConfig, num_classes: int) -> Supernet:
    """The network that is searched."""
    return Supernet(
        config.channels,
        config.layers,
        num_classes,
        config.nodes,
        batch_norm_groups=config.batch_norm_groups,
    )


def make_estimator(
    config: SearchConfig, optimizer: optax.GradientTransformation
) -> Callable[[hypergradient.Bilevel], hypergradient.Estimator]:
    """Bilevel problem -> estimator.

    The inner step is the very optimizer that trains w. Clipping is thus differentiated through;
    the original's unrolled step has momentum and weight decay, but does not clip.
    """
    return {
        "first_order": hypergradient.first_order,
        "unrolled": partial(hypergradient.unrolled, inner_optimizer=optimizer),
        "finite_difference": partial(
            hypergradient.finite_difference, inner_optimizer=optimizer, radius=config.radius
        ),
    }[config.estimator]


def make_train_step(
    mesh: Mesh, step: Callable, config: DataConfig, dataset: data.Dataset
) -> Callable[[search.SearchState, Images, Indices], tuple[search.SearchState, search.Metrics]]:
    """The search step on images that are taken from the device and augmented there."""

    augmented = make_augment(config, dataset)

    @jax.jit
    def train_and_val(
        key: jax.Array, count: jax.Array, images: Images, indices: Indices
    ) -> tuple[search.Batch, search.Batch]:
        train_key, val_key = jax.random.split(jax.random.fold_in(key, count))
        indices = devices.constrain(mesh, indices, devices.BATCH)
        # The original augments the batches that train alpha, too.
        train_batch = augmented(train_key, images.train, indices.train)
        return train_batch, augmented(val_key, images.val, indices.val)

    def train_step(state, images, indices):
        return step(state, *train_and_val(state.key, state.step, images, indices))

    return train_step


def make_eval_step(
    mesh: Mesh, evaluate: Callable, dataset: data.Dataset
) -> Callable[..., tuple[dict[str, jax.Array], jax.Array]]:
    """The evaluation on validation images as they are."""

    @jax.jit
    def eval_step(state: search.SearchState, images: Images, batch: tuple[jax.Array, jax.Array]):
        indices, mask = batch
        loss, correct = evaluate(state, plain_batch(dataset, images.val, indices), mask)
        return {"eval_loss": loss, "eval_accuracy": correct}, mask.sum()

    return lambda state, images, batch: eval_step(
        state, images, devices.spread(mesh, batch, devices.BATCH)
    )


def end_epoch(workdir: Path, state: search.SearchState) -> dict[str, Any]:
    """Saves the cells so far; returns the alphas, to be recorded."""
    alpha = jax.device_get(state.alpha)
    genotype.save(genotype.derive(alpha), workdir / "genotype.json")
    return {"alpha": {name: values.tolist() for name, values in alpha.items()}}


def make_job(config: Config, dataset: data.Dataset, workdir: Path) -> runner.Job:
    """The search as the runner takes it.

    Raises:
      ValueError: if the images are too few for a batch. The job's `init`: if they do not fit the
        network.
    """
    batch_size, epochs = config.search.batch_size, config.search.epochs
    train, val = data.split_search(dataset.train, config.search.train_portion)
    train_size, val_size = len(train.labels), len(val.labels)
    steps_per_epoch = len(data.epoch_indices(config.seed, 0, train_size, batch_size))
    network = supernet(config.network, dataset.num_classes)
    w = w_optimizer(config.search.w, w_schedule(config.search.w, epochs, steps_per_epoch))
    alpha = alpha_optimizer(config.search.alpha)
    step = search.make_step(
        network,
        make_estimator(config.search, w),
        w,
        alpha,
        skip_nonfinite=config.run.skip_nonfinite,
    )

    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    train_step = make_train_step(mesh, step, config.data, dataset)
    eval_step = make_eval_step(mesh, search.make_evaluate(network), dataset)
    images = devices.keep(mesh, Images(train, val))
    spec = PartitionSpec(*devices.leading(config.seeds))
    facts = {"train images": data.fingerprint(train), "validation images": data.fingerprint(val)}

    def alone(seed: int, folder: Path) -> runner.Job:
        def init() -> search.SearchState:
            shape = dataset.image_shape
            return search.init(jax.random.key(seed), network, w, alpha, shape)

        def train_batches(epoch: int) -> list[Indices]:
            order = data.epoch_indices(seed, epoch, train_size, batch_size)
            fresh = data.random_indices(seed, epoch, len(order), val_size, batch_size)
            return list(map(Indices, order, fresh))

        return runner.Job(
            name="search step",
            init=init,
            train_step=train_step,
            eval_step=eval_step,
            data=images,
            train_batches=train_batches,
            eval_batches=list(data.padded_indices(val_size, batch_size)),
            epochs=epochs,
            steps_per_epoch=steps_per_epoch,
            end_epoch=partial(end_epoch, folder),
            checked=search.checked,
            draw=partial(draw, folder),
            facts=facts,
            place=lambda state: devices.spread(mesh, state, spec),
        )

    return seeds.together(alone, seeds_of(config), config.seeds_at_once, workdir, mesh)


def seeds_of(config: Config) -> range:
    """The seeds of the searches."""
    return range(config.seed, config.seed + config.seeds)


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    data.check(config.data.name)
    check_data(config.data)
    alpha = config.search.alpha
    command_line.check_at_least(
        ("network.channels", config.network.channels, 1),
        ("network.nodes", config.network.nodes, 1),
        ("search.epochs", config.search.epochs, 1),
        ("search.alpha.learning-rate", alpha.learning_rate, 0),
        ("search.alpha.b1", alpha.b1, 0),
        ("search.alpha.b2", alpha.b2, 0),
        ("search.alpha.weight-decay", alpha.weight_decay, 0),
    )
    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    devices.check_batch(mesh, "search.batch-size", config.search.batch_size)
    check_groups(config.network.batch_norm_groups, config.search.batch_size)
    check_w(config.search.w, "search.w")
    if not config.search.radius > 0:
        raise ValueError(f"--search.radius is {config.search.radius}; give more than 0")
    command_line.check_below_one(("search.alpha.b1", alpha.b1), ("search.alpha.b2", alpha.b2))
    seeds.check(config.seed, config.seeds, config.seeds_at_once)
    check_run(config.run)


def found(epochs: Sequence[dict[str, Any]]) -> genotype.Genotype:
    """The cells that the last of some epochs stands for."""
    return genotype.derive(epochs[-1]["alpha"])


def draw(workdir: Path, epochs: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws the cells that were found, and the alphas over time; returns the pictures, PNG."""
    from darts_jax import plots  # matplotlib

    alphas = {
        name: np.array([line["alpha"][name] for line in epochs]) for name in ("normal", "reduce")
    }
    cells = found(epochs)
    genotype.save(cells, workdir / "genotype.json")
    plots.draw_genotype(cells, workdir)
    plots.draw_alphas(
        [line["step"] for line in epochs], alphas, genotype.CNN_PRIMITIVES, workdir / "alphas"
    )
    return [workdir / f"{name}.png" for name in (*alphas, "alphas")]


def search_cells(
    config: Config, dataset: data.Dataset, workdir: Path, display: Display
) -> tuple[genotype.Genotype, runner.Result]:
    """Searches, or goes on where the workdir says; returns the cells of the best seed."""
    with command_line.user_errors():
        job = make_job(config, dataset, workdir)
    result = runner.run(job, config, workdir, display)
    return found(seeds.of_best(result.epochs, seeds_of(config))), result


def summary(
    cells: genotype.Genotype,
    result: runner.Result,
    own_seeds: Sequence[int],
    workdir: Path,
    command: str,
) -> Table:
    """The table that a search ends with; the cells are those of the best seed."""

    def cell(edges: Sequence[genotype.Edge]) -> str:
        pairs = zip(edges[::2], edges[1::2], strict=True)
        names = ("c_{k-2}", "c_{k-1}", *map(str, range(len(edges) // 2)))
        return "\n".join(
            f"{node} = " + " + ".join(f"{operation}({names[source]})" for operation, source in pair)
            for node, pair in enumerate(pairs)
        )

    table = Table(title="Search finished", show_header=False, title_justify="left")
    table.add_row("normal cell", cell(cells.normal))
    table.add_row("reduction cell", cell(cells.reduce))

    def validation(of: Sequence[int]) -> str:
        accuracy, loss = (
            seeds.mean_text(scale * seeds.values_of(result.epochs[-1], name, of, own_seeds), digits)
            for name, scale, digits in (("eval_accuracy", 100, 1), ("eval_loss", 1, 3))
        )
        return f"accuracy {accuracy}%, loss {loss}"

    seeds.add_rows(table, result.epochs, own_seeds, validation)
    table.add_row(
        "time",
        f"{result.seconds:.0f} s search, all {len(result.epochs)} epochs;"
        f" {result.compile_seconds:.0f} s tracing and compiling, this time",
    )
    if (peak := peak_memory()) is not None:
        table.add_row("peak memory", f"{peak / 1e6:.0f} MB, this process, compiling included")
    # As text: in a plain string, brackets would be markup.
    table.add_row("written to", Text(str(workdir)))
    table.add_row("next", Text(command))
    return table


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        prepare(config.run)
        check(config)
    workdir = config.workdir or Path("runs") / f"search_cnn-{preset}-seed{config.seed}"
    with opened(workdir, config, config.run.fork) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path, config.data.limit)
        cells, result = search_cells(config, dataset, workdir, display)
    own = command_line.data_flags(config.data, PRESETS[preset][1].data)
    file = seeds.best_genotype(result.epochs, seeds_of(config), workdir)
    command = command_line.command(
        "experiments.evaluate_cnn", [preset, *own, "--genotype", str(file)]
    )
    display.console.print(summary(cells, result, seeds_of(config), workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
