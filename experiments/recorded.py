"""What a run has written, read back: its config, metrics, alphas and cells."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from darts_jax import genotype
from darts_jax.files import read_json
from experiments import evaluate_cnn, evaluate_rnn, search_cnn, search_rnn
from experiments.errors import UserError
from experiments.metrics import METRICS, parse_line
from experiments.seeds import OF_SEED
from experiments.workdir import ALWAYS, APART, CONFIG, MISSING, flatten

GENOTYPE = "genotype.json"  # file of a workdir
EXPERIMENTS = (search_cnn, search_rnn, evaluate_cnn, evaluate_rnn)
ALPHA = "alpha"  # in lines of metrics
PLACE = ("kind", "step", "epoch")  # fields that say where a line belongs
CELLS = ("cells", "cell")  # fields of a config that hold what was trained
# Fields in which runs of one preset may differ: which cells, and what was random.
OWN = (*CELLS, "genotype", "seed", "seeds", *ALWAYS)


class Frame(NamedTuple):
    """The alphas after an epoch.

    Attributes:
      epoch: after which they were recorded.
      weights: cell -> softmax of its alpha, [edges, operations].
      cells: that they stand for.
    """

    epoch: int
    weights: dict[str, np.ndarray]
    cells: genotype.AnyGenotype


class Run(NamedTuple):
    """One run.

    Attributes:
      name: to tell it from the others.
      fields: of its config, {"search.epochs": 50, ...}.
      lines: of metrics.jsonl, by kind.
      unfinished: the place of a last line that has no end yet, if there is one.
      frames: its alphas over time, those of each seed where there are several, by the name of what
        they are of: {"": ...}, or {"seed 3": ...}; none unless it was a search.
      cells: that it found or trained, if any.
    """

    name: str
    fields: dict[str, Any]
    lines: dict[str, list[dict[str, Any]]]
    unfinished: str | None
    frames: dict[str, list[Frame]]
    cells: genotype.AnyGenotype | None

    def series(self, kind: str) -> dict[str, list[tuple[int, float]]]:
        """Metric -> where and what, in the lines of kind "step" by step, "epoch" by epoch."""
        found: dict[str, list[tuple[int, float]]] = {}
        for line in self.lines.get(kind, ()):
            for name, value in line.items():
                if name not in PLACE and type(value) in (int, float):  # true and false are none
                    found.setdefault(name, []).append((line[kind], float(value)))
        return found


def read_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Reads the runs of some folders, each once; named by what their paths do not share.

    Raises:
      UserError: if a folder holds no run, or a file of it cannot be read; it names the file.
    """
    paths = list(dict.fromkeys(path.resolve() for path in workdirs))
    shared = set.intersection(*({*path.parents} for path in paths))
    root = max(shared, key=lambda path: len(path.parts), default=Path("/"))
    return [_read(path, str(path.relative_to(root))) for path in paths]


def origin(fields: Mapping[str, Any]) -> tuple[str, str]:
    """The experiment that a config belongs to, and the preset that is nearest to it.

    The preset is told with the number of fields that were changed; both are "" if none is known.
    """
    top = {name.split(".")[0] for name in fields} - {"facts"}
    for module in EXPERIMENTS:
        presets = {name: config for name, (_, config) in module.PRESETS.items()}
        names = {field.name for field in dataclasses.fields(next(iter(presets.values())))}
        if names - {*APART} != top:
            continue
        changed = {name: _changed(fields, config) for name, config in presets.items()}
        nearest = min(changed, key=lambda name: changed[name])
        count = changed[nearest]
        plural = "" if count == 1 else "s"
        text = f"{nearest}, {count} field{plural} changed" if count else nearest
        return module.MODULE.removeprefix("experiments."), text
    return "", ""


def _changed(fields: Mapping[str, Any], config: Any) -> int:
    """How many fields are not those of a config, a dataclass."""
    own = flatten(json.loads(json.dumps(dataclasses.asdict(config), default=str)))
    return sum(
        own.get(name, MISSING) != value
        for name, value in fields.items()
        if name not in OWN and not name.startswith("facts.")
    )


def _read(workdir: Path, name: str) -> Run:
    for file in (CONFIG, METRICS):
        if not (workdir / file).is_file():
            what = f"no run (it has no {file})" if workdir.is_dir() else "no folder"
            raise UserError(
                f"{workdir} is {what}; give folders that a search or an evaluation has written to"
            )
    fields = _read_config(workdir / CONFIG)
    lines, unfinished, frames = _read_metrics(workdir / METRICS)
    cells = _read_cells(workdir / GENOTYPE) if (workdir / GENOTYPE).exists() else None
    return Run(name, fields, lines, unfinished, frames, cells)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return flatten(read_json(path))
    except json.JSONDecodeError as error:
        raise _damaged(f"{path}, line {error.lineno}", error) from error
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _read_metrics(
    path: Path,
) -> tuple[dict[str, list[dict[str, Any]]], str | None, dict[str, list[Frame]]]:
    """The lines by kind, the place of a last one that has no end yet, and the alphas in them."""
    lines: dict[str, list[dict[str, Any]]] = {}
    frames: dict[str, list[Frame]] = {}
    try:
        *texts, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _damaged(path, error) from error
    for number, text in enumerate(texts, 1):
        try:
            line = parse_line(text)
            if line["kind"] == "epoch":
                for of, alpha in _alphas(line):
                    before = frames.setdefault(of, [])
                    before.append(_frame(line["epoch"], alpha, before[:1]))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _damaged(f"{path}, line {number}", error) from error
        lines.setdefault(line["kind"], []).append(line)
    return lines, f"{path}, line {len(texts) + 1}" if rest else None, frames


def _alphas(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is called alpha in a line of kind "epoch": of what ("" or a seed), and the alphas."""
    for name, value in line.items():
        if name == ALPHA:
            yield "", value
        elif name.startswith(ALPHA + OF_SEED):
            yield f"seed {name.removeprefix(ALPHA + OF_SEED)}", value


def _frame(epoch: int, alpha: Any, first: Sequence[Frame]) -> Frame:
    """The alphas of two cells or of a recurrent one, as they were after an epoch.

    Raises:
      ValueError, TypeError: if they stand for no cell, or have other shapes than in the first.
    """
    if isinstance(alpha, dict):
        cells: genotype.AnyGenotype = genotype.derive(alpha)
    else:
        cells, alpha = genotype.derive_recurrent(alpha), {"recurrent": alpha}
    weights = {}
    for name, values in alpha.items():
        if name.endswith("_edges"):
            continue
        power = np.exp(np.array(values) - np.max(values, axis=1, keepdims=True))
        weights[name] = power / power.sum(axis=1, keepdims=True)
    for other in first:
        if _shapes(other.weights) != _shapes(weights):
            raise ValueError("alpha has another shape than in the first epoch")
    return Frame(epoch, weights, cells)


def _shapes(arrays: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}


def _read_cells(path: Path) -> genotype.AnyGenotype:
    """The genotype in a file, of either kind."""
    try:
        kind = genotype.RNN if "recurrent" in read_json(path) else genotype.CNN
        return genotype.load(path, kind=kind)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(where: str | Path, error: Exception) -> UserError:
    if isinstance(error, json.JSONDecodeError):
        text = error.msg
    elif isinstance(error, OSError):
        text = error.strerror or str(error)
    else:
        text = str(error).removeprefix(f"{where}: ")
    return UserError(
        f"{where}: cannot be read ({text}); put the file back as it was, or leave this run out"
    )
