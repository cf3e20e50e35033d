"""Training a network with a fixed genotype, as pure functions: state, step, evaluation."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from darts_jax import finite, grouped
from darts_jax.operations import NOISE
from darts_jax.search import Batch, accuracy, cross_entropy

PyTree = Any

TOP = 5  # of the second accuracy
OF_OPERATIONS = 1  # folded into the key of a step, by which drop path draws


class TrainState(NamedTuple):
    """All that continues a training: `step` counts finished steps, `key` is never consumed."""

    step: Array
    key: Array
    params: PyTree
    batch_stats: PyTree
    opt_state: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one step, before the weights move; the loss with its auxiliary part."""

    train_loss: Array
    train_accuracy: Array
    gradient_norm: Array
    nonfinite: Array
    """Of the leaves of `Checked`, the first that holds NaN or infinity, int32; -1 if none does."""


class Checked(NamedTuple):
    """What must be finite in a step."""

    train_loss: Any
    gradient: PyTree


def checked(state: TrainState) -> Checked:
    """A pytree of the leaves that `Metrics.nonfinite` counts; their values say nothing."""
    return Checked(0.0, state.params)


class Evaluation(NamedTuple):
    """Sums over the examples of a batch: cross-entropy, and how often the label came first, or
    among the first five."""

    loss: Array
    accuracy: Array
    top5_accuracy: Array


def init(
    key: Array,
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """The state before the first step. Call it outside of jit: compiling would take longer.

    Args:
      key: random key, from which all randomness of the training is derived.
      network: an `evaluation.EvaluationNetwork`.
      optimizer: trains the weights.
      image_shape: (height, width, channels) of one image.
    """
    params_key, state_key = jax.random.split(key)
    variables = network.init(params_key, jnp.zeros((1, *image_shape)), train=True)
    params = variables["params"]
    opt_state = optimizer.init(params)
    return TrainState(
        jnp.zeros((), jnp.int32), state_key, params, variables["batch_stats"], opt_state
    )


def make_loss(
    network: nn.Module, label_smoothing: float = 0.0, auxiliary_weight: float = 0.4
) -> Callable[..., tuple[Array, tuple[Array, PyTree]]]:
    """`loss(params, batch_stats, batch, drop_path, key) -> (loss, (logits, statistics after))`.

    The mean cross-entropy, plus auxiliary_weight times that of the auxiliary head if there is one;
    in both, label_smoothing of a label's weight is spread evenly over all classes. Batch norm is by
    slices of the batch as in `search.make_loss`.
    """
    groups = grouped.count(network)

    def loss(params, batch_stats, batch: Batch, drop_path, key):
        def forward(image, keys):
            return network.apply(
                {"params": params, "batch_stats": batch_stats},
                image,
                train=True,
                drop_path=drop_path,
                rngs={"drop_path": keys[0], NOISE: jax.random.fold_in(keys[0], OF_OPERATIONS)},
                mutable=["batch_stats"],
            )

        keys = grouped.keys(key, groups)
        logits, updated = grouped.by_slices(forward, groups)(batch.image, keys)
        targets = optax.smooth_labels(
            jax.nn.one_hot(batch.label, logits.main.shape[-1]), label_smoothing
        )
        value = optax.softmax_cross_entropy(logits.main, targets).mean()
        if logits.auxiliary is not None:
            auxiliary = optax.softmax_cross_entropy(logits.auxiliary, targets).mean()
            value = value + auxiliary_weight * auxiliary
        return value, (logits.main, updated["batch_stats"])

    return loss


def make_step(
    network: nn.Module,
    optimizer: optax.GradientTransformation,
    label_smoothing: float = 0.0,
    auxiliary_weight: float = 0.4,
    skip_nonfinite: bool = False,
) -> Callable[[TrainState, Batch, Array | None], tuple[TrainState, Metrics]]:
    """`step(state, batch, drop_path) -> (state, Metrics)`; drop_path is a probability, or None.

    Args:
      network, optimizer: as for `init`.
      label_smoothing, auxiliary_weight: as for `make_loss`.
      skip_nonfinite: where the loss or its gradient is NaN or infinite, leave weights, statistics
        and the optimizer's state as they were.
    """
    differentiate = jax.value_and_grad(
        make_loss(network, label_smoothing, auxiliary_weight), has_aux=True
    )

    def step(state: TrainState, batch: Batch, drop_path: Array | None):
        key = jax.random.fold_in(state.key, state.step)
        (loss, (logits, batch_stats)), gradient = differentiate(
            state.params, state.batch_stats, batch, drop_path, key
        )
        of_each = finite.squares(gradient)
        metrics = Metrics(
            loss,
            accuracy(logits, batch.label),
            jnp.sqrt(of_each.sum()),
            finite.first(jnp.concatenate([loss[None], of_each])),
        )

        def update(old):
            params, _, opt_state = old
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), batch_stats, opt_state

        new = finite.guarded(update, skip_nonfinite)(
            (loss, gradient), (state.params, state.batch_stats, state.opt_state)
        )
        return TrainState(state.step + 1, state.key, *new), metrics

    return step


def make_evaluate(network: nn.Module) -> Callable[[TrainState, Batch, Array], Evaluation]:
    """`evaluate(state, batch, mask) -> Evaluation`, by running statistics.

    mask [B] is true where the batch holds an example, and not padding.
    """

    def evaluate(state: TrainState, batch: Batch, mask: Array) -> Evaluation:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        rngs = {NOISE: jax.random.key(0)}
        logits = network.apply(variables, batch.image, train=False, rngs=rngs).main
        losses = cross_entropy(logits, batch.label)
        # Of equal logits, the first ones count: a network that says nothing is not right.
        _, first = jax.lax.top_k(logits, min(TOP, logits.shape[-1]))
        hits = first == batch.label[:, None]
        return Evaluation(
            jnp.where(mask, losses, 0).sum(),
            (hits[:, 0] & mask).sum(),
            (hits.any(1) & mask).sum(),
        )

    return evaluate
