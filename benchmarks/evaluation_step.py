"""Times compiling, and one training step, of evaluation networks of several depths.

    python -m benchmarks.evaluation_step
    python -m benchmarks.evaluation_step --layers 20 --against

Cells of equal shape run as a loop, so that a deep network compiles in little more than a shallow
one. The cells are DARTS_V2's, images 32x32x3. The rival is the same network in PyTorch, where that
is installed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro
from rich import box
from rich.table import Table

from benchmarks.processes import LIBRARY, TORCH, Case, megabytes, report, with_torch

CELLS = "DARTS_V2"
NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)
LEARNING_RATE, DROP_PATH = 0.025, 0.2


@dataclass(frozen=True)
class Config:
    """Times compiling, and one training step, of evaluation networks of several depths."""

    layers: tuple[int, ...] = (8, 20)
    """Cells of a network."""
    channels: int = 36
    """Channels of each node in the first cell."""
    batch: int = 8
    """Images in a batch."""
    against: tuple[Literal["torch"], ...] = ("torch",)
    """Rivals; torch is left out where it is not installed."""
    repeats: int = 1
    """Processes that step, for each depth."""
    iterations: int = 3
    """Steps that each of them times, after one that it does not."""
    output: Path = Path("benchmarks/results/evaluation_step.json")
    """File for the figures."""


def make_iteration(channels: int, batch: int, case: Case) -> Callable[[], Any]:
    """A function that takes the next training step, and waits for it."""
    make = torch_iteration if case.implementation == TORCH else jax_iteration
    return make(channels, int(case.size), batch)


def torch_iteration(channels: int, layers: int, batch: int) -> Callable[[], Any]:
    """In PyTorch."""
    import torch

    from benchmarks import torch_evaluation
    from darts_jax.genotype import PUBLISHED

    torch.manual_seed(0)
    network = torch_evaluation.Network(PUBLISHED[CELLS], channels, layers, NUM_CLASSES)
    step = torch_evaluation.make_step(network, LEARNING_RATE, DROP_PATH)
    height, width, image_channels = IMAGE_SHAPE
    images = torch.randn(batch, image_channels, height, width)
    example = images, torch.randint(NUM_CLASSES, (batch,))
    return lambda: step(example)


def jax_iteration(channels: int, layers: int, batch: int) -> Callable[[], Any]:
    """In JAX."""
    import jax
    import numpy as np

    from darts_jax import training
    from darts_jax.evaluation import EvaluationNetwork
    from darts_jax.genotype import PUBLISHED
    from darts_jax.search import Batch
    from experiments.config import WConfig, w_optimizer

    network = EvaluationNetwork(PUBLISHED[CELLS], channels, layers, NUM_CLASSES, auxiliary=True)
    optimizer = w_optimizer(WConfig(), LEARNING_RATE)
    state = training.init(jax.random.key(0), network, optimizer, IMAGE_SHAPE)
    step = jax.jit(training.make_step(network, optimizer), donate_argnums=0)
    rng = np.random.default_rng(0)
    images = jax.numpy.asarray(rng.normal(size=(batch, *IMAGE_SHAPE)), "float32")
    example = Batch(images, jax.numpy.asarray(rng.integers(NUM_CLASSES, size=batch)))
    drop_path = jax.numpy.float32(DROP_PATH)

    def iterate():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, example, drop_path))
        return metrics.train_loss

    return iterate


def table(measurements: list[dict[str, Any]]) -> Table:
    """The figures as a person reads them."""
    view = Table(title="Seconds of one training step", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("layers", "code", "compile", "median", "peak MB", "XLA MB"):
        view.add_column(name, justify="right", no_wrap=True)
    for m in measurements:
        if "error" in m:
            view.add_row(m["size"], m["implementation"], "failed")
            continue
        view.add_row(
            m["size"],
            m["implementation"],
            f"{m['compile_seconds']:.1f}",
            f"{m['iteration_seconds']['median']:.2f}",
            megabytes(m["peak_bytes"]),
            megabytes(m["temp_bytes"]),
        )
    return view


def main(config: Config) -> None:
    """Measure depth after depth."""
    sizes = {str(layers): {"layers": layers} for layers in config.layers}
    make = partial(make_iteration, config.channels, config.batch)
    rivals = (LIBRARY, *with_torch(config.against))
    report(make, sizes, lambda size: (Case(size, name, "none") for name in rivals), config, table)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.evaluation_step"))
