"""The gradient at constant weights."""

import jax
import jax.numpy as jnp

from darts_jax.hypergradient.problem import (
    Bilevel,
    Estimate,
    Estimator,
    make_estimate,
    value_and_grad,
)


def first_order(problem: Bilevel) -> Estimator:
    """The gradient at constant weights, grad_alpha L_val(w, alpha): xi = 0 in the paper.

    The implicit term is zero. opt_state and train_batch are taken for the signature and not used.
    """
    validate = value_and_grad(problem.val_loss, problem.has_aux)

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        del opt_state, train_batch
        val, (_, direct) = validate(w, alpha, val_batch)
        return make_estimate(val, direct, jax.tree.map(jnp.zeros_like, direct), train=None)

    return estimate
