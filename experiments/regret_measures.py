"""What searches are worth: regret, rank and collapse against a table, and how methods compare."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy import stats

from darts_jax import ground_truth, isomorphism
from darts_jax.dag_cell import CONVOLUTIONS


class Score(NamedTuple):
    """Of architectures, arrays [...]: regrets in [0, 1], rank from 1, and whether it collapsed."""

    test_regret: Array
    validation_regret: Array
    rank: Array
    collapsed: Array


class Random(NamedTuple):
    """What the best of some random architectures is worth: a mean and standard deviation of each.

    Exact, over all draws.
    """

    mean: Score
    deviation: Score


class Interval(NamedTuple):
    """A mean of paired differences, and the 95% interval of Student's t around it."""

    mean: float
    low: float
    high: float


def derive(alpha: Array, primitives: Sequence[str], with_none: bool = True) -> Array:
    """The operation of the largest alpha of every edge, int32 [..., edges].

    `none` is one of them, as in `Space.derive`: of this cell no edge is dropped, so that nothing
    else can take one away. Without it, it is never chosen, as in DARTS.

    Args:
      alpha: [..., edges, candidates].
      primitives: names of the candidates.
      with_none: whether none can be chosen.
    """
    allowed = np.array([with_none or name != "none" for name in primitives])
    return jnp.where(allowed, alpha, -jnp.inf).argmax(-1)


def collapsed(choice: Array, primitives: Sequence[str]) -> Array:
    """Whether architectures [..., edges] collapsed: bool [...].

    That is, whether at least half of the edges are skip connections, or none has a convolution.
    """
    choice = jnp.asarray(choice)
    skips = (choice == primitives.index("skip_connect")).mean(-1)
    parametric = np.array([name in CONVOLUTIONS for name in primitives])
    return (skips >= 0.5) | ~jnp.asarray(parametric)[choice].any(-1)


def ranks(table: ground_truth.Table) -> np.ndarray:
    """The rank by test accuracy of every architecture of `isomorphism.choices`, among classes.

    int32 [architectures]: 1 for the best, and the same rank for those that are as accurate.
    """
    accuracy = _of_classes(table, "test")
    better = stats.rankdata(-accuracy, method="min").astype(np.int32)
    return better[table.class_of]


def _of_classes(table: ground_truth.Table, part: str) -> np.ndarray:
    """Accuracy of each class, [classes]."""
    powers = ground_truth.index(table.architectures, len(table.primitives))
    return np.asarray(ground_truth.accuracy(table, powers, part))


def make_score(table: ground_truth.Table):
    """`score(choice) -> Score`, jitted, of architectures [..., edges]."""
    order = ranks(table)

    @jax.jit
    def score(choice: Array) -> Score:
        number = ground_truth.index(choice, len(table.primitives))
        return Score(
            *(ground_truth.regret(table, number, part) for part in ("test", "validation")),
            jnp.asarray(order)[number],
            collapsed(choice, table.primitives),
        )

    return score


def random_search(table: ground_truth.Table, count: int) -> Random:
    """The best by validation accuracy of `count` architectures, drawn uniformly with repetition."""
    choices = isomorphism.choices(len(table.edges), len(table.primitives))
    accuracy = np.asarray(ground_truth.accuracy(table, np.arange(len(choices)), "validation"))
    chance = best_of(accuracy, count)
    scores = jax.tree.map(lambda x: np.asarray(x, float), make_score(table)(choices))
    mean = jax.tree.map(lambda x: float(chance @ x), scores)
    deviation = jax.tree.map(lambda x, m: float(np.sqrt(chance @ (x - m) ** 2)), scores, mean)
    return Random(mean, deviation)


def best_of(value: np.ndarray, count: int) -> np.ndarray:
    """How likely each is to have the largest value of `count` uniform draws: [N], sums to 1.

    That the largest has a rank of at most r of N is (r / N) ** count; equal ones share evenly.
    """
    _, group, sizes = np.unique(value, return_inverse=True, return_counts=True)
    below = np.concatenate([[0], np.cumsum(sizes)]) / len(value)
    return (np.diff(below**count) / sizes)[group]


def paired(first: np.ndarray, second: np.ndarray) -> Interval:
    """The differences first - second of the same seeds, [seeds]; no interval of one seed."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    mean, count = float(differences.mean()), len(differences)
    if count < 2:
        return Interval(mean, float("-inf"), float("inf"))
    half = stats.t.ppf(0.975, count - 1) * standard_error(differences)
    return Interval(mean, mean - half, mean + half)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of [seeds], at least 2."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
