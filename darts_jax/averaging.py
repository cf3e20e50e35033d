"""Averaged SGD: when to start it, and the mean of the weights from then on.

The mean is that of all weights after each step from its start. (PyTorch's ASGD, which the original
uses, forgets the first of them: its first average is that of the second step alone, and its n-th
divides by n - 1. The two agree in the limit.)
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

PyTree = Any


class Average(NamedTuple):
    """The mean of `count` pytrees of weights; of none, the weights it was made with."""

    count: Array
    mean: PyTree


def init(params: PyTree) -> Average:
    """The average before any weights are in it."""
    return Average(jnp.zeros((), jnp.int32), params)


def update(average: Average, params: PyTree, active: Array | bool = True) -> Average:
    """The average with these weights in it; not active, it starts anew at them."""
    count = jnp.where(active, average.count + 1, 0)
    step = 1 / jnp.maximum(count, 1).astype(float)
    mean = optax.incremental_update(params, average.mean, step)
    mean = jax.tree.map(lambda new, now: jnp.where(active, new, now), mean, params)
    return Average(count, mean)


def should_start(losses: Sequence[float], patience: int = 5) -> bool:
    """Whether the last of these validation losses is above the best of all but the last `patience`.

    The trigger of Merity et al., arXiv 1708.02182: no progress for so many evaluations.
    """
    return len(losses) > patience and losses[-1] > min(losses[:-patience])
