"""Discrete cells: their type, their derivation from alphas, JSON, and the published ones.

States of a cell are numbered: inputs first, then the intermediate nodes. A discrete cell is a
flat tuple of (operation, source state) edges, a fixed number per node in the order of the nodes,
and the states whose concatenation is its output. Needs numpy alone: reading a genotype must not
cost an import of jax.
"""

import difflib
import json
import os
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from darts_jax import published
from darts_jax.files import write_text

Edge = tuple[str, int]

# Candidate operations of the convolutional search space, in the order of alpha's columns.
CNN_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
# What a genotype may name: published cells use two operations that are not searched over.
CNN_OPERATIONS = (*CNN_PRIMITIVES, "sep_conv_7x7", "conv_7x1_1x7")
CNN_NUM_INPUTS = 2
CNN_EDGES_PER_NODE = 2

MAX_FILE_BYTES = 1_000_000


class Genotype(NamedTuple):
    """A pair of discrete convolutional cells.

    `normal` and `reduce` hold two (operation, source state) edges per intermediate node, strongest
    first within a node; states 0 and 1 are the outputs of the cells two back and one back, node i
    is state i + 2. `normal_concat` and `reduce_concat` are the states concatenated as output.
    """

    normal: tuple[Edge, ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[Edge, ...]
    reduce_concat: tuple[int, ...]


PUBLISHED: Mapping[str, Genotype] = MappingProxyType(
    {name: Genotype(**cells) for name, cells in published.CELLS.items()}
)


def edges(num_nodes: int, num_inputs: int = CNN_NUM_INPUTS) -> tuple[tuple[int, int], ...]:
    """Returns all (source, destination) states of a cell, by destination, then by source.

    This is the order of alpha's rows.
    """
    states = range(num_inputs, num_inputs + num_nodes)
    return tuple((source, state) for state in states for source in range(state))


def count_nodes(num_edges: int, num_inputs: int = CNN_NUM_INPUTS) -> int:
    """Returns the number of intermediate nodes of a cell with `num_edges` candidate edges.

    Raises:
      ValueError: if no whole number of nodes has that many edges.
    """
    num_nodes = total = 0
    while total < num_edges:
        total += num_inputs + num_nodes
        num_nodes += 1
    if total != num_edges or num_nodes == 0:
        valid = ", ".join(str(len(edges(n, num_inputs))) for n in (1, 2, 3, 4))
        raise ValueError(
            f"{num_edges} edges fit no cell with {num_inputs} inputs; alpha needs one row per edge:"
            f" {valid}, ... rows for 1, 2, 3, 4, ... nodes"
        )
    return num_nodes


def derive_cell(
    alpha: ArrayLike, primitives: Sequence[str], edges_per_node: int, num_inputs: int
) -> tuple[Edge, ...]:
    """Returns the strongest edges into each node of one cell, strongest first within a node.

    An edge's strength is the largest softmax probability of its operations other than `none`,
    which does keep its mass in the denominator; that operation is the edge's. Ties go to the lower
    operation and to the lower source. DARTS (arXiv 1806.09055), section 2.4.

    Args:
      alpha: [edges, operations] real, rows in the order of `edges`; the number of nodes follows.
      primitives: names of the columns.
      edges_per_node: how many edges each node keeps.
      num_inputs: how many input states the cell has.

    Raises:
      ValueError: if alpha has another shape or holds a value that is not finite.
    """
    alpha = _matrix(alpha, len(primitives))
    num_nodes = count_nodes(len(alpha), num_inputs)
    if not 1 <= edges_per_node <= num_inputs:
        raise ValueError(
            f"the first node has {num_inputs} incoming edges and cannot keep {edges_per_node};"
            f" keep 1 to {num_inputs} per node"
        )
    columns = [i for i, name in enumerate(primitives) if name != "none"]
    choice = [columns[i] for i in alpha[:, columns].argmax(axis=1)]
    strength = _log_softmax(alpha)[np.arange(len(alpha)), choice]

    kept, row = [], 0
    for num_sources in range(num_inputs, num_inputs + num_nodes):
        sources = sorted(range(num_sources), key=lambda source: -strength[row + source])
        kept += [(primitives[choice[row + s]], s) for s in sources[:edges_per_node]]
        row += num_sources
    return tuple(kept)


def derive(alpha: Mapping[str, ArrayLike], primitives: Sequence[str] = CNN_PRIMITIVES) -> Genotype:
    """Returns the discrete cells that alpha stands for; every node is concatenated.

    Args:
      alpha: {"normal", "reduce"}: [edges, operations] real, 14 edges for the usual 4 nodes.
      primitives: names of the operations, columns of alpha.

    Raises:
      ValueError: if a cell is missing, has another shape, or holds a value that is not finite.
    """
    if set(alpha) != {"normal", "reduce"}:
        raise ValueError(f"alpha has the cells {sorted(alpha)}; it needs 'normal' and 'reduce'")
    cells = {}
    for name in ("normal", "reduce"):
        try:
            cell = derive_cell(alpha[name], primitives, CNN_EDGES_PER_NODE, CNN_NUM_INPUTS)
        except ValueError as error:
            raise ValueError(f"alpha[{name!r}]: {error}") from error
        num_nodes = len(cell) // CNN_EDGES_PER_NODE
        cells[name] = cell
        cells[f"{name}_concat"] = tuple(range(CNN_NUM_INPUTS, CNN_NUM_INPUTS + num_nodes))
    return Genotype(**cells)


def sample(
    rng: np.random.Generator,
    num_nodes: int = 4,
    primitives: Sequence[str] = CNN_PRIMITIVES,
) -> Genotype:
    """Draws a pair of cells, uniform over the space that a search chooses from.

    Each node has two different sources among the states before it, listed by their number, and an
    operation other than `none` on each. The baseline of section 3.1 of DARTS (arXiv 1806.09055).
    """
    operations = [name for name in primitives if name != "none"]
    concat = tuple(range(CNN_NUM_INPUTS, CNN_NUM_INPUTS + num_nodes))
    cells: dict[str, Any] = {}
    for name in ("normal", "reduce"):
        cells[name] = tuple(
            (operations[rng.integers(len(operations))], int(source))
            for state in concat
            for source in sorted(rng.choice(state, CNN_EDGES_PER_NODE, replace=False))
        )
        cells[f"{name}_concat"] = concat
    return Genotype(**cells)


def validate(genotype: Genotype, operations: Sequence[str] = CNN_OPERATIONS) -> Genotype:
    """Returns the genotype, every sequence in it a tuple, if an evaluation network can be built.

    Args:
      genotype: what to validate.
      operations: names that it may use; by default those of the original.

    Raises:
      ValueError: naming the field, what is wrong with it, and what would be right.
    """
    cells: dict[str, Any] = {}
    for name in ("normal", "reduce"):
        cell = getattr(genotype, name)
        concat = getattr(genotype, f"{name}_concat")
        cells[name] = _valid_edges(name, cell, operations, CNN_EDGES_PER_NODE, CNN_NUM_INPUTS)
        num_states = CNN_NUM_INPUTS + len(cell) // CNN_EDGES_PER_NODE
        cells[f"{name}_concat"] = _valid_concat(
            f"{name}_concat", concat, range(CNN_NUM_INPUTS, num_states)
        )
    return Genotype(**cells)


def to_json(genotype: Genotype, operations: Sequence[str] = CNN_OPERATIONS) -> str:
    """Returns the genotype as JSON text, one field a line; `from_json` gives back its equal.

    Args and raises: as `validate`.
    """
    fields = validate(genotype, operations)._asdict()
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str, operations: Sequence[str] = CNN_OPERATIONS) -> Genotype:
    """Reads a genotype from JSON text.

    Args:
      text: an object with the fields of `Genotype`.
      operations: names that it may use.

    Raises:
      ValueError: if the text is not JSON, a field is missing, unknown or given twice, or the
        genotype is not valid.
    """
    twice: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        fields = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}); write genotypes with `save`") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"a genotype is a JSON object with the fields {', '.join(Genotype._fields)},"
            f" not {reprlib.repr(fields)}"
        )
    if twice:
        raise ValueError(f"field {reprlib.repr(twice[0])} is given twice; keep one")
    for name in fields:
        if name not in Genotype._fields:
            raise ValueError(
                f"unknown field {reprlib.repr(name)}; remove it, or rename it to one of:"
                f" {nearest(name, Genotype._fields)}"
            )
    for name in Genotype._fields:
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; add it")
    return validate(Genotype(**fields), operations)


def save(
    genotype: Genotype,
    path: str | os.PathLike[str],
    operations: Sequence[str] = CNN_OPERATIONS,
) -> None:
    """Writes the genotype to a JSON file, whole or not at all.

    Args:
      genotype: what to write.
      path: of the file.
      operations: names that the genotype may use.

    Raises:
      ValueError: if the genotype is not valid; nothing is written then.
    """
    write_text(path, to_json(genotype, operations))


def load(
    path_or_name: str | os.PathLike[str], operations: Sequence[str] = CNN_OPERATIONS
) -> Genotype:
    """Returns a published cell by its name, or reads the JSON file at a path.

    Args:
      path_or_name: of the file, or one of `PUBLISHED`.
      operations: names that a file may use.

    Raises:
      ValueError: if it is neither, or the file cannot be read, is larger than 1 MB, or holds no
        valid genotype; the message starts with the path.
    """
    if path_or_name in PUBLISHED:
        return PUBLISHED[path_or_name]
    path = Path(path_or_name)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(
            f"no genotype file or published cell {str(path)!r}; give the path of a JSON file,"
            f" or one of: {nearest(str(path), PUBLISHED)}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; give the path of a readable JSON file"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than 1 MB, so not a genotype; give another file")
    try:
        return from_json(content.decode(), operations)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; write genotypes with `save`") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def nearest(name: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    """Returns the valid names most like `name`, comma-separated; all of them if none is alike."""
    folded = {candidate.casefold(): candidate for candidate in valid}
    close = difflib.get_close_matches(name[:100].casefold(), folded, n=3, cutoff=0.5)
    return ", ".join(folded[match] for match in close or folded)


def _matrix(alpha: ArrayLike, num_operations: int) -> np.ndarray:
    try:
        alpha = np.asarray(alpha, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"not an array of real numbers; alpha is [edges, {num_operations} operations]"
        ) from error
    if alpha.ndim != 2 or alpha.shape[1] != num_operations:
        raise ValueError(
            f"shape {list(alpha.shape)}; alpha is [edges, {num_operations} operations]"
        )
    if not np.isfinite(alpha).all():
        row, column = np.argwhere(~np.isfinite(alpha))[0]
        raise ValueError(
            f"element [{row}, {column}] is {alpha[row, column]};"
            " derive from the last alpha that is finite"
        )
    return alpha


def _log_softmax(alpha: np.ndarray) -> np.ndarray:
    # The logarithm orders edges as the probability does, and does not underflow where `none`
    # dominates. Sorting fixes the order of the sum: rows that hold the same numbers tie exactly.
    shifted = alpha - alpha.max(axis=1, keepdims=True)
    return shifted - np.log(np.sort(np.exp(shifted), axis=1).sum(axis=1, keepdims=True))


def _valid_edges(
    field: str, cell: Any, operations: Sequence[str], edges_per_node: int, num_inputs: int
) -> tuple[Edge, ...]:
    if not isinstance(cell, list | tuple):
        raise ValueError(
            f"field {field!r} is {reprlib.repr(cell)}; it needs a list of [operation, source]"
        )
    if not cell or len(cell) % edges_per_node:
        raise ValueError(
            f"field {field!r} has {len(cell)} edges; it needs {edges_per_node} per node"
        )
    for index, edge in enumerate(cell):
        where = f"field {field!r}, edge {index}"
        if not isinstance(edge, list | tuple) or [type(part) for part in edge] != [str, int]:
            raise ValueError(
                f"{where} is {reprlib.repr(edge)}; it needs [operation, source], as"
                ' ["skip_connect", 0]'
            )
        operation, source = edge
        if operation not in operations:
            raise ValueError(
                f"{where}: unknown operation {reprlib.repr(operation)}; use one of:"
                f" {nearest(operation, operations)}"
            )
        last = num_inputs + index // edges_per_node - 1
        if not 0 <= source <= last:
            raise ValueError(
                f"{where}: source {reprlib.repr(source)} is out of range; use 0 to {last}, a state"
                " before the node"
            )
    return tuple((operation, source) for operation, source in cell)


def _valid_concat(field: str, concat: Any, nodes: range) -> tuple[int, ...]:
    needs = f"it needs different nodes from {nodes.start} to {nodes.stop - 1}"
    if not isinstance(concat, list | tuple | range) or not concat:
        raise ValueError(f"field {field!r} is {reprlib.repr(concat)}; {needs}")
    for state in concat:
        if type(state) is not int or state not in nodes:
            raise ValueError(f"field {field!r} holds {reprlib.repr(state)}; {needs}")
    if len(set(concat)) < len(concat):
        raise ValueError(f"field {field!r} holds a node twice; {needs}")
    return tuple(concat)
