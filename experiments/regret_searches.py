"""Many searches by one of the methods of `regret_methods`, as a program."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from darts_jax import perturbation, relaxation, search, shrinking, spectrum
from darts_jax.dag_network import Network
from experiments.enumeration import Batch, sgd
from experiments.errors import NonFinite
from experiments.metrics import leaf_name
from experiments.regret_methods import CELL, EXACT, METHODS, PARTIAL, Method, operations
from experiments.remedies import REMOVED

PyTree = Any

MEASURED_ON = 50  # validation images, of the eigenvalue


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


class Found(NamedTuple):
    """What the searches of a method, one of each seed, have found.

    Attributes:
      alpha: float32 [epochs + 1, seeds, edges, candidates], before the first epoch and after each;
        -1e9 of what was taken away.
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
      NonFinite: for what is not finite; it names the epoch, the leaf and the seed.
    """
    method, kept = METHODS[name], None
    if method.partial:
        network = network.clone(partial=math.gcd(PARTIAL, network.channels))
    lengths = [len(part) for part in np.array_split(range(config.epochs), 1 + len(method.keep))]
    found: list[Found] = []
    for stage, epochs in enumerate(length for length in lengths if length):
        if stage:
            last, had = found[-1].alpha[-1], None if kept is None else {CELL: kept}
            kept = shrinking.survivors({CELL: last}, method.keep[stage - 1], had)[CELL]
        done, own = sum(lengths[:stage]), replace(config, epochs=epochs)
        functions = make_search(method, network, own, train, val, stage)
        measured = network if name == EXACT else None
        numbers = range(done, done + epochs)
        found.append(_run(functions, numbers, seeds, train, val, progress, kept, measured))
    return found[0] if len(found) == 1 else _joined(found)


def _joined(stages: Sequence[Found]) -> Found:
    """One search after the other; what a later one begins with is left out."""
    first, *later = stages
    return first._replace(
        alpha=np.concatenate([first.alpha, *(stage.alpha[1:] for stage in later)]),
        accuracy=np.concatenate([stage.accuracy for stage in stages]),
        seconds=np.concatenate([stage.seconds for stage in stages]),
        compile_seconds=sum(stage.compile_seconds for stage in stages),
    )


def _run(
    functions: tuple[Callable, Callable],
    epochs: range,
    seeds: Sequence[int],
    train: Batch,
    val: Batch,
    progress: Callable[[int], None],
    kept: np.ndarray | None,
    measured: Network | None,
) -> Found:
    """Runs the functions of `make_search`.

    Args:
      epochs: their numbers among those of all stages.
      kept: bool [seeds, edges, candidates], what earlier searches left; None for all.
      measured: the network, if eigenvalues and selections by perturbation are wanted.
      The others: as for `run_searches`.
    """
    init, epoch = functions
    numbers = jnp.array(seeds, jnp.uint32)
    state = init(numbers)
    if kept is not None:
        state = state._replace(alpha=jnp.where(kept, state.alpha, REMOVED))
    start = time.perf_counter()
    program = epoch.lower(state, numbers, 0, train, val).compile()
    compile_seconds = time.perf_counter() - start
    measure = None if measured is None else make_eigenvalue(measured, val)
    alphas = [np.asarray(operations(state.alpha))]
    accuracies, seconds, eigenvalues = [], [], []
    for number in epochs:
        start = time.perf_counter()
        state, accuracy, nonfinite = jax.block_until_ready(
            program(state, numbers, number - epochs.start, train, val)
        )
        seconds.append(time.perf_counter() - start)
        _require_finite(number + 1, np.asarray(nonfinite), seeds, state)
        alphas.append(np.asarray(operations(state.alpha)))
        accuracies.append(np.asarray(accuracy))
        if measure is not None:
            eigenvalues.append(np.asarray(measure(state)))
        progress(number + 1)
    perturbed = np.zeros((0, 0), np.int32)
    if measured is not None:
        perturbed = select(measured, state, seeds, val)
    return Found(
        np.stack(alphas),
        np.stack(accuracies),
        np.array(seconds),
        np.array(compile_seconds),
        np.array(eigenvalues, np.float32).reshape(-1, len(seeds)),
        perturbed,
    )


def make_search(
    method: Method,
    network: Network,
    config: SearchConfig,
    train: Batch,
    val: Batch,
    stage: int = 0,
) -> tuple[Callable, Callable]:
    """The two functions that search from many seeds at once, each by itself.

    Another stage has other initial weights and alphas, and other batches.

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

    def keys_of(seed):
        key = jax.random.key(seed)
        return jax.random.split(jax.random.fold_in(key, stage) if stage else key)

    def init(seed):
        key, _ = keys_of(seed)
        return search.init(key, network, w_optimizer, alpha_optimizer, shape, method.init_alpha)

    def epoch(state, seed, number, train, val):
        _, key = keys_of(seed)
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


def _require_finite(
    epoch: int, nonfinite: np.ndarray, seeds: Sequence[int], state: search.SearchState
) -> None:
    for seed, leaf in zip(seeds, nonfinite, strict=True):
        if leaf >= 0:
            paths = jax.tree_util.tree_leaves_with_path(search.checked(state))
            raise NonFinite(
                f"epoch {epoch}: {leaf_name(paths[leaf][0])} of seed {seed} is not finite"
            )


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
