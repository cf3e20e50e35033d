"""The accuracy of every architecture of a small search space, measured, as a table.

`python -m experiments.enumerate_space` makes one; the package holds `nasbench201_small`, whose card
is docs/ground_truth.md.
"""

import os
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from darts_jax.files import write_arrays

FOLDER = Path(__file__).parent / "tables"
SHIPPED = FOLDER / "nasbench201_small.npz"
PARTS = ("validation", "test")
MAX_BYTES = 10_000_000


class Table(NamedTuple):
    """Accuracies of the architectures of a space.

    Its names are no arrays: a jitted function takes it by closing over it.

    Attributes:
      primitives: names of the operations.
      edges: (source, destination) each.
      architectures: int8 [classes, edges], the operations of one architecture of each class.
      class_of: int16 [operations ** edges], the class of every architecture, by `index`;
        -1 for those that were not trained.
      right: uint16 [classes, seeds, epochs, 2], right predictions on validation and test images.
      sizes: int32 [2], how many of them there are.
      config: how it was made, JSON.
    """

    primitives: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    architectures: np.ndarray
    class_of: np.ndarray
    right: np.ndarray
    sizes: np.ndarray
    config: str

    @property
    def accuracy(self) -> np.ndarray:
        """float32 [classes, seeds, epochs, 2], of validation and test, in [0, 1]."""
        return (self.right / self.sizes).astype(np.float32)


def save(table: Table, path: str | os.PathLike[str]) -> None:
    """Writes a table, whole or not at all.

    Raises:
      OSError: if it cannot be written.
    """
    write_arrays(path, table._asdict())


def load(path: str | os.PathLike[str] = SHIPPED) -> Table:
    """Reads a table; without a path, the package's own.

    Raises:
      ValueError: if there is none or it is no table; one line that names the path.
    """
    try:
        if Path(path).stat().st_size > MAX_BYTES:
            raise ValueError(f"larger than {MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in Table._fields}
        return _checked(arrays)
    except FileNotFoundError:
        raise ValueError(
            f"no table {path}; make one by python -m experiments.enumerate_space"
        ) from None
    except Exception as error:  # a damaged archive raises errors of many types
        raise ValueError(f"{path} is no table ({error}); give another file") from error


def _checked(arrays: dict[str, np.ndarray]) -> Table:
    table = Table(
        tuple(str(name) for name in arrays["primitives"]),
        tuple((int(source), int(destination)) for source, destination in arrays["edges"]),
        *(arrays[name] for name in ("architectures", "class_of", "right", "sizes")),
        str(arrays["config"]),
    )
    count, num_edges = table.architectures.shape
    needed = {
        "edges": num_edges == len(table.edges),
        "class_of": table.class_of.shape == (len(table.primitives) ** num_edges,)
        and -1 <= table.class_of.min() <= table.class_of.max() < count,
        "right": table.right.shape[::3] == (count, len(PARTS)) and table.right.ndim == 4,
        "sizes": table.sizes.shape == (len(PARTS),),
    }
    for name, fits in needed.items():
        if not fits:
            raise ValueError(f"its array {name!r} has the wrong shape or values")
    return table


def index(choice: Array, num_candidates: int) -> Array:
    """The number of an architecture: its operations, integers [..., edges], as digits."""
    choice = jnp.asarray(choice, jnp.int32)
    powers = num_candidates ** np.arange(choice.shape[-1] - 1, -1, -1, dtype=np.int32)
    return (choice * powers).sum(-1)


def accuracy(table: Table, architecture: Array, part: str = "test") -> Array:
    """Accuracy of architectures after the last epoch, the mean over seeds, in [0, 1].

    Args:
      table: the table.
      architecture: numbers as from `index`, [...]; may be traced.
      part: "validation" or "test".

    Returns:
      float32 [...]; NaN where none was trained.
    """
    final = np.append(_final(table, part), np.nan)  # at -1
    return jnp.asarray(final)[jnp.asarray(table.class_of)[architecture]]


def regret(table: Table, architecture: Array, part: str = "test") -> Array:
    """How much more accurate the best architecture of the space is: float32 [...], at least 0.

    Args: as `accuracy`.
    """
    return _final(table, part).max() - accuracy(table, architecture, part)


def _final(table: Table, part: str) -> np.ndarray:
    return table.accuracy[:, :, -1, PARTS.index(part)].mean(1)


class Agreement(NamedTuple):
    """How much of what a table holds is the architectures', and how much is chance.

    Attributes:
      between: variance of accuracy between architectures, that of seeds taken out; at least 0.
      within: variance between seeds of one architecture.
      rank_correlation: Spearman's, the mean over pairs of seeds; NaN if one of them makes no
        difference between architectures.
    """

    between: float
    within: float
    rank_correlation: float


def agreement(accuracy: np.ndarray) -> Agreement:
    """Compares architectures with seeds.

    Args:
      accuracy: [architectures, seeds], at least 2 of each.
    """
    from scipy.stats import rankdata

    seeds = accuracy.shape[1]
    within = accuracy.var(1, ddof=1).mean()
    between = max(accuracy.mean(1).var(ddof=1) - within / seeds, 0.0)
    with np.errstate(invalid="ignore"):
        ranks = np.corrcoef([rankdata(column) for column in accuracy.T])
    pairs = ranks[np.triu_indices(seeds, 1)]
    return Agreement(float(between), float(within), float(pairs.mean()))
