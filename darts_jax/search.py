"""The search: a step of alpha by its hypergradient, then a step of the weights, as pure functions.

`init` makes a state, `make_step` a function from a state and two batches to the next state and
metrics. Everything that continues a search is in the state. The step is made of jitted stages: as
it is, they are compiled apart, and a stage that is used three times is compiled once. It can also
be jitted as a whole, and mapped over seeds.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from darts_jax import finite, grouped, relaxation
from darts_jax.hypergradient import Bilevel, Estimator, value_and_grad
from darts_jax.operations import NOISE
from darts_jax.relaxation import Context, Relaxation

PyTree = Any

ALPHA_SCALE = 1e-3  # standard deviation of the initial alphas, the original's
CONTEXT = 2  # folded into the key of a step, which is split in 0 and 1 elsewhere
OF_OPERATIONS = 2  # folded into the key of a batch, from which a relaxation draws


class Batch(NamedTuple):
    """Images [B, H, W, C], floating point and normalised, and labels [B], integers.

    A relaxation that is random or changes in the course of a search finds what it needs in
    `context` (see `with_context`).
    """

    image: Array
    label: Array
    context: Context | None = None


class SearchState(NamedTuple):
    """All that continues a search: `step` counts finished iterations, `key` is never consumed.

    `carry` is what goes from batch to batch beside the weights: running statistics, and for a
    recurrent model its hidden states.
    """

    step: Array
    key: Array
    w: PyTree
    alpha: PyTree
    carry: PyTree
    w_opt_state: optax.OptState
    alpha_opt_state: optax.OptState


class Metrics(NamedTuple):
    """Scalars of one iteration.

    The training loss and accuracy are those of the weight step, before the weights move, at the
    new alpha. The validation ones are at the weights where the estimator evaluates them. Norms are
    global, of the gradients before any clipping.
    """

    train_loss: Array
    train_accuracy: Array
    val_loss: Array
    val_accuracy: Array
    w_gradient_norm: Array
    hypergradient_norm: Array
    nonfinite: Array
    """Of the leaves of `Checked`, the first that holds NaN or infinity, int32; -1 if none does."""


class Checked(NamedTuple):
    """What must be finite in an iteration, in the order in which it comes about."""

    val_loss: Any
    hypergradient: PyTree
    alpha: PyTree
    train_loss: Any
    w_gradient: PyTree


def checked(state: SearchState) -> Checked:
    """A pytree of the leaves that `Metrics.nonfinite` counts; their values say nothing."""
    return Checked(0.0, state.alpha, state.alpha, 0.0, state.w)


class Aux(NamedTuple):
    """What a loss returns beside its value: logits [B, classes], running statistics afterwards."""

    logits: Array
    batch_stats: PyTree


class Task(NamedTuple):
    """What is searched for: losses, and how the carry goes from batch to batch.

    Attributes:
      train_loss, val_loss: `loss(w, alpha, inputs) -> (value, aux)`.
      train_inputs, val_inputs: `(carry, batch) -> inputs` of the losses.
      next_carry: `(aux of the weight step, aux of the hypergradient) -> carry`.
      accuracy: `(aux, batch) -> share` of right predictions, in [0, 1].
    """

    train_loss: Callable
    val_loss: Callable
    train_inputs: Callable[[PyTree, Any], Any]
    val_inputs: Callable[[PyTree, Any], Any]
    next_carry: Callable[[Any, Any], PyTree]
    accuracy: Callable[[Any, Any], Array]


class Inputs(NamedTuple):
    """A batch for a loss: the statistics ride along, since batch norm in training ignores them."""

    batch: Batch
    batch_stats: PyTree


def init_alpha(
    key: Array, network: nn.Module, edge_weights: bool = False, fixed: int = 0
) -> PyTree:
    """Alphas to begin with, normal of standard deviation 1e-3.

    Args:
      key: random key.
      network: a `networks.Supernet`, or another whose `weight_shapes` are those of its mixing
        weights.
      edge_weights: with leaves "normal_edges" and "reduce_edges" [edges], too, for
        `relaxation.edge_weighted`.
      fixed: how many of the network's last primitives have no column in alpha: 1 for
        `relaxation.with_auxiliary_skip`.

    Returns:
      [edges, candidates] in the structure of `weight_shapes`: {"normal", "reduce"}.
    """
    shapes, treedef = jax.tree.flatten(network.weight_shapes, is_leaf=_is_shape)
    keys = jax.random.split(key, len(shapes))
    alpha = treedef.unflatten(
        ALPHA_SCALE * jax.random.normal(k, (edges, candidates - fixed))
        for k, (edges, candidates) in zip(keys, shapes, strict=True)
    )
    if edge_weights:
        for name, k, (edges, _) in zip(list(alpha), keys, shapes, strict=True):
            values = jax.random.normal(jax.random.fold_in(k, 1), (edges,))
            alpha[name + relaxation.EDGES] = ALPHA_SCALE * values
    return alpha


def _is_shape(value: Any) -> bool:
    return isinstance(value, tuple)


def init(
    key: Array,
    network: nn.Module,
    w_optimizer: optax.GradientTransformation,
    alpha_optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    make_alpha: Callable[[Array, nn.Module], PyTree] = init_alpha,
) -> SearchState:
    """The state before the first iteration.

    Call it outside of jit: compiling it would take longer than running it.

    Args:
      key: random key, from which all randomness of the search is derived.
      network: a `networks.Supernet`, or another that takes mixing weights.
      w_optimizer: trains the weights.
      alpha_optimizer: trains alpha.
      image_shape: (height, width, channels) of one image.
      make_alpha: (random key, network) -> the alphas to begin with.
    """
    w_key, alpha_key, state_key = jax.random.split(key, 3)
    alpha = make_alpha(alpha_key, network)
    # Their values do not count.
    weights = jax.tree.map(jnp.zeros, network.weight_shapes, is_leaf=_is_shape)
    variables = network.init(w_key, jnp.zeros((1, *image_shape)), weights, train=True)
    w = variables["params"]

    def fresh(opt_state):  # an optimizer may return w itself, which cannot be donated twice
        return jax.device_put(opt_state, may_alias=False)

    return SearchState(
        step=jnp.zeros((), jnp.int32),
        key=state_key,
        w=w,
        alpha=alpha,
        carry=variables["batch_stats"],
        w_opt_state=fresh(w_optimizer.init(w)),
        alpha_opt_state=fresh(alpha_optimizer.init(alpha)),
    )


def make_loss(network: nn.Module, relax: Relaxation = relaxation.softmax) -> Callable:
    """`loss(w, alpha, inputs) -> (mean cross-entropy, Aux)`, batch norm by the batch.

    By each of `network.batch_norm_groups` equal slices of it, if the network has that field; the
    running statistics then advance by the mean over the slices.

    The same function for the same arguments, so that what is compiled of it is compiled once.
    """
    return _make_loss(network, relax)


@lru_cache
def _make_loss(network: nn.Module, relax: Relaxation) -> Callable:
    def loss(w, alpha, inputs: Inputs):
        variables = {"params": w, "batch_stats": inputs.batch_stats}
        context = inputs.batch.context
        weights, groups = relax(alpha, context), grouped.count(network)

        def forward(image, keys):
            rngs = {} if keys is None else {NOISE: keys[0]}
            return network.apply(
                variables, image, weights, train=True, mutable=["batch_stats"], rngs=rngs
            )

        keys = None
        if context is not None and context.key is not None:
            keys = grouped.keys(jax.random.fold_in(context.key, OF_OPERATIONS), groups)
        logits, updated = grouped.by_slices(forward, groups)(inputs.batch.image, keys)
        return cross_entropy(logits, inputs.batch.label).mean(), Aux(logits, updated["batch_stats"])

    return loss


def image_task(network: nn.Module, relax: Relaxation = relaxation.softmax) -> Task:
    """Classification of images by a supernet; the carry is its running statistics.

    They advance with the weight step alone: the passes that an estimator makes are not training.
    """
    loss = make_loss(network, relax)

    def inputs(carry, batch):
        return Inputs(batch, carry)

    return Task(
        loss,
        loss,
        inputs,
        inputs,
        next_carry=lambda train, val: train.batch_stats,
        accuracy=lambda aux, batch: accuracy(aux.logits, batch.label),
    )


def make_step(
    network: nn.Module,
    estimator: Callable[[Bilevel], Estimator],
    w_optimizer: optax.GradientTransformation,
    alpha_optimizer: optax.GradientTransformation,
    relax: Relaxation = relaxation.softmax,
    skip_nonfinite: bool = False,
) -> Callable[[SearchState, Batch, Batch], tuple[SearchState, Metrics]]:
    """`step(state, train_batch, val_batch) -> (state, Metrics)` of a supernet, by `make_task_step`.

    Args:
      network: as for `init`.
      relax: from alpha to mixing weights.
      The others: as for `make_task_step`.
    """
    task = image_task(network, relax)
    return make_task_step(task, estimator, w_optimizer, alpha_optimizer, skip_nonfinite)


def make_task_step(
    task: Task,
    estimator: Callable[[Bilevel], Estimator],
    w_optimizer: optax.GradientTransformation,
    alpha_optimizer: optax.GradientTransformation,
    skip_nonfinite: bool = False,
) -> Callable[[SearchState, Any, Any], tuple[SearchState, Metrics]]:
    """`step(state, train_batch, val_batch) -> (state, Metrics)`: one iteration, alpha first.

    The state is donated: weights, alpha and optimizer states are updated where they lie, and the
    state that was passed in must not be used again.

    Args:
      task: what is searched for.
      estimator: makes an estimator from the bilevel problem, such as
        `lambda problem: hypergradient.unrolled(problem, w_optimizer)`.
      w_optimizer: trains the weights.
      alpha_optimizer: trains alpha.
      skip_nonfinite: where a loss or gradient is NaN or infinite, leave what it would change as it
        was: alpha or the weights, and the carry with either.
    """
    estimate = estimator(Bilevel(task.train_loss, task.val_loss, has_aux=True))
    differentiate = value_and_grad(task.train_loss, True)

    @partial(jax.jit, donate_argnames="old")
    def alpha_step(old, value, gradient):
        def update(old):
            alpha, opt_state = old
            updates, opt_state = alpha_optimizer.update(gradient, opt_state, alpha)
            return optax.apply_updates(alpha, updates), opt_state

        return finite.guarded(update, skip_nonfinite)((value, gradient), old)

    @partial(jax.jit, donate_argnames=("count", "old"))
    def w_step(count, old, value, gradient):
        def update(old):
            w, opt_state = old
            updates, opt_state = w_optimizer.update(gradient, opt_state, w)
            return optax.apply_updates(w, updates), opt_state

        return count + 1, *finite.guarded(update, skip_nonfinite)((value, gradient), old)

    @jax.jit
    def summarize(train, train_batch, w_gradient, alpha, val_value, val_aux, val_batch, gradient):
        of_alpha, of_w = finite.squares(gradient), finite.squares(w_gradient)
        parts = Checked(val_value[None], of_alpha, finite.squares(alpha), train.value[None], of_w)
        return Metrics(
            train.value,
            task.accuracy(train.aux, train_batch),
            val_value,
            task.accuracy(val_aux, val_batch),
            jnp.sqrt(of_w.sum()),
            jnp.sqrt(of_alpha.sum()),
            finite.first(jnp.concatenate(parts)),
        )

    @jax.jit
    def guard_carry(nonfinite, new, old):
        return jax.tree.map(lambda a, b: jnp.where(nonfinite < 0, a, b), new, old)

    def step(state, train_batch, val_batch):
        train_inputs = task.train_inputs(state.carry, train_batch)
        val_inputs = task.val_inputs(state.carry, val_batch)
        hyper = estimate(state.alpha, state.w, state.w_opt_state, train_inputs, val_inputs)
        alpha, alpha_opt_state = alpha_step(
            (state.alpha, state.alpha_opt_state), hyper.value, hyper.gradient
        )
        train, (gradient, _) = differentiate(state.w, alpha, train_inputs)
        metrics = summarize(
            train, train_batch, gradient, alpha, hyper.value, hyper.aux, val_batch, hyper.gradient
        )
        carry = task.next_carry(train.aux, hyper.aux)
        if skip_nonfinite:
            carry = guard_carry(metrics.nonfinite, carry, state.carry)
        count, w, w_opt_state = w_step(
            state.step, (state.w, state.w_opt_state), train.value, gradient
        )
        return SearchState(count, state.key, w, alpha, carry, w_opt_state, alpha_opt_state), metrics

    return step


def with_context(step: Callable, num_steps: int) -> Callable:
    """The step of `make_step` for what is random, or depends on how far the search is.

    Each batch is given a `relaxation.Context` of its own. The key of the two is fold_in(state.key,
    state.step): steps differ, and a resumed search draws what it would have drawn. Within a step
    every pass over the training batch sees the same weights, the estimator's and the weight step's
    alike, and so the unrolled step is the step that is taken; the validation batch has a key of its
    own.

    Args:
      step: as `make_step` makes it.
      num_steps: iterations of the whole search, after which the progress is 1.
    """

    @jax.jit
    def contexts(key, count):
        keys = jax.random.split(jax.random.fold_in(jax.random.fold_in(key, count), CONTEXT))
        return tuple(Context(key, count / num_steps) for key in keys)

    def step_with_context(state, train_batch, val_batch):
        train, val = contexts(state.key, state.step)
        return step(state, train_batch._replace(context=train), val_batch._replace(context=val))

    return step_with_context


def make_evaluate(
    network: nn.Module, relax: Relaxation = relaxation.softmax
) -> Callable[[SearchState, Batch, Array], tuple[Array, Array]]:
    """`evaluate(state, batch, mask) -> (summed loss, correct)`, by running statistics.

    Without the noise of a random relaxation, and by schedules' values at the end of the search.
    What random operations draw is always the same. mask [B] is true where the batch holds an
    example, and not padding.
    """

    def evaluate(state, batch, mask):
        variables = {"params": state.w, "batch_stats": state.carry}
        weights = relax(state.alpha, relaxation.EVALUATION)
        rngs = {NOISE: jax.random.key(0)}
        logits = network.apply(variables, batch.image, weights, train=False, rngs=rngs)
        losses = cross_entropy(logits, batch.label)
        correct = logits.argmax(-1) == batch.label
        return jnp.where(mask, losses, 0).sum(), (correct & mask).sum()

    return evaluate


def cross_entropy(logits: Array, label: Array) -> Array:
    """Softmax cross-entropy [B], in nats, of logits [B, classes] and labels [B]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def accuracy(logits: Array, label: Array) -> Array:
    """Share, in [0, 1], of examples whose largest logit is at their label."""
    return (logits.argmax(-1) == label).mean()
