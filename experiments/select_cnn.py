"""Selects the cells of a finished search anew, apart from how its supernet was trained.

    python -m experiments.select_cnn --search runs/search_cnn-digits-seed0
    python -m experiments.select_cnn --search runs/search_cnn-digits-seed0 --method argmax_with_none

The supernet is that of the newest checkpoint in the workdir of the search, where the cells are
written to: genotype-METHOD.json. `perturbation` is DARTS-PT (arXiv 2108.04392) without training
between its decisions.
"""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import tyro

from darts_jax import data, genotype, perturbation, relaxation, search
from darts_jax.files import read_json
from experiments import command_line, remedies, runner, search_cnn, search_config
from experiments.images import plain_batch
from experiments.metrics import Display
from experiments.workdir import CONFIG, locked, writing

MODULE = "experiments.select_cnn"


@dataclass(frozen=True)
class Config:
    """Select the cells of a finished search."""

    search: Path
    """Workdir of a search by experiments.search_cnn."""
    method: Literal["argmax", "argmax_with_none", "perturbation"] = "perturbation"
    """By the largest alphas, without or with none; or by what the supernet loses (DARTS-PT)."""
    batches: int = 4
    """Validation batches that an accuracy is measured on, at most."""
    seed: int = 0
    """Of the order in which edges and nodes are decided."""


def read_config(workdir: Path) -> search_config.Config:
    """The config of a search.

    Raises:
      ValueError: if there is none.
    """
    path = workdir / CONFIG

    def filled(example: Any, fields: Any, name: str = "") -> Any:
        if not isinstance(fields, dict):
            raise ValueError(f"{name} is no object")
        values, kinds = {}, get_type_hints(type(example))
        for field in dataclasses.fields(example):
            before = getattr(example, field.name)
            if field.name in fields:
                value, own = fields[field.name], f"{name}.{field.name}".removeprefix(".")
                if dataclasses.is_dataclass(before):
                    values[field.name] = filled(before, value, own)
                else:
                    values[field.name] = _fitting(value, kinds[field.name], before, own)
        return dataclasses.replace(example, **values)

    try:
        fields = read_json(path)
        if not {"data", "network", "search"} <= set(fields):
            raise ValueError("fields are missing")
        config = filled(search_config.DIGITS, fields)
        search_cnn.check(config)
        return config
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is not the config of a search ({error}); give --search the workdir of one by"
            " experiments.search_cnn"
        ) from error


def _fitting(value: Any, kind: Any, before: Any, name: str) -> Any:
    """A value of a file for a field.

    Args:
      value: that JSON holds.
      kind: type of the field.
      before: what it had.
      name: of the field.

    Raises:
      ValueError: if it is of another type, or none of the values that there are.
    """
    origin, of = get_origin(kind), get_args(kind)
    if origin is Literal:
        if isinstance(value, str) and value in of:
            return value
        raise ValueError(f"{name} is {str(value)[:50]!r}; use one of: {', '.join(of)}")
    if origin is UnionType and (value is None or type(value) in of):
        return value
    if origin is UnionType and Path in of and isinstance(value, str):
        return Path(value)
    if origin is tuple and isinstance(value, list) and len(value) == len(of):
        rows = zip(value, of, before, strict=True)
        return tuple(_fitting(*row, name) for row in rows)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is kind:
        return value
    raise ValueError(f"{name} is {str(value)[:50]!r}, where {before!r} would be of the right kind")


def by_perturbation(
    own: Config, config: search_config.Config, dataset: data.Dataset, state: search.SearchState
) -> genotype.Genotype:
    """The cells that the supernet would lose most without, by accuracy on validation images."""
    options = config.search.remedies
    if options.relaxation == "gumbel":  # its weights without noise are one-hot: nothing to compare
        options = dataclasses.replace(options, relaxation="softmax")
    mask = remedies.survivors(options)
    network = search_cnn.supernet(config.network, dataset.num_classes)
    network = remedies.adapt(options, network, mask)
    relax = remedies.make_relaxation(options, mask)
    given = remedies.with_auxiliary_skip(options, relaxation.as_they_are)
    loss = search.make_loss(network, given)
    _, val = data.split_search(dataset.train, config.search.train_portion)
    size = config.search.batch_size
    count = min(own.batches, max(1, len(val.labels) // size))
    batches = [
        plain_batch(dataset, val, np.arange(i * size, (i + 1) * size) % len(val.labels))._replace(
            context=relaxation.EVALUATION
        )
        for i in range(count)
    ]

    @jax.jit
    def accuracy(state, weights, batch):
        # Normalised by the batch: running statistics are of other mixing weights.
        _, aux = loss(state.w, weights, search.Inputs(batch, state.carry))
        return search.accuracy(aux.logits, batch.label)

    return perturbation.select(
        state,
        lambda state: jax.device_get(relax(state.alpha, relaxation.EVALUATION)),
        lambda state, weights: float(np.mean([accuracy(state, weights, b) for b in batches])),
        np.random.default_rng(own.seed),
    )


def run(argv: Sequence[str]) -> None:
    """Runs the command line."""
    own = tyro.cli(
        Config, args=list(argv), prog=f"python -m {MODULE}", description=__doc__.splitlines()[0]
    )
    with command_line.user_errors():
        command_line.check_at_least(("batches", own.batches, 1))
        command_line.check_seed(own.seed)
        config = read_config(own.search)
        if config.seeds > 1:
            raise ValueError(
                f"{own.search} holds {config.seeds} searches; give --search the workdir of one that"
                " was made by --seeds 1"
            )
    with locked(own.search), Display() as display, command_line.user_errors():
        with display.phase(f"loading {config.data.name}"):
            dataset = data.load(config.data.name, config.data.path, config.data.limit)
            state = runner.restore(
                search_cnn.make_job(config, dataset, own.search), own.search, display
            )
        if own.method == "perturbation":
            with display.phase("measuring the supernet without each operation"):
                cells = by_perturbation(own, config, dataset, state)
        else:
            mask = remedies.survivors(config.search.remedies)
            alpha = remedies.recorded(jax.device_get(state.alpha), mask)
            cells = genotype.derive(alpha, with_none=own.method == "argmax_with_none")
        path = own.search / f"genotype-{own.method}.json"
        with writing(own.search):
            genotype.save(cells, path)
        display.console.print(f"written to {path}", markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code (see `experiments.command_line`)."""
    return command_line.guard(MODULE, run, argv)


if __name__ == "__main__":
    sys.exit(main())
