"""Times one iteration of the recurrent search, and one training step of a discrete cell.

    python -m benchmarks.rnn_step
    python -m benchmarks.rnn_step --sizes search-64 --estimators unrolled --repeats 1

The rival is the same model in PyTorch, a cell written the ordinary way, where that is installed.
Its second order is the finite difference. There is no dropout, which both would do alike.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import tyro
from rich import box
from rich.table import Table

from benchmarks.processes import LIBRARY, TORCH, Case, megabytes, report, with_torch
from darts_jax.genotype import PUBLISHED_RECURRENT

CELL = "DARTS_V2"  # of the training
LENGTH = 35  # words of a sequence
LEARNING_RATE = 1.0  # small enough for random words not to diverge

Estimator = Literal["first_order", "unrolled", "finite_difference"]
SizeName = Literal["search-64", "search-300", "train-300"]


class Size(NamedTuple):
    """A model and its batch."""

    size: int
    nodes: int
    batch: int
    vocabulary: int


SIZES = {
    "search-64": Size(64, 8, 32, 1600),
    "search-300": Size(300, 8, 32, 10_000),
    "train-300": Size(300, 8, 64, 10_000),
}


@dataclass(frozen=True)
class Config:
    """Times one iteration of the recurrent search, and one training step of a discrete cell."""

    sizes: tuple[SizeName, ...] = ("search-64", "search-300", "train-300")
    """Length of a state; batch 32 and 1600 words for 64, else 10,000 words, and batch 32 to search
    and 64 to train."""
    estimators: tuple[Estimator, ...] = ("first_order", "unrolled", "finite_difference")
    """Of the search. PyTorch has no unrolled one."""
    repeats: int = 2
    """Processes that step, for each case."""
    iterations: int = 5
    """Iterations that each of them times, after one that it does not."""
    output: Path = Path("benchmarks/results/rnn_step.json")
    """File for the figures."""

    def cases(self, size: str) -> Iterator[Case]:
        """The cases of one size."""
        estimators = self.estimators if size.startswith("search") else ("none",)
        for estimator, implementation in itertools.product(
            estimators, (LIBRARY, *with_torch([TORCH]))
        ):
            if (implementation, estimator) != (TORCH, "unrolled"):
                yield Case(size, implementation, estimator)


def texts(size: Size) -> list[np.ndarray]:
    """Tokens and targets to train on and to validate on, int [T, B] each."""
    rng = np.random.default_rng(0)
    rows = rng.integers(size.vocabulary, size=(2, LENGTH + 1, size.batch))
    return [part for text in rows for part in (text[:-1], text[1:])]


def make_iteration(case: Case) -> Callable[[], Any]:
    """A function that takes the next step, and waits for it."""
    if case.implementation == TORCH:
        return torch_iteration(case)
    return jax_search(case) if case.size.startswith("search") else jax_training(case)


def jax_batches(size: Size) -> list[Any]:
    """The training and the validation batch."""
    import jax

    from darts_jax.language_model import Batch

    train_tokens, train_targets, val_tokens, val_targets = map(jax.numpy.asarray, texts(size))
    valid, key = np.ones(LENGTH, bool), jax.random.key(0)
    return [
        Batch(train_tokens, train_targets, valid, key),
        Batch(val_tokens, val_targets, valid, key),
    ]


def jax_search(case: Case) -> Callable[[], Any]:
    """The next step of a search in JAX."""
    import jax
    import jax.numpy as jnp

    from darts_jax import genotype, language_model, recurrent, search
    from experiments import config, search_rnn
    from experiments.texts import DropoutConfig, TextConfig, TextOptimizerConfig, optimizer

    size = SIZES[case.size]
    settings = search_rnn.SearchConfig(
        case.estimator, slowness=0.0, w=TextOptimizerConfig(LEARNING_RATE)
    )
    whole = search_rnn.Config(
        TextConfig("ptb"),
        search_rnn.ModelConfig(size.size, size.nodes),
        DropoutConfig(),
        settings,
    )
    w_optimizer, alpha_optimizer = optimizer(settings.w), config.alpha_optimizer(settings.alpha)
    step = search.make_task_step(
        search_rnn.task(whole),
        search_rnn.make_estimator(settings, w_optimizer),
        w_optimizer,
        alpha_optimizer,
    )
    key, hidden = jax.random.key(0), jnp.zeros((size.batch, size.size))
    w = language_model.init_params(key, size.vocabulary, size.size, size.nodes)
    alpha = jnp.zeros((len(genotype.edges(size.nodes, 1)), len(genotype.RNN_PRIMITIVES)))
    state = search.SearchState(
        jnp.zeros((), jnp.int32),
        key,
        w,
        alpha,
        search_rnn.Carry(recurrent.running_statistics(size.size), hidden, hidden + 0),
        w_optimizer.init(w),
        alpha_optimizer.init(alpha),
    )
    train, val = jax_batches(size)

    def iterate():
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, train, val))
        return metrics.train_loss

    return iterate


def jax_training(case: Case) -> Callable[[], Any]:
    """The next training step of a discrete cell in JAX."""
    from functools import partial

    import jax
    import jax.numpy as jnp
    import optax

    from darts_jax import language_model
    from experiments.texts import TextOptimizerConfig, optimizer

    size = SIZES[case.size]
    cell = language_model.discrete_cell(PUBLISHED_RECURRENT[CELL])
    loss = language_model.make_discrete_loss(cell)
    w_optimizer = optimizer(TextOptimizerConfig(LEARNING_RATE))
    train, _ = jax_batches(size)

    @partial(jax.jit, donate_argnums=(0, 1, 2))
    def step(params, hidden, opt_state):
        inputs = language_model.Inputs(train, hidden, None)
        (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(params, inputs)
        updates, opt_state = w_optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), aux.hidden, opt_state), value

    params = language_model.init_params(
        jax.random.key(0), size.vocabulary, size.size, len(PUBLISHED_RECURRENT[CELL].recurrent)
    )
    state = params, jnp.zeros((size.batch, size.size)), w_optimizer.init(params)

    def iterate():
        nonlocal state
        state, value = jax.block_until_ready(step(*state))
        return value

    return iterate


def torch_iteration(case: Case) -> Callable[[], Any]:
    """The next step of a search, or of a training, in PyTorch."""
    import torch

    from benchmarks import torch_recurrent

    size = SIZES[case.size]
    torch.manual_seed(0)
    cell = None if case.size.startswith("search") else PUBLISHED_RECURRENT[CELL]
    model = torch_recurrent.Model(size.vocabulary, size.size, size.nodes, cell)
    hidden = torch.zeros(size.batch, size.size)
    second_order = case.estimator == "finite_difference"
    step = torch_recurrent.make_step(model, hidden, second_order, LEARNING_RATE)
    parts = list(map(torch.as_tensor, texts(size)))
    return lambda: step(parts[:2], parts[2:])


def table(measurements: list[dict[str, Any]]) -> Table:
    """The figures as a person reads them; tokens are those of the training batch."""
    view = Table(title="Seconds of one iteration", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("", "estimator", "code"):
        view.add_column(name, no_wrap=True)
    for name in ("compile", "median", "tokens/s", "peak MB", "XLA MB"):
        view.add_column(name, justify="right", no_wrap=True)
    for m in measurements:
        names = (m["size"], m["estimator"], m["implementation"])
        if "error" in m:
            view.add_row(*names, "failed")
            continue
        seconds = m["iteration_seconds"]["median"]
        view.add_row(
            *names,
            f"{m['compile_seconds']:.1f}",
            f"{seconds:.3f}",
            f"{LENGTH * SIZES[m['size']].batch / seconds:,.0f}",
            megabytes(m["peak_bytes"]),
            megabytes(m["temp_bytes"]),
        )
    return view


def main(config: Config) -> None:
    """Measure size after size."""
    sizes = {name: SIZES[name]._asdict() for name in config.sizes}
    report(make_iteration, sizes, config.cases, config, table)


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.rnn_step"))
