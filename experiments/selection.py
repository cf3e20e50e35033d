"""Choosing among cells by a short training of each, and giving them one budget of parameters."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from darts_jax import data, genotype
from darts_jax.evaluation import count_parameters
from experiments import evaluate_cnn
from experiments.evaluate_cnn import Config, evaluation_network
from experiments.metrics import Display
from experiments.workdir import writing

MAX_CHANNELS = 256  # to which a budget is searched


class Candidate(NamedTuple):
    """Cells, after a short training.

    Attributes:
      name: of the candidate.
      source: published name, or file that holds the cells.
      error: on the held-out images, in [0, 1].
      seconds: that the training took.
    """

    name: str
    source: str
    error: float
    seconds: float


def save_random(count: int, nodes: int, seed: int, folder: Path) -> dict[str, str]:
    """Draws so many pairs of cells, fixed by the seed, into files: name -> path."""
    rng, sources = np.random.default_rng(seed), {}
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = folder / f"random_{i}.json"
            genotype.save(genotype.sample(rng, nodes), path)
            sources[path.stem] = str(path)
    return sources


def train_briefly(
    candidates: Mapping[str, str],
    config: Config,
    dataset: data.Dataset,
    workdir: Path,
    display: Display,
) -> list[Candidate]:
    """The candidates, best first; of equal ones, the first.

    Args:
      candidates: name -> published name, or file that holds the cells.
      config: of the short trainings, with a `train.portion` below 1.
      dataset: what it names.
      workdir: holds a folder for each training, by the candidate's name.
      display: shows the progress.
    """
    found = []
    for name, source in candidates.items():
        display.console.print(f"training {name} briefly", highlight=False)
        own = evaluate_cnn.with_cells(config, source)
        outcome = evaluate_cnn.train(own, dataset, workdir / name, display)
        error = float(outcome.errors.mean())
        found.append(Candidate(name, source, error, outcome.result.seconds))
        jax.clear_caches()  # the programs of a network that is not trained again
    return sorted(found, key=lambda candidate: candidate.error)


def fit_budget(config: Config, dataset: data.Dataset, parameters: int) -> Config:
    """The config with as many channels as bring the network nearest to a number of parameters."""

    def resized(channels: int) -> Config:
        return replace(config, network=replace(config.network, channels=channels))

    def count(channels: int) -> int:
        return parameter_count(resized(channels), dataset)

    return resized(nearest_size(count, parameters, range(2, MAX_CHANNELS)))


def nearest_size(count: Callable[[int], int], parameters: int, sizes: range) -> int:
    """The size whose count of parameters, which grows with it, is nearest; of two, the smaller."""
    after = bisect_right(sizes, parameters, key=count)
    around = sizes[max(after - 1, 0) : after + 1]
    return min(around, key=lambda size: abs(count(size) - parameters))


def parameter_count(config: Config, dataset: data.Dataset) -> int:
    """Parameters of the network of a config, without its auxiliary head."""
    network = evaluation_network(config, dataset.num_classes).clone(auxiliary=False)
    images = jnp.zeros((1, *dataset.image_shape))
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), images, train=True))
    return count_parameters(shapes["params"])
