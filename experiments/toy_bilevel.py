"""The toy bilevel problem of the paper's figure 2, which the hypergradient decides.

    L_val(w, alpha) = alpha w - 2 alpha + 1        L_train(w, alpha) = (w - alpha)^2

The optimum is w = alpha = 1. Gradient steps that unroll one inner step of rate xi settle at
w = alpha = 2 / (1 + 2 xi) instead: at 2 for the first-order estimator, whose xi is 0, and at the
optimum for xi = 0.5.

    python -m experiments.toy_bilevel
    python -m experiments.toy_bilevel --xi 0.1 0.9 --start -1 3
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence

import jax
import optax
from rich.console import Console
from rich.table import Table

from darts_jax import hypergradient
from experiments import command_line

MODULE = "experiments.toy_bilevel"
PROBLEM = hypergradient.Bilevel(
    train_loss=lambda w, alpha, _: (w - alpha) ** 2,
    val_loss=lambda w, alpha, _: alpha * w - 2 * alpha + 1,
)
ESTIMATORS = {
    "first_order": lambda problem, _: hypergradient.first_order(problem),
    "unrolled": hypergradient.unrolled,
    "finite_difference": hypergradient.finite_difference,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Search the toy bilevel problem at constant weights, through a step, and approximately so."""

    start: tuple[float, float] = (2.0, -2.0)
    """Where w and alpha start."""
    xi: tuple[float, ...] = (0.1, 0.25, 0.5)
    """Rates of the inner step that is unrolled."""
    alpha_rate: float = 0.1
    """Rate of the steps of alpha."""
    w_rate: float = 0.1
    """Rate of the steps of w."""
    num_steps: int = 1000
    """Iterations: one step of alpha, then one of w."""


PRESETS = {
    "default": ("The paper's problem, run until it settles.", Config()),
    "smoke": ("Two rates, a few iterations.", Config(xi=(0.25, 0.5), num_steps=200)),
}


@functools.partial(jax.jit, static_argnames=("name", "config"))
def search(name: str, xi: float, config: Config) -> tuple[jax.Array, jax.Array]:
    """Final w and alpha, both scalars, of gradient steps with the named estimator."""
    inner_optimizer = optax.sgd(xi)
    estimate = ESTIMATORS[name](PROBLEM, inner_optimizer)

    def step(_, point):
        w, alpha = point
        alpha -= (
            config.alpha_rate * estimate(alpha, w, inner_optimizer.init(w), None, None).gradient
        )
        w -= config.w_rate * jax.grad(PROBLEM.train_loss)(w, alpha, None)
        return w, alpha

    return jax.lax.fori_loop(0, config.num_steps, step, config.start)


def run(argv: Sequence[str]) -> None:
    """Print where each estimator ends for each xi, beside the fixed point 2 / (1 + 2 xi)."""
    with command_line.user_errors():
        _, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        if config.num_steps < 1:
            raise ValueError(f"--num-steps is {config.num_steps}; give at least 1")
        for xi in config.xi:
            if not xi > 0:
                raise ValueError(f"--xi is {xi}; give more than 0")
    table = Table(title="Toy bilevel problem (optimum: w = alpha = 1)")
    for column in ("start", "xi", "estimator", "final (w, alpha)", "fixed point"):
        table.add_column(column, no_wrap=True)
    cases = [("first_order", 0.0)]
    cases += [(name, xi) for xi in config.xi for name in ("unrolled", "finite_difference")]
    start = "({:g}, {:g})".format(*config.start)
    for name, xi in cases:
        final = "({:.4f}, {:.4f})".format(*search(name, xi, config))
        table.add_row(start, f"{xi:g}", name, final, f"{2 / (1 + 2 * xi):.4f}")
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
