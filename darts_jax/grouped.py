"""Batch norm by slices of a batch, as where each of several devices normalises its own."""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array

PyTree = Any
Forward = Callable[..., tuple[PyTree, PyTree]]


def by_slices(forward: Forward, groups: int) -> Forward:
    """A pass over a batch, each of `groups` equal slices of it on its own.

    Args:
      forward: `(*arrays) -> (outputs, statistics)`, the first axis of arrays and of outputs being
        that of the batch.
      groups: a divisor of the batch; 1 gives `forward` itself.

    Returns:
      Such a function; its statistics are the means over the slices.
    """
    if groups == 1:
        return forward

    def run(*arrays: Array) -> tuple[PyTree, PyTree]:
        sliced = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), arrays)
        outputs, statistics = jax.vmap(forward)(*sliced)
        whole = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
        return whole, jax.tree.map(lambda x: x.mean(0), statistics)

    return run


def keys(key: Array, groups: int) -> Array:
    """A random key for each slice, [groups], for `by_slices`; of one slice, the key itself."""
    return key[None] if groups == 1 else jax.random.split(key, groups)


def count(network: Any) -> int:
    """Slices that a network's batch norm is by: its field `batch_norm_groups`, or 1 without it."""
    return getattr(network, "batch_norm_groups", 1)
