"""Time and memory of every estimator as the number of alphas, of weights and of steps grows.

    python -m benchmarks.hypergradients
    python -m benchmarks.hypergradients --repeats 3 --output /tmp/hypergradients

The problem is a deep network of tanh layers on which alpha scales groups of channels. Each figure
is of one compiled program: the median of its run times, taken in turn with the others', and the
scratch memory that XLA planned for it. Slopes are fitted to the logarithms: 1 is linear growth.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.console import Console
from rich.table import Table

from darts_jax import hypergradient
from darts_jax.hypergradient.unrolled import through_one_step

LAYERS, BATCH = 8, 256
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@dataclass(frozen=True)
class Config:
    """Time and memory of the estimators."""

    repeats: int = 5
    """Runs of each program."""
    output: Path = Path("benchmarks/results/hypergradients")
    """Files for the figures: this with .json, .png and .svg."""


class Point(NamedTuple):
    """What is measured: a size of the problem along one axis."""

    axis: str
    method: str
    weights: int
    alphas: int
    steps: int


def problem(width: int, groups: int) -> tuple[hypergradient.Bilevel, Any, Any, Any]:
    """The bilevel problem, alpha [LAYERS, groups], w [LAYERS, width, width], and a batch."""

    def loss(w, alpha, batch):
        x, y = batch
        for layer, scales in zip(w, alpha, strict=True):
            x = jnp.tanh(x @ layer) * jnp.repeat(jnp.exp(scales), width // groups)
        return jnp.mean((x - y) ** 2)

    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(LAYERS, width, width)) / np.sqrt(width), jnp.float32)
    batch = jnp.asarray(rng.normal(size=(2, BATCH, width)), jnp.float32)
    return hypergradient.Bilevel(loss, loss), jnp.zeros((LAYERS, groups)), w, batch


def explicit(bilevel: hypergradient.Bilevel, optimizer: Any) -> hypergradient.Estimator:
    """The mixed block of the Hessian as a matrix of |w| by |alpha| numbers, times the vector."""

    def product(w, alpha, batch, u, alpha_gradient):
        mixed = jax.jacfwd(jax.grad(bilevel.train_loss), argnums=1)(w, alpha, batch)
        return jnp.tensordot(u, mixed, axes=u.ndim)

    return through_one_step(bilevel, optimizer, product)


ONE_STEP: dict[str, Callable] = {
    "explicit matrix": explicit,
    "reverse over reverse": partial(hypergradient.unrolled, mode="reverse"),
    "forward over reverse": hypergradient.unrolled,
    "finite difference": hypergradient.finite_difference,
    "Neumann, 5 terms": partial(hypergradient.neumann, num_terms=5),
    "conjugate gradient, 5 steps": partial(
        hypergradient.conjugate_gradient, num_steps=5, damping=1.0, tolerance=0.0
    ),
}
STEPS: dict[str, Callable] = {
    "forward over reverse": hypergradient.unrolled,
    "reverse over reverse": partial(hypergradient.unrolled, mode="reverse"),
    "reverse, remat": partial(hypergradient.unrolled, mode="reverse", remat=True),
}
WIDTHS, GROUPS, COUNTS = (32, 64, 128, 256), (1, 4, 16, 64), (1, 2, 4, 8, 16)


def points() -> Iterator[tuple[Point, Callable[[], tuple[Callable, tuple]]]]:
    """Each point, and what makes its estimator and inputs."""
    for axis, widths, groups in (("weights", WIDTHS, (4,)), ("alphas", (128,), GROUPS)):
        for width in widths:
            for count in groups:
                for method, make in ONE_STEP.items():
                    point = Point(axis, method, LAYERS * width**2, LAYERS * count, 1)
                    yield point, partial(_build, make, width, count, 1)
    for steps in COUNTS:
        for method, make in STEPS.items():
            point = Point("steps", method, LAYERS * 128**2, LAYERS * 4, steps)
            yield point, partial(_build, partial(make, num_steps=steps), 128, 4, steps)


def _build(make: Callable, width: int, groups: int, steps: int) -> tuple[Callable, tuple]:
    bilevel, alpha, w, batch = problem(width, groups)
    train = batch if steps == 1 else jnp.broadcast_to(batch, (steps, *batch.shape))
    return make(bilevel, OPTIMIZER), (alpha, w, OPTIMIZER.init(w), train, batch)


def measure(repeats: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """All figures; the programs of one axis and size take turns."""
    compiled = []
    for point, build in points():
        say(f"compiling {point.method}, {getattr(point, point.axis)} {point.axis}")
        estimate, inputs = build()
        program = jax.jit(estimate).lower(*inputs).compile()
        jax.block_until_ready(program(*inputs))
        compiled.append((point, program, inputs, []))
    for turn in range(repeats):
        for point, program, inputs, seconds in compiled:
            say(f"run {turn + 1}: {point.method}")
            start = time.perf_counter()
            jax.block_until_ready(program(*inputs))
            seconds.append(time.perf_counter() - start)
    return [
        point._asdict()
        | {
            "seconds": statistics.median(seconds),
            "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        }
        for point, program, _, seconds in compiled
    ]


def slopes(rows: list[dict[str, Any]], figure: str) -> dict[tuple[str, str], float]:
    """(axis, method) -> exponent of the growth of a figure, fitted to all sizes."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in rows:
        key = row["axis"], row["method"]
        lines.setdefault(key, []).append((row[row["axis"]], max(row[figure], 1e-9)))
    return {
        key: float(np.polyfit(*np.log(np.array(line).T), 1)[0])
        for key, line in lines.items()
        if len(line) > 1
    }


def draw(rows: list[dict[str, Any]], output: Path) -> None:
    """Time above memory, one column an axis, both scales logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figures = (("seconds", "time, ms", 1e3), ("temp_bytes", "scratch memory, MB", 1e-6))
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3, sharex="col")
    for column, axis in enumerate(("weights", "alphas", "steps")):
        for row, (name, label, unit) in enumerate(figures):
            ax, fitted = axes[row, column], slopes(rows, name)
            for method in dict.fromkeys(r["method"] for r in rows if r["axis"] == axis):
                line = [r for r in rows if (r["axis"], r["method"]) == (axis, method)]
                slope = fitted.get((axis, method))
                text = method if slope is None else f"{method}: {slope:.2f}"
                x, y = [r[axis] for r in line], [r[name] * unit for r in line]
                ax.loglog(x, y, "o-", markersize=4, linewidth=1.3, label=text)
            low, high = ax.get_ylim()
            ax.set_ylim(low, high * (high / low) ** 0.6)  # room for the legend
            ax.legend(fontsize=7, frameon=False, title="fitted slope", title_fontsize=7)
            ax.grid(alpha=0.25)
            ax.set_ylabel(label if column == 0 else "")
        axes[1, column].set_xlabel(f"number of {axis}")
    for suffix in (".png", ".svg"):
        figure.savefig(output.with_suffix(suffix), dpi=150)


def table(rows: list[dict[str, Any]]) -> Table:
    """The largest size of each axis, and the slopes."""
    view = Table("axis", "method", "size", "ms", "slope", "MB", "slope", box=None)
    seconds, memory = slopes(rows, "seconds"), slopes(rows, "temp_bytes")
    for axis, method in seconds:
        line = [row for row in rows if (row["axis"], row["method"]) == (axis, method)]
        view.add_row(
            axis,
            method,
            str(line[-1][axis]),
            f"{1e3 * line[-1]['seconds']:.1f}",
            f"{seconds[axis, method]:.2f}",
            f"{line[-1]['temp_bytes'] / 1e6:.1f}",
            f"{memory[axis, method]:.2f}",
        )
    return view


def main(config: Config) -> None:
    """Measures, writes and shows the figures."""
    if config.repeats < 1:
        sys.exit(f"--repeats {config.repeats}: it must be at least 1")
    console = Console()
    with console.status("") as status:
        rows = measure(config.repeats, status.update)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    config.output.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, config.output)
    console.print(table(rows))
    console.print(f"jax {jax.__version__}, {jax.default_backend()}; written to {config.output}.*")


if __name__ == "__main__":
    main(tyro.cli(Config, prog="python -m benchmarks.hypergradients"))
