"""Differentiable architecture search (DARTS) in JAX, with exact hypergradients.

Modules and main names are imported when they are first used: `import darts_jax` costs nothing, to
read a genotype needs no JAX, and to search needs no Matplotlib, Orbax or TensorFlow Datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from darts_jax.evaluation import EvaluationNetwork as EvaluationNetwork
    from darts_jax.genotype import Genotype as Genotype
    from darts_jax.genotype import RecurrentGenotype as RecurrentGenotype
    from darts_jax.hypergradient import Bilevel as Bilevel
    from darts_jax.hypergradient import Estimate as Estimate
    from darts_jax.networks import Supernet as Supernet
    from darts_jax.operations import OPERATIONS as OPERATIONS
    from darts_jax.operations import Operation as Operation
    from darts_jax.prediction import load as load
    from darts_jax.search import Batch as Batch
    from darts_jax.search import SearchState as SearchState

__version__ = "0.1.0"

_MODULES = (
    "augment",
    "averaging",
    "cells",
    "checkpoint",
    "choices",
    "convolution",
    "dag_cell",
    "dag_network",
    "data",
    "discrete",
    "evaluation",
    "finite",
    "genotype",
    "ground_truth",
    "grouped",
    "hypergradient",
    "isomorphism",
    "language_model",
    "nasbench201_table",
    "networks",
    "operations",
    "perturbation",
    "plots",
    "prediction",
    "recurrent",
    "relaxation",
    "search",
    "shrinking",
    "smoothing",
    "spaces",
    "spectrum",
    "stream",
    "text",
    "training",
)
# The main names, and where they are.
_NAMES = {
    "OPERATIONS": "operations",
    "Batch": "search",
    "Bilevel": "hypergradient",
    "Estimate": "hypergradient",
    "EvaluationNetwork": "evaluation",
    "Genotype": "genotype",
    "Operation": "operations",
    "RecurrentGenotype": "genotype",
    "SearchState": "search",
    "Supernet": "networks",
    "load": "prediction",
}

__all__ = [*_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
