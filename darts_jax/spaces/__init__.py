"""Search spaces, each one file of this folder, which defines `SPACE`; nothing else registers it.

`get` finds a space by the name of its file. Files that start with an underscore are what spaces
share.
"""

import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from darts_jax.genotype import nearest

PyTree = Any
Edges = tuple[tuple[int, int], ...]


class Space(NamedTuple):
    """A search space.

    Alpha is a pytree of arrays [edges, candidates], one for each kind of cell.

    Attributes:
      primitives: names of the candidates, the columns of alpha.
      edges: of each kind of cell, (source, destination) of the rows of alpha: alpha's structure.
      allowed: bool, alpha's structure and shapes: which candidates which edge has.
      relax: a `relaxation.Relaxation`, whose weights are zero for what is not allowed.
      relaxed: `relaxed(**options)`, the network that takes mixing weights. For images a Flax
        module, with `num_classes` and sizes as options; for text `language_model.relaxed_cell`.
      discrete: `discrete(architecture, **options)`, the network of one architecture, likewise.
      derive: alpha -> the architecture that it stands for.
      encode: architecture -> the mixing weights that make the relaxed cell compute it: 0 or 1,
        alpha's structure.
    """

    primitives: tuple[str, ...]
    edges: PyTree
    allowed: PyTree
    relax: Callable[..., PyTree]
    relaxed: Callable[..., Any]
    discrete: Callable[..., Any]
    derive: Callable[[PyTree], Any]
    encode: Callable[[Any], PyTree]


NAMES = tuple(
    sorted(found.name for found in pkgutil.iter_modules(__path__) if not found.name.startswith("_"))
)


def get(name: str) -> Space:
    """The space of a name, one of `NAMES`.

    Raises:
      ValueError: if there is none, naming the nearest.
    """
    if name not in NAMES:
        raise ValueError(f"unknown space {name!r}; use one of: {nearest(name, NAMES)}")
    return import_module(f"{__name__}.{name}").SPACE
