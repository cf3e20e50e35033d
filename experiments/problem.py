"""A bilevel problem as the comparison of hypergradients takes it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import optax

from darts_jax import genotype, search
from darts_jax.hypergradient import Bilevel

PyTree = Any


class Cells(NamedTuple):
    """What the alphas of cells stand for.

    Attributes:
      kind: of their genotypes.
      primitives: the operations of alpha's columns.
      derive: alphas -> genotype.
    """

    kind: genotype.Kind
    primitives: Sequence[str]
    derive: Callable[[PyTree], Any]


class Problem(NamedTuple):
    """A bilevel problem, and what a search of it needs.

    Attributes:
      bilevel: the two losses.
      w_optimizer: trains w, and is the inner optimizer.
      alpha_optimizer: trains alpha.
      weight_decay: that of `w_optimizer`.
      num_steps: iterations of a search.
      init: seed -> the state before the first of them.
      prepare: (seed, state, finished steps) -> (the state as the next step takes it, the inputs of
        the training loss, those of the validation loss).
      evaluate: state -> validation loss over all that is there to validate on.
      alpha_names: one for each number in alpha, in the order of its leaves.
      next_carry: (aux of the training loss, that of the validation loss) -> the state's carry.
      cells: of what cells alpha is, if of any: a genotype can then be derived.
    """

    bilevel: Bilevel
    w_optimizer: optax.GradientTransformation
    alpha_optimizer: optax.GradientTransformation
    weight_decay: float
    num_steps: int
    init: Callable[[int], search.SearchState]
    prepare: Callable[[int, search.SearchState, int], tuple[search.SearchState, PyTree, PyTree]]
    evaluate: Callable[[search.SearchState], float]
    alpha_names: tuple[str, ...]
    next_carry: Callable[[PyTree, PyTree], PyTree] = lambda train, val: None
    cells: Cells | None = None
