"""The implicit function theorem at a fixed point of the inner optimizer: series for the inverse.

If w = step(w, alpha), with step(w, alpha) = w + update(grad_w L_train(w, alpha), opt_state, w) and
opt_state constant, then dw/d alpha = (I - J)^-1 K, with J and K the derivatives of the step in w
and in alpha. The implicit term is K^T q, where q solves (I - J)^T q = v. For SGD of rate eta on a
loss with weight decay lambda, I - J is eta (H_ww + lambda I), K is -eta H_w,alpha, and eta cancels.

A product with (J - I)^T is a pull-back through the optimizer's update and a Hessian product. So the
Hessian is never formed, and momentum, weight decay and schedules are those of the optimizer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from darts_jax.hypergradient.problem import (
    Bilevel,
    Estimate,
    Estimator,
    PyTree,
    make_estimate,
    value_and_grad,
)
from darts_jax.hypergradient.products import (
    hessian_product,
    mixed_product,
    pull_back,
    pull_back_to_both,
)

# (w, alpha, train_batch, grad_w L_train, opt_state, v) -> q
Solve = Callable[[PyTree, PyTree, PyTree, PyTree, optax.OptState, PyTree], PyTree]


def neumann(
    problem: Bilevel, inner_optimizer: optax.GradientTransformation, num_terms: int = 5
) -> Estimator:
    """The implicit gradient by a Neumann series, its terms so many steps looked back.

        q = sum of (J^T)^j v over j < num_terms

    Lorraine et al. 2020 (arXiv 1911.02590), iDARTS (arXiv 2106.10784). It converges where no
    eigenvalue of J reaches 1 in size: for SGD where the rate eta is below 2 over the largest
    eigenvalue of H_ww, and then as 1 - eta times the smallest. At a fixed point it equals
    `unrolled` by SGD without momentum, num_steps = num_terms, on one batch; elsewhere it takes the
    current w for one. opt_state is constant: for momentum the series is that of plain SGD, which
    has the same limit and bears no larger rate; Nesterov's mu makes the rate eta (1 + mu). At a
    minimum of the training loss Adam's limit is the same too, as its scaling cancels, and that with
    clipping, which is idle there. Elsewhere the derivatives of either are in the series.

    Cost: two gradients, num_terms - 1 Hessian products (two gradients each) and a mixed product.
    Memory: that of a Hessian product, for any num_terms.

    The right one where w is trained to near convergence between the steps of alpha: it looks far
    back without storing a path.

    Args:
      problem: the two losses; value and direct term are taken at the current w.
      inner_optimizer: the transformation that trains w, which decides what a fixed point is.
      num_terms: at least 1.

    Raises:
      ValueError: for num_terms out of range. When called: as `unrolled` does.
    """
    if num_terms < 1:
        raise ValueError(f"num_terms must be at least 1, got {num_terms}")
    change = transposed_change(problem, inner_optimizer)

    @jax.jit
    def series(w, alpha, batch, gradient, opt_state, v):
        def add(carry, _):
            term, total = carry
            changed = change(w, alpha, batch, gradient, opt_state, term)
            term = jax.tree.map(jnp.add, term, changed)
            return (term, jax.tree.map(jnp.add, total, term)), None

        (_, total), _ = jax.lax.scan(add, (v, v), length=num_terms - 1)
        return total

    def solve(*args):
        return series(*args) if num_terms > 1 else args[-1]

    return at_fixed_point(problem, inner_optimizer, solve)


def t1_t2(problem: Bilevel, inner_optimizer: optax.GradientTransformation) -> Estimator:
    """The implicit gradient with the identity for the inverse, T1-T2: q = v.

    Luketina et al. 2016 (arXiv 1511.06727). The first term of `neumann`. It differs from one
    `unrolled` step in that the validation loss is taken at w, not after the step.

    Cost: two gradients and a mixed product. Memory: that of a gradient twice over.

    The right one where the step is small and the validation loss at w is wanted.

    Args:
      problem, inner_optimizer: as for `neumann`.

    Raises:
      ValueError: when called, as `unrolled` does.
    """
    return neumann(problem, inner_optimizer, num_terms=1)


def at_fixed_point(
    problem: Bilevel, optimizer: optax.GradientTransformation, solve: Solve
) -> Estimator:
    """The estimator that takes w for a fixed point, by a solution of (I - J)^T q = v."""
    train_gradient = value_and_grad(problem.train_loss, problem.has_aux)
    validate = value_and_grad(problem.val_loss, problem.has_aux)
    product = mixed_product(problem.train_loss, problem.has_aux)
    transposed_update = pull_back(optimizer)

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        train, (gradient, _) = train_gradient(w, alpha, train_batch)
        val, (v, direct) = validate(w, alpha, val_batch)
        q = solve(w, alpha, train_batch, gradient, opt_state, v)
        u = transposed_update(gradient, opt_state, w, q)
        return make_estimate(val, direct, product(w, alpha, train_batch, u), train)

    return estimate


def transposed_change(
    problem: Bilevel, optimizer: optax.GradientTransformation, damping: float = 0.0
) -> Solve:
    """`(w, alpha, batch, gradient, opt_state, p) -> (J - I)^T p`, with damping added to H_ww."""
    hessian = hessian_product(problem.train_loss, problem.has_aux)
    transposed_update = pull_back_to_both(optimizer)

    def product(w, alpha, batch, gradient, opt_state, p):
        u, through_w = transposed_update(gradient, opt_state, w, p)
        curvature = hessian(w, alpha, batch, u)
        return jax.tree.map(lambda a, b, u: a + b + damping * u, through_w, curvature, u)

    return product
