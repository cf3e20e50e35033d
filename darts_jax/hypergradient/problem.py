"""The bilevel problem, the door to its losses, and what an estimator returns."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

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
        inner steps, or at w for `first_order` and the implicit estimators.
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


def make_estimate(val: Evaluation, direct, implicit, train: Evaluation | None) -> Estimate:
    """The estimate whose gradient is the sum of the two terms."""
    gradient = jax.tree.map(jnp.add, direct, implicit)
    return Estimate(val.value, gradient, direct, implicit, val.aux, train)


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


def require_leading_axis(train_batch: PyTree, num_steps: int) -> None:
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
