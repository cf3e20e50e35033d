"""Relaxations: functions alpha -> weights that make the choice of operations continuous.

A relaxation turns the architecture variables into the mixing weights that the relaxed cells take.
It is applied outside the network, so another one is any function with the signature of `softmax`.
"""

from functools import partial
from typing import Any

import jax

PyTree = Any


def softmax(alpha: PyTree) -> PyTree:
    """Weights exp(alpha_o) / sum over o' of exp(alpha_o'), equation (2) of arXiv 1806.09055.

    Args:
      alpha: pytree of floating-point arrays [..., edges, operations].

    Returns:
      The same pytree; the last axis of every leaf sums to one.
    """
    return jax.tree.map(partial(jax.nn.softmax, axis=-1), alpha)
