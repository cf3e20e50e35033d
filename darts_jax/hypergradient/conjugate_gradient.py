"""The implicit function theorem, its linear system solved by conjugate gradients."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from darts_jax.hypergradient.implicit import at_fixed_point, transposed_change
from darts_jax.hypergradient.problem import Bilevel, Estimator, PyTree
from darts_jax.hypergradient.products import pull_back

# Where an optimizer is probed: steps of its schedule, and sizes of gradients and weights.
_COUNTS = (0, 1, 1000)
_SCALES = (1e-3, 1.0, 1e6)


def conjugate_gradient(
    problem: Bilevel,
    inner_optimizer: optax.GradientTransformation,
    num_steps: int = 10,
    damping: float = 0.0,
    tolerance: float = 1e-5,
) -> Estimator:
    """The implicit gradient by conjugate gradients.

        (H_ww + (decay + damping) I) p = v,   implicit term -H_alpha,w p

    Pedregosa 2016 (arXiv 1602.02355), Rajeswaran et al. 2019 (arXiv 1909.04630). The error falls by
    (sqrt(k) - 1) / (sqrt(k) + 1) a step, with k the condition number, and is zero after as many
    steps as there are distinct eigenvalues. The inverse is of the system of `implicit`, which is
    symmetric if the optimizer's step is -c (gradient + decay * w): SGD, momentum, Nesterov, weight
    decay and schedules. Adam and the like have no such form and are refused, as is clipping (of
    gradients up to 1e6, as far as it is tried). Where c is zero, as at the start of a warm-up, so
    is the implicit term.

    Cost: two gradients, num_steps + 1 Hessian products (two gradients each) and a mixed product.
    Memory: that of a Hessian product, for any num_steps.

    The right one where w is trained to convergence on a convex loss. Where H_ww has negative
    eigenvalues, as at most weights of a network, only a damping above them makes it meaningful.

    Args:
      problem: the two losses; value and direct term are taken at the current w.
      inner_optimizer: the transformation that trains w, which decides what a fixed point is.
      num_steps: of conjugate gradients at most, at least 1.
      damping: added to the Hessian's diagonal, not negative.
      tolerance: stop when the residual is smaller than this share of v, not negative.

    Raises:
      ValueError: for num_steps, damping or tolerance out of range. When called: for an optimizer
        whose step is of another form, or that is made of traced values, and as `unrolled` does.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}")
    for name, value in (("damping", damping), ("tolerance", tolerance)):
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    change = transposed_change(problem, inner_optimizer, damping)
    transposed_update = pull_back(inner_optimizer)

    @jax.jit
    def solve(w, alpha, batch, gradient, opt_state, v):
        _require_symmetric(inner_optimizer, w)
        u = transposed_update(gradient, opt_state, w, v)
        moves = optax.tree.norm(u) > 0  # if not, the system is singular, and any q is as good
        flat, unravel = ravel_pytree(v)  # the solver needs one dtype

        def system(p):
            changed = change(w, alpha, batch, gradient, opt_state, unravel(p))
            return jnp.where(moves, -ravel_pytree(changed)[0], p)

        q, _ = jax.scipy.sparse.linalg.cg(system, flat, tol=tolerance, maxiter=num_steps)
        return unravel(q)

    return at_fixed_point(problem, inner_optimizer, solve)


def _require_symmetric(optimizer: optax.GradientTransformation, w: PyTree) -> None:
    leaves, treedef = jax.tree.flatten(w)
    # An axis is as good as its first two entries: the probe stays small.
    shapes = [tuple(min(size, 2) for size in jnp.shape(leaf)) for leaf in leaves]
    if not any(map(math.prod, shapes)):
        return
    try:
        symmetric = _is_gradient_descent(optimizer, treedef, shapes)
    except jax.errors.TracerArrayConversionError:
        raise ValueError(
            "inner_optimizer holds a traced value, such as its learning rate, and cannot be tried:"
            " make it outside of jit, vmap and grad"
        ) from None
    if not symmetric:
        raise ValueError(
            "inner_optimizer does not step by -c (gradient + decay * w), so that its system is not"
            " symmetric: use neumann or unrolled"
        )


def _is_gradient_descent(
    optimizer: optax.GradientTransformation, treedef: Any, shapes: list[tuple[int, ...]]
) -> bool:
    """Whether update(g, opt_state, w) is -c (g + decay * w) plus a constant, by trying it.

    c is one for all leaves; decay may be each leaf's own, as it is often masked. Tried at small and
    large gradients, since clipping leaves small ones alone, and Adam is linear at none.
    """
    rng = np.random.default_rng(0)
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    g, w = (rng.choice([-1, 1], ends[-1]) * rng.uniform(0.5, 1.5, ends[-1]) for _ in range(2))

    def tree(vector):
        parts = np.split(np.asarray(vector, np.float32), ends[:-1])
        return treedef.unflatten([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])

    def rate(count: int) -> float | None:
        """c after so many steps; None if there is none."""
        state = jax.tree.map(
            lambda x: (
                jnp.full_like(x, count)
                if jnp.issubdtype(jnp.result_type(x), jnp.signedinteger)
                else x
            ),
            optimizer.init(tree(w)),
        )

        def update(g, w):
            updates = jax.tree.leaves(step(tree(g), state, tree(w)))
            return np.concatenate([np.ravel(leaf) for leaf in updates])

        rest, rates, decays = update(0 * g, 0 * w), [], []
        for scale in _SCALES:
            by_g, by_w, by_both = (
                update(scale * a * g, scale * b * w) - rest for a, b in ((1, 0), (0, 1), (1, 1))
            )
            if not np.allclose(by_both, by_g + by_w, rtol=0, atol=1e-3 * np.abs(by_g).max()):
                return None
            rates.append(-by_g / (scale * g))
            decays.append(np.split(-by_w / (scale * w), ends[:-1]))
        c = float(np.median(rates))
        by_leaf = [np.concatenate(leaf) for leaf in zip(*decays, strict=True) if leaf[0].size]
        same = np.allclose(rates, c, rtol=1e-3, atol=0) and all(
            np.allclose(decay, np.median(decay), rtol=1e-3, atol=1e-5 * abs(c)) for decay in by_leaf
        )
        return c if same else None

    with jax.ensure_compile_time_eval():
        step = jax.jit(lambda *args: optimizer.update(*args)[0])
        rates = [rate(count) for count in _COUNTS]
    return None not in rates and any(rates)
