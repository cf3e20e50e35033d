"""Derivatives of a loss beyond its gradient, and of the optimizer's step: jitted stages.

Estimators are written as a few of them. Called outside of jit, each is compiled once and apart,
which takes a fraction of the time and memory of compiling an estimator as one program; estimators
of the same loss share those of the loss.
"""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import optax

from darts_jax.hypergradient.problem import Loss, PyTree, ValueAndGrad, value_and_grad

Product = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]


@lru_cache
def alpha_gradient(loss: Loss, has_aux: bool) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """`(w, alpha, batch) -> grad_alpha`: without the gradient in w, a cheaper program."""
    differentiate = value_and_grad(loss, has_aux)

    @jax.jit
    def alpha_gradient(*point):
        return differentiate(*point)[1][1]

    return alpha_gradient


@lru_cache
def mixed_product(loss: Loss, has_aux: bool) -> Product:
    """`(w, alpha, batch, u) -> H_alpha,w u`: exact, forward over reverse."""
    differentiate = value_and_grad(loss, has_aux)

    @jax.jit
    def mixed_product(w, alpha, batch, u):
        return forward_over_reverse(differentiate, w, alpha, batch, u)[1]

    return mixed_product


@lru_cache
def hessian_product(loss: Loss, has_aux: bool) -> Product:
    """`(w, alpha, batch, u) -> H_ww u`: exact, forward over reverse."""
    differentiate = value_and_grad(loss, has_aux)

    @jax.jit
    def hessian_product(w, alpha, batch, u):
        return forward_over_reverse(differentiate, w, alpha, batch, u)[0]

    return hessian_product


def forward_over_reverse(train: ValueAndGrad, w, alpha, batch, u) -> tuple[PyTree, PyTree]:
    """(H_ww u, H_alpha,w u): how both gradients of the loss change when w moves along u."""
    _, products = jax.jvp(lambda w: train(w, alpha, batch)[1], (w,), (u,))
    return products


def inner_step(optimizer: optax.GradientTransformation) -> Callable[..., PyTree]:
    """`(gradient, opt_state, w) -> w + update(gradient, opt_state, w)`.

    Raises:
      ValueError: when called, for an opt_state that the optimizer would not make of w.
    """

    @jax.jit
    def inner_step(gradient, opt_state, w):
        require_state_of(optimizer, opt_state, w)
        updates, _ = optimizer.update(gradient, opt_state, w)
        return optax.apply_updates(w, updates)

    return inner_step


def pull_back(optimizer: optax.GradientTransformation) -> Callable[..., PyTree]:
    """`(gradient, opt_state, w, v) -> (dupdate/dgradient)^T v`.

    Of the update, not of w + update: v would swallow the digits of a small rate times v.

    Raises:
      ValueError: as `inner_step` does.
    """

    @jax.jit
    def pull_back(gradient, opt_state, w, v):
        update = _update_of(optimizer, opt_state, w)
        (u,) = jax.vjp(lambda gradient: update(gradient, w), gradient)[1](v)
        return u

    return pull_back


def pull_back_to_both(
    optimizer: optax.GradientTransformation,
) -> Callable[..., tuple[PyTree, PyTree]]:
    """`(gradient, opt_state, w, v) -> ((dupdate/dgradient)^T v, (dupdate/dw)^T v)`.

    Raises:
      ValueError: as `inner_step` does.
    """

    @jax.jit
    def pull_back_to_both(gradient, opt_state, w, v):
        return jax.vjp(_update_of(optimizer, opt_state, w), gradient, w)[1](v)

    return pull_back_to_both


def _update_of(optimizer: optax.GradientTransformation, opt_state: optax.OptState, w: PyTree):
    """`(gradient, w) -> update`, in the dtypes of w."""
    require_state_of(optimizer, opt_state, w)

    def update(gradient, w):
        updates, _ = optimizer.update(gradient, opt_state, w)
        return jax.tree.map(lambda u, w: jnp.asarray(u, w.dtype), updates, w)

    return update


def require_state_of(
    optimizer: optax.GradientTransformation, opt_state: optax.OptState, w: PyTree
) -> None:
    def signature(state):
        leaves, structure = jax.tree.flatten(state)
        return structure, [jnp.shape(leaf) for leaf in leaves]

    if signature(opt_state) != signature(jax.eval_shape(optimizer.init, w)):
        raise ValueError("opt_state is not of inner_optimizer and w: make it by its init(w)")
