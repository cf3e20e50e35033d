"""Training at perturbed mixing weights: SmoothDARTS, Chen and Hsieh, arXiv 2002.05283.

The weights of the network are trained to bear a change of the mixing weights A, while alpha is
trained at A itself:

    min over alpha of L_val(w*, A),   w* = argmin over w of L_train(w, A + delta)

with delta uniform in +-radius (`random`), or the worst one of that size (`adversarial`). As in the
authors' code, A is what the relaxation makes of alpha, and A + delta is brought back to where
weights of an edge are in [0, 1] and sum to one. delta is a constant when the loss is differentiated
in alpha. The unrolled step of an estimator is a step of this training loss, as the formula says;
the authors' unrolls the unperturbed one.

Put in the place of a task's training loss, they give the whole method:

    task = search.image_task(network, relax)
    loss = search.make_loss(network, smoothing.random(relax, linear(0.03, 0.3)))
    step = search.make_task_step(task._replace(train_loss=loss), ...)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from darts_jax.relaxation import EDGES, Context, Relaxation, Schedule, split_like, value_at

PyTree = Any

SMOOTHING = 1  # folded into the key of a batch, from which a relaxation draws


def random(relax: Relaxation, radius: float | Schedule) -> Relaxation:
    """The relaxation, its weights moved by uniform noise: SDARTS-RS.

    Args:
      relax: gives weights that sum to one.
      radius: of the noise, a number or a schedule of the progress; the authors' is linear(0.03,
        0.3).
    """

    def relax_noisily(alpha: PyTree, context: Context | None = None) -> PyTree:
        weights, size = relax(alpha, context), value_at(radius, context)
        return _at(weights, _noisy(weights, size, context))

    return relax_noisily


def adversarial(
    loss: Callable[[PyTree, PyTree, Any], tuple[Array, Any]],
    relax: Relaxation,
    radius: float | Schedule,
    steps: int = 7,
) -> Callable[[PyTree, PyTree, Any], tuple[Array, Any]]:
    """`loss(w, alpha, inputs) -> (value, aux)` at the worst weights that are near: SDARTS-ADV.

    They are found by projected gradient ascent: from a random point, steps of 2 radius / steps
    along the sign of the gradient, each brought back to within the radius. Batch norm is by the
    batch there, too, where the authors' takes running statistics.

    Args:
      loss: `loss(w, weights, inputs)` of mixing weights, as `search.make_loss(network,
        relaxation.as_they_are)`; inputs have the batch with its context.
      relax: gives weights that sum to one.
      radius: as for `random`.
      steps: of the ascent, each a gradient; the authors' are 7.
    """

    def loss_at_the_worst(w: PyTree, alpha: PyTree, inputs: Any) -> tuple[Array, Any]:
        context = inputs.batch.context
        weights, size = relax(alpha, context), value_at(radius, context)
        constants = lax.stop_gradient((w, weights))
        worst = _worst(loss, *constants, inputs, size, steps, context)
        return loss(w, _at(weights, worst), inputs)

    return loss_at_the_worst


def _worst(loss, w, weights, inputs, size, steps, context):
    gradient = jax.grad(lambda weights: loss(w, weights, inputs)[0])

    def climb(_, found):
        def move(name, at, centre, slope):
            rate = jnp.asarray(2 * size / steps, at.dtype)
            return centre + jnp.clip(at + rate * jnp.sign(slope) - centre, -size, size)

        return _of_operations(move, found, weights, gradient(found))

    return lax.fori_loop(0, steps, climb, _noisy(weights, size, context))


def _noisy(weights, size, context):
    keys = split_like(jax.random.fold_in(context.key, SMOOTHING), weights)

    def move(name, at, key):
        return at + jnp.asarray(size, at.dtype) * jax.random.uniform(
            key, at.shape, at.dtype, minval=-1, maxval=1
        )

    return _of_operations(move, weights, keys)


def _of_operations(move, weights, *rest):
    """Moves the weights of operations and brings them back to where they sum to one."""
    return {
        name: at
        if name.endswith(EDGES)
        else to_simplex(move(name, at, *(tree[name] for tree in rest)))
        for name, at in weights.items()
    }


def to_simplex(weights: Array) -> Array:
    """Weights [..., operations] clipped to [0, 1], then divided by their sum.

    Where all would be zero, the largest becomes one.
    """
    clipped = jnp.clip(weights, 0, 1)
    largest = jax.nn.one_hot(weights.argmax(-1), weights.shape[-1], dtype=weights.dtype)
    clipped = jnp.where(clipped.any(-1, keepdims=True), clipped, largest)
    return clipped / clipped.sum(-1, keepdims=True)


def _at(weights, moved):
    """`moved`, as `weights` plus a constant."""
    return jax.tree.map(lambda a, b: a + lax.stop_gradient(b - a), weights, moved)
