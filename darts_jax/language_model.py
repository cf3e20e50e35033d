"""The recurrent language model of a search or of a discrete cell, as pure functions.

Embedding and decoder share their weights. Dropout is drawn once for a sequence, from the key of its
batch: the passes that an estimator makes over one batch all see the same masks.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from darts_jax import recurrent, relaxation
from darts_jax.genotype import RNN_PRIMITIVES, RecurrentGenotype
from darts_jax.operations import Moments
from darts_jax.recurrent import ACTIVATIONS, Masks, Trajectory
from darts_jax.relaxation import Context, Relaxation

PyTree = Any
Cell = Callable[..., Trajectory]


class Dropout(NamedTuple):
    """Probabilities, in [0, 1), that something is set to zero for a whole sequence.

    Attributes:
      words: all of a word's embedding, for the whole batch.
      embedding: an element of the embeddings, as they are looked up.
      input: an element of the cell's input.
      hidden: an element of what each node reads.
      output: an element of the hidden states that the decoder reads.
    """

    words: float = 0.0
    embedding: float = 0.0
    input: float = 0.0
    hidden: float = 0.0
    output: float = 0.0


NO_DROPOUT = Dropout()


class ModelMasks(NamedTuple):
    """Factors 0 or 1 / keep: words [V, 1], embedding and output [B, D], those of the cell."""

    words: Array
    embedding: Array
    output: Array
    cell: Masks


class Batch(NamedTuple):
    """A piece of B texts.

    Attributes:
      tokens: int [T, B].
      targets: int [T, B], the tokens one later.
      valid: bool [T], False at steps that only fill up.
      key: random key of its dropout.
      context: what the relaxation may depend on, if it needs one (see `search.with_context`).
    """

    tokens: Array
    targets: Array
    valid: Array
    key: Array
    context: Context | None = None


class Inputs(NamedTuple):
    """A batch for a loss, with what was carried to it: [B, D], and running statistics."""

    batch: Batch
    hidden: Array
    running: Moments | None


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      logits: [T, B, V].
      hidden: [B, D], to carry to the next batch.
      running: running statistics, likewise.
      cross_entropy: mean over the valid tokens, without any regularisation.
    """

    logits: Array
    hidden: Array
    running: Moments | None
    cross_entropy: Array


class Output(NamedTuple):
    """Logits [T, B, V], and what the cell did, before output dropout."""

    logits: Array
    trajectory: Trajectory


def shapes(vocabulary: int, size: int, num_nodes: int) -> PyTree:
    """Shapes of the parameters: embedding [V, D], decoder bias [V], and those of the cell."""
    return {
        "embedding": (vocabulary, size),
        "bias": (vocabulary,),
        "cell": recurrent.shapes(size, size, num_nodes),
    }


def init_params(key: Array, vocabulary: int, size: int, num_nodes: int) -> PyTree:
    """Parameters uniform in +-0.04, the decoder's bias zero."""
    params = recurrent.uniform(key, shapes(vocabulary, size, num_nodes))
    return params | {"bias": jnp.zeros(vocabulary)}


def draw_masks(
    key: Array, dropout: Dropout, batch: int, size: int, vocabulary: int, dtype: Any = jnp.float32
) -> ModelMasks:
    """The masks of one batch of sequences."""
    shapes = ModelMasks(
        (vocabulary, 1), (batch, size), (batch, size), Masks((batch, size), (batch, size))
    )
    rates = ModelMasks(
        dropout.words, dropout.embedding, dropout.output, Masks(dropout.input, dropout.hidden)
    )
    is_shape = lambda x: isinstance(x, tuple) and isinstance(x[0], int)  # noqa: E731
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=is_shape)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        (jax.random.bernoulli(k, 1 - rate, shape) / (1 - rate)).astype(dtype)
        for k, shape, rate in zip(keys, leaves, jax.tree.leaves(rates), strict=True)
    )


def apply(
    params: PyTree,
    tokens: Array,
    hidden: Array,
    cell: Cell,
    masks: ModelMasks | None = None,
    valid: Array | None = None,
) -> Output:
    """Runs the model over a batch.

    Args:
      params: as in `shapes`.
      tokens: int [T, B].
      hidden: [B, D], or what else the cell takes for it.
      cell: (cell's params, x, hidden, masks=, valid=) -> Trajectory.
      masks: dropout; None for none.
      valid: bool [T], False at steps that only fill up.
    """
    table = params["embedding"]
    x = (table if masks is None else table * masks.words)[tokens]
    x = x if masks is None else x * masks.embedding
    cell_masks = None if masks is None else masks.cell
    trajectory = cell(params["cell"], x, hidden, masks=cell_masks, valid=valid)
    outputs = trajectory.hiddens if masks is None else trajectory.hiddens * masks.output
    return Output(outputs @ table.T + params["bias"], trajectory)


def relaxed_cell(
    running: Moments,
    weights: Array,
    train: bool,
    activations: recurrent.Activations = ACTIVATIONS,
    primitives: tuple[str, ...] = RNN_PRIMITIVES,
) -> Cell:
    """The relaxed cell with these mixing weights, for `apply`."""
    columns = {name: primitives.index(name) for name in activations}

    def cell(params, x, hidden, **options):
        return recurrent.relaxed(
            params,
            running,
            x,
            hidden,
            weights,
            train=train,
            activations=activations,
            columns=columns,
            **options,
        )

    return cell


def discrete_cell(
    genotype: RecurrentGenotype, activations: recurrent.Activations = ACTIVATIONS
) -> Cell:
    """The cell of a genotype, for `apply`."""

    def cell(params, x, hidden, **options):
        return recurrent.discrete(params, x, hidden, genotype, activations=activations, **options)

    return cell


def cross_entropies(logits: Array, targets: Array, valid: Array) -> tuple[Array, Array]:
    """(sum of the cross-entropy of all valid tokens, in nats, and their number)."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.where(valid[:, None], losses, 0).sum(), valid.sum() * targets.shape[1]


def slowness(hiddens: Array, valid: Array) -> Array:
    """Mean of (h[t + 1] - h[t])^2 over the valid steps of hiddens [T, B, D]."""
    squares = jnp.square(hiddens[1:] - hiddens[:-1])
    count = jnp.maximum(valid[1:].sum(), 1) * hiddens.shape[1] * hiddens.shape[2]
    return jnp.where(valid[1:, None, None], squares, 0).sum() / count


@lru_cache
def make_loss(
    dropout: Dropout = NO_DROPOUT,
    slowness_weight: float = 0.0,
    relax: Relaxation = relaxation.softmax,
) -> Callable[[PyTree, PyTree, Inputs], tuple[Array, Aux]]:
    """`loss(w, alpha, inputs) -> (value, Aux)` of the relaxed model, for a `Bilevel` problem.

    The mean cross-entropy of the valid tokens, plus slowness_weight times `slowness`. The same
    function for the same arguments, so that what is compiled of it is compiled once.
    """

    def loss(w, alpha, inputs):
        cell = relaxed_cell(inputs.running, relax(alpha, inputs.batch.context), train=True)
        return _loss(w, cell, inputs, dropout, slowness_weight)

    return loss


def make_discrete_loss(
    cell: Cell, dropout: Dropout = NO_DROPOUT, slowness_weight: float = 0.0
) -> Callable[[PyTree, Inputs], tuple[Array, Aux]]:
    """`loss(params, inputs) -> (value, Aux)` of the model with this cell, as `make_loss`."""
    return lambda params, inputs: _loss(params, cell, inputs, dropout, slowness_weight)


def _loss(params, cell, inputs, dropout, slowness_weight):
    batch = inputs.batch
    vocabulary, size = params["embedding"].shape
    masks = None
    if any(dropout):
        masks = draw_masks(
            batch.key, dropout, batch.tokens.shape[1], size, vocabulary, params["embedding"].dtype
        )
    output = apply(params, batch.tokens, inputs.hidden, cell, masks, batch.valid)
    total, count = cross_entropies(output.logits, batch.targets, batch.valid)
    cross_entropy = value = total / count
    if slowness_weight:
        value = value + slowness_weight * slowness(output.trajectory.hiddens, batch.valid)
    trajectory = output.trajectory
    return value, Aux(output.logits, trajectory.last, trajectory.running, cross_entropy)


def evaluate(
    params: PyTree, cell: Cell, hidden: Array, tokens: Array, targets: Array, valid: Array
) -> tuple[Array, Array]:
    """(summed cross-entropy in nats, number of tokens) of B texts, read from their beginning.

    Args:
      params: as in `shapes`.
      cell: as for `apply`.
      hidden: [B, D], before the first token.
      tokens, targets: int [windows, T, B], each window going on where the one before ended.
      valid: bool [windows, T].
    """

    def window(hidden, xs):
        tokens, targets, valid = xs
        output = apply(params, tokens, hidden, cell, valid=valid)
        sums = cross_entropies(output.logits, targets, valid)
        return output.trajectory.last, sums

    _, (totals, counts) = jax.lax.scan(window, hidden, (tokens, targets, valid))
    return totals.sum(), counts.sum()


def sample(
    key: Array, params: PyTree, cell: Cell, hidden: Array, start: int, num_words: int
) -> Array:
    """Draws words one after the other from the model: int32 [num_words].

    Args:
      key: random key.
      params: as in `shapes`.
      cell: as for `apply`.
      hidden: [1, D], before the first word.
      start: the word, not drawn, that the first one follows.
      num_words: how many to draw.
    """

    def word(carry, key):
        token, hidden = carry
        output = apply(params, token[None, None], hidden, cell)
        token = jax.random.categorical(key, output.logits[0, 0])
        return (token, output.trajectory.last), token

    return jax.lax.scan(word, (jnp.int32(start), hidden), jax.random.split(key, num_words))[1]
