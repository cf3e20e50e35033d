"""Trains the network of a found cell from scratch, and reports its test error.

    python -m experiments.evaluate_cnn                       # digits, the cells searched last
    python -m experiments.evaluate_cnn --genotype DARTS_V2 --seeds 5
    python -m experiments.evaluate_cnn paper --genotype runs/search_cnn-paper-seed0/genotype.json

The workdir then holds the cells, the trained networks (see `darts_jax.prediction`), the first of
them as a file that runs on its own, and what `experiments.runner` writes. The same command resumes.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from rich.table import Table
from rich.text import Text

from darts_jax import genotype, prediction, training
from darts_jax.evaluation import EvaluationNetwork, count_parameters, multiply_adds
from experiments import command_line, devices, images, runner
from experiments.config import check_groups, check_w, w_optimizer, w_schedule
from experiments.evaluation_config import PRESETS, Config
from experiments.memory import enough_memory, peak_memory
from experiments.metrics import Display
from experiments.run_config import check_run, prepare
from experiments.seeds import OF_SEED, mean_text, over
from experiments.sources import newest_search, saved_genotype
from experiments.workdir import opened, writing

MODULE = "experiments.evaluate_cnn"
DEFAULT_GENOTYPE = "DARTS_V2"  # where nothing has been searched yet
EXPORTED = "model.export"  # file of a workdir


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
        stem=config.network.stem,
        auxiliary=config.network.auxiliary,
        dtype=jnp.dtype(config.train.precision),
        remat=config.train.remat,
        batch_norm_groups=config.network.batch_norm_groups,
    )


def make_job(config: Config, dataset: images.ImageData) -> runner.Job:
    """The training as the runner takes it; the first axis of every state is that of the seeds.

    Raises:
      ValueError: if the images are too few for a batch, or the batches of an epoch cannot be
        accumulated evenly. The job's `init`: if they do not fit the
        network.
    """
    train_config = config.train
    seeds = range(config.seed, config.seed + config.seeds)
    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    over_seeds = partial(over, mesh, config.seeds_at_once)
    feed = images.make_feed(mesh, config, dataset)
    steps_per_epoch = feed.steps_per_epoch
    if steps_per_epoch % train_config.accumulate:
        raise ValueError(
            f"--train.accumulate is {train_config.accumulate}, of which the {steps_per_epoch}"
            " batches of an epoch are no multiple; give one of their divisors"
        )
    network = evaluation_network(config, dataset.num_classes)
    schedule = w_schedule(
        train_config.w, train_config.epochs, steps_per_epoch // train_config.accumulate
    )
    optimizer = w_optimizer(train_config.w, schedule)
    if train_config.accumulate > 1:
        optimizer = optax.MultiSteps(optimizer, train_config.accumulate).gradient_transformation()
    step = training.make_step(
        network,
        optimizer,
        train_config.label_smoothing,
        train_config.auxiliary_weight,
        skip_nonfinite=config.run.skip_nonfinite,
    )
    evaluate = training.make_evaluate(network)

    def init() -> training.TrainState:
        shape = dataset.image_shape
        states = [training.init(jax.random.key(seed), network, optimizer, shape) for seed in seeds]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    @partial(jax.jit, donate_argnums=0)
    def train_step(states, data, items):
        def one(pair):
            state, item = pair
            drop_path = None
            if train_config.drop_path:
                epoch = state.step // steps_per_epoch
                drop_path = train_config.drop_path * epoch / train_config.epochs
            # The step folds its number into the key: this is not one of those keys.
            key, _ = jax.random.split(jax.random.fold_in(state.key, state.step))
            return step(state, feed.train_batch(key, data, item), drop_path)

        states, metrics = over_seeds(one, (states, items))
        means = jax.tree.map(jnp.mean, metrics)
        return states, means._replace(nonfinite=metrics.nonfinite.max())

    @jax.jit
    def eval_step(states, data, item):
        plain, mask = feed.eval_batch(data, item)
        sums = over_seeds(lambda state: evaluate(state, plain, mask), states)
        named = {f"eval_{name}": values for name, values in sums._asdict().items()}
        means = {name: values.mean() for name, values in named.items()}
        for name in ("eval_accuracy", "eval_top5_accuracy"):
            each = zip(seeds, named[name], strict=True)
            means |= {f"{name}{OF_SEED}{seed}": value for seed, value in each}
        return means, mask.sum()

    def placed_train_step(states, data, items):
        spec = PartitionSpec(devices.SEED, devices.DATA)
        return train_step(states, data, feed.place(items, spec))

    def placed_eval_step(states, data, item):
        return eval_step(states, data, feed.place(item, devices.BATCH))

    return runner.Job(
        name="training step",
        init=init,
        train_step=devices.within(mesh, placed_train_step),
        eval_step=devices.within(mesh, placed_eval_step),
        data=feed.data,
        train_batches=feed.train_batches,
        eval_batches=feed.eval_batches,
        epochs=train_config.epochs,
        steps_per_epoch=steps_per_epoch,
        end_epoch=lambda states: {},
        checked=training.checked,
        facts=feed.facts,
        place=lambda states: devices.spread(mesh, states, PartitionSpec(devices.SEED)),
    )


def train(config: Config, dataset: images.ImageData, workdir: Path, display: Display) -> Outcome:
    """Trains the cells of a config, whose `cells` are set, and saves the networks."""
    with command_line.user_errors():
        job = make_job(config, dataset)
    with enough_memory(remedy(config)):
        result = runner.run(job, config, workdir, display)
    network = evaluation_network(config, dataset.num_classes)
    shape = dataset.image_shape
    with display.phase("saving the network"), writing(workdir):
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
        np.array([1 - last[f"eval_accuracy{OF_SEED}{seed}"] for seed in seeds]),
        np.array([1 - last[f"eval_top5_accuracy{OF_SEED}{seed}"] for seed in seeds]),
        count_parameters(variables["params"]) // config.seeds,
        multiply_adds(network, shape),
        result,
    )


def remedy(config: Config) -> str:
    """What to do where the memory is not enough."""
    if (at_once := min(config.seeds_at_once or config.seeds, config.seeds)) > 1:
        return f"go on with --seeds-at-once {at_once // 2}"
    return "give --train.remat, or a smaller --train.batch-size with --train.accumulate"


def percent(shares: np.ndarray) -> str:
    """Mean of shares in percent, with their sample standard deviation if there are several."""
    return mean_text(100 * shares, 2)


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
    images.check(config)
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
    )
    command_line.check_positive(("train.portion", train_config.portion))
    if train_config.portion > 1:
        raise ValueError(f"--train.portion is {train_config.portion}; give 1 at most")
    if config.seeds_at_once is not None:
        command_line.check_at_least(("seeds-at-once", config.seeds_at_once, 1))
    check_groups(config.network.batch_norm_groups, train_config.batch_size)
    check_w(train_config.w, "train.w")
    command_line.check_below_one(
        ("train.drop-path", train_config.drop_path),
        ("train.label-smoothing", train_config.label_smoothing),
    )
    command_line.check_seed(config.seed, config.seeds)
    check_run(config.run)


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
        prepare(config.run)
        check(config)
        workdir = config.workdir or Path("runs") / f"evaluate_cnn-{preset}-seed{config.seed}"
        config = resolve_genotype(config, workdir)
    with opened(workdir, config, config.run.fork) as workdir, Display() as display:
        display.console.print(f"cells: {config.genotype}", soft_wrap=True, highlight=False)
        with command_line.user_errors(), display.phase(f"loading {config.data.name}"):
            dataset = images.load(config)
        outcome = train(config, dataset, workdir, display)
    command = command_line.next_command(MODULE, argv, config.seed + config.seeds)
    display.console.print(summary(config, outcome, dataset.num_classes, workdir, command))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
