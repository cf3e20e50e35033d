"""Curvature of the validation loss in alpha, and the early stopping that it gives: RobustDARTS.

Zela et al., arXiv 1909.09656: where the dominant eigenvalue of the Hessian of the validation loss
in alpha grows, the cells that the alphas stand for generalise worse.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree

PyTree = Any


def dominant_eigenvalue(
    loss: Callable[[PyTree], Array], alpha: PyTree, key: Array, iterations: int = 20
) -> Array:
    """The largest eigenvalue of the Hessian of a loss at alpha, by the method of Lanczos.

    With full reorthogonalisation. The result is never above the eigenvalue, and equals it, up to
    rounding, where `iterations` is at least the number of different eigenvalues. The authors' code
    takes the largest of a full Hessian, too, and not the largest in size.

    Cost: a gradient, then for each iteration a Hessian-vector product, forward over reverse, which
    is worth about two gradients. Works under jit, vmap and float64.

    Args:
      loss: `loss(alpha)`, a floating-point scalar, twice differentiable.
      alpha: pytree of floating-point arrays.
      key: random key, of the vector to start from.
      iterations: Hessian-vector products, of which more than alpha has numbers are not made.

    Returns:
      A scalar of alpha's dtype.
    """
    flat, unravel = ravel_pytree(alpha)
    count = min(iterations, flat.size)
    _, product = jax.linearize(jax.grad(lambda flat: loss(unravel(flat))), flat)
    diagonal, beside = _lanczos(product, jax.random.normal(key, flat.shape, flat.dtype), count)
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    return jnp.linalg.eigvalsh(matrix)[-1]


def _lanczos(product: Callable[[Array], Array], start: Array, count: int) -> tuple[Array, Array]:
    """Diagonal and off-diagonal [count] of the tridiagonal matrix, the last of them unused."""
    tolerance = start.size * jnp.finfo(start.dtype).eps

    def iterate(i, carry):
        basis, diagonal, beside = carry
        v = basis[i]
        u = product(v)
        # A basis that is complete before `count` goes on with zeros: no eigenvalue may come of it.
        diagonal = diagonal.at[i].set(jnp.where(v.any(), v @ u, diagonal[0]))
        for _ in range(2):  # twice is enough, where once leaves what rounding left
            u = u - basis.T @ (basis @ u)
        norm = jnp.linalg.norm(u)
        goes_on = norm > tolerance * jnp.abs(diagonal).max()
        v = jnp.where(goes_on, u / jnp.where(goes_on, norm, 1), 0)
        beside = beside.at[i].set(jnp.where(goes_on, norm, 0))
        return basis.at[i + 1].set(v, mode="drop"), diagonal, beside

    basis = jnp.zeros((count, start.size), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    zeros = jnp.zeros(count, start.dtype)
    _, diagonal, beside = lax.fori_loop(0, count, iterate, (basis, zeros, zeros))
    return diagonal, beside


def early_stop(eigenvalues: Sequence[float], ratio: float = 0.75, window: int = 5) -> int | None:
    """Where a search should have stopped, by its dominant eigenvalues so far.

    With m(i) the mean of the `window` (k) eigenvalues around i, the search stops as soon as

        m(i - k) / m(i) < ratio

    and goes back to i - k, section 4.3 of arXiv 1909.09656, which has k = 5 and a ratio of 0.75.
    Only whole windows count, and only those with a positive mean at i. The authors' code has a
    ratio of 1 / 1.3 between windows that are 4 apart, and no stop that goes back to before epoch
    10.

    Args:
      eigenvalues: one for each time that it was measured, from the beginning.
      ratio: what is too steep a growth.
      window: number of eigenvalues to take the mean of, odd.

    Returns:
      The index of the measurement to go back to; None if there is no reason to stop.
    """
    values, half = np.asarray(eigenvalues, float), window // 2
    if len(values) < 2 * window:
        return None
    means = np.convolve(values, np.full(window, 1 / window), "valid")  # means[j] is around j + half
    before, after = means[:-window], means[window:]
    steep = np.flatnonzero((after > 0) & (before < ratio * after))
    return int(steep[0]) + half if len(steep) else None
