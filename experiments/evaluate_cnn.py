"""Trains the network of a found cell from scratch, and reports its test error.

    python -m experiments.evaluate_cnn                       # digits, the cells searched last
    python -m experiments.evaluate_cnn --genotype DARTS_V2 --seeds 5
    python -m experiments.evaluate_cnn paper --genotype runs/search_cnn-paper-seed0/genotype.json

The workdir then holds the cells, the trained networks (see `darts_jax.prediction`), the first of
them as a file that runs on its own, and what `experiments.runner` writes. The same command resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table
from rich.text import Text

from darts_jax import data, genotype, prediction, training
from darts_jax.evaluation import EvaluationNetwork, count_parameters, multiply_adds
from darts_jax.genotype import Genotype
from experiments import command_line, runner
from experiments.config import (
    DataConfig,
    WConfig,
    check_data,
    check_w,
    w_optimizer,
    w_schedule,
)
from experiments.images import make_augment, plain_batch
from experiments.memory import peak_memory
from experiments.metrics import Display
from experiments.sources import newest_search, saved_genotype

MODULE = "experiments.evaluate_cnn"
DEFAULT_GENOTYPE = "DARTS_V2"  # where nothing has been searched yet
EXPORTED = "model.export"  # file of a workdir


@dataclass(frozen=True)
class NetworkConfig:
    """The network of the cells."""

    channels: int = 36
    """Channels of each node in the first cell."""
    layers: int = 20
    """Cells, at least 3: those at 1/3 and 2/3 of the depth are reduction cells."""
    auxiliary: bool = True
    """Train a second classifier, at 2/3 of the depth; needs images of 32x32."""


@dataclass(frozen=True)
class TrainConfig:
    """Training from scratch."""

    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 96
    """Images in a batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the weights."""
    portion: float = 1.0
    """Share of the training images to train on. Below 1, the others take the place of the test
    images, to choose a network by."""
    drop_path: float = 0.2
    """Probability that the output of an edge is dropped; rises to this from 0, epoch by epoch."""
    auxiliary_weight: float = 0.4
    """Weight of the loss of the second classifier."""
    label_smoothing: float = 0.0
    """Share of a label's weight that is spread over all classes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the arithmetic of convolutions; parameters, statistics and losses are float32."""
    remat: bool = False
    """Compute the inside of each cell twice, to save memory."""
    w: WConfig = field(default_factory=lambda: WConfig(learning_rate_min=0.0))


@dataclass(frozen=True)
class Config:
    """All that decides what is trained."""

    data: DataConfig
    genotype: str | None = None
    """Cells: a JSON file or a published name; None for those of the newest search in runs/."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    seeds: int = 1
    """Networks to train side by side: by this seed and those that follow it."""
    seed: int = 0
    """Of everything random: parameters, order of the images, augmentation, drop path."""
    log_every: int = 10
    """Steps from one line of metrics.jsonl to the next."""
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/evaluate_cnn-PRESET-seedSEED."""
    cells: Annotated[Genotype | None, tyro.conf.Suppress] = None
    """What `genotype` stands for."""


# Digits are not mirror symmetric, and an 8x8 image loses a stroke to a shift of more than a pixel.
DIGITS = Config(
    data=DataConfig("digits", crop=1, flip=False),
    network=NetworkConfig(channels=8, layers=5, auxiliary=False),
    train=TrainConfig(epochs=20, batch_size=32, drop_path=0.0, w=WConfig(learning_rate_min=0.0)),
)
# "paper:" is section 3.2.1 and appendix A.2.1 of arXiv 1806.09055v2, "code:" train.py of
# quark0/darts where the paper is silent or differs.
PAPER = Config(
    data=DataConfig(
        "cifar10",
        crop=4,  # code: RandomCrop(32, padding=4)
        flip=True,  # code: RandomHorizontalFlip
        cutout=16,  # paper: cutout; code: of 16 pixels
    ),
    network=NetworkConfig(
        channels=36,  # paper
        layers=20,  # paper
        auxiliary=True,  # paper
    ),
    train=TrainConfig(
        epochs=600,  # paper
        batch_size=96,  # paper
        drop_path=0.2,  # paper
        auxiliary_weight=0.4,  # paper
        label_smoothing=0.0,  # code
        w=WConfig(
            learning_rate=0.025,  # paper
            schedule="cosine",  # paper
            learning_rate_min=0.0,  # paper
            momentum=0.9,  # paper
            weight_decay=3e-4,  # paper
            clip=5.0,  # code
        ),
    ),
    log_every=50,  # code: report_freq
)
PRESETS = {
    "digits": ("8x8 handwritten digits (embedded), minutes on two cores", DIGITS),
    "mnist5k": (
        "28x28 handwritten digits (embedded), tens of minutes on two cores",
        replace(
            DIGITS,
            data=DataConfig("mnist5k", crop=2, flip=False),
            train=replace(DIGITS.train, epochs=10, batch_size=64),
        ),
    ),
    "cifar10": (
        "CIFAR-10 by TensorFlow Datasets, smaller and shorter than the paper's",
        replace(
            PAPER,
            network=NetworkConfig(channels=16, layers=8),
            train=replace(PAPER.train, epochs=100, drop_path=0.1),
        ),
    ),
    "paper": ("CIFAR-10, the values of the paper", PAPER),
    "cifar100": (
        "CIFAR-100, else as paper",
        replace(PAPER, data=replace(PAPER.data, name="cifar100")),
    ),
    "smoke": (
        "a few steps on a few digits, to see that all works",
        replace(
            DIGITS,
            data=replace(DIGITS.data, limit=64),
            network=NetworkConfig(channels=2, layers=3, auxiliary=False),
            train=replace(DIGITS.train, epochs=2, drop_path=0.1),
            log_every=1,
        ),
    ),
}


class Images(NamedTuple):
    """What lives on the device: images to train on, and to test by."""

    train: data.Split
    test: data.Split


class Outcome(NamedTuple):
    """What came of training a cell.

    Attributes:
      errors: of each seed, the share of test images whose label did not come first.
      top5_errors: the share whose label was not among the first five.
      parameters: trainable numbers, without the auxiliary head, which is for training alone.
      multiply_adds: for one image.
      result: of the run.
    """

    errors: np.ndarray
    top5_errors: np.ndarray
    parameters: int
    multiply_adds: int
    result: runner.Result


def evaluation_network(config: Config, num_classes: int) -> EvaluationNetwork:
    """The network that is trained."""
    return EvaluationNetwork(
        config.cells,
        config.network.channels,
        config.network.layers,
        num_classes,
        auxiliary=config.network.auxiliary,
        dtype=jnp.dtype(config.train.precision),
        remat=config.train.remat,
    )


def make_job(config: Config, dataset: data.Dataset) -> runner.Job:
    """The training as the runner takes it; the first axis of every state is that of the seeds.

    Raises:
      ValueError: if the images are too few for a batch. The job's `init`: if they do not fit the
        network.
    """
    train_config, batch_size = config.train, config.train.batch_size
    seeds = range(config.seed, config.seed + config.seeds)
    images = Images(dataset.train, dataset.test)
    if train_config.portion < 1:
        images = Images(*data.split_search(dataset.train, train_config.portion))
    train_size, test_size = len(images.train.labels), len(images.test.labels)
    steps_per_epoch = len(data.epoch_indices(config.seed, 0, train_size, batch_size))
    network = evaluation_network(config, dataset.num_classes)
    schedule = w_schedule(
        train_config.w, train_config.epochs, max(1, steps_per_epoch // train_config.accumulate)
    )
    optimizer = w_optimizer(train_config.w, schedule)
    if train_config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, train_config.accumulate).gradient_transformation()
    step = training.make_step(
        network, optimizer, train_config.label_smoothing, train_config.auxiliary_weight
    )
    augmented = make_augment(config.data, dataset)
    evaluate = training.make_evaluate(network)

    def init() -> training.TrainState:
        shape = dataset.train.images.shape[1:]
        states = [training.init(jax.random.key(seed), network, optimizer, shape) for seed in seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @partial(jax.jit, donate_argnums=0)
    def train_step(states, images: Images, indices):
        def one(state, indices):
            drop_path = None
            if train_config.drop_path:
                epoch = state.step // steps_per_epoch
                drop_path = train_config.drop_path * epoch / train_config.epochs
            # The step folds its number into the key: this is not one of those keys.
            key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
            return step(state, augmented(key, images.train, indices), drop_path)

        states, metrics = jax.vmap(one)(states, indices)
        return states, jax.tree.map(jnp.mean, metrics)

    @jax.jit
    def eval_step(states, images: Images, batch):
        indices, mask = batch
        plain = plain_batch(dataset, images.test, indices)
        sums = jax.vmap(lambda state: evaluate(state, plain, mask))(states)
        named = {f"eval_{name}": values for name, values in sums._asdict().items()}
        means = {name: values.mean() for name, values in named.items()}
        for name in ("eval_accuracy", "eval_top5_accuracy"):
            each = zip(seeds, named[name], strict=True)
            means |= {f"{name}_of_seed_{seed}": value for seed, value in each}
        return means, mask.sum()

    def train_batches(epoch: int) -> list[np.ndarray]:
        orders = [data.epoch_indices(seed, epoch, train_size, batch_size) for seed in seeds]
        return list(np.stack(orders, axis=1))

    return runner.Job(
        name="training step",
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        data=jax.device_put(images),
        train_batches=train_batches,
        eval_batches=list(data.padded_indices(test_size, min(batch_size, test_size))),
        epochs=train_config.epochs,
        steps_per_epoch=steps_per_epoch,
        end_epoch=lambda states: {},
    )


def train(config: Config, dataset: data.Dataset, workdir: Path, display: Display) -> Outcome:
    """Trains the cells of a config, whose `cells` are set, and saves the networks."""
    with command_line.user_errors():
        job = make_job(config, dataset)
    result = runner.run(job, config, workdir, config.log_every, display)
    network = evaluation_network(config, dataset.num_classes)
    shape = dataset.train.images.shape[1:]
    with display.phase("saving the network"), runner.writing(workdir):
        genotype.save(config.cells, workdir / "genotype.json")
        variables = {"params": result.state.params, "batch_stats": result.state.batch_stats}
        plain = network.clone(auxiliary=False, remat=False, dtype=None)
        variables = jax.tree.map(lambda x: x, variables)
        for part in variables.values():
            part.pop("auxiliary", None)  # for training alone
        prediction.save(workdir, plain, variables, shape, dataset.mean, dataset.std)
        prediction.export(prediction.load(workdir), workdir / EXPORTED)
    last = result.epochs[-1]
    seeds = range(config.seed, config.seed + config.seeds)
    return Outcome(
        np.array([1 - last[f"eval_accuracy_of_seed_{seed}"] for seed in seeds]),
        np.array([1 - last[f"eval_top5_accuracy_of_seed_{seed}"] for seed in seeds]),
        count_parameters(variables["params"]) // config.seeds,
        multiply_adds(network, shape),
        result,
    )


def percent(shares: np.ndarray) -> str:
    """Mean of shares in percent, with their sample standard deviation if there are several."""
    text = f"{100 * shares.mean():.2f}"
    return text if len(shares) == 1 else f"{text} ± {100 * shares.std(ddof=1):.2f}"


def summary(
    config: Config, outcome: Outcome, num_classes: int, workdir: Path, command: str
) -> Table:
    """The table that a training ends with."""
    result = outcome.result
    which = "test" if config.train.portion == 1 else "held-out"
    table = Table(title="Training finished", show_header=False, title_justify="left")
    table.add_row("cells", Text(str(config.genotype)))
    table.add_row(f"{which} error", f"{percent(outcome.errors)} %")
    if num_classes > training.TOP:
        table.add_row(f"{which} error, top 5", f"{percent(outcome.top5_errors)} %")
    table.add_row("parameters", f"{outcome.parameters:,}")
    table.add_row("multiply-adds", f"{outcome.multiply_adds:,} an image")
    table.add_row(
        "time",
        f"{result.seconds:.0f} s training, all {len(result.epochs)} epochs;"
        f" {result.compile_seconds:.0f} s tracing and compiling, this time",
    )
    if (peak := peak_memory()) is not None:
        table.add_row("peak memory", f"{peak / 1e6:.0f} MB, this process, compiling included")
    table.add_row("written to", Text(str(workdir)))
    table.add_row("next", Text(command))
    return table


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    data.check(config.data.name)
    check_data(config.data)
    train_config = config.train
    command_line.check_at_least(
        ("network.channels", config.network.channels, 2),
        ("train.epochs", train_config.epochs, 1),
        ("train.batch-size", train_config.batch_size, 1),
        ("train.accumulate", train_config.accumulate, 1),
        ("train.drop-path", train_config.drop_path, 0),
        ("train.auxiliary-weight", train_config.auxiliary_weight, 0),
        ("train.label-smoothing", train_config.label_smoothing, 0),
        ("seeds", config.seeds, 1),
        ("log-every", config.log_every, 1),
    )
    command_line.check_positive(("train.portion", train_config.portion))
    if train_config.portion > 1:
        raise ValueError(f"--train.portion is {train_config.portion}; give 1 at most")
    check_w(train_config.w, "train.w")
    command_line.check_below_one(
        ("train.drop-path", train_config.drop_path),
        ("train.label-smoothing", train_config.label_smoothing),
    )
    command_line.check_seed(config.seed, config.seeds)


def resolve_genotype(config: Config, workdir: Path) -> Config:
    """The config with its cells: those named, those of the run in the workdir, or the newest.

    Raises:
      ValueError: if a file holds no genotype.
    """
    name = config.genotype
    if name is None:
        name = saved_genotype(workdir) or newest_search("search_cnn") or DEFAULT_GENOTYPE
    return with_cells(config, name)


def with_cells(config: Config, source: str) -> Config:
    """The config with the cells of a file, or published ones."""
    return replace(config, genotype=source, cells=genotype.load(source))


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        check(config)
        workdir = config.workdir or Path("runs") / f"evaluate_cnn-{preset}-seed{config.seed}"
        config = resolve_genotype(config, workdir)
    runner.check_workdir(workdir, config)
    command_line.enable_compilation_cache()
    with Display() as display:
        display.console.print(f"cells: {config.genotype}", soft_wrap=True, highlight=False)
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path, config.data.limit)
        outcome = train(config, dataset, workdir, display)
    command = command_line.next_command(MODULE, argv, config.seed + config.seeds)
    display.console.print(summary(config, outcome, dataset.num_classes, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
