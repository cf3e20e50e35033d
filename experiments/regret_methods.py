"""The methods that `experiments.regret` compares, and many searches by one of them as a program.

What has no row: the edge weights of PC-DARTS and its partial channels, since the cell of
NAS-Bench-201 keeps all of its edges and has no bypass; and the shrinking of P-DARTS, since 4
candidates leave nothing to shrink in stages.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from darts_jax import hypergradient, perturbation, relaxation, search, smoothing, spectrum
from darts_jax.dag_network import Network
from darts_jax.relaxation import Relaxation, linear
from experiments.enumeration import Batch, sgd
from experiments.metrics import leaf_name, non_finite

PyTree = Any

EXACT = "exact"
RADIUS = linear(0.03, 0.3)  # of the perturbations of SmoothDARTS, the authors'
MEASURED_ON = 50  # validation images, of the eigenvalue
CELL = "cell"  # the name of alpha where a function wants alphas by name


@dataclass(frozen=True)
class SearchConfig:
    """A search. The weights are trained as the networks of the table are, by default."""

    epochs: int = 25
    """Passes over the images that train w."""
    batch_size: int = 25
    """Images in a batch, of either part."""
    learning_rate: float = 0.1
    """Of w: SGD, falling to zero as half of a cosine."""
    momentum: float = 0.9
    """Of w."""
    weight_decay: float = 5e-4
    """L2 penalty of w, added to the gradient."""
    alpha_learning_rate: float = 3e-3
    """Of alpha: Adam with decays 0.5 and 0.999."""
    alpha_weight_decay: float = 1e-3
    """L2 penalty of alpha, added to the gradient."""


class Method(NamedTuple):
    """How a search goes.

    Attributes:
      text: what it is, in a few words.
      estimator: (bilevel problem, inner optimizer) -> hypergradient estimator.
      relax: from alpha [edges, candidates] to mixing weights.
      train_loss: network -> the training loss, if it is not that of `relax`.
    """

    text: str
    estimator: Callable[..., hypergradient.Estimator] = hypergradient.unrolled
    relax: Relaxation = relaxation.softmax
    train_loss: Callable[[Network], Callable] | None = None


def named(relax: Relaxation) -> Relaxation:
    """The relaxation of one array, its weights by name: {"cell"}."""
    return lambda alpha, context=None: {CELL: relax(alpha, context)}


def unnamed(relax: Relaxation) -> Relaxation:
    """A relaxation that gives weights by name, as one of an array."""
    return lambda alpha, context=None: relax(alpha, context)[CELL]


def auxiliary_skip(column: int) -> Relaxation:
    """DARTS-: since a skip connection is the identity in this cell, b x is b more of its weight."""
    both = relaxation.with_auxiliary_skip(named(relaxation.softmax), linear(1, 0))

    def relax(alpha: Array, context: relaxation.Context | None = None) -> Array:
        weights = both(alpha, context)[CELL]
        return weights[:, :-1].at[:, column].add(weights[:, -1])

    return relax


def _random(network: Network) -> Callable:
    relax = smoothing.random(named(relaxation.softmax), RADIUS)
    return search.make_loss(network, unnamed(relax))


def _adversarial(network: Network) -> Callable:
    loss = search.make_loss(network, unnamed(relaxation.as_they_are))
    return smoothing.adversarial(loss, named(relaxation.softmax), RADIUS)


METHODS = {
    "first_order": Method("first order", lambda problem, _: hypergradient.first_order(problem)),
    EXACT: Method("exact, through one step"),
    "finite_difference": Method("finite difference", hypergradient.finite_difference),
    "temperature": Method(
        "temperature 5 to 0.5", relax=relaxation.tempered_softmax(linear(5, 0.5))
    ),
    "concrete": Method("SNAS, temperature 1 to 0.03", relax=relaxation.concrete(linear(1, 0.03))),
    "gumbel": Method("GDAS, temperature 10 to 0.1", relax=relaxation.gumbel(linear(10, 0.1))),
    "sigmoid": Method("FairDARTS", relax=relaxation.sigmoid),
    "dirichlet": Method("DrNAS", relax=relaxation.dirichlet),
    "auxiliary_skip": Method("DARTS-", relax=auxiliary_skip(column=1)),
    "random": Method("SmoothDARTS, random", train_loss=_random),
    "adversarial": Method("SmoothDARTS, adversarial", train_loss=_adversarial),
}


class Found(NamedTuple):
    """What the searches of a method, one of each seed, have found.

    Attributes:
      alpha: float32 [epochs + 1, seeds, edges, candidates], before the first epoch and after each.
      accuracy: float32 [epochs, seeds, 2], of the supernets on training and validation batches.
      seconds: float64 [epochs], of all seeds together, compilation left out.
      compile_seconds: float64 [].
      eigenvalue: float32 [epochs, seeds], the largest of the Hessian in alpha; of the exact method
        alone, and empty else.
      perturbed: int32 [seeds, edges], the operations that `perturbation` selects; likewise.
    """

    alpha: np.ndarray
    accuracy: np.ndarray
    seconds: np.ndarray
    compile_seconds: np.ndarray
    eigenvalue: np.ndarray
    perturbed: np.ndarray


def run_searches(
    name: str,
    network: Network,
    config: SearchConfig,
    seeds: Sequence[int],
    train: Batch,
    val: Batch,
    progress: Callable[[int], None],
) -> Found:
    """Searches from all seeds at once; a seed has the same start and batches by every method.

    Args:
      name: of the method.
      network: the relaxed one.
      config: of the search.
      seeds: of the searches.
      train: what w is trained on, [N, ...].
      val: what alpha is trained on.
      progress: is told the number of finished epochs.

    Raises:
      NonFinite: for what is not finite.
    """
    method = METHODS[name]
    init, epoch = make_search(method, network, config, train, val)
    numbers = jnp.array(seeds, jnp.uint32)
    state = init(numbers)
    start = time.perf_counter()
    program = epoch.lower(state, numbers, 0, train, val).compile()
    compile_seconds = time.perf_counter() - start
    measure = make_eigenvalue(network, val) if name == EXACT else None
    alphas, accuracies, seconds, eigenvalues = [np.asarray(state.alpha)], [], [], []
    for number in range(config.epochs):
        start = time.perf_counter()
        state, accuracy, nonfinite = jax.block_until_ready(
            program(state, numbers, number, train, val)
        )
        seconds.append(time.perf_counter() - start)
        _require_finite(number, np.asarray(nonfinite), state)
        alphas.append(np.asarray(state.alpha))
        accuracies.append(np.asarray(accuracy))
        if measure is not None:
            eigenvalues.append(np.asarray(measure(state)))
        progress(number + 1)
    perturbed = select(network, state, seeds, val) if name == EXACT else np.zeros((0, 0), np.int32)
    return Found(
        np.stack(alphas),
        np.stack(accuracies),
        np.array(seconds),
        np.array(compile_seconds),
        np.array(eigenvalues, np.float32).reshape(-1, len(seeds)),
        perturbed,
    )


def make_search(
    method: Method, network: Network, config: SearchConfig, train: Batch, val: Batch
) -> tuple[Callable, Callable]:
    """The two functions that search from many seeds at once, each by itself.

    Returns:
      init: `seeds -> states`.
      epoch: `(states, seeds, number, train, val) -> (states, accuracy, nonfinite)`, as in `Found`
        and `search.Metrics`, of one pass over the training images.
    """
    size = config.batch_size
    steps_per_epoch = min(len(train.label), len(val.label)) // size
    num_steps = steps_per_epoch * config.epochs
    w_optimizer = sgd(config, num_steps)
    alpha_optimizer = optax.chain(
        optax.add_decayed_weights(config.alpha_weight_decay),
        optax.adam(config.alpha_learning_rate, 0.5, 0.999),
    )
    task = search.image_task(network, method.relax)
    if method.train_loss is not None:
        task = task._replace(train_loss=method.train_loss(network))
    step = search.with_context(
        search.make_task_step(
            task,
            lambda problem: method.estimator(problem, w_optimizer),
            w_optimizer,
            alpha_optimizer,
        ),
        num_steps,
    )
    shape = train.image.shape[1:]

    def init(seed):
        key, _ = jax.random.split(jax.random.key(seed))
        return search.init(key, network, w_optimizer, alpha_optimizer, shape)

    def epoch(state, seed, number, train, val):
        _, key = jax.random.split(jax.random.key(seed))
        keys = jax.random.split(jax.random.fold_in(key, number))
        orders = [
            jax.random.permutation(k, len(part.label))[: steps_per_epoch * size].reshape(-1, size)
            for k, part in zip(keys, (train, val), strict=True)
        ]

        def advance(state, rows):
            batches = (
                search.Batch(part.image[row], part.label[row])
                for part, row in zip((train, val), rows, strict=True)
            )
            return step(state, *batches)

        state, metrics = lax.scan(advance, state, orders)
        accuracy = jnp.stack([metrics.train_accuracy.mean(), metrics.val_accuracy.mean()])
        return state, accuracy, metrics.nonfinite.max()

    return (
        jax.jit(jax.vmap(init)),
        jax.jit(jax.vmap(epoch, in_axes=(0, 0, None, None, None)), donate_argnums=0),
    )


def _require_finite(number: int, nonfinite: np.ndarray, state: search.SearchState) -> None:
    if (nonfinite >= 0).any():
        paths = jax.tree_util.tree_leaves_with_path(search.checked(state))
        raise non_finite(number + 1, leaf_name(paths[nonfinite.max()][0]))


def make_eigenvalue(network: Network, val: Batch) -> Callable[[search.SearchState], Array]:
    """`eigenvalue(states)`, [seeds]: of the Hessian in alpha, on fixed validation images."""
    loss = search.make_loss(network)
    batch = search.Batch(*(x[:MEASURED_ON] for x in val))

    def eigenvalue(state):
        inputs = search.Inputs(batch, state.carry)
        key = jax.random.key(0)
        return spectrum.dominant_eigenvalue(
            lambda alpha: loss(state.w, alpha, inputs)[0], state.alpha, key
        )

    return jax.jit(jax.vmap(eigenvalue))


def select(
    network: Network, states: search.SearchState, seeds: Sequence[int], val: Batch
) -> np.ndarray:
    """Operations by perturbation, int32 [seeds, edges]: edge after edge, without tuning between.

    Batch norm is by the batch, all validation images.
    """
    loss = search.make_loss(network, relaxation.as_they_are)

    @jax.jit
    def accuracy(state, weights):
        inputs = search.Inputs(search.Batch(*val), state.carry)
        return search.accuracy(loss(state.w, weights, inputs)[1].logits, val.label)

    def evaluate(state, weights):
        return float(accuracy(state, jnp.asarray(weights[CELL])))

    def weigh(state):
        return {CELL: np.asarray(relaxation.softmax(state.alpha))}

    chosen = []
    for i, seed in enumerate(seeds):
        state = jax.tree.map(lambda x, i=i: x[i], states)
        kept = {CELL: np.ones(network.weight_shapes, bool)}
        for edge in np.random.default_rng(seed).permutation(len(kept[CELL])):
            found = perturbation.operation(
                state, weigh, evaluate, network.primitives, kept, CELL, edge
            )
            kept[CELL][edge] = np.arange(len(network.primitives)) == found
        chosen.append(kept[CELL].argmax(-1))
    return np.array(chosen, np.int32)
