"""The fields of `experiments.search_cnn`, and its presets."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro

from experiments.config import AlphaConfig, DataConfig, WConfig
from experiments.remedies import RemediesConfig
from experiments.run_config import RunConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The supernet."""

    channels: int = 16
    """Channels of each node in the first cell."""
    layers: int = 8
    """Cells, at least 3: those at 1/3 and 2/3 of the depth are reduction cells."""
    nodes: int = 4
    """Intermediate nodes of each cell."""
    batch_norm_groups: int = 1
    """Slices of a batch, each normalised by itself; as many as devices: each device's own part."""
    partial: int = 1
    """One of so many channels goes through the operations (PC-DARTS); a divisor of channels."""


@dataclass(frozen=True)
class SearchConfig:
    """The bilevel optimization."""

    estimator: Literal["first_order", "unrolled", "finite_difference"] = "unrolled"
    """Hypergradient: at constant weights; exact through one step of w; or the paper's
    approximation of that, by a finite difference."""
    radius: float = 0.01
    """How far the finite difference moves the weights, as a global norm."""
    train_portion: float = 0.5
    """Share of the training images that trains w; the others train alpha."""
    epochs: int = 50
    """Passes over the images that train w."""
    batch_size: int = 64
    """Images in a batch, for w and for alpha alike."""
    w: WConfig = field(default_factory=WConfig)
    alpha: AlphaConfig = field(default_factory=AlphaConfig)
    remedies: RemediesConfig = field(default_factory=RemediesConfig)


@dataclass(frozen=True)
class Config:
    """All that decides what a search does."""

    data: DataConfig
    network: NetworkConfig = field(default_factory=NetworkConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    seed: int = 0
    """Of everything random: parameters, order of the images, augmentation."""
    seeds: int = 1
    """Searches to run side by side: by this seed and those that follow it."""
    seeds_at_once: int | None = None
    """Of these, so many in one batch of arrays, which bounds memory; None for all, on CPUs for one
    on each device."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/search_cnn-PRESET-seedSEED."""


# Digits are not mirror symmetric, and an 8x8 image loses a stroke to a shift of more than a pixel.
DIGITS = Config(
    data=DataConfig("digits", crop=1, flip=False),
    network=NetworkConfig(channels=4, layers=3),
    search=SearchConfig(epochs=10, batch_size=16, alpha=AlphaConfig(learning_rate=3e-3)),
)
# "paper:" is section 3.1.1 and appendix A.1.1 of arXiv 1806.09055v2, "code:" train_search.py of
# quark0/darts where the paper is silent or differs.
PAPER = Config(
    data=DataConfig(
        "cifar10",
        crop=4,  # code: RandomCrop(32, padding=4), for both halves
        flip=True,  # code: RandomHorizontalFlip, for both halves
        cutout=0,  # code: off in the search unless asked for
    ),
    network=NetworkConfig(
        channels=16,  # paper: initial number of channels
        layers=8,  # paper: a small network of 8 cells
        nodes=4,  # paper: 7 nodes, the two inputs and the output among them
    ),
    search=SearchConfig(
        train_portion=0.5,  # paper: half of the training data each
        estimator="unrolled",  # paper: second order; exact here, `finite_difference` is the paper's
        radius=0.01,  # paper: epsilon = 0.01 / norm
        epochs=50,  # paper
        batch_size=64,  # paper: for both the training and validation sets
        w=WConfig(
            learning_rate=0.025,  # paper
            learning_rate_min=0.001,  # code; the paper anneals to zero
            momentum=0.9,  # paper
            weight_decay=3e-4,  # paper
            clip=5.0,  # code
        ),
        alpha=AlphaConfig(
            learning_rate=3e-4,  # paper
            b1=0.5,  # paper
            b2=0.999,  # paper
            weight_decay=1e-3,  # paper
        ),
    ),
    run=RunConfig(log_every=50),  # code: report_freq
)
PRESETS = {
    "digits": ("8x8 handwritten digits (embedded), minutes on two cores", DIGITS),
    "mnist5k": (
        "5000 images of MNIST (embedded)",
        replace(
            DIGITS,
            data=DataConfig("mnist5k", crop=2, flip=False),
            search=replace(DIGITS.search, epochs=5, batch_size=32),
        ),
    ),
    "cifar10": (
        "CIFAR-10, a small network",
        replace(
            PAPER,
            network=NetworkConfig(channels=8, layers=5),
            search=replace(PAPER.search, epochs=25),
        ),
    ),
    "paper": ("CIFAR-10, the values of the paper", PAPER),
    "smoke": (
        "a few steps on a few digits, to see that all works",
        replace(
            DIGITS,
            data=replace(DIGITS.data, limit=128),
            network=NetworkConfig(channels=2, layers=3, nodes=2),
            search=replace(DIGITS.search, epochs=2),
            run=RunConfig(log_every=1),
        ),
    ),
}
