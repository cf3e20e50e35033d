"""The bilevel problems on which hypergradients are compared, behind one interface."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from darts_jax import data, genotype, search
from darts_jax.hypergradient import Bilevel
from experiments import command_line, runner, search_cnn, toy_bilevel
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
from experiments.search_cnn import NetworkConfig, SearchConfig

PyTree = Any


@dataclass(frozen=True)
class ToyConfig:
    """The two numbers of `experiments.toy_bilevel`."""

    xi: float = 0.1
    """Rate of the steps of w."""
    alpha_rate: float = 0.1
    """Rate of the steps of alpha."""
    start: tuple[float, float] = (2.0, -2.0)
    """Where w and alpha start, for seed 0; each of them off by a normal number for others."""
    steps: int = 100
    """Iterations of a search."""


@dataclass(frozen=True)
class RidgeConfig:
    """Linear regression with a penalty for each feature; alpha is their logarithms."""

    w_rate: float = 0.1
    """Rate of the steps of w."""
    alpha_rate: float = 0.02
    """Rate of Adam for alpha."""
    steps: int = 200
    """Iterations of a search."""


@dataclass(frozen=True)
class CleaningConfig:
    """Digits, some of them mislabelled; alpha is how much each of them counts, as a logit."""

    flipped: float = 0.3
    """Share of the images that train w whose label is wrong."""
    images: int = 500
    """Images that train w; the others, all with their own label, train alpha."""
    w_rate: float = 1.0
    """Rate of the steps of w."""
    alpha_rate: float = 0.1
    """Rate of Adam for alpha."""
    steps: int = 200
    """Iterations of a search."""


@dataclass(frozen=True)
class CnnConfig:
    """The search of a convolutional cell, as `experiments.search_cnn` does it."""

    data: DataConfig = search_cnn.DIGITS.data
    network: NetworkConfig = search_cnn.DIGITS.network
    epochs: int = 2
    """Passes over the images that train w."""
    batch_size: int = search_cnn.DIGITS.search.batch_size
    """Images in a batch, for w and for alpha alike."""
    w: WConfig = field(default_factory=WConfig)
    alpha: AlphaConfig = search_cnn.DIGITS.search.alpha


# Of the fields that there are, by their names in any of the configs.
_LEAST = {
    "steps": 1,
    "images": 1,
    "epochs": 1,
    "batch_size": 1,
    "network.channels": 1,
    "network.nodes": 1,
}
_POSITIVE = ("xi", "w_rate", "alpha_rate")

ProblemConfig = ToyConfig | RidgeConfig | CleaningConfig | CnnConfig


class Problem(NamedTuple):
    """A bilevel problem, and what a search of it needs.

    Attributes:
      bilevel: the two losses; if they have an auxiliary output, it is a `search.Aux`.
      w_optimizer: trains w, and is the inner optimizer.
      alpha_optimizer: trains alpha.
      weight_decay: that of `w_optimizer`.
      num_steps: iterations of a search.
      init: seed -> the state before the first of them.
      batches: (seed, state, finished steps) -> (batch for the training loss, for the validation).
      evaluate: state -> validation loss over all that is there to validate on.
      alpha_names: one for each number in alpha, in the order of its leaves.
      cells: whether alpha is that of two cells, from which a genotype can be derived.
    """

    bilevel: Bilevel
    w_optimizer: optax.GradientTransformation
    alpha_optimizer: optax.GradientTransformation
    weight_decay: float
    num_steps: int
    init: Callable[[int], search.SearchState]
    batches: Callable[[int, search.SearchState, int], tuple[PyTree, PyTree]]
    evaluate: Callable[[search.SearchState], float]
    alpha_names: tuple[str, ...]
    cells: bool = False


def make(config: ProblemConfig) -> Problem:
    """The problem that a config stands for.

    Raises:
      ValueError: for what cannot be one. The problem's `init`: for images that do not fit the
        network.
    """
    return _MAKERS[type(config)](config)


def check_problem(config: ProblemConfig) -> None:
    """Raises a ValueError for a field out of range, before anything is loaded."""
    fields = runner.flatten(dataclasses.asdict(config))
    command_line.check_at_least(
        *((_flag(name), fields[name], least) for name, least in _LEAST.items() if name in fields)
    )
    command_line.check_positive(
        *((_flag(name), fields[name]) for name in _POSITIVE if name in fields)
    )
    if isinstance(config, CleaningConfig) and not 0 <= config.flipped <= 1:
        raise ValueError(f"--problem.flipped is {config.flipped}; give a share from 0 to 1")
    if isinstance(config, CnnConfig):
        data.check(config.data.name)
        check_data(config.data)
        check_w(config.w, "problem.w")


def _flag(name: str) -> str:
    return f"problem.{name.replace('_', '-')}"


def toy(config: ToyConfig) -> Problem:
    """The toy problem, both optimizers plain gradient steps."""
    bilevel = toy_bilevel.PROBLEM

    def start(seed: int) -> tuple[jax.Array, jax.Array]:
        offset = np.random.default_rng(seed).normal(size=2) if seed else np.zeros(2)
        w, alpha = jnp.asarray(np.array(config.start) + offset, jnp.float32)
        return alpha, w

    return full_batch(
        bilevel,
        optax.sgd(config.xi),
        optax.sgd(config.alpha_rate),
        config.steps,
        start,
        (None, None),
        ("alpha",),
    )


def ridge(config: RidgeConfig) -> Problem:
    """Ridge regression of scikit-learn's diabetes data, half of the patients to validate.

    Features and target are standardised. The losses are half of the mean squared error; the
    training loss adds half of the sum of penalty times weight squared.
    """
    from sklearn.datasets import load_diabetes

    patients = load_diabetes()
    columns = np.column_stack([patients.data, patients.target])
    columns = ((columns - columns.mean(0)) / columns.std(0)).astype(np.float32)
    batches = tuple(
        (jnp.asarray(half[:, :-1]), jnp.asarray(half[:, -1])) for half in _halves(columns)
    )

    def val_loss(w, alpha, batch):
        x, y = batch
        return jnp.mean((x @ w - y) ** 2) / 2

    def train_loss(w, alpha, batch):
        return val_loss(w, alpha, batch) + jnp.sum(jnp.exp(alpha) * w**2) / 2

    def start(seed: int) -> tuple[jax.Array, jax.Array]:
        size = 2, len(patients.feature_names)
        alpha, w = jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)
        return alpha - 3, 0.1 * w

    return full_batch(
        Bilevel(train_loss, val_loss),
        optax.sgd(config.w_rate),
        optax.adam(config.alpha_rate),
        config.steps,
        start,
        batches,
        tuple(f"log penalty of {name}" for name in patients.feature_names),
    )


def _halves(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[::2], rows[1::2]


def cleaning(config: CleaningConfig) -> Problem:
    """Softmax regression of digits, each training image weighted by sigmoid(alpha)."""
    train, val, _ = mislabelled_digits(config)

    def example_losses(w, batch):
        images, labels = batch
        return search.cross_entropy(images @ w["kernel"] + w["bias"], labels)

    def train_loss(w, alpha, batch):
        return jnp.mean(jax.nn.sigmoid(alpha) * example_losses(w, batch))

    def val_loss(w, alpha, batch):
        return example_losses(w, batch).mean()

    def start(seed: int) -> tuple[jax.Array, PyTree]:
        shape = train[0].shape[1], 10
        kernel = 0.01 * np.random.default_rng(seed).normal(size=shape)
        w = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(shape[1])}
        return jnp.zeros(config.images), w

    return full_batch(
        Bilevel(train_loss, val_loss),
        optax.sgd(config.w_rate, momentum=0.9),
        optax.adam(config.alpha_rate),
        config.steps,
        start,
        (train, val),
        tuple(f"image {index}" for index in range(config.images)),
    )


def mislabelled_digits(config: CleaningConfig) -> tuple[PyTree, PyTree, np.ndarray]:
    """(images, labels) with wrong labels, those without, and which of the first are wrong, [N]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    if config.images >= len(labels):
        raise ValueError(
            f"--problem.images is {config.images}; give less than all {len(labels)} digits"
        )
    rng = np.random.default_rng(0)
    order = rng.permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    size = config.images
    wrong = np.zeros(size, bool)
    wrong[: round(config.flipped * size)] = True
    given = np.where(wrong, (labels[:size] + rng.integers(1, 10, size)) % 10, labels[:size])
    train = jnp.asarray(images[:size]), jnp.asarray(given, jnp.int32)
    return train, (jnp.asarray(images[size:]), jnp.asarray(labels[size:])), wrong


def full_batch(
    bilevel: Bilevel,
    w_optimizer: optax.GradientTransformation,
    alpha_optimizer: optax.GradientTransformation,
    num_steps: int,
    start: Callable[[int], tuple[PyTree, PyTree]],
    batches: tuple[PyTree, PyTree],
    alpha_names: tuple[str, ...],
) -> Problem:
    """A problem whose two batches are always the same.

    Args:
      start: seed -> (alpha, w).
      batches: for the training loss, and for the validation loss.
      The others: as in `Problem`.
    """

    def init(seed: int) -> search.SearchState:
        alpha, w = start(seed)
        return search.SearchState(
            step=jnp.zeros((), jnp.int32),
            key=jax.random.key(seed),
            w=w,
            alpha=alpha,
            carry=None,
            w_opt_state=w_optimizer.init(w),
            alpha_opt_state=alpha_optimizer.init(alpha),
        )

    return Problem(
        bilevel,
        w_optimizer,
        alpha_optimizer,
        weight_decay=0.0,
        num_steps=num_steps,
        init=init,
        batches=lambda seed, state, step: batches,
        evaluate=lambda state: float(bilevel.val_loss(state.w, state.alpha, batches[1])),
        alpha_names=alpha_names,
    )


def cnn(config: CnnConfig) -> Problem:
    """The search of a convolutional cell: its loss, images, augmentation and optimizers."""
    dataset = data.load(config.data.name, config.data.path, config.data.limit)

    @lru_cache
    def job(seed: int):
        whole = search_cnn.Config(
            config.data,
            config.network,
            SearchConfig(
                epochs=config.epochs, batch_size=config.batch_size, w=config.w, alpha=config.alpha
            ),
            seed,
        )
        return search_cnn.make_job(whole, dataset, Path())

    steps_per_epoch, num_steps = job(0).steps_per_epoch, config.epochs * job(0).steps_per_epoch
    loss = search.make_loss(search_cnn.supernet(config.network, dataset.num_classes))
    augmented = search_cnn.make_train_step(lambda _, *pair: pair, config.data, dataset)

    def batches(seed: int, state: search.SearchState, step: int):
        epoch, index = divmod(step, steps_per_epoch)
        pair = augmented(state, job(seed).data, job(seed).train_batches(epoch)[index])
        return tuple(search.Inputs(batch, state.carry) for batch in pair)

    def evaluate(state: search.SearchState) -> float:
        one = job(0)  # the images that validate are the same for every seed
        outputs = [one.eval_step(state, one.data, batch) for batch in one.eval_batches]
        sums, counts = zip(*jax.device_get(outputs), strict=True)
        return float(sum(loss["eval_loss"] for loss in sums) / sum(counts))

    return Problem(
        Bilevel(loss, loss, has_aux=True),
        w_optimizer(config.w, w_schedule(config.w, config.epochs, steps_per_epoch)),
        alpha_optimizer(config.alpha),
        config.w.weight_decay,
        num_steps,
        init=lambda seed: job(seed).init(),
        batches=batches,
        evaluate=evaluate,
        alpha_names=_cell_names(config.network.nodes),
        cells=True,
    )


def _cell_names(nodes: int) -> tuple[str, ...]:
    states = ("c_{k-2}", "c_{k-1}", *map(str, range(nodes)))
    return tuple(
        f"{cell} {states[source]} → {states[destination]} {operation}"
        for cell in ("normal", "reduce")
        for source, destination in genotype.edges(nodes)
        for operation in genotype.CNN_PRIMITIVES
    )


_MAKERS: dict[type, Callable[[Any], Problem]] = {
    ToyConfig: toy,
    RidgeConfig: ridge,
    CleaningConfig: cleaning,
    CnnConfig: cnn,
}
