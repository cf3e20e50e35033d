"""The gradient through one step, its mixed product by a finite difference."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from darts_jax.hypergradient.problem import Bilevel, Estimator
from darts_jax.hypergradient.products import alpha_gradient
from darts_jax.hypergradient.unrolled import through_one_step


def finite_difference(
    problem: Bilevel,
    inner_optimizer: optax.GradientTransformation,
    radius: float | None = 0.01,
    relative: bool = False,
    scheme: Literal["central", "forward"] = "central",
) -> Estimator:
    """The gradient through one inner step, its mixed product a difference, equation (8) of DARTS.

    The weights move by eps u either way, eps = radius / norm(u):

        H_alpha,w u ~ (grad_alpha L_train(w + eps u) - grad_alpha L_train(w - eps u)) / (2 eps)

    For SGD with momentum and weight decay u is -xi v, so these are the paper's points w +- eps v.
    Where u is zero, so is the implicit term.

    Cost: four gradients, two of them in alpha alone; "forward" saves one of these. Memory: that of
    a gradient.

    The error is of second order in the radius if the training loss is smooth between the points
    ("forward": of first order), plus rounding of the order of machine epsilon over the radius. A
    network with ReLU and max pooling is not smooth, and the paper's radius crosses kinks: use it
    to reproduce the paper, or where a loss cannot be differentiated twice.

    Args:
      problem: the two losses.
      inner_optimizer: the transformation that trains w, as in `unrolled`.
      radius: global norm of the movement; the paper's is 0.01. None for the textbook's balance of
        truncation and rounding, machine epsilon ** (1/3) ("forward": 1/2) times the norm of w or,
        if that is larger, 1.
      relative: the radius is in units of norm(w), if w is not zero, instead of w's own.
      scheme: "central", or "forward": from w to w + eps u, where the gradient at w is known.

    Raises:
      ValueError: for a radius that is not positive, relative without one, or an unknown scheme.
        When called: as `unrolled` does.
    """
    if radius is not None and not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    if radius is None and relative:
        raise ValueError("relative needs a radius: None is already relative to norm(w)")
    if scheme not in ("central", "forward"):
        raise ValueError(f"scheme must be 'central' or 'forward', got {scheme!r}")
    central = scheme == "central"
    gradient = alpha_gradient(problem.train_loss, problem.has_aux)

    def product(w, alpha, batch, u, at_w):
        plus, minus, distance = points(w, u, radius, relative, central)
        base = gradient(minus, alpha, batch) if central else at_w
        return quotient(gradient(plus, alpha, batch), base, distance)

    return through_one_step(problem, inner_optimizer, product)


# The radius is an argument: estimators of all radii share one program.
@partial(jax.jit, static_argnames=("relative", "central"))
def points(w, u, radius, relative, central):
    """The two points whose gradients are compared, and their distance in units of u."""
    norm, w_norm = optax.tree.norm(u), optax.tree.norm(w)
    if radius is None:
        order = 1 / 3 if central else 1 / 2
        radius = jnp.finfo(w_norm.dtype).eps ** order * jnp.maximum(w_norm, 1)
    elif relative:
        radius = radius * jnp.where(w_norm > 0, w_norm, 1)
    eps = radius / jnp.where(norm > 0, norm, 1)  # u = 0 moves nothing: the product is zero

    def move(sign):
        return jax.tree.map(lambda w, u: w + (sign * eps).astype(u.dtype) * u, w, u)

    return move(1), move(-1) if central else w, 2 * eps if central else eps


@jax.jit
def quotient(plus, minus, distance):
    """The difference of the two gradients over the distance of their points."""
    return jax.tree.map(lambda p, m: (p - m) / distance.astype(p.dtype), plus, minus)
