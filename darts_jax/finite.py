"""Finding NaN and infinity in a pytree, on the device."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

PyTree = Any


def squares(tree: PyTree) -> Array:
    """The sum of squares of each leaf, [leaves]; not finite where the leaf is not, or overflows."""
    return jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree)])


def first(values: Array) -> Array:
    """The index, int32, of the first of some values [N] that is not finite; -1 if there is none."""
    bad = ~jnp.isfinite(values)
    return jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32)


def all_finite(tree: PyTree) -> Array:
    """Whether no leaf holds NaN or infinity, a bool."""
    return jnp.isfinite(squares(tree)).all()


def guarded(update: Callable[[PyTree], PyTree], skip: bool) -> Callable[[PyTree, PyTree], PyTree]:
    """`guarded(update, skip)(checked, old)`: `update(old)`, or `old` where it is to be skipped.

    Args:
      update: from the old values to the new ones, a pytree of the same structure.
      skip: whether to skip an update if `checked` holds NaN or infinity.
    """

    def run(checked: PyTree, old: PyTree) -> PyTree:
        new = update(old)
        if not skip:
            return new
        ok = all_finite(checked)
        return jax.tree.map(lambda a, b: jnp.where(ok, a, b), new, old)

    return run
