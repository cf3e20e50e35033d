"""Several searches as one job: the same search by several seeds, side by side.

Each is what it would be alone, to float tolerance. States are stacked along a first axis, that of
the seeds, whatever number of them goes through a step at once.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from rich.table import Table

from darts_jax import choices, genotype, plots
from darts_jax.files import write_text
from experiments import command_line, devices, runner
from experiments.recurrent_cell import START

PyTree = Any
# From the lines of kind "epoch" of one search to the cells that it has found.
Find = Callable[[Sequence[dict[str, Any]]], genotype.AnyGenotype]

OF_SEED = "_of_seed_"  # in names of what is recorded of one of several seeds
AGREEMENT = "agreement"  # files of a workdir: how often each operation was chosen


def check(seed: int, count: int, at_once: int | None) -> None:
    """Raises a ValueError for a number of seeds, or of seeds at once, that cannot be."""
    command_line.check_at_least(("seeds", count, 1))
    command_line.check_seed(seed, count)
    if at_once is None:
        return
    command_line.check_at_least(("seeds-at-once", at_once, 1))
    if count % at_once:
        raise ValueError(
            f"--seeds-at-once is {at_once}, of which the {count} seeds are no multiple; give one of"
            " their divisors"
        )


def folder(workdir: Path, seed: int) -> Path:
    """Where the cells and pictures of one of several seeds go."""
    return workdir / f"seed{seed}"


def together(
    alone: Callable[[int, Path], runner.Job],
    seeds: Sequence[int],
    at_once: int | None,
    workdir: Path,
    mesh: Mesh,
    find: Find,
) -> runner.Job:
    """The job of some seeds; that of one is as it is alone.

    Args:
      alone: (seed, folder) -> the job of a search, whose state is a `search.SearchState`. Jobs of
        different seeds differ in `init`, `train_batches`, `end_epoch` and `draw` only.
      seeds: of the searches.
      at_once: how many of them go through a step as one batch of arrays, a divisor of their number.
        None for all, but on CPUs for one in each group of devices, since convolutions there gain
        nothing from a batch of seeds (see docs/performance.md).
      workdir: of all of them.
      mesh: `devices.mesh` of so many seeds, so many of them at once.
      find: the cells of one.
    """
    if len(seeds) == 1:
        return alone(seeds[0], workdir)
    jobs = [alone(seed, folder(workdir, seed)) for seed in seeds]
    job, count = jobs[0], len(seeds)
    if at_once is None:
        at_once = mesh.shape[devices.SEED] if jax.default_backend() == "cpu" else count
    train = _by_chunks(mesh, job.train_step, count, at_once, in_axes=(0, None, 0))
    evaluate = _by_chunks(mesh, job.eval_step, count, at_once, in_axes=(0, None, None))

    def train_step(states: PyTree, data: PyTree, batches: PyTree) -> tuple[PyTree, Any]:
        batches = devices.spread(mesh, batches, PartitionSpec(devices.SEED))
        states, metrics = train(states, data, batches)
        return states, _summarize(metrics, len(jax.tree.leaves(job.checked(states))))

    def eval_step(states: PyTree, data: PyTree, batch: PyTree) -> tuple[dict[str, Any], Any]:
        sums, counts = evaluate(states, data, batch)
        return _by_seed(sums, counts, tuple(seeds))

    def end_epoch(states: PyTree) -> dict[str, Any]:
        recorded: dict[str, Any] = {}
        for i, (seed, one) in enumerate(zip(seeds, jobs, strict=True)):
            folder(workdir, seed).mkdir(exist_ok=True)
            own = one.end_epoch(jax.tree.map(lambda x, i=i: x[i], states))
            recorded |= {f"{name}{OF_SEED}{seed}": value for name, value in own.items()}
        return recorded

    def draw(lines: Sequence[dict[str, Any]]) -> list[Path]:
        pictures = []
        for seed, one in zip(seeds, jobs, strict=True):
            folder(workdir, seed).mkdir(exist_ok=True)
            pictures += one.draw(of_seed(lines, seed))
        return [*pictures, _save_choices(lines, seeds, workdir, find)]

    return job._replace(
        init=lambda: _stack([one.init() for one in jobs]),
        train_step=devices.within(mesh, train_step),
        eval_step=devices.within(mesh, eval_step),
        train_batches=lambda epoch: [
            jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
            for batches in zip(*(one.train_batches(epoch) for one in jobs), strict=True)
        ],
        end_epoch=end_epoch,
        checked=lambda states: OrderedDict((f"seed_{s}", job.checked(states)) for s in seeds),
        draw=draw,
    )


def of_seed(lines: Sequence[Mapping[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Lines of kind "epoch" as the search of one of several seeds would have them alone."""
    suffix = f"{OF_SEED}{seed}"
    return [
        {name: value for name, value in line.items() if OF_SEED not in name}
        | {name[: -len(suffix)]: value for name, value in line.items() if name.endswith(suffix)}
        for line in lines
    ]


def best(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> int:
    """The seed of the largest validation accuracy at the end or, without one, the smallest loss."""

    def rank(seed: int) -> tuple[float, float]:
        (last,) = of_seed(lines[-1:], seed)
        return -last.get("eval_accuracy", 0.0), last["eval_loss"]

    return min(seeds, key=rank)


def of_best(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Lines of kind "epoch" as the search of the best seed would have them alone."""
    return of_seed(lines, best(lines, seeds))


def best_genotype(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int], workdir: Path) -> Path:
    """The file of the cells of the best seed."""
    own = workdir if len(seeds) == 1 else folder(workdir, best(lines, seeds))
    return own / "genotype.json"


def values_of(
    line: Mapping[str, Any], name: str, of: Sequence[int], seeds: Sequence[int]
) -> np.ndarray:
    """A figure in a line of kind "epoch", of some of the seeds of a run."""
    if len(seeds) == 1:
        return np.array([line[name]])
    return np.array([line[f"{name}{OF_SEED}{seed}"] for seed in of])


def add_rows(
    table: Table,
    lines: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    validation: Callable[[Sequence[int]], str],
    find: Find,
) -> None:
    """Adds what a search ends with to its table: of all seeds, then of each, and how they agree.

    Args:
      table: of two columns.
      lines: of kind "epoch".
      seeds: of the searches.
      validation: some of the seeds -> their figures as a text.
      find: the cells of one.
    """
    table.add_row("validation", validation(seeds))
    if len(seeds) > 1:
        each = [f"seed {seed}: {validation([seed])}" for seed in seeds]
        chosen = best(lines, seeds)
        each[seeds.index(chosen)] += " (the cells above)"
        table.add_row("each seed", "\n".join(each))
        table.add_row("agreement", agreement(lines, seeds, find))


def mean_text(values: np.ndarray, digits: int) -> str:
    """The mean of some figures, with their sample standard deviation if there are several."""
    text = f"{values.mean():.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {values.std(ddof=1):.{digits}f}"


def agreement(lines: Sequence[Mapping[str, Any]], seeds: Sequence[int], find: Find) -> str:
    """How far the cells of some seeds agree: a line for each cell."""
    rows = []
    for cell, of_cell in choices.table(_cells(lines, seeds, find))["cells"].items():
        chosen = of_cell["operations"]
        order = sorted(chosen, key=lambda name: -chosen[name])
        shares = ", ".join(f"{name} {chosen[name] / sum(chosen.values()):.0%}" for name in order)
        rows.append(f"{cell}: {of_cell['distinct']} distinct of {len(seeds)}; {shares}")
    return "\n".join(rows)


def _cells(
    lines: Sequence[Mapping[str, Any]], seeds: Sequence[int], find: Find
) -> list[genotype.AnyGenotype]:
    """The cells that each seed has found in the end."""
    return [find(of_seed(lines, seed)) for seed in seeds]


def _save_choices(
    lines: Sequence[Mapping[str, Any]], seeds: Sequence[int], workdir: Path, find: Find
) -> Path:
    """Saves the cells of the best seed, and what all have chosen; returns the picture of that."""
    found = _cells(lines, seeds, find)
    genotype.save(found[seeds.index(best(lines, seeds))], workdir / "genotype.json")
    write_text(workdir / f"{AGREEMENT}.json", json.dumps(choices.table(found), indent=2) + "\n")
    inputs = (START,) if choices.kind_of(found) is genotype.RNN else plots.INPUT_NAMES
    _, png = choices.draw(found, workdir / AGREEMENT, inputs)
    return png


def over(mesh: Mesh, at_once: int | None, function: Callable, items: PyTree) -> PyTree:
    """`function` of what is of each seed; for jit, in a step by `devices.within`.

    Args:
      mesh: its groups of devices have seeds of their own, [seeds, ...] being spread over them.
      at_once: how many seeds are computed in one batch, on all devices; None for all.
      function: of the items of one seed.
      items: of all seeds, [seeds, ...].
    """
    groups = mesh.shape[devices.SEED]
    one_group = partial(jax.lax.map, function, batch_size=(at_once or 0) // groups)  # 0 for all
    if groups == 1:
        return one_group(items)
    if len(jax.tree.leaves(items)[0]) == groups:
        return jax.vmap(function, spmd_axis_name=devices.SEED)(items)
    apart = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), items)
    results = jax.vmap(one_group, spmd_axis_name=devices.SEED)(apart)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), results)


def _by_chunks(
    mesh: Mesh, step: Callable, count: int, at_once: int, in_axes: tuple[int | None, ...]
) -> Callable[..., Any]:
    """A step for the arguments of all seeds, so many of them at once.

    Each group of devices takes as many of its own seeds, so that none has to move. Called outside
    of jit, so that the stages of a step are compiled apart, and once for all chunks.
    """
    groups = mesh.shape[devices.SEED]
    chunks, of_group = count // at_once, at_once // groups
    batched = step if of_group == 1 else jax.vmap(step, in_axes)
    if groups > 1:
        batched = jax.vmap(batched, in_axes, spmd_axis_name=devices.SEED)
    if at_once == count and 1 in (groups, of_group):
        return batched
    # The axes of a chunk: groups, seeds of a group; without those of size 1.
    axes = tuple(size for size in (groups, of_group) if size > 1)

    @jax.jit
    def split(args):
        apart = jax.tree.map(lambda x: x.reshape(groups, chunks, of_group, *x.shape[1:]), args)
        return [
            jax.tree.map(lambda x, i=i: x[:, i].reshape(*axes, *x.shape[3:]), apart)
            for i in range(chunks)
        ]

    @jax.jit
    def join(results):
        def one(*leaves):
            rest = leaves[0].shape[len(axes) :]
            apart = [x.reshape(groups, of_group, *rest) for x in leaves]
            return jnp.stack(apart, axis=1).reshape(count, *rest)

        return jax.tree.map(one, *results)

    def run(*args: PyTree) -> PyTree:
        own = [arg for arg, axis in zip(args, in_axes, strict=True) if axis is not None]
        results = []
        for chunk in split(own):
            parts = iter(chunk)
            given = [
                arg if axis is None else next(parts)
                for arg, axis in zip(args, in_axes, strict=True)
            ]
            results.append(batched(*given))
        return join(results)

    return run


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@partial(jax.jit, static_argnames="seeds")
def _by_seed(
    sums: Mapping[str, jax.Array], counts: jax.Array, seeds: tuple[int, ...]
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Sums [seeds] of an evaluation as the means of all and those of each, and their one count."""
    means = {name: values.mean() for name, values in sums.items()}
    for name, values in sums.items():
        means |= {f"{name}{OF_SEED}{seed}": values[i] for i, seed in enumerate(seeds)}
    return means, counts[0]


@partial(jax.jit, static_argnames="num_leaves")
def _summarize(metrics: Any, num_leaves: int) -> Any:
    """Metrics [seeds] of a step as those of all: means, and what is not finite of the first seed.

    Args:
      metrics: a NamedTuple; its `nonfinite` is -1, or one of so many leaves.
      num_leaves: of what is checked of one seed.
    """
    bad = metrics.nonfinite
    seed = jnp.argmax(bad >= 0)
    first = jnp.where(bad.max() < 0, -1, seed * num_leaves + bad[seed])
    return jax.tree.map(jnp.mean, metrics)._replace(nonfinite=first)
