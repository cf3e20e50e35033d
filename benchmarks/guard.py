"""Fails if the relaxed cell has become slow beside the ordinary formulation in JAX.

    python -m benchmarks.guard

Compiles the gradient of the first cell of S, which the ordinary formulation of all of S would take
minutes for, and runs both in turns. What is compared are CPU seconds of this process: other work on
the machine changes them little, and the machine changes their ratio little.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ordinary
from benchmarks.search_step import IMAGE_SHAPE, NUM_CLASSES, SIZES
from darts_jax import native
from darts_jax.genotype import CNN_PRIMITIVES, edges
from darts_jax.networks import STEM_MULTIPLIER, RelaxedCell
from darts_jax.operations import OPERATIONS

PyTree = Any

CHANNELS, LAYERS, BATCH = SIZES["S"]
NODES = 4
WEIGHTS = (len(edges(NODES)), len(CNN_PRIMITIVES))
INPUT = (BATCH, *IMAGE_SHAPE[:2], STEM_MULTIPLIER * CHANNELS)
RUNS = 10


class Seconds(NamedTuple):
    """CPU seconds of compiling and of one run; or how many times those of the other."""

    compile: float
    run: float


# The ordinary formulation over this one.
MEASURED = Seconds(8.9, 7.4) if native.AVAILABLE else Seconds(1.6, 4.4)
MARGIN = 0.7  # share of it that must be left


def library_cell() -> tuple[Callable[..., jax.Array], PyTree]:
    """(params, weights, older, newer) -> output, and the shapes of the parameters."""
    cell = RelaxedCell(CHANNELS, False, False, OPERATIONS, CNN_PRIMITIVES)
    example = jnp.zeros((1, *INPUT[1:])), jnp.zeros((1, *INPUT[1:])), jnp.zeros(WEIGHTS)
    variables = jax.eval_shape(lambda: cell.init(jax.random.key(0), *example, train=True))
    stats = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables["batch_stats"])

    def apply(params, weights, older, newer):
        held = {"params": params, "batch_stats": stats}
        return cell.apply(held, older, newer, weights, train=True, mutable=["batch_stats"])[0]

    return apply, jax.tree.map(lambda leaf: leaf.shape, variables["params"])


def ordinary_cell() -> tuple[Callable[..., jax.Array], PyTree]:
    """As `library_cell`."""
    network = ordinary.Supernet(CHANNELS, LAYERS, NUM_CLASSES)

    def apply(params, weights, older, newer):
        return network.cell(params, older, newer, weights, False, False, ordinary.batch_norm)

    return apply, network.shapes(IMAGE_SHAPE[-1])["cell_0"]


def program(apply: Callable[..., jax.Array], shapes: PyTree) -> tuple[float, Callable[[], float]]:
    """CPU seconds of compiling a cell's gradient, and a function that measures those of a run."""
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.normal(size=shape), "float32")

    params = jax.tree.map(draw, shapes, is_leaf=lambda shape: type(shape) is tuple)
    point = params, draw(WEIGHTS), draw(INPUT), draw(INPUT)
    target = draw((*INPUT[:-1], NODES * CHANNELS))

    def loss(*point):
        return (apply(*point) * target).mean()

    start = time.process_time()
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*point).compile()
    seconds = time.process_time() - start

    def timed() -> float:
        start = time.process_time()
        jax.block_until_ready(run(*point))
        return time.process_time() - start

    return seconds, timed


def measure() -> tuple[Seconds, Seconds]:
    """Figures of this formulation and of the ordinary one: of a run, the least of all but one."""
    pair = [program(*library_cell()), program(*ordinary_cell())]
    turns = [[run() for _, run in pair] for _ in range(1 + RUNS)][1:]
    ours, theirs = (
        Seconds(seconds, min(runs))
        for (seconds, _), runs in zip(pair, zip(*turns, strict=True), strict=True)
    )
    return ours, theirs


def failure(ours: Seconds, theirs: Seconds) -> str | None:
    """What is too slow, in one line; None if nothing is."""
    for name, own, other, measured in zip(Seconds._fields, ours, theirs, MEASURED, strict=True):
        floor = MARGIN * measured
        if other < floor * own:
            return (
                f"{name}: {own:.3g} CPU seconds are {other / own:.1f} times fewer than those of the"
                f" ordinary formulation, {other:.3g}, and must be {floor:.1f} times fewer; see what"
                " has become slow by python -m benchmarks.search_step"
            )
    return None


def main() -> None:
    """Exits with 1, and one line, where something is too slow."""
    jax.config.update("jax_enable_compilation_cache", False)
    ours, theirs = measure()
    if text := failure(ours, theirs):
        sys.exit(text)
    compiling, running = (b / a for a, b in zip(ours, theirs, strict=True))
    print(
        "CPU seconds of the ordinary formulation over ours:"
        f" {compiling:.1f} to compile, {running:.1f} a run"
    )


if __name__ == "__main__":
    main()
