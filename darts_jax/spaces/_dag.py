"""Spaces of cells like those of NAS-Bench-201, and the strings of their architectures.

    |nor_conv_3x3~0|+|none~0|skip_connect~1|+|none~0|none~1|avg_pool_3x3~2|

A part for each state after the input, in which every edge is OPERATION~SOURCE.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from darts_jax import relaxation
from darts_jax.dag_network import Network
from darts_jax.genotype import nearest
from darts_jax.spaces import Edges, Space


def space(edges: Edges, primitives: tuple[str, ...], **options: Any) -> Space:
    """A space of one cell, all of whose edges have the same candidates.

    Args:
      edges: (source, destination) each, by destination, then by source.
      primitives: names of the candidates.
      options: of `Network`, for the relaxed and the discrete network; they can be overridden.
    """
    network = partial(Network, edges=edges, primitives=primitives, **options)

    def discrete(text: str, affine: bool = True, **others) -> Network:
        return network(choice=from_string(text, edges, primitives), affine=affine, **others)

    return Space(
        primitives,
        edges,
        np.ones((len(edges), len(primitives)), bool),
        relaxation.softmax,
        network,
        discrete,
        partial(_derive, edges, primitives),
        partial(_encode, edges, primitives),
    )


def to_string(choice: Sequence[int], edges: Edges, primitives: Sequence[str]) -> str:
    """The string of an architecture: of each edge, its operation's number."""
    parts = []
    for state in range(1, max(destination for _, destination in edges) + 1):
        held = (e for e, (_, destination) in enumerate(edges) if destination == state)
        parts.append("|".join(f"{primitives[choice[e]]}~{edges[e][0]}" for e in held))
    return "+".join(f"|{part}|" for part in parts)


def from_string(text: str, edges: Edges, primitives: Sequence[str]) -> tuple[int, ...]:
    """The operations' numbers that a string stands for.

    Raises:
      ValueError: if it is not an architecture of the space, saying what is wrong.
    """
    found = {}
    for state, part in enumerate(str(text).strip().split("+"), 1):
        for edge in part.strip("|").split("|"):
            name, tilde, source = edge.partition("~")
            if name not in primitives:
                raise ValueError(
                    f"{_short(text)}: unknown operation {name[:40]!r}; use one of:"
                    f" {nearest(name, primitives)}"
                )
            place = (int(source) if source.isdecimal() and len(source) < 3 else -1, state)
            if not tilde or place not in edges or place in found:
                raise ValueError(f"{_short(text)}: {edge[:40]!r} in part {state} is {_WRONG}")
            found[place] = primitives.index(name)
    missing = [edge for edge in edges if edge not in found]
    if missing:
        source, state = missing[0]
        raise ValueError(f"{_short(text)}: part {state} lacks the edge OPERATION~{source}")
    return tuple(found[edge] for edge in edges)


_WRONG = "no edge of the cell, or there twice; write each edge once, as OPERATION~SOURCE"


def _short(text: str) -> str:
    return repr(str(text)[:200])


def _derive(edges: Edges, primitives: Sequence[str], alpha: ArrayLike) -> str:
    """The strongest candidate of every edge, `none` included; ties go to the first."""
    alpha = np.asarray(alpha, np.float64)
    if alpha.shape != (len(edges), len(primitives)) or not np.isfinite(alpha).all():
        raise ValueError(
            f"alpha of shape {list(alpha.shape)}; it needs finite numbers of shape"
            f" [{len(edges)} edges, {len(primitives)} candidates]"
        )
    return to_string(alpha.argmax(1), edges, primitives)


def _encode(edges: Edges, primitives: Sequence[str], text: str) -> np.ndarray:
    choice = from_string(text, edges, primitives)
    return np.eye(len(primitives), dtype=np.float32)[list(choice)]
