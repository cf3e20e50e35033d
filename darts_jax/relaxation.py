"""Relaxations: functions alpha -> weights that make the choice of operations continuous.

A relaxation turns the architecture variables into the mixing weights that the relaxed cells take.
It is applied outside the network, so another one is any function with the signature of `softmax`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def softmax(alpha: PyTree) -> PyTree:
    """Weights exp(alpha_o) / sum over o' of exp(alpha_o'), equation (2) of arXiv 1806.09055.

    Args:
      alpha: pytree of floating-point arrays [..., edges, operations].

    Returns:
      The same pytree; the last axis of every leaf sums to one.
    """
    return jax.tree.map(partial(jax.nn.softmax, axis=-1), alpha)


def restricted(allowed: PyTree) -> Callable[[PyTree], PyTree]:
    """The softmax over those candidates that each edge has; the others have weight 0.

    Args:
      allowed: bool, a pytree like alpha, with at least one candidate for each edge.
    """

    def relax(alpha: PyTree) -> PyTree:
        return softmax(jax.tree.map(lambda a, held: jnp.where(held, a, -jnp.inf), alpha, allowed))

    return relax
