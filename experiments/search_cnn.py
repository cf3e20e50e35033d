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
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table
from rich.text import Text

from darts_jax import data, genotype, hypergradient, search
from darts_jax.networks import Supernet
from experiments import command_line, devices, remedies, runner, seeds
from experiments.config import (
    DataConfig,
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
from experiments.remedies import RemediesConfig
from experiments.run_config import check_run, prepare
from experiments.search_config import PRESETS, Config, NetworkConfig, SearchConfig
from experiments.workdir import opened

MODULE = "experiments.search_cnn"


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
        partial=config.partial,
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


def end_epoch(
    workdir: Path,
    record: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    eigenvalue: Callable[[search.SearchState], float] | None,
    state: search.SearchState,
) -> dict[str, Any]:
    """Saves the cells so far; returns the alphas, to be recorded, and the eigenvalue if wanted."""
    alpha = record(jax.device_get(state.alpha))
    genotype.save(genotype.derive(alpha), workdir / "genotype.json")
    line: dict[str, Any] = {"alpha": {name: values.tolist() for name, values in alpha.items()}}
    return line if eigenvalue is None else line | {"eigenvalue": eigenvalue(state)}


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
    own, num_steps = config.search.remedies, epochs * steps_per_epoch
    mask = remedies.survivors(own)
    network = remedies.adapt(own, supernet(config.network, dataset.num_classes), mask)
    w = w_optimizer(config.search.w, w_schedule(config.search.w, epochs, steps_per_epoch))
    alpha = alpha_optimizer(config.search.alpha)
    relax = remedies.make_relaxation(own, mask)
    whole = remedies.with_auxiliary_skip(own, relax)
    step = remedies.make_step(
        own,
        network,
        relax,
        make_estimator(config.search, w),
        w,
        alpha,
        config.run.skip_nonfinite,
        num_steps,
    )
    eigenvalue = remedies.make_eigenvalue(network, whole, dataset, val, batch_size, num_steps)

    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    train_step = make_train_step(mesh, step, config.data, dataset)
    eval_step = make_eval_step(mesh, search.make_evaluate(network, whole), dataset)
    images = devices.keep(mesh, Images(train, val))
    spec = PartitionSpec(*devices.leading(config.seeds))
    facts = {
        "train images": data.fingerprint(train),
        "validation images": data.fingerprint(val),
        **remedies.facts(mask),
    }

    def end(folder: Path, state: search.SearchState) -> dict[str, Any]:
        due = own.eigenvalue_every and state.step // steps_per_epoch % own.eigenvalue_every == 0
        record = partial(remedies.recorded, mask=mask)
        return end_epoch(folder, record, eigenvalue if due else None, state)

    def alone(seed: int, folder: Path) -> runner.Job:
        def init() -> search.SearchState:
            key, shape = jax.random.key(seed), dataset.image_shape
            return search.init(key, network, w, alpha, shape, remedies.init_alpha(own))

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
            end_epoch=partial(end, folder),
            checked=search.checked,
            stop=lambda lines: remedies.stop_line(own, lines) is not None,
            draw=partial(draw, folder, own),
            facts=facts,
            place=lambda state: devices.spread(mesh, state, spec),
        )

    return seeds.together(
        alone, seeds_of(config), config.seeds_at_once, workdir, mesh, partial(found, own)
    )


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
        ("network.partial", config.network.partial, 1),
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
    remedies.check(config.search.remedies)
    seeds.check(config.seed, config.seeds, config.seeds_at_once)
    if config.seeds > 1 and config.search.remedies.stop_ratio:
        raise ValueError(
            "--search.remedies.stop-ratio ends each search at a time of its own; give --seeds 1"
        )
    check_run(config.run)


def found(own: RemediesConfig, epochs: Sequence[dict[str, Any]]) -> genotype.Genotype:
    """The cells that the last of some epochs stands for, or the one that an early stop goes to."""
    return genotype.derive((remedies.stop_line(own, epochs) or epochs[-1])["alpha"])


def draw(workdir: Path, own: RemediesConfig, epochs: Sequence[dict[str, Any]]) -> list[Path]:
    """Draws the cells that were found, and the alphas over time; returns the pictures, PNG."""
    from darts_jax import plots  # matplotlib

    alphas = {
        name: np.array([line["alpha"][name] for line in epochs]) for name in ("normal", "reduce")
    }
    cells = found(own, epochs)
    genotype.save(cells, workdir / "genotype.json")
    plots.draw_genotype(cells, workdir)
    plots.draw_alphas(
        [line["step"] for line in epochs], alphas, genotype.CNN_PRIMITIVES, workdir / "alphas"
    )
    names = [*alphas, "alphas"]
    if any("eigenvalue" in line for line in epochs):
        remedies.draw_eigenvalues(own, epochs, workdir / "eigenvalue")
        names.append("eigenvalue")
    return [workdir / f"{name}.png" for name in names]


def search_cells(
    config: Config, dataset: data.Dataset, workdir: Path, display: Display
) -> tuple[genotype.Genotype, runner.Result]:
    """Searches, or goes on where the workdir says; returns the cells of the best seed."""
    with command_line.user_errors():
        job = make_job(config, dataset, workdir)
    result = runner.run(job, config, workdir, display)
    return found(config.search.remedies, seeds.of_best(result.epochs, seeds_of(config))), result


def summary(
    cells: genotype.Genotype,
    result: runner.Result,
    own_seeds: Sequence[int],
    find: Callable[[Sequence[dict[str, Any]]], genotype.Genotype],
    workdir: Path,
    command: str,
) -> Table:
    """The table that a search ends with; the cells are those of the best seed.

    `find` gives the cells of the lines of kind "epoch" of one.
    """

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

    seeds.add_rows(table, result.epochs, own_seeds, validation, find)
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
    find = partial(found, config.search.remedies)
    display.console.print(summary(cells, result, seeds_of(config), find, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
