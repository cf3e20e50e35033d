"""What experiments on text share: configs, text on the device, windows of it, evaluation."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from darts_jax import language_model, recurrent, text
from darts_jax.genotype import RecurrentGenotype
from darts_jax.language_model import Batch, Cell, Dropout
from darts_jax.text import Corpus
from experiments import devices
from experiments.command_line import check_at_least, check_below_one, check_positive

MAX_LOSS = 700.0  # whose exponential is still a float
EVALUATION_LENGTH = 35  # rows of a window; the loss does not depend on it


@dataclass(frozen=True)
class TextConfig:
    """The text."""

    name: str
    """Text: pydoc, which comes with Python; ptb or wikitext2, from a folder."""
    path: str | None = None
    """Folder of the train, valid and test files, for the last two."""
    limit: int | None = None
    """Use this many words of each part only, the first ones; None for all."""


@dataclass(frozen=True)
class DropoutConfig:
    """Probabilities that something is set to zero for a whole sequence."""

    words: float = 0.0
    """All of a word's embedding."""
    embedding: float = 0.0
    """An element of the embeddings, as they are looked up."""
    input: float = 0.0
    """An element of the cell's input."""
    hidden: float = 0.0
    """An element of what each node reads."""
    output: float = 0.0
    """An element of the hidden states that the decoder reads."""


@dataclass(frozen=True)
class TextOptimizerConfig:
    """Optimizer of the weights: SGD, its rate proportional to the length of the sequence."""

    learning_rate: float = 20.0
    """Learning rate at the usual length."""
    weight_decay: float = 5e-7
    """L2 penalty, added to the gradient once that is clipped."""
    clip: float = 0.25
    """Largest global norm of the gradient."""


class Texts(NamedTuple):
    """What lives on the device: a text in columns, int32 [rows + filling, batch]."""

    train: Array
    val: Array


class Recurrence(NamedTuple):
    """What of a language model depends on its cell.

    Attributes:
      cell: for `language_model.apply`.
      init: (key, vocabulary) -> parameters of the model.
      width: numbers in a hidden state.
    """

    cell: Cell
    init: Callable[[jax.Array, int], Any]
    width: int


def perplexity(loss: float) -> float:
    """Of a cross-entropy in nats a word, `<unk>` counted as one; infinity where it has no float."""
    return math.exp(loss) if loss < MAX_LOSS else math.inf


def recurrence(cell: RecurrentGenotype | None, size: int) -> Recurrence:
    """That of a discrete cell of this size, or of an LSTM for None."""
    if cell is not None:
        nodes = len(cell.recurrent)
        return Recurrence(
            language_model.discrete_cell(cell),
            lambda key, vocabulary: language_model.init_params(key, vocabulary, size, nodes),
            size,
        )

    def init(key: jax.Array, vocabulary: int) -> Any:
        key, cell_key = jax.random.split(key)
        params = language_model.init_params(key, vocabulary, size, num_nodes=0)
        return params | {"cell": recurrent.lstm_params(cell_key, size, size)}

    return Recurrence(recurrent.lstm, init, 2 * size)


def dropout_of(config: DropoutConfig) -> Dropout:
    """The probabilities as the model takes them."""
    return Dropout(config.words, config.embedding, config.input, config.hidden, config.output)


def optimizer(config: TextOptimizerConfig) -> optax.GradientTransformation:
    """SGD whose learning rate is in its state: see `with_length`."""

    def sgd(learning_rate):
        return optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(learning_rate),
        )

    return optax.inject_hyperparams(sgd)(learning_rate=config.learning_rate)


def with_length(
    opt_state: optax.OptState, config: TextOptimizerConfig, length: Array, usual: int
) -> optax.OptState:
    """The state of `optimizer` with the learning rate for a sequence of this length."""
    rate = config.learning_rate * length / usual
    return optax.tree.set(opt_state, learning_rate=rate.astype(jnp.float32))


def on_device(mesh: Mesh, tokens: np.ndarray, batch: int, filling: int) -> Array:
    """A text in columns, with rows at its end that only fill windows up.

    Each device has columns of its own.
    """
    rows = text.columns(tokens, batch)
    spec = PartitionSpec(None, devices.DATA)
    return devices.keep(mesh, np.pad(rows, ((0, filling), (0, 0))), spec)


def window(rows: Array, start: Array, length: Array, longest: int, key: Array) -> Batch:
    """The batch of `length` rows from `start` on, filled up to the longest."""
    piece = jax.lax.dynamic_slice_in_dim(rows, start, longest + 1)
    return Batch(piece[:-1], piece[1:], jnp.arange(longest) < length, key)


def make_evaluation(
    mesh: Mesh, corpus: Corpus, split: str, batch: int, width: int
) -> Callable[..., tuple[Array, Array]]:
    """`evaluate(params, cell) -> (summed cross-entropy, tokens)` of a part of the text.

    It is cut into so many columns, and a hidden state has so many numbers.
    """
    columns = text.columns(getattr(corpus, split), batch)
    tokens, targets, valid = jax.device_put(text.consecutive(columns, EVALUATION_LENGTH))

    def evaluate(params, cell: Cell) -> tuple[Array, Array]:
        spread = devices.constrain(mesh, (tokens, targets), PartitionSpec(None, None, devices.DATA))
        hidden = devices.constrain(mesh, jnp.zeros((batch, width)), devices.BATCH)
        return language_model.evaluate(params, cell, hidden, *spread, valid)

    return evaluate


def check_text(
    data: TextConfig, dropout: DropoutConfig, w: TextOptimizerConfig, prefix: str, outer: str = ""
) -> None:
    """Raises a ValueError for a field out of range.

    The optimizer's flags begin with `prefix`, and those of the dropout's with `outer`.
    """
    text.check(data.name, data.path)
    for name in Dropout._fields:
        row = f"{outer}dropout.{name}", getattr(dropout, name)
        check_at_least((*row, 0))
        check_below_one(row)
    check_at_least(
        (f"{prefix}.learning-rate", w.learning_rate, 0),
        (f"{prefix}.weight-decay", w.weight_decay, 0),
    )
    check_positive((f"{prefix}.clip", w.clip))
