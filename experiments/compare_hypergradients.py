"""Compares hypergradient estimators with the exact one, in value, direction, time and memory.

    python -m experiments.compare_hypergradients                  # cells on digits, minutes
    python -m experiments.compare_hypergradients toy              # two numbers, seconds
    python -m experiments.compare_hypergradients --estimators finite_difference unrolled_5

Along one search whose alpha follows the exact hypergradient, all estimators are evaluated on the
same states and batches. Then the radius of the finite difference is varied at one state, in several
precisions. Then whole searches follow each estimator, from the same seeds. The workdir then holds
comparison.jsonl, comparison.csv and figures (see docs/experiments.md).
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np
import tyro

from darts_jax.search import SearchState
from experiments import command_line, comparison, comparison_report, search_cnn
from experiments.comparison import Compiled, Line, Point
from experiments.comparison_estimators import EXACT, Method, Settings, methods
from experiments.comparison_problems import (
    CleaningConfig,
    CnnConfig,
    ProblemConfig,
    RidgeConfig,
    RnnConfig,
    ToyConfig,
    check_problem,
    make,
)
from experiments.errors import NonFinite
from experiments.metrics import Display
from experiments.problem import Problem
from experiments.stages import Program
from experiments.workdir import opened, write_config, writing

MODULE = "experiments.compare_hypergradients"
SMALLEST_DECADE = -8  # of the radii


@dataclass(frozen=True)
class Config:
    """All that decides what is compared."""

    problem: tyro.conf.AvoidSubcommands[ProblemConfig]
    estimators: tuple[str, ...] = (
        "first_order",
        "finite_difference",
        "finite_difference_small",
        "t1_t2",
        "neumann",
        "conjugate_gradient",
    )
    """Compared with the exact one: these, or unrolled_K, the exact gradient through K steps."""
    settings: Settings = dataclasses.field(default_factory=Settings)
    every: int = 10
    """Steps of the search from one comparison to the next."""
    precisions: tuple[Literal["float32", "float64", "bfloat16"], ...] = comparison.PRECISIONS
    """In which the radius of the finite difference is varied; none to leave that out."""
    radii_per_decade: int = 2
    """Radii from 1e-8 to 1."""
    num_seeds: int = 1
    """Searches with each estimator: by this seed and those that follow it."""
    seed: int = 0
    """Of the first search, along which the estimators are compared."""
    workdir: Path | None = None
    """Folder to write to; None for runs/compare_hypergradients-PRESET-seedSEED."""


ALL = Config.estimators
# A network's Hessian has negative eigenvalues, where conjugate gradients find little. They are left
# out, since they take minutes to compile; the damping is for those who ask for them.
CNN = Config(CnnConfig(), ALL[:-1], Settings(small_radius=1e-5, cg_damping=1.0))
FULL_BATCH = Settings(small_radius=1e-3)
SMOKE_CNN = CnnConfig(
    data=search_cnn.PRESETS["smoke"][1].data,
    network=search_cnn.PRESETS["smoke"][1].network,
)
PRESETS = {
    "digits_cnn": ("cells on 8x8 handwritten digits, minutes on two cores", CNN),
    "text_rnn": (
        "a recurrent cell on the help texts of Python, minutes on two cores",
        Config(RnnConfig(), ALL[:-1], Settings(small_radius=1e-4), every=20),
    ),
    "toy": (
        "two numbers, with a closed form: seconds",
        Config(ToyConfig(), (*ALL, "unrolled_5"), FULL_BATCH, num_seeds=3),
    ),
    "ridge": (
        "a penalty for each feature of a linear regression: seconds",
        Config(RidgeConfig(), (*ALL, "unrolled_5"), FULL_BATCH, num_seeds=3),
    ),
    "cleaning": (
        "which labels of digits are wrong: seconds",
        Config(CleaningConfig(), (*ALL, "unrolled_5"), FULL_BATCH),
    ),
    "smoke": (
        "a few steps on a few digits, to see that all works",
        replace(
            CNN,
            problem=SMOKE_CNN,
            estimators=("first_order", "finite_difference", "t1_t2"),
            every=2,
            precisions=(),
        ),
    ),
}


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    settings = config.settings
    command_line.check_at_least(
        ("every", config.every, 1),
        ("radii-per-decade", config.radii_per_decade, 1),
        ("num-seeds", config.num_seeds, 1),
        ("settings.neumann-terms", settings.neumann_terms, 1),
        ("settings.cg-steps", settings.cg_steps, 1),
        ("settings.cg-damping", settings.cg_damping, 0),
    )
    command_line.check_positive(
        ("settings.radius", settings.radius), ("settings.small-radius", settings.small_radius)
    )
    command_line.check_seed(config.seed, config.num_seeds)
    check_problem(config.problem)
    methods(config.estimators, settings)  # which raises it for a name that it does not know


class Comparison(NamedTuple):
    """What all parts of a comparison share."""

    config: Config
    problem: Problem
    methods: Mapping[str, Method]
    programs: Mapping[str, Program]
    compiled: Compiled
    display: Display


def measure(
    config: Config, problem: Problem, point: Point, display: Display
) -> Iterator[list[Line]]:
    """The lines of one part after the other (see `comparison_report`).

    Args:
      config: of the comparison.
      problem: what it compares on.
      point: where the first search starts.
      display: shows the progress.
    """
    chosen, compiled = methods(config.estimators, config.settings), {}
    with display.phase("compiling the estimators (the first time this takes long)"):
        programs = comparison.make_programs(problem, chosen, point, compiled, display.detail)
    shared = Comparison(config, problem, chosen, programs, compiled, display)
    with display.phase("comparing along a search by the exact hypergradient"):
        states, search, point = _along_search(shared)
    yield [*states, *_costs(shared, states)]
    if config.precisions:
        with display.phase("varying the radius of the finite difference"):
            swept = comparison.radius_sweep(
                problem, point, _radii(config), config.precisions, compiled, display.detail
            )
        yield [{"kind": "radius", **line} for line in swept]
    yield _searches(shared, search)


def _radii(config: Config) -> list[float]:
    count = -SMALLEST_DECADE * config.radii_per_decade
    return [10 ** (-k / config.radii_per_decade) for k in range(count + 1)]


def _along_search(shared: Comparison) -> tuple[list[Line], list[Line], Point]:
    """The lines of each state, those of the exact search, and the last point compared at."""
    config, states, points = shared.config, [], []

    def observe(step: int, state: SearchState, point: Point | None) -> None:
        if point is not None and step % config.every == 0:
            lines = comparison.compare(shared.problem, shared.programs, state, point)
            states.extend({"kind": "state", "step": step, **line} for line in lines)
            points[:] = [point]

    search = _search(shared, EXACT, config.seed, observe)
    return states, search, points[0]


def _costs(shared: Comparison, states: Sequence[Line]) -> list[Line]:
    return [
        {
            "kind": "cost",
            "estimator": name,
            "target": method.target,
            "gradient_evaluations": method.gradient_evaluations,
            "seconds": float(
                np.median([line["seconds"] for line in states if line["estimator"] == name])
            ),
            "compile_seconds": shared.programs[name].compile_seconds,
            "temp_bytes": shared.programs[name].temp_bytes,
        }
        for name, method in shared.methods.items()
    ]


def _searches(shared: Comparison, first: list[Line]) -> list[Line]:
    """The lines of all searches, `first` those of the exact one by the first seed."""
    config, lines = shared.config, []
    for seed in range(config.seed, config.seed + config.num_seeds):
        with shared.display.phase(f"searching by each estimator, seed {seed}"):
            exact = first if seed == config.seed else _search(shared, EXACT, seed)
            for name in shared.programs:
                start = time.monotonic()
                found = exact if name == EXACT else _search(shared, name, seed)
                lines += [found[0] | _distance(shared.problem, found[0], exact[0]), *found[1:]]
                shared.display.detail(name, time.monotonic() - start)
    return lines


def _search(
    shared: Comparison,
    name: str,
    seed: int,
    observe: Callable[[int, SearchState, Point | None], None] = lambda *_: None,
) -> list[Line]:
    """The result of one search, then its alphas every so many steps."""
    problem, every = shared.problem, shared.config.every
    line = {"kind": "search", "estimator": name, "seed": seed}
    alphas: list[Line] = []

    def record(step: int, state: SearchState, point: Point | None) -> None:
        shared.display.detail(f"{name}, step {step}/{problem.num_steps}")
        observe(step, state, point)
        if point is None or step % every == 0:
            alpha = comparison.flatten(state.alpha).tolist()
            alphas.append({**line, "kind": "alpha", "step": step, "alpha": alpha})

    try:
        state = comparison.run_search(problem, shared.programs[name], shared.compiled, seed, record)
        line["val_loss"] = problem.evaluate(state)
        if not np.isfinite(line["val_loss"]):
            raise NonFinite(f"seed {seed}: the final validation loss is {line['val_loss']}")
    except NonFinite as error:
        if name == EXACT:
            raise
        return [line | {"val_loss": None, "diverged": str(error)}, *alphas]
    if problem.cells:
        line["genotype"] = problem.cells.derive(jax.device_get(state.alpha))._asdict()
    return [line, *alphas]


def _distance(problem: Problem, line: Line, exact: Line) -> Line:
    """How far the cells of a search are from those of the exact one, if both have any."""
    if "genotype" not in line:
        return {}
    kind = problem.cells.kind
    one, other = (kind.type(**each["genotype"]) for each in (line, exact))
    return comparison.genotype_distance(one, other, kind)


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    with command_line.user_errors():
        preset, config = command_line.parse(PRESETS, argv, MODULE, __doc__.splitlines()[0])
        check(config)
    workdir = config.workdir or Path("runs") / f"compare_hypergradients-{preset}-seed{config.seed}"
    command_line.enable_compilation_cache()
    with opened(workdir, config) as workdir, Display() as display:
        with command_line.user_errors(), display.phase("loading the problem"):
            problem = make(config.problem)
            point = comparison.start(problem, config.seed)
        lines: list[Line] = []
        with writing(workdir):
            write_config(config, workdir)
        for part in measure(config, problem, point, display):
            lines += part
            with writing(workdir):
                comparison_report.write(lines, workdir)
        with display.phase("drawing"):
            comparison_report.draw(lines, problem.alpha_names, config.settings.radius, workdir)
    for table in comparison_report.tables(lines, config.settings.radius):
        display.console.print(table)
    display.console.print(f"written to {workdir}", soft_wrap=True, highlight=False)
    command = command_line.next_command(MODULE, argv, config.seed + config.num_seeds)
    display.console.print(f"next: {command}", soft_wrap=True, highlight=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
