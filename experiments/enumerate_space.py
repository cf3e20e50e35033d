"""Trains every architecture of a small search space, several times each, to know which are good.

    python -m experiments.enumerate_space               # minutes, see docs/ground_truth.md
    python -m experiments.enumerate_space pilot         # some of them: do they differ by enough?

The workdir then holds table.npz, which `darts_jax.ground_truth` reads. The same command resumes,
from the last group of networks that was finished.
"""

import dataclasses
import io
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from rich.table import Table
from rich.text import Text

from darts_jax import data, ground_truth, isomorphism
from darts_jax.dag_network import Network, one_hot
from darts_jax.files import write_bytes
from darts_jax.spaces.nasbench201_small import EDGES, PRIMITIVES, SPACE
from experiments import command_line
from experiments.enumeration import Images, batched, make_train, pooled, sgd
from experiments.errors import NonFinite
from experiments.metrics import Display
from experiments.run_config import DeviceConfig, prepare_device
from experiments.workdir import APART, opened, write_config, writing

MODULE = "experiments.enumerate_space"
TABLE, FINISHED = "table.npz", "networks"  # a file of a workdir, and a folder
EVAL_BATCH = 250


@dataclass(frozen=True)
class ImagesConfig:
    """Which images, and how small."""

    name: str = "mnist5k"
    """Dataset: digits, mnist5k, cifar10, cifar100, fashion_mnist or svhn_cropped."""
    path: str | None = None
    """Folder of TensorFlow Datasets, for the last four; None for its default."""
    train: int = 1000
    """The first so many training images train the networks."""
    validation: int = 1000
    """The next so many are for validation; all test images are for the test."""
    pool: int = 4
    """Side in pixels of the squares that are averaged to one pixel."""


@dataclass(frozen=True)
class NetworkConfig:
    """The network around the cell."""

    channels: int = 8
    """Channels throughout."""
    cells: int = 1
    """Cells, one after the other, of one architecture."""


@dataclass(frozen=True)
class TrainConfig:
    """SGD, its learning rate falling to zero as half of a cosine."""

    epochs: int = 25
    """Passes over the training images."""
    batch_size: int = 25
    """Images in a batch."""
    learning_rate: float = 0.1
    """Learning rate of the first step."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 5e-4
    """L2 penalty, added to the gradient."""


@dataclass(frozen=True)
class Config:
    """All that decides what is trained."""

    data: ImagesConfig = field(default_factory=ImagesConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    architectures: int | None = None
    """Train so many of the different architectures, drawn at random; None for all."""
    seeds: int = 3
    """Networks of each architecture, each with its own weights and order of images."""
    together: int = 51
    """Networks that are trained at once, which decides about memory and speed alone."""
    seed: int = 0
    """Of everything random."""
    run: tyro.conf.OmitArgPrefixes[DeviceConfig] = field(default_factory=DeviceConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/enumerate_space-PRESET-seedSEED."""


PRESETS = {
    "nasbench201_small": ("306 architectures on 7x7 images of MNIST (embedded)", Config()),
    "pilot": (
        "20 of the architectures, to see how much they differ",
        Config(architectures=20, together=20),
    ),
    "smoke": (
        "a few of the architectures, one epoch, to see that all works",
        Config(
            data=ImagesConfig(train=100, validation=100),
            network=NetworkConfig(channels=2, cells=1),
            train=TrainConfig(epochs=1),
            architectures=3,
            seeds=2,
            together=3,
        ),
    ),
}


class Group(NamedTuple):
    """Networks that are trained at once: classes of architectures, int [A], with one seed."""

    seed: int
    classes: np.ndarray


def small_network(config: NetworkConfig, num_classes: int) -> Network:
    """The relaxed network, which is that of one architecture with one-hot weights."""
    return SPACE.relaxed(num_classes, channels=config.channels, cells=config.cells)


def make_images(config: ImagesConfig, dataset: data.Dataset) -> Images:
    """The images of the three parts.

    Raises:
      ValueError: if the training set has too few, or they cannot be pooled.
    """
    train = dataset.train
    needed = config.train + config.validation
    if len(train.labels) < needed:
        raise ValueError(
            f"--data.train and --data.validation are {needed} together; {config.name} has"
            f" {len(train.labels)} training images: give fewer"
        )
    first = data.Split(*(x[: config.train] for x in train))
    second = data.Split(*(x[config.train : needed] for x in train))
    first, second, test = (pooled(x, dataset, config.pool) for x in (first, second, dataset.test))
    return Images(first, batched(second, EVAL_BATCH), batched(test, EVAL_BATCH))


def groups(config: Config, num_classes: int) -> list[Group]:
    """What is trained, in this order; each group has the same size, filled up by repetition."""
    drawn = np.arange(num_classes)
    if config.architectures is not None:
        count = min(config.architectures, num_classes)
        drawn = np.sort(np.random.default_rng(config.seed).choice(drawn, count, replace=False))
    size = min(config.together, len(drawn))
    return [
        Group(seed, np.resize(drawn[start : start + size], size))
        for seed in range(config.seeds)
        for start in range(0, len(drawn), size)
    ]


def make_train_group(
    config: Config, dataset: data.Dataset, representatives: np.ndarray
) -> Callable[[Group], np.ndarray]:
    """A function from a group to its right predictions, uint16 [A, epochs, 2].

    It raises NonFinite, which names a network, if the weights of one are not finite.

    Raises:
      ValueError: if the images are too few, or cannot be pooled.
    """
    images = make_images(config.data, dataset)
    steps = config.train.epochs * (config.data.train // config.train.batch_size)
    network = small_network(config.network, dataset.num_classes)
    init, epoch = make_train(network, sgd(config.train, steps), config.train.batch_size)

    def train_group(group: Group) -> np.ndarray:
        # Of a seed and a class alone: a network does not depend on the group that it is in.
        key = jax.random.fold_in(jax.random.key(config.seed), group.seed)
        keys = jax.vmap(lambda c: jax.random.fold_in(key, c))(group.classes)
        weights = one_hot(representatives[group.classes], len(PRIMITIVES))
        state, right = init(keys, weights, images.train.image), []
        for number in range(config.train.epochs):
            state, count, finite = epoch(state, number, images)
            _require_finite(group, number + 1, np.asarray(finite), representatives)
            right.append(np.asarray(count))
        return np.stack(right, 1).astype(np.uint16)

    return train_group


def _require_finite(
    group: Group, epoch: int, finite: np.ndarray, representatives: np.ndarray
) -> None:
    bad = np.unique(group.classes[~finite])
    if bad.size:
        names = " ".join(PRIMITIVES[o] for o in representatives[bad[0]])
        more = f", and of {bad.size - 1} more," if bad.size > 1 else ""
        raise NonFinite(
            f"epoch {epoch}: the weights of architecture {names}, seed {group.seed}{more} are not"
            " finite. Finished groups are kept; train anew with a lower --train.learning-rate in"
            " another --workdir"
        )


def train_all(
    config: Config, dataset: data.Dataset, workdir: Path, display: Display
) -> ground_truth.Table:
    """Trains what is not trained yet, and returns the table of all."""
    representatives, class_of = isomorphism.classes(EDGES, PRIMITIVES)
    with command_line.user_errors():
        train_group = make_train_group(config, dataset, representatives)
    todo = groups(config, len(representatives))
    right = np.zeros((len(representatives), config.seeds, config.train.epochs, 2), np.uint16)
    start, trained = time.monotonic(), 0
    for i, group in enumerate(todo):
        path = workdir / FINISHED / f"{i:04}.npy"
        if not path.exists():
            found = train_group(group)
            with writing(workdir):
                _save(found, path)
            trained += 1
            rate = (time.monotonic() - start) / trained
            display.console.print(
                f"{i + 1} of {len(todo)} groups of {len(group.classes)} networks;"
                f" {rate:.0f} s each, {rate * (len(todo) - i - 1) / 60:.0f} min left",
                highlight=False,
            )
        right[group.classes, group.seed] = _read(path, right[group.classes, 0].shape)
    done = np.unique([group.classes for group in todo])
    number = np.full(len(representatives), -1, np.int16)
    number[done] = np.arange(len(done))
    sizes = np.array([config.data.validation, len(dataset.test.labels)], np.int32)
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in APART}
    architectures = (representatives[done], number[class_of])
    return ground_truth.Table(
        PRIMITIVES, EDGES, *architectures, right[done], sizes, json.dumps(fields)
    )


def _save(array: np.ndarray, path: Path) -> None:
    content = io.BytesIO()
    np.save(content, array)
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, content.getvalue())


def _read(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    with command_line.user_errors():
        try:
            found = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); remove it") from error
        if found.shape != shape:
            raise ValueError(f"{path} has shape {list(found.shape)}, not {list(shape)}; remove it")
        return found


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    data.check(config.data.name)
    command_line.check_at_least(
        ("data.train", config.data.train, 1),
        ("data.validation", config.data.validation, 1),
        ("data.pool", config.data.pool, 1),
        ("network.channels", config.network.channels, 1),
        ("network.cells", config.network.cells, 1),
        ("train.epochs", config.train.epochs, 1),
        ("train.batch-size", config.train.batch_size, 1),
        ("train.learning-rate", config.train.learning_rate, 0),
        ("train.momentum", config.train.momentum, 0),
        ("train.weight-decay", config.train.weight_decay, 0),
        ("seeds", config.seeds, 2),
        ("together", config.together, 1),
    )
    if config.architectures is not None:
        command_line.check_at_least(("architectures", config.architectures, 3))
    if config.train.batch_size > config.data.train:
        raise ValueError(
            f"--train.batch-size is {config.train.batch_size}; give at most the"
            f" {config.data.train} images of --data.train"
        )
    command_line.check_seed(config.seed)


def summary(table: ground_truth.Table, chance: float, workdir: Path, command: str) -> Table:
    """The table that the experiment ends with; chance is the accuracy of guessing."""
    shown = Table(title="Enumeration finished", show_header=False, title_justify="left")
    count, seeds, epochs, _ = table.right.shape
    shown.add_row("trained", f"{count} architectures, {seeds} seeds, {epochs} epochs")
    for i, part in enumerate(ground_truth.PARTS):
        final = table.accuracy[:, :, -1, i]
        means = final.mean(1)
        best = table.architectures[means.argmax()]
        names = " ".join(table.primitives[o] for o in best)
        shown.add_row(
            f"{part} accuracy",
            f"{means.min():.1%} to {means.max():.1%}, median {np.median(means):.1%}; best: {names}",
        )
        for text, rows in (("all", final), ("above twice chance", final[means > 2 * chance])):
            if len(rows) < 3:
                continue
            found = ground_truth.agreement(rows)
            shown.add_row(
                f"  {text}",
                f"{len(rows)}: standard deviation between architectures {found.between**0.5:.2%},"
                f" between seeds {found.within**0.5:.2%}; rank correlation of seeds"
                f" {found.rank_correlation:.3f}",
            )
    shown.add_row("written to", Text(str(workdir / TABLE)))
    shown.add_row("next", Text(command))
    return shown


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        prepare_device(config.run)
        check(config)
    workdir = config.workdir or Path("runs") / f"enumerate_space-{preset}-seed{config.seed}"
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path)
        facts = {
            "images": data.fingerprint(dataset.train),
            "test images": data.fingerprint(dataset.test),
        }
        with writing(workdir):
            write_config(config, workdir, facts)
        table = train_all(config, dataset, workdir, display)
        with writing(workdir):
            ground_truth.save(table, workdir / TABLE)
    command = command_line.next_command(MODULE, argv, config.seed + 1)
    display.console.print(summary(table, 1 / dataset.num_classes, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
