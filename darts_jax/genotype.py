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
from darts_jax.derivation import CNN_NUM_INPUTS, Edge, derive_cell
from darts_jax.derivation import count_nodes as count_nodes
from darts_jax.derivation import edges as edges
from darts_jax.files import write_text

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
CNN_EDGES_PER_NODE = 2

# Candidate activations of the recurrent search space, in the order of alpha's columns.
RNN_PRIMITIVES = ("none", "tanh", "relu", "sigmoid", "identity")
RNN_NUM_INPUTS = 1
RNN_EDGES_PER_NODE = 1

MAX_FILE_BYTES = 1_000_000
MAX_SHOWN = 100  # characters of a value in a message


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


class RecurrentGenotype(NamedTuple):
    """A discrete recurrent cell.

    `recurrent` holds one (activation, source state) edge per node; state 0 is the cell's start,
    node i is state i + 1. `concat` are the states whose mean is the output.
    """

    recurrent: tuple[Edge, ...]
    concat: tuple[int, ...]


PUBLISHED: Mapping[str, Genotype] = MappingProxyType(
    {name: Genotype(**cells) for name, cells in published.CELLS.items()}
)
PUBLISHED_RECURRENT: Mapping[str, RecurrentGenotype] = MappingProxyType(
    {name: RecurrentGenotype(**cell) for name, cell in published.RECURRENT_CELLS.items()}
)

AnyGenotype = Genotype | RecurrentGenotype


class Kind(NamedTuple):
    """What is to be known of a type of genotypes to read and check them.

    Attributes:
      name: for messages.
      type: the type.
      cells: names of its fields, (edges, concat) for each cell.
      operations: names that it may use by default: those of the original.
      edges_per_node: kept per node.
      num_inputs: states of a cell before its nodes.
      published: those that go by a name.
    """

    name: str
    type: type
    cells: tuple[tuple[str, str], ...]
    operations: tuple[str, ...]
    edges_per_node: int
    num_inputs: int
    published: Mapping[str, Any]


CNN = Kind(
    "convolutional",
    Genotype,
    (("normal", "normal_concat"), ("reduce", "reduce_concat")),
    CNN_OPERATIONS,
    CNN_EDGES_PER_NODE,
    CNN_NUM_INPUTS,
    PUBLISHED,
)
RNN = Kind(
    "recurrent",
    RecurrentGenotype,
    (("recurrent", "concat"),),
    RNN_PRIMITIVES[1:],  # a node that nothing enters has no value
    RNN_EDGES_PER_NODE,
    RNN_NUM_INPUTS,
    PUBLISHED_RECURRENT,
)


def derive(
    alpha: Mapping[str, ArrayLike],
    primitives: Sequence[str] = CNN_PRIMITIVES,
    with_none: bool = False,
) -> Genotype:
    """Returns the discrete cells that alpha stands for; every node is concatenated.

    Args:
      alpha: {"normal", "reduce"}: [edges, operations] real, 14 edges for the usual 4 nodes; and
        "normal_edges" and "reduce_edges" [edges], if edges have weights of their own.
      primitives: names of the operations, columns of alpha.
      with_none: `none` can be chosen like any other operation.

    Raises:
      ValueError: if a cell is missing, has another shape, or holds a value that is not finite, but
        for operations of -inf, which are not chosen.
    """
    if {name for name in alpha if not name.endswith("_edges")} != {"normal", "reduce"}:
        raise ValueError(f"alpha has the cells {sorted(alpha)}; it needs 'normal' and 'reduce'")
    cells = {}
    for name in ("normal", "reduce"):
        try:
            own = alpha[name], primitives, CNN_EDGES_PER_NODE, CNN_NUM_INPUTS
            cell = derive_cell(*own, with_none, alpha.get(f"{name}_edges"))
        except ValueError as error:
            raise ValueError(f"alpha[{name!r}]: {error}") from error
        num_nodes = len(cell) // CNN_EDGES_PER_NODE
        cells[name] = cell
        cells[f"{name}_concat"] = tuple(range(CNN_NUM_INPUTS, CNN_NUM_INPUTS + num_nodes))
    return Genotype(**cells)


def derive_recurrent(
    alpha: ArrayLike, primitives: Sequence[str] = RNN_PRIMITIVES
) -> RecurrentGenotype:
    """Returns the discrete recurrent cell that alpha stands for; every node is in its output.

    Args:
      alpha: [edges, activations] real, 36 edges for the usual 8 nodes.
      primitives: names of the activations, columns of alpha.

    Raises:
      ValueError: if alpha has another shape, or holds a value that is not finite.
    """
    cell = derive_cell(alpha, primitives, RNN_EDGES_PER_NODE, RNN_NUM_INPUTS)
    return RecurrentGenotype(cell, tuple(range(1, len(cell) + 1)))


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


def sample_recurrent(
    rng: np.random.Generator,
    num_nodes: int = 8,
    primitives: Sequence[str] = RNN_PRIMITIVES,
) -> RecurrentGenotype:
    """Draws a recurrent cell, uniform over the space that a search chooses from."""
    activations = [name for name in primitives if name != "none"]
    nodes = tuple(
        (activations[rng.integers(len(activations))], int(rng.integers(node + RNN_NUM_INPUTS)))
        for node in range(num_nodes)
    )
    return RecurrentGenotype(nodes, tuple(range(RNN_NUM_INPUTS, num_nodes + RNN_NUM_INPUTS)))


def validate(genotype: AnyGenotype, operations: Sequence[str] | None = None) -> AnyGenotype:
    """Returns the genotype, every sequence in it a tuple, if an evaluation network can be built.

    Args:
      genotype: what to validate.
      operations: names that it may use; by default those of the original.

    Raises:
      ValueError: naming the field, what is wrong with it, and what would be right.
    """
    kind = CNN if isinstance(genotype, Genotype) else RNN
    names = kind.operations if operations is None else operations
    cells: dict[str, Any] = {}
    for name, concat in kind.cells:
        cell = getattr(genotype, name)
        cells[name] = _valid_edges(name, cell, names, kind)
        num_states = kind.num_inputs + len(cell) // kind.edges_per_node
        nodes = range(kind.num_inputs, num_states)
        cells[concat] = _valid_concat(concat, getattr(genotype, concat), nodes)
    return kind.type(**cells)


def to_json(genotype: AnyGenotype, operations: Sequence[str] | None = None) -> str:
    """Returns the genotype as JSON text, one field a line; `from_json` gives back its equal.

    Args and raises: as `validate`.
    """
    fields = validate(genotype, operations)._asdict()
    lines = (f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def from_json(text: str, operations: Sequence[str] | None = None, kind: Kind = CNN) -> AnyGenotype:
    """Reads a genotype from JSON text.

    Args:
      text: an object with the fields of the genotype.
      operations: names that it may use; by default those of the original.
      kind: `CNN` or `RNN`.

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
    names = kind.type._fields
    if not isinstance(fields, dict):
        raise ValueError(
            f"a genotype is a JSON object with the fields {', '.join(names)}, not {_shown(fields)}"
        )
    if twice:
        raise ValueError(f"field {_shown(twice[0])} is given twice; keep one")
    for other in (CNN, RNN):
        if other is not kind and set(fields) == set(other.type._fields):
            raise ValueError(f"holds {other.name} cells; give a file of {kind.name} ones")
    for name in fields:
        if name not in names:
            raise ValueError(
                f"unknown field {_shown(name)}; remove it, or rename it to one of:"
                f" {nearest(name, names)}"
            )
    for name in names:
        if name not in fields:
            raise ValueError(f"field {name!r} is missing; add it")
    return validate(kind.type(**fields), operations)


def save(
    genotype: AnyGenotype,
    path: str | os.PathLike[str],
    operations: Sequence[str] | None = None,
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
    path_or_name: str | os.PathLike[str],
    operations: Sequence[str] | None = None,
    kind: Kind = CNN,
) -> AnyGenotype:
    """Returns a published cell by its name, or reads the JSON file at a path.

    Args:
      path_or_name: of the file, or one of the kind's published cells.
      operations: names that a file may use.
      kind: `CNN` or `RNN`.

    Raises:
      ValueError: if it is neither, or the file cannot be read, is larger than 1 MB, or holds no
        valid genotype; the message starts with the path.
    """
    if path_or_name in kind.published:
        return kind.published[path_or_name]
    path = Path(path_or_name)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(
            f"no genotype file or published cell {str(path)!r}; give the path of a JSON file,"
            f" or one of: {nearest(str(path), kind.published)}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; give the path of a readable JSON file"
        ) from error
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"{path}: larger than 1 MB, so not a genotype; give another file")
    try:
        return from_json(content.decode(), operations, kind)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text; write genotypes with `save`") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def nearest(name: str, valid: Sequence[str] | Mapping[str, Any]) -> str:
    """Returns the valid names most like `name`, comma-separated; all of them if none is alike."""
    folded = {candidate.casefold(): candidate for candidate in valid}
    close = difflib.get_close_matches(name[:100].casefold(), folded, n=3, cutoff=0.5)
    return ", ".join(folded[match] for match in close or folded)


def _shown(value: Any) -> str:
    """A value of a file as a part of one line, whatever it is."""
    text = reprlib.repr(value)  # which is short of lists, and long of lists in lists
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _valid_edges(field: str, cell: Any, operations: Sequence[str], kind: Kind) -> tuple[Edge, ...]:
    if not isinstance(cell, list | tuple):
        raise ValueError(
            f"field {field!r} is {_shown(cell)}; it needs a list of [operation, source]"
        )
    if not cell or len(cell) % kind.edges_per_node:
        raise ValueError(
            f"field {field!r} has {len(cell)} edges; it needs {kind.edges_per_node} per node"
        )
    for index, edge in enumerate(cell):
        where = f"field {field!r}, edge {index}"
        if not isinstance(edge, list | tuple) or [type(part) for part in edge] != [str, int]:
            raise ValueError(
                f'{where} is {_shown(edge)}; it needs [operation, source], as ["skip_connect", 0]'
            )
        operation, source = edge
        if operation not in operations:
            raise ValueError(
                f"{where}: unknown operation {_shown(operation)}; use one of:"
                f" {nearest(operation, operations)}"
            )
        last = kind.num_inputs + index // kind.edges_per_node - 1
        if not 0 <= source <= last:
            raise ValueError(
                f"{where}: source {_shown(source)} is out of range; use 0 to {last}, a state"
                " before the node"
            )
    return tuple((operation, source) for operation, source in cell)


def _valid_concat(field: str, concat: Any, nodes: range) -> tuple[int, ...]:
    needs = f"it needs different nodes from {nodes.start} to {nodes.stop - 1}"
    if not isinstance(concat, list | tuple | range) or not concat:
        raise ValueError(f"field {field!r} is {_shown(concat)}; {needs}")
    for state in concat:
        if type(state) is not int or state not in nodes:
            raise ValueError(f"field {field!r} holds {_shown(state)}; {needs}")
    if len(set(concat)) < len(concat):
        raise ValueError(f"field {field!r} holds a node twice; {needs}")
    return tuple(concat)
