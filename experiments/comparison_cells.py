"""The searches of cells on which hypergradients are compared."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import jax

from darts_jax import data, genotype, search, text
from darts_jax.hypergradient import Bilevel
from experiments import devices, runner, search_cnn, search_config, search_rnn, texts
from experiments.config import (
    AlphaConfig,
    DataConfig,
    WConfig,
    alpha_optimizer,
    check_data,
    check_w,
    w_optimizer,
    w_schedule,
)
from experiments.problem import Cells, Problem
from experiments.recurrent_cell import START
from experiments.search_config import NetworkConfig
from experiments.search_rnn import ModelConfig
from experiments.texts import DropoutConfig, TextConfig, TextOptimizerConfig


@dataclass(frozen=True)
class CnnConfig:
    """The search of a convolutional cell, as `experiments.search_cnn` does it."""

    data: DataConfig = search_config.DIGITS.data
    network: NetworkConfig = search_config.DIGITS.network
    epochs: int = 2
    """Passes over the images that train w."""
    batch_size: int = search_config.DIGITS.search.batch_size
    """Images in a batch, for w and for alpha alike."""
    w: WConfig = field(default_factory=WConfig)
    alpha: AlphaConfig = search_config.DIGITS.search.alpha


@dataclass(frozen=True)
class RnnConfig:
    """The search of a recurrent cell, as `experiments.search_rnn` does it."""

    data: TextConfig = search_rnn.PYDOC.data
    model: ModelConfig = search_rnn.PYDOC.model
    dropout: DropoutConfig = search_rnn.PYDOC.dropout
    epochs: int = 1
    """Passes over the training text."""
    batch_size: int = search_rnn.PYDOC.search.batch_size
    """Columns that both texts are cut into."""
    length: int = search_rnn.PYDOC.search.length
    """Words of a sequence; one in twenty is half as long."""
    w: TextOptimizerConfig = search_rnn.PYDOC.search.w
    alpha: AlphaConfig = search_rnn.PYDOC.search.alpha


def check_cells(config: CnnConfig | RnnConfig) -> None:
    """Raises a ValueError for a field out of range, before anything is loaded."""
    if isinstance(config, CnnConfig):
        data.check(config.data.name)
        check_data(config.data)
        check_w(config.w, "problem.w")
    else:
        texts.check_text(config.data, config.dropout, config.w, "problem.w", "problem.")


def cnn(config: CnnConfig) -> Problem:
    """The search of a convolutional cell: its loss, images, augmentation and optimizers."""
    dataset = data.load(config.data.name, config.data.path, config.data.limit)

    @lru_cache
    def job(seed: int) -> runner.Job:
        own = search_config.SearchConfig(
            epochs=config.epochs, batch_size=config.batch_size, w=config.w, alpha=config.alpha
        )
        whole = search_config.Config(config.data, config.network, own, seed)
        return search_cnn.make_job(whole, dataset, Path())

    loss = search.make_loss(search_cnn.supernet(config.network, dataset.num_classes))
    augmented = search_cnn.make_train_step(
        devices.mesh(), lambda _, *pair: pair, config.data, dataset
    )
    steps_per_epoch, num_steps = job(0).steps_per_epoch, config.epochs * job(0).steps_per_epoch

    def prepare(seed: int, state: search.SearchState, step: int):
        epoch, index = divmod(step, steps_per_epoch)
        pair = augmented(state, job(seed).data, job(seed).train_batches(epoch)[index])
        pair = devices.collect(pair)  # stages are compiled for one device
        return state, *(search.Inputs(batch, state.carry) for batch in pair)

    return Problem(
        Bilevel(loss, loss, has_aux=True),
        w_optimizer(config.w, w_schedule(config.w, config.epochs, steps_per_epoch)),
        alpha_optimizer(config.alpha),
        config.w.weight_decay,
        num_steps,
        init=lambda seed: job(seed).init(),
        prepare=prepare,
        evaluate=lambda state: _evaluate(job(0), state),
        alpha_names=_alpha_names(
            ("normal", "reduce"),
            ("c_{k-2}", "c_{k-1}"),
            config.network.nodes,
            genotype.CNN_PRIMITIVES,
        ),
        next_carry=lambda train, val: train.batch_stats,
        cells=Cells(genotype.CNN, genotype.CNN_PRIMITIVES, genotype.derive),
    )


def rnn(config: RnnConfig) -> Problem:
    """The search of a recurrent cell: its losses, texts, dropout and optimizers."""
    corpus = text.load(config.data.name, config.data.path, config.data.limit)

    @lru_cache
    def whole(seed: int) -> search_rnn.Config:
        own = search_rnn.SearchConfig(
            epochs=config.epochs,
            batch_size=config.batch_size,
            length=config.length,
            w=config.w,
            alpha=config.alpha,
        )
        return search_rnn.Config(config.data, config.model, config.dropout, own, seed)

    @lru_cache
    def job(seed: int) -> runner.Job:
        return search_rnn.make_job(whole(seed), corpus, Path())

    task = search_rnn.task(whole(0))
    steps_per_epoch, num_steps = job(0).steps_per_epoch, config.epochs * job(0).steps_per_epoch
    windows = search_rnn.make_train_step(lambda *args: args, whole(0), steps_per_epoch)

    def prepare(seed: int, state: search.SearchState, step: int):
        epoch, index = divmod(step, steps_per_epoch)
        at = job(seed).train_batches(epoch)[index]
        state, train, val = devices.collect(windows(state, job(seed).data, at))
        return state, task.train_inputs(state.carry, train), task.val_inputs(state.carry, val)

    return Problem(
        Bilevel(task.train_loss, task.val_loss, has_aux=True),
        texts.optimizer(config.w),
        alpha_optimizer(config.alpha),
        config.w.weight_decay,
        num_steps,
        init=lambda seed: job(seed).init(),
        prepare=prepare,
        evaluate=lambda state: _evaluate(job(0), state),
        alpha_names=_alpha_names(("",), (START,), config.model.nodes, genotype.RNN_PRIMITIVES),
        next_carry=task.next_carry,
        cells=Cells(genotype.RNN, genotype.RNN_PRIMITIVES, genotype.derive_recurrent),
    )


def _evaluate(job: runner.Job, state: search.SearchState) -> float:
    """The validation loss, over what is the same for every seed."""
    outputs = [job.eval_step(state, job.data, batch) for batch in job.eval_batches]
    sums, counts = zip(*jax.device_get(outputs), strict=True)
    return float(sum(loss["eval_loss"] for loss in sums) / sum(counts))


def _alpha_names(
    cells: tuple[str, ...], inputs: tuple[str, ...], nodes: int, primitives: tuple[str, ...]
) -> tuple[str, ...]:
    states = (*inputs, *map(str, range(nodes)))
    return tuple(
        f"{cell} {states[source]} → {states[destination]} {operation}".lstrip()
        for cell in cells
        for source, destination in genotype.edges(nodes, len(inputs))
        for operation in primitives
    )
