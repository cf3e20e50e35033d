"""Progressive shrinking of the search space: P-DARTS, Chen et al., arXiv 1904.12760.

The search is a few searches, each from new weights and alphas: after one, every edge keeps the
operations of its largest alphas alone (`survivors`), to which `relaxation.masked` confines the
next; the authors' keep 5 and then 3 of 8. Each of them may use another network, such as a deeper
one. Dropout after skip connections, and the final restriction of their number, are left out.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

Mask = dict[str, np.ndarray]  # cell -> boolean [edges, operations]


def survivors(
    alpha: Mapping[str, ArrayLike], keep: int, mask: Mapping[str, ArrayLike] | None = None
) -> Mask:
    """Where the largest alphas of every edge are; ties go to the lower operation.

    Args:
      alpha: cell -> [..., edges, operations].
      keep: how many operations an edge keeps.
      mask: those that it had in the search of these alphas; all by default.

    Raises:
      ValueError: if an edge has not as many.
    """
    found = {}
    for cell, values in alpha.items():
        values = np.asarray(values, float)
        had = np.ones(values.shape, bool) if mask is None else np.asarray(mask[cell], bool)
        if not 1 <= keep <= had.sum(-1).min():
            raise ValueError(
                f"keep is {keep}; an edge of {cell!r} has {had.sum(-1).min()} operations, so give 1"
                f" to {had.sum(-1).min()}"
            )
        order = np.argsort(np.where(had, -values, np.inf), axis=-1, kind="stable")
        kept = np.zeros(values.shape, bool)
        np.put_along_axis(kept, order[..., :keep], True, axis=-1)
        found[cell] = kept
    return found
