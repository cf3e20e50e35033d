"""Hypergradients: how the validation loss of trained weights changes with alpha.

The bilevel problem, equations (3) and (4) of DARTS (arXiv 1806.09055), is

    min over alpha of L_val(w*(alpha), alpha),   w*(alpha) = argmin over w of L_train(w, alpha)

Here w* is replaced by what the inner optimizer makes of w in one step, or in a few:

    g = grad_w L_train(w, alpha),   w' = w + update(g, opt_state, w)

where `update` is that of any `optax.GradientTransformation`. By the chain rule, equation (7), the
hypergradient has a direct and an implicit term:

    d L_val(w', alpha) / d alpha = grad_alpha L_val(w', alpha) + (dw'/d alpha)^T v
                               v = grad_w' L_val(w', alpha)

Alpha enters an inner step through g alone. The implicit term is therefore the mixed second
derivative of the training loss times one vector, u = (dw'/dg)^T v, which the learning rate,
momentum, clipping and the sign are part of. The estimators differ only in how they form that
product: exactly and forward over reverse, exactly and in reverse, by a central difference, or not
at all.

Every factory returns `estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate`, a pure
function that works under jit, vmap and float64. w and alpha are any pytrees of floating-point
arrays; batches and auxiliary outputs are any pytrees, integers and random keys included.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

PyTree = Any
Loss = Callable[[PyTree, PyTree, PyTree], Any]


class Bilevel(NamedTuple):
    """Two losses of the same weights and alpha, equations (3) and (4).

    Attributes:
      train_loss: `loss(w, alpha, batch)`, which w minimises: a floating-point scalar.
      val_loss: `loss(w, alpha, batch)`, which alpha minimises: a floating-point scalar.
      has_aux: both losses return `(scalar, aux)` instead, aux being any pytree.
    """

    train_loss: Loss
    val_loss: Loss
    has_aux: bool = False


class Evaluation(NamedTuple):
    """A loss at one point: its scalar value and its auxiliary output (None without `has_aux`)."""

    value: jax.Array
    aux: PyTree


class Estimate(NamedTuple):
    """What an estimator returns.

    Attributes:
      value: validation loss, a scalar, where the estimator evaluates it: at the weights after the
        inner steps, or at w for `first_order`.
      gradient: the hypergradient, a pytree like alpha: direct + implicit.
      direct: partial derivative of that validation loss in alpha, the weights being constant.
      implicit: the part that acts through the weights, with its sign and learning rate.
      aux: auxiliary output of that validation loss.
      train: training loss before each inner step, with a leading axis of num_steps when that is
        more than one. None for `first_order`, which does not evaluate it.
    """

    value: jax.Array
    gradient: PyTree
    direct: PyTree
    implicit: PyTree
    aux: PyTree
    train: Evaluation | None


Estimator = Callable[[PyTree, PyTree, optax.OptState, PyTree, PyTree], Estimate]
ValueAndGrad = Callable[[PyTree, PyTree, PyTree], tuple[Evaluation, tuple[PyTree, PyTree]]]
MixedProduct = Callable[[PyTree, PyTree, PyTree, PyTree], PyTree]


def first_order(problem: Bilevel) -> Estimator:
    """The gradient at constant weights, grad_alpha L_val(w, alpha): xi = 0 in the paper.

    The implicit term is zero. opt_state and train_batch are taken for the signature and not used.
    """
    validate = value_and_grad(problem.val_loss, problem.has_aux)

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        del opt_state, train_batch
        val, (_, direct) = validate(w, alpha, val_batch)
        return _estimate(val, direct, jax.tree.map(jnp.zeros_like, direct), train=None)

    return estimate


def unrolled(
    problem: Bilevel,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int = 1,
    mode: Literal["forward", "reverse"] = "forward",
    remat: bool = False,
) -> Estimator:
    """The exact gradient through num_steps of the inner optimizer, equations (5) to (7).

    Exact wherever the optimizer is differentiable. (Adam is not where a gradient is exactly zero,
    unless eps_root > 0.)

    Args:
      problem: the two losses.
      inner_optimizer: the transformation that trains w. Momentum, weight decay, schedules and
        clipping are differentiated through because they are in it.
      num_steps: inner steps, at least 1. When more, every leaf of train_batch has a leading axis
        of num_steps: one batch a step.
      mode: how the gradient of the training loss is differentiated. "forward" (over reverse) keeps
        only w, opt_state and the batch of each step in memory, but takes batches as constants and
        needs the rules of any `jax.custom_vjp` in the loss to be differentiable forward, which a
        rule that calls its own function is not. "reverse" (over reverse) has neither limit, and
        keeps every intermediate value of every step.
      remat: `jax.checkpoint` each step, so that reverse mode keeps those of one step at a time.

    Raises:
      ValueError: for num_steps or mode out of range. When called: for a loss that is not a
        floating-point scalar, a leaf of w or alpha that is not floating-point, or a train_batch
        without its leading axis.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    if mode not in ("forward", "reverse"):
        raise ValueError(f"mode must be 'forward' or 'reverse', got {mode!r}")
    if num_steps == 1 and mode == "forward":
        product = _mixed_product(problem.train_loss, problem.has_aux)
        return _through_one_step(problem, inner_optimizer, product)
    return _through_inner_steps(problem, inner_optimizer, mode, num_steps, remat)


def finite_difference(
    problem: Bilevel, inner_optimizer: optax.GradientTransformation, radius: float = 0.01
) -> Estimator:
    """The gradient through one inner step, its mixed product a central difference, equation (8).

    The weights move by eps u either way, eps = radius / norm(u). For SGD with momentum and weight
    decay u is -xi v, so these are the paper's points w +- eps v. The error is of second order in
    the radius if the training loss is smooth between them. Where u is zero, so is the implicit
    term.

    Args:
      problem: the two losses.
      inner_optimizer: the transformation that trains w, as in `unrolled`.
      radius: global norm of the movement, in units of w; the paper's is 0.01.

    Raises:
      ValueError: for a radius that is not positive. When called: as `unrolled` does.
    """
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}")
    alpha_gradient = _alpha_gradient(problem.train_loss, problem.has_aux)

    @jax.jit
    def points(w, u):
        norm = optax.tree.norm(u)
        eps = radius / jnp.where(norm > 0, norm, 1)  # u = 0 moves nothing: the product is zero

        def move(sign):
            return jax.tree.map(lambda w, u: w + (sign * eps).astype(u.dtype) * u, w, u)

        return move(1), move(-1), eps

    @jax.jit
    def quotient(plus, minus, eps):
        return jax.tree.map(lambda p, m: (p - m) / (2 * eps).astype(p.dtype), plus, minus)

    def product(w, alpha, batch, u):
        plus, minus, eps = points(w, u)
        gradients = [alpha_gradient(moved, alpha, batch) for moved in (plus, minus)]
        return quotient(*gradients, eps)

    return _through_one_step(problem, inner_optimizer, product)


@lru_cache
def value_and_grad(loss: Loss, has_aux: bool = False) -> ValueAndGrad:
    """`(w, alpha, batch) -> (Evaluation, (grad_w, grad_alpha))`: the one door to every loss.

    Always both gradients, and always the same jitted function for the same loss: outside of any
    other jit, the passes of a whole search iteration are one compiled program at different points.

    Raises:
      ValueError: when called, for a loss that is not a floating-point scalar, or a leaf of w or
        alpha that is not floating-point.
    """
    name = getattr(loss, "__name__", "loss")

    def evaluate(w, alpha, batch):
        return _scalar_and_aux(loss(w, alpha, batch), has_aux, name)

    differentiate = jax.value_and_grad(evaluate, argnums=(0, 1), has_aux=True)

    @jax.jit
    def value_and_gradient(w, alpha, batch):
        evaluation, gradients = differentiate(w, alpha, batch)
        return Evaluation(*evaluation), gradients

    def checked(w, alpha, batch):
        _require_floating("w", w)
        _require_floating("alpha", alpha)
        return value_and_gradient(w, alpha, batch)

    return checked


@lru_cache
def _alpha_gradient(loss: Loss, has_aux: bool) -> Callable[[PyTree, PyTree, PyTree], PyTree]:
    """`(w, alpha, batch) -> grad_alpha`: without the gradient in w, a cheaper program."""
    differentiate = value_and_grad(loss, has_aux)

    @jax.jit
    def alpha_gradient(*point):
        return differentiate(*point)[1][1]

    return alpha_gradient


@lru_cache
def _mixed_product(loss: Loss, has_aux: bool) -> MixedProduct:
    """`(w, alpha, batch, u) -> H_alpha,w u`: exact, forward over reverse."""
    differentiate = value_and_grad(loss, has_aux)

    @jax.jit
    def mixed_product(w, alpha, batch, u):
        return _forward_over_reverse(differentiate, w, alpha, batch, u)[1]

    return mixed_product


def _through_one_step(
    problem: Bilevel, optimizer: optax.GradientTransformation, product: MixedProduct
) -> Estimator:
    """The estimator for one inner step: `product(w, alpha, batch, u)` is H_alpha,w u.

    Written as a few jitted stages. Called outside of jit, each is compiled once and apart, which
    takes a fraction of the time and memory of compiling them as one program.
    """
    train_gradient = value_and_grad(problem.train_loss, problem.has_aux)
    validate = value_and_grad(problem.val_loss, problem.has_aux)

    @jax.jit
    def inner_step(gradient, opt_state, w):
        updates, _ = optimizer.update(gradient, opt_state, w)
        return optax.apply_updates(w, updates)

    @jax.jit
    def pull_back(gradient, opt_state, w, v):
        _, pullback = jax.vjp(lambda gradient: inner_step(gradient, opt_state, w), gradient)
        return pullback(v)[0]

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        train, (gradient, _) = train_gradient(w, alpha, train_batch)
        w_prime = inner_step(gradient, opt_state, w)
        val, (v, direct) = validate(w_prime, alpha, val_batch)
        u = pull_back(gradient, opt_state, w, v)
        implicit = product(w, alpha, train_batch, u)
        return _estimate(val, direct, implicit, train)

    return estimate


def _through_inner_steps(
    problem: Bilevel,
    optimizer: optax.GradientTransformation,
    mode: Literal["forward", "reverse"],
    num_steps: int,
    remat: bool,
) -> Estimator:
    """The estimator that pulls v = grad_w' L_val back through the inner steps to alpha."""
    train_gradient = _train_gradient(
        value_and_grad(problem.train_loss, problem.has_aux), forward_over_reverse=mode == "forward"
    )
    validate = value_and_grad(problem.val_loss, problem.has_aux)

    def inner_step(alpha, carry, batch):
        w, opt_state = carry
        gradient, train = train_gradient(w, alpha, batch)
        updates, opt_state = optimizer.update(gradient, opt_state, w)
        return (optax.apply_updates(w, updates), opt_state), train

    if remat:
        inner_step = jax.checkpoint(inner_step)

    def estimate(alpha, w, opt_state, train_batch, val_batch) -> Estimate:
        def unroll(alpha):
            step, carry = partial(inner_step, alpha), (w, opt_state)
            if num_steps == 1:
                (w_prime, _), train = step(carry, train_batch)
            else:
                _require_leading_axis(train_batch, num_steps)
                (w_prime, _), train = jax.lax.scan(step, carry, train_batch, length=num_steps)
            return w_prime, train

        w_prime, pullback, train = jax.vjp(unroll, alpha, has_aux=True)
        val, (v, direct) = validate(w_prime, alpha, val_batch)
        return _estimate(val, direct, pullback(v)[0], train)

    return estimate


def _estimate(val: Evaluation, direct, implicit, train: Evaluation | None) -> Estimate:
    gradient = jax.tree.map(jnp.add, direct, implicit)
    return Estimate(val.value, gradient, direct, implicit, val.aux, train)


def _train_gradient(train: ValueAndGrad, forward_over_reverse: bool) -> Callable:
    """`(w, alpha, batch) -> (grad_w, Evaluation)`, differentiated by JAX or forward over reverse.

    The pullback of (w, alpha) -> grad_w L takes u to (H_ww u, H_alpha,w u), with H the Hessian of
    L. As H is symmetric, that is also how both gradients of L change when w moves along u.
    """

    def gradient(w, alpha, batch):
        evaluation, (grad_w, _) = train(w, alpha, batch)
        return grad_w, evaluation

    if not forward_over_reverse:
        return gradient

    def forward(*point):
        return gradient(*point), point

    def backward(point, cotangents):
        u, _ = cotangents
        return *_forward_over_reverse(train, *point, u), None

    gradient_with_product = jax.custom_vjp(gradient)
    gradient_with_product.defvjp(forward, backward)
    return gradient_with_product


def _forward_over_reverse(train: ValueAndGrad, w, alpha, batch, u) -> tuple[PyTree, PyTree]:
    """(H_ww u, H_alpha,w u): the derivative of both gradients along u."""
    _, products = jax.jvp(lambda w: train(w, alpha, batch)[1], (w,), (u,))
    return products


def _scalar_and_aux(output: Any, has_aux: bool, name: str) -> tuple[jax.Array, PyTree]:
    """Split what a loss returned, and refuse what is not as promised."""
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise ValueError(f"{name} must return (scalar, aux) with has_aux=True, got {_type(output)}")
    value, aux = output if has_aux else (output, None)
    if not (_is_floating(value) and jnp.shape(value) == ()):
        remedy = "" if has_aux else ", or (scalar, aux) with has_aux=True"
        raise ValueError(f"{name} must return a floating-point scalar{remedy}, got {_type(value)}")
    return value, aux


def _require_floating(name: str, tree: PyTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _is_floating(leaf):
            culprit = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{culprit} must be floating-point, got {_type(leaf)}: cast it first")


def _require_leading_axis(train_batch: PyTree, num_steps: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(train_batch):
        if jnp.shape(leaf)[:1] != (num_steps,):
            culprit = f"train_batch{jax.tree_util.keystr(path)}"
            need = f"must have a leading axis of num_steps={num_steps}"
            raise ValueError(f"{culprit} {need}, got {_type(leaf)}")


def _is_floating(x: Any) -> bool:
    return jax.tree_util.all_leaves([x]) and jnp.issubdtype(jax.typeof(x).dtype, jnp.floating)


def _type(x: Any) -> str:
    """Dtype and shape of an array, such as float32[2, 3]; the class of anything else."""
    if not jax.tree_util.all_leaves([x]):
        return type(x).__name__
    array = jax.typeof(x)
    return f"{array.dtype}{list(array.shape)}"
