"""The bilevel problems on which hypergradients are compared, behind one interface."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from darts_jax import search
from darts_jax.hypergradient import Bilevel
from experiments import command_line, toy_bilevel
from experiments.comparison_cells import CnnConfig, RnnConfig, check_cells, cnn, rnn
from experiments.problem import Problem
from experiments.workdir import flatten

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


# Of the fields that there are, by their names in any of the configs.
_LEAST = {
    "steps": 1,
    "images": 1,
    "epochs": 1,
    "batch_size": 1,
    "network.channels": 1,
    "network.nodes": 1,
    "model.size": 1,
    "model.nodes": 1,
    "length": 1,
}
_POSITIVE = ("xi", "w_rate", "alpha_rate")

ProblemConfig = ToyConfig | RidgeConfig | CleaningConfig | CnnConfig | RnnConfig


def make(config: ProblemConfig) -> Problem:
    """The problem that a config stands for.

    Raises:
      ValueError: for what cannot be one. The problem's `init`: for images that do not fit the
        network.
    """
    return _MAKERS[type(config)](config)


def check_problem(config: ProblemConfig) -> None:
    """Raises a ValueError for a field out of range, before anything is loaded."""
    fields = flatten(dataclasses.asdict(config))
    command_line.check_at_least(
        *((_flag(name), fields[name], least) for name, least in _LEAST.items() if name in fields)
    )
    command_line.check_positive(
        *((_flag(name), fields[name]) for name in _POSITIVE if name in fields)
    )
    if isinstance(config, CleaningConfig) and not 0 <= config.flipped <= 1:
        raise ValueError(f"--problem.flipped is {config.flipped}; give a share from 0 to 1")
    if isinstance(config, CnnConfig | RnnConfig):
        check_cells(config)


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
        prepare=lambda seed, state, step: (state, *batches),
        evaluate=lambda state: float(bilevel.val_loss(state.w, state.alpha, batches[1])),
        alpha_names=alpha_names,
    )


_MAKERS: dict[type, Callable[[Any], Problem]] = {
    ToyConfig: toy,
    RidgeConfig: ridge,
    CleaningConfig: cleaning,
    CnnConfig: cnn,
    RnnConfig: rnn,
}
