"""Measuring hypergradients against the exact one: pure numbers, no files and no screen."""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from darts_jax import genotype, hypergradient, search
from darts_jax.hypergradient import Estimate, Estimator, value_and_grad
from experiments.comparison_estimators import EXACT, Method
from experiments.metrics import NonFinite
from experiments.problem import Problem
from experiments.stages import Program, Say, Stage, compile_stages

PyTree = Any
Line = dict[str, Any]
Point = tuple[PyTree, PyTree, PyTree, PyTree, PyTree]  # the arguments of an estimator
Compiled = dict[Hashable, Stage]

PRECISIONS = ("float32", "float64", "bfloat16")


# Two hypergradients.


def agreement(estimate: PyTree, exact: PyTree) -> Line:
    """How near one pytree of gradients is to another, in float64.

    Returns:
      cosine: of the angle between them; None where one of them is zero.
      relative_error: norm of the difference, over the norm of the exact one; None where that is 0.
      norm_ratio: norm of the estimate, over that of the exact one; so too.
      A number that is not finite is None, too.
    """
    a, b = flatten(estimate), flatten(exact)
    norms = np.linalg.norm(a), np.linalg.norm(b)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = {
            "cosine": a @ b / norms[0] / norms[1],
            "relative_error": np.linalg.norm(a - b) / norms[1],
            "norm_ratio": norms[0] / norms[1],
        }
    return {name: float(x) if np.isfinite(x) else None for name, x in values.items()}


def sign_agreement(estimate: PyTree, exact: PyTree) -> float:
    """Share of the alphas whose gradients have the same sign."""
    return float((np.sign(flatten(estimate)) == np.sign(flatten(exact))).mean())


def top_operations(alpha: PyTree, primitives: Sequence[str]) -> np.ndarray:
    """The operation, other than none, that each edge of all cells puts first: int [edges]."""
    none = primitives.index("none")
    return np.concatenate(
        [np.delete(np.asarray(rows), none, 1).argmax(1) for rows in jax.tree.leaves(alpha)]
    )


def genotype_distance(one: PyTree, other: PyTree, kind: genotype.Kind) -> Line:
    """Shares, in [0, 1], of what two genotypes of one size do not have in common.

    Returns:
      edges_differ: of the kept edges, whatever their operation.
      operations_differ: of the kept edges with their operation.
    """

    def kept(found: PyTree, with_operation: bool) -> set[tuple]:
        return {
            (cell, index // kind.edges_per_node, source, operation if with_operation else None)
            for cell, _ in kind.cells
            for index, (operation, source) in enumerate(getattr(found, cell))
        }

    pairs = {
        name: (kept(one, flag), kept(other, flag))
        for name, flag in (("edges_differ", False), ("operations_differ", True))
    }
    return {name: 1 - len(a & b) / len(a) for name, (a, b) in pairs.items()}


def flatten(tree: PyTree) -> np.ndarray:
    """All numbers of a pytree, float64 [n]."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


# A search.


def make_programs(
    problem: Problem,
    methods: Mapping[str, Method],
    point: Point,
    compiled: Compiled,
    say: Say,
) -> dict[str, Program]:
    """Every method compiled for arguments such as these."""
    return {
        name: compile_stages(method.make(problem), point, compiled, prefixed(name, say))
        for name, method in methods.items()
    }


def prefixed(prefix: str, say: Say) -> Say:
    """`say`, told for what the stages are."""
    return lambda name, *seconds: say(f"{prefix}: {name}", *seconds)


def start(problem: Problem, seed: int) -> Point:
    """Where the search of a seed starts."""
    state = problem.init(seed)
    return point_of(*problem.prepare(seed, state, 0))


def point_of(state: search.SearchState, train_batch: PyTree, val_batch: PyTree) -> Point:
    """The arguments of an estimator."""
    return state.alpha, state.w, state.w_opt_state, train_batch, val_batch


def run_search(
    problem: Problem,
    program: Program,
    compiled: Compiled,
    seed: int,
    observe: Callable[[int, search.SearchState, Point | None], None],
) -> search.SearchState:
    """The state after a search whose alpha follows an estimator.

    Args:
      problem: what is searched.
      program: the estimator, compiled.
      compiled: the stages so far, for the step of w.
      seed: of the search.
      observe: called with the number of finished steps and the state, before each step with the
        arguments of the estimator, and once more with None in the end.

    Raises:
      NonFinite: by a loss that is not finite.
    """
    state = problem.init(seed)
    advance = None
    for step in range(problem.num_steps):
        state, *inputs = problem.prepare(seed, state, step)
        point = point_of(state, *inputs)
        observe(step, state, point)
        estimate = program.call(*point)
        arguments = state, estimate, inputs[0]
        advance = advance or compile_stages(_make_advance(problem), arguments, compiled)
        state, loss = advance.call(*arguments)
        if not np.isfinite(loss):
            raise NonFinite(
                f"step {step + 1} of seed {seed}: the training loss is {loss}; lower the learning"
                " rates"
            )
    observe(problem.num_steps, state, None)
    return state


def _make_advance(
    problem: Problem,
) -> Callable[[search.SearchState, Estimate, PyTree], tuple[search.SearchState, jax.Array]]:
    """`advance(state, hypergradient, train_inputs) -> (next state, training loss)`."""
    differentiate = value_and_grad(problem.bilevel.train_loss, problem.bilevel.has_aux)

    @jax.jit
    def step_alpha(gradient, opt_state, alpha):
        return _step(problem.alpha_optimizer, gradient, opt_state, alpha)

    @jax.jit
    def step_w(gradient, opt_state, w):
        return _step(problem.w_optimizer, gradient, opt_state, w)

    def advance(state, estimate, train_inputs):
        alpha, alpha_opt_state = step_alpha(estimate.gradient, state.alpha_opt_state, state.alpha)
        train, (gradient, _) = differentiate(state.w, alpha, train_inputs)
        w, w_opt_state = step_w(gradient, state.w_opt_state, state.w)
        carry = problem.next_carry(train.aux, estimate.aux)
        state = search.SearchState(
            state.step + 1, state.key, w, alpha, carry, w_opt_state, alpha_opt_state
        )
        return state, train.value

    return advance


def _step(
    optimizer: optax.GradientTransformation,
    gradient: PyTree,
    opt_state: optax.OptState,
    params: PyTree,
) -> tuple[PyTree, optax.OptState]:
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


# The comparison at one state.


def compare(
    problem: Problem, programs: Mapping[str, Program], state: search.SearchState, point: Point
) -> list[Line]:
    """One line an estimator: its agreement with the exact one at this state, and its seconds.

    Raises:
      NonFinite: by the exact hypergradient.
    """
    results = {name: _timed(program, point) for name, program in programs.items()}
    exact, _ = results[EXACT]
    if not np.isfinite(flatten(exact.gradient)).all():
        raise NonFinite(
            f"step {int(state.step)}: the exact hypergradient is not finite; lower"
            " the learning rates"
        )
    tops = {}
    if problem.cells:
        before = state.alpha_opt_state, state.alpha
        tops = {
            name: top_operations(
                _step(problem.alpha_optimizer, estimate.gradient, *before)[0],
                problem.cells.primitives,
            )
            for name, (estimate, _) in results.items()
        }
    lines = []
    for name, (estimate, seconds) in results.items():
        line: Line = {"estimator": name}
        for term in ("gradient", "implicit"):
            values = agreement(getattr(estimate, term), getattr(exact, term))
            line |= {f"{term}_{key}": value for key, value in values.items()}
        line["sign_agreement"] = sign_agreement(estimate.gradient, exact.gradient)
        if tops:
            line["top_agreement"] = float((tops[name] == tops[EXACT]).mean())
        lines.append(line | {"seconds": seconds})
    return lines


def _timed(program: Program, point: Point) -> tuple[Estimate, float]:
    start = time.perf_counter()
    estimate = jax.block_until_ready(program.call(*point))
    return estimate, time.perf_counter() - start


# The radius of the finite difference.


def radius_sweep(
    problem: Problem,
    point: Point,
    radii: Sequence[float],
    precisions: Sequence[str],
    compiled: Compiled,
    say: Say,
) -> list[Line]:
    """Error of the finite difference's implicit term at one state, by precision and radius.

    The state is rounded to bfloat16 first, so that it is the same one in every precision.

    Returns:
      Lines of precision, radius, and cosine, relative_error and norm_ratio against the exact term
      in float64. Where radius is None, those of the exact estimator in that precision.
    """
    bilevel, optimizer = problem.bilevel, problem.w_optimizer
    exact = hypergradient.unrolled(bilevel, optimizer)
    point = cast(point, "bfloat16")

    # A process can hold only so many compiled programs (each is thousands of memory maps): those of
    # a precision go when it is done.
    own: dict[str, Compiled] = {"float32": compiled, "float64": {}}

    def implicit(estimate: Estimator, precision: str, stages: Compiled) -> PyTree:
        with jax.enable_x64(precision == "float64"):
            here = cast(point, precision)
            program = compile_stages(estimate, here, stages, prefixed(precision, say))
            return jax.device_get(program.call(*here).implicit)

    reference = implicit(exact, "float64", own["float64"])
    lines = []
    for precision in sorted(precisions, key=lambda name: name != "float64"):
        stages = own.pop(precision, {})
        estimators = {None: exact} | {
            radius: hypergradient.finite_difference(bilevel, optimizer, radius=radius)
            for radius in radii
        }
        for radius, estimate in estimators.items():
            values = agreement(implicit(estimate, precision, stages), reference)
            lines.append({"precision": precision, "radius": radius, **values})
    lines.sort(key=lambda line: precisions.index(line["precision"]))
    return lines


def cast(tree: PyTree, dtype: str) -> PyTree:
    """The tree with all its floating-point arrays in one dtype."""

    def convert(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(convert, tree)
