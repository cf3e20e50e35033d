"""The hypergradient estimators that are compared, by name."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from darts_jax import hypergradient
from darts_jax.genotype import nearest
from darts_jax.hypergradient import Estimator
from experiments.problem import Problem

EXACT = "exact"  # what all others are compared with
UNROLLED = re.compile(r"unrolled_([2-9]|[1-9]\d+)")

# What stands for the weights that alpha leads to: those after one step, w itself without an effect
# of alpha, or w itself as if it were a fixed point of the step. Two estimators are estimates of the
# same number only if this is the same.
ONE_STEP = "one step"
CONSTANT = "constant w"
FIXED_POINT = "fixed point"


@dataclass(frozen=True)
class Settings:
    """Of the estimators that have any."""

    radius: float = 0.01
    """finite_difference: how far it moves the weights, as a global norm; the paper's is 0.01."""
    small_radius: float = 1e-4
    """finite_difference_small: the same."""
    neumann_terms: int = 5
    """neumann: terms of the series."""
    cg_steps: int = 5
    """conjugate_gradient: steps at most."""
    cg_damping: float = 0.0
    """conjugate_gradient: added to the diagonal of the Hessian."""


class Method(NamedTuple):
    """An estimator to compare.

    Attributes:
      make: makes it for a problem.
      target: what stands for the weights that alpha leads to.
      gradient_evaluations: its cost on paper, a product with second derivatives counted as two.
    """

    make: Callable[[Problem], Estimator]
    target: str
    gradient_evaluations: int


def methods(names: Sequence[str], settings: Settings) -> dict[str, Method]:
    """The methods of these names; the exact one is always there, and first.

    Raises:
      ValueError: for an unknown name, or a setting out of range.
    """
    table = _table(settings)
    found = {EXACT: table[EXACT]}
    for name in names:
        if match := UNROLLED.fullmatch(name):
            found[name] = _unrolled(int(match[1]))
        elif name in table:
            found[name] = table[name]
        else:
            raise ValueError(
                f"unknown estimator {name!r} in --estimators; use unrolled_K with K from 2, or one"
                f" of: {nearest(name, table)}"
            )
    return found


def _table(settings: Settings) -> dict[str, Method]:
    def one_step(factory: Callable[..., Estimator], **options: float) -> Method:
        def make(problem: Problem) -> Estimator:
            return factory(problem.bilevel, problem.w_optimizer, **options)

        return Method(make, ONE_STEP, gradient_evaluations=4)

    def fixed_point(make: Callable[[Problem], Estimator], products: int) -> Method:
        return Method(make, FIXED_POINT, gradient_evaluations=2 + 2 * products)

    terms, steps = settings.neumann_terms, settings.cg_steps
    return {
        EXACT: one_step(hypergradient.unrolled),
        "first_order": Method(lambda p: hypergradient.first_order(p.bilevel), CONSTANT, 1),
        "finite_difference": one_step(hypergradient.finite_difference, radius=settings.radius),
        "finite_difference_small": one_step(
            hypergradient.finite_difference, radius=settings.small_radius
        ),
        "t1_t2": fixed_point(lambda p: hypergradient.t1_t2(p.bilevel, p.w_optimizer), products=1),
        "neumann": fixed_point(
            lambda p: hypergradient.neumann(p.bilevel, p.w_optimizer, num_terms=terms),
            products=terms,
        ),
        "conjugate_gradient": fixed_point(
            lambda p: _conjugate_gradient(p, steps, settings.cg_damping), products=steps + 2
        ),
    }


def _conjugate_gradient(problem: Problem, steps: int, damping: float) -> Estimator:
    """By plain gradient descent: learning rate, momentum and clipping have no part in its target.

    The rate cancels, and at a fixed point there is nothing to clip; the estimator refuses an
    optimizer that clips, since elsewhere the system would not be symmetric.
    """
    optimizer = optax.chain(optax.add_decayed_weights(problem.weight_decay), optax.sgd(1.0))
    solve = hypergradient.conjugate_gradient(
        problem.bilevel, optimizer, num_steps=steps, damping=damping
    )

    def estimate(alpha, w, opt_state, train_batch, val_batch):
        del opt_state
        return solve(alpha, w, optimizer.init(w), train_batch, val_batch)

    return estimate


def _unrolled(num_steps: int) -> Method:
    """Every step takes the same batch, so that the batches are those of the other estimators."""

    def make(problem: Problem) -> Estimator:
        exact = hypergradient.unrolled(problem.bilevel, problem.w_optimizer, num_steps)

        @jax.jit  # its loops are compiled at every call else
        def unrolled(alpha, w, opt_state, train_batch, val_batch):
            batches = jax.tree.map(
                lambda x: jnp.broadcast_to(x, (num_steps, *jnp.shape(x))), train_batch
            )
            return exact(alpha, w, opt_state, batches, val_batch)

        return unrolled

    return Method(make, f"{num_steps} steps", 3 * num_steps + 1)
