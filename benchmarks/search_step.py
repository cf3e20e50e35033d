"""Times one iteration of the search, a step of alpha and a step of w, beside its rivals.

    python -m benchmarks.search_step
    python -m benchmarks.search_step --sizes S --estimators unrolled --against torch --repeats 1
    python -m benchmarks.search_step --sizes C4-L4-B16 C8-L4-B16 --against

The rivals are the same network written the ordinary way in JAX, and in PyTorch where that is
installed.
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro
from rich import box
from rich.table import Table

from benchmarks.processes import LIBRARY, Case, megabytes, report, with_torch

NUM_CLASSES = 10
IMAGE_SHAPE = (32, 32, 3)

Estimator = Literal["first_order", "unrolled", "finite_difference"]
Rival = Literal["ordinary", "torch"]


class Size(NamedTuple):
    """A supernet and its batch."""

    channels: int
    layers: int
    batch: int


SIZES: dict[str, Size] = {"S": Size(4, 4, 16), "M": Size(8, 5, 32), "L": Size(16, 8, 8)}


def size_of(name: str) -> Size:
    """The size of a name, as S, or C8-L4-B16.

    Raises:
      ValueError: if it is neither.
    """
    if name in SIZES:
        return SIZES[name]
    found = re.fullmatch(r"C([1-9]\d*)-L([1-9]\d*)-B([1-9]\d*)", name)
    if not found:
        raise ValueError(
            f"--sizes {name}: give {', '.join(SIZES)}, or channels, layers and batch as C8-L4-B16"
        )
    return Size(*map(int, found.groups()))


@dataclass(frozen=True)
class Config:
    """Times one iteration of the search beside its rivals."""

    sizes: tuple[str, ...] = ("S", "M", "L")
    """S is 4 channels, 4 layers, batch 16, or C4-L4-B16; M is C8-L5-B32, L is C16-L8-B8. Images are
    32x32x3."""
    estimators: tuple[Estimator, ...] = ("first_order", "unrolled", "finite_difference")
    """Hypergradient estimators. PyTorch has no unrolled one."""
    against: tuple[Rival, ...] = ("ordinary", "torch")
    """Rivals; torch is left out where it is not installed."""
    repeats: int = 3
    """Processes that step, for each case."""
    iterations: int = 5
    """Iterations that each of them times, after one that it does not."""
    output: Path = Path("benchmarks/results/search_step.json")
    """File for the figures."""

    def cases(self, size: str) -> Iterator[Case]:
        """The cases of one size."""
        for estimator, implementation in itertools.product(
            self.estimators, (LIBRARY, *with_torch(self.against))
        ):
            if (implementation, estimator) != ("torch", "unrolled"):
                yield Case(size, implementation, estimator)


def jax_search(case: Case) -> tuple[Callable, Any, Any, Any]:
    """A search in JAX: its step, the state before the first one, and two batches."""
    import jax
    import numpy as np
    import optax

    from benchmarks import ordinary
    from darts_jax import hypergradient, networks, search

    size = size_of(case.size)
    module = networks if case.implementation == LIBRARY else ordinary
    network = module.Supernet(size.channels, size.layers, NUM_CLASSES)
    sgd = optax.chain(optax.add_decayed_weights(3e-4), optax.sgd(0.025, momentum=0.9))
    w_optimizer = optax.flatten(optax.chain(optax.clip_by_global_norm(5.0), sgd))
    alpha_optimizer = optax.chain(
        optax.add_decayed_weights(1e-3), optax.adam(3e-4, b1=0.5, b2=0.999)
    )

    def estimator(problem):
        factory = getattr(hypergradient, case.estimator)
        return factory(problem, *(() if case.estimator == "first_order" else (w_optimizer,)))

    step = search.make_step(network, estimator, w_optimizer, alpha_optimizer)
    state = search.init(jax.random.key(0), network, w_optimizer, alpha_optimizer, IMAGE_SHAPE)
    rng = np.random.default_rng(0)
    train, val = (
        search.Batch(
            jax.numpy.asarray(rng.normal(size=(size.batch, *IMAGE_SHAPE)), "float32"),
            jax.numpy.asarray(rng.integers(NUM_CLASSES, size=size.batch)),
        )
        for _ in range(2)
    )
    return step, state, train, val


def jax_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step of a search in JAX, and waits for it."""
    import jax

    step, state, train, val = jax_search(case)

    def iterate():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, train, val))
        return metrics.train_loss

    return iterate


def torch_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step of a search in PyTorch."""
    import torch

    from benchmarks import torch_reference

    size = size_of(case.size)
    torch.manual_seed(0)
    network = torch_reference.Supernet(size.channels, size.layers, NUM_CLASSES)
    step = torch_reference.make_step(network, case.estimator == "finite_difference")
    height, width, channels = IMAGE_SHAPE
    train, val = (
        (
            torch.randn(size.batch, channels, height, width),
            torch.randint(NUM_CLASSES, (size.batch,)),
        )
        for _ in range(2)
    )
    return lambda: step(train, val)


def table(measurements: list[dict[str, Any]]) -> Table:
    """The figures as a person reads them."""
    view = Table(
        title="Seconds of one iteration, alpha then w", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for name in ("", "estimator", "code"):
        view.add_column(name, no_wrap=True)
    for name in ("compile", "median", "min", "CPU", "peak MB", "XLA MB"):
        view.add_column(name, justify="right")
    for m in measurements:
        names = (m["size"], m["estimator"], m["implementation"])
        if "error" in m:
            view.add_row(*names, "failed")
            continue
        wall, cpu = m["iteration_seconds"], m["iteration_cpu_seconds"]
        view.add_row(
            *names,
            f"{m['compile_seconds']:.1f}",
            f"{wall['median']:.2f}",
            f"{wall['min']:.2f}",
            f"{cpu['median']:.2f}",
            megabytes(m["peak_bytes"]),
            megabytes(m["temp_bytes"]),
        )
    return view


def make_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step of a search, and waits for it."""
    return torch_iteration(case) if case.implementation == "torch" else jax_iteration(case)


def main(config: Config) -> None:
    """Measure size after size; the file is complete for the sizes that are done."""
    try:
        sizes = {name: size_of(name)._asdict() for name in config.sizes}
    except ValueError as error:
        sys.exit(f"error: {error}")
    report(make_iteration, sizes, config.cases, config, table)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.search_step"))
