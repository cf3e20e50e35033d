"""The exact gradient through steps of the inner optimizer."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from darts_jax.hypergradient.problem import (
    Bilevel,
    Estimate,
    Estimator,
    PyTree,
    ValueAndGrad,
    make_estimate,
    require_leading_axis,
    value_and_grad,
)
from darts_jax.hypergradient.products import (
    forward_over_reverse,
    inner_step,
    mixed_product,
    pull_back,
    require_state_of,
)

# (w, alpha, train_batch, u, grad_alpha L_train(w, alpha)) -> H_alpha,w u
OneStepProduct = Callable[[PyTree, PyTree, PyTree, PyTree, PyTree], PyTree]


def unrolled(
    problem: Bilevel,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int = 1,
    mode: Literal["forward", "reverse"] = "forward",
    remat: bool = False,
    truncate: int | None = None,
) -> Estimator:
    """The exact gradient through num_steps of the inner optimizer, equations (5) to (7) of DARTS.

    Exact wherever the optimizer is differentiable. (Adam is not where a gradient is exactly zero,
    unless eps_root > 0.) Several steps: Maclaurin et al. 2015 (arXiv 1502.03492), Franceschi et al.
    2017 (arXiv 1703.01785); truncated: Shaban et al. 2019 (arXiv 1810.10667).

    Cost: for one step two gradients and a mixed product, which is worth about two more; for K of
    them K gradients and one at the end, then a mixed and a Hessian product for each differentiated
    step. Memory: that of a gradient twice over, and for K steps K copies of w, opt_state and what
    the update keeps; in reverse mode every intermediate value of K steps, with remat those of one.

    The right one by default: it is the derivative of what the inner optimizer does, and one step
    costs what its approximation by `finite_difference` does. More steps see further, and cost more.

    Args:
      problem: the two losses.
      inner_optimizer: the transformation that trains w. Momentum, weight decay, schedules and
        clipping are differentiated through because they are in it.
      num_steps: inner steps, at least 1. When more, every leaf of train_batch has a leading axis
        of num_steps: one batch a step.
      mode: how the gradient of the training loss is differentiated. "forward" (over reverse) keeps
        w, opt_state, the batch and what the update needs of each step in memory, but takes batches
        as constants, and needs the rule of any `jax.custom_vjp` in the loss to be the true
        derivative (a straight-through, reversed or scaled gradient gives another number here) and
        differentiable forward, which a rule that calls its own function is not. "reverse" (over
        reverse) has none of these limits, and keeps every intermediate value of every step.
      remat: `jax.checkpoint` each step, so that the intermediate values of one step are kept at a
        time, those of its update included.
      truncate: differentiate the last so many steps alone; those before move w, and count as
        constant in alpha. None for all.

    Raises:
      ValueError: for num_steps, truncate or mode out of range. When called: for a loss that is not
        a floating-point scalar, a leaf of w or alpha that is not floating-point, an opt_state that
        is not the optimizer's for w, or a train_batch without its leading axis.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if truncate is not None and not 1 <= truncate <= num_steps:
        raise ValueError(f"truncate must be from 1 to num_steps={num_steps}, got {truncate}")
    if mode not in ("forward", "reverse"):
        raise ValueError(f"mode must be 'forward' or 'reverse', got {mode!r}")
    if num_steps == 1 and mode == "forward":
        product = mixed_product(problem.train_loss, problem.has_aux)
        return through_one_step(problem, inner_optimizer, lambda *args: product(*args[:-1]))
    step = _differentiable_step(problem, inner_optimizer, mode == "forward")
    step = jax.checkpoint(step) if remat else step
    return _through_steps(problem, step, num_steps, truncate or num_steps)


def through_one_step(
    problem: Bilevel, optimizer: optax.GradientTransformation, product: OneStepProduct
) -> Estimator:
    """The estimator for one inner step, by `product(w, alpha, batch, u, alpha_gradient)`."""
    train_gradient = value_and_grad(problem.train_loss, problem.has_aux)
    validate = value_and_grad(problem.val_loss, problem.has_aux)
    step, transposed_update = inner_step(optimizer), pull_back(optimizer)

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        train, (gradient, alpha_gradient) = train_gradient(w, alpha, train_batch)
        w_prime = step(gradient, opt_state, w)
        val, (v, direct) = validate(w_prime, alpha, val_batch)
        u = transposed_update(gradient, opt_state, w, v)
        implicit = product(w, alpha, train_batch, u, alpha_gradient)
        return make_estimate(val, direct, implicit, train)

    return estimate


def _differentiable_step(
    problem: Bilevel, optimizer: optax.GradientTransformation, forward_mode: bool
) -> Callable:
    """`(alpha, (w, opt_state), batch) -> ((w', opt_state'), Evaluation)`."""
    train = value_and_grad(problem.train_loss, problem.has_aux)
    train_gradient = _forward_over_reverse_gradient(train) if forward_mode else _gradient(train)

    def step(alpha, carry, batch):
        w, opt_state = carry
        require_state_of(optimizer, opt_state, w)
        gradient, evaluation = train_gradient(w, alpha, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), evaluation

    return step


def _through_steps(problem: Bilevel, step: Callable, num_steps: int, kept: int) -> Estimator:
    """The estimator that pulls v = grad_w' L_val back through the last steps to alpha."""
    validate = value_and_grad(problem.val_loss, problem.has_aux)
    constant = num_steps - kept

    @jax.jit
    def advance(alpha, carry, train_batch):
        """w', the pullback of alpha -> w' through the steps that are kept, every Evaluation."""
        if num_steps == 1:
            train_batch = jax.tree.map(lambda x: jnp.asarray(x)[None], train_batch)
        require_leading_axis(train_batch, num_steps)
        first = jax.tree.map(lambda x: x[:constant], train_batch)
        last = jax.tree.map(lambda x: x[constant:], train_batch)
        if constant:
            carry, before = jax.lax.scan(partial(step, alpha), carry, first, length=constant)

        def unroll(alpha):
            (w_prime, _), train = jax.lax.scan(partial(step, alpha), carry, last, length=kept)
            return w_prime, train

        w_prime, pullback, train = jax.vjp(unroll, alpha, has_aux=True)
        if constant:
            train = jax.tree.map(lambda *parts: jnp.concatenate(parts), before, train)
        if num_steps == 1:
            train = jax.tree.map(lambda x: x[0], train)
        return w_prime, pullback, train

    @jax.jit
    def pull_through(pullback, v):
        return pullback(v)[0]

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        w_prime, pullback, train = advance(alpha, (w, opt_state), train_batch)
        val, (v, direct) = validate(w_prime, alpha, val_batch)
        return make_estimate(val, direct, pull_through(pullback, v), train)

    return estimate


def _gradient(train: ValueAndGrad) -> Callable:
    """`(w, alpha, batch) -> (grad_w, Evaluation)`, differentiated by JAX: in reverse."""

    def gradient(w, alpha, batch):
        evaluation, (grad_w, _) = train(w, alpha, batch)
        return grad_w, evaluation

    return gradient


def _forward_over_reverse_gradient(train: ValueAndGrad) -> Callable:
    """The same function, differentiated forward over reverse.

    The pullback of (w, alpha) -> grad_w L takes u to (H_ww u, H_alpha,w u), with H the Hessian of
    L. As H is symmetric, that is also how both gradients of L change when w moves along u.
    """
    gradient = _gradient(train)

    def forward(*point):
        return gradient(*point), point

    def backward(point, cotangents):
        u, _ = cotangents
        return *forward_over_reverse(train, *point, u), None

    gradient_with_products = jax.custom_vjp(gradient)
    gradient_with_products.defvjp(forward, backward)
    return gradient_with_products
