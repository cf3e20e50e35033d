"""Hypergradients: how the validation loss of trained weights changes with alpha.

The bilevel problem, equations (3) and (4) of DARTS (arXiv 1806.09055), is

    min over alpha of L_val(w*(alpha), alpha),   w*(alpha) = argmin over w of L_train(w, alpha)

Two families of estimators stand for w*. The unrolled ones put what the inner optimizer makes of w
in a few steps in its place: w' = step(step(w)), where

    step(w, alpha) = w + update(grad_w L_train(w, alpha), opt_state, w)

with `update` that of any `optax.GradientTransformation`. The implicit ones take the current w for
a fixed point of that step, and differentiate the equation w* = step(w*, alpha). In either family
the hypergradient has a direct and an implicit term, the second acting through the weights:

    d L_val(w*, alpha) / d alpha = grad_alpha L_val(w*, alpha) + (dw*/d alpha)^T v
                             v = grad_w L_val(w*, alpha)

Alpha enters a step through the gradient of the training loss alone. The implicit term is therefore
made of mixed second derivatives of that loss times vectors, in which the learning rate, momentum,
clipping and the sign are contained. The estimators differ in the vectors, and in how they form the
products: exactly and forward over reverse, exactly and in reverse, by a finite difference, or not
at all.

Every factory returns `estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate`, a pure
function that works under jit, vmap and float64. w and alpha are any pytrees of floating-point
arrays; batches and auxiliary outputs are any pytrees, integers and random keys included.
"""

from darts_jax.hypergradient.conjugate_gradient import conjugate_gradient
from darts_jax.hypergradient.finite_difference import finite_difference
from darts_jax.hypergradient.first_order import first_order
from darts_jax.hypergradient.implicit import neumann, t1_t2
from darts_jax.hypergradient.problem import (
    Bilevel,
    Estimate,
    Estimator,
    Evaluation,
    value_and_grad,
)
from darts_jax.hypergradient.unrolled import unrolled

__all__ = [
    "Bilevel",
    "Estimate",
    "Estimator",
    "Evaluation",
    "conjugate_gradient",
    "finite_difference",
    "first_order",
    "neumann",
    "t1_t2",
    "unrolled",
    "value_and_grad",
]
