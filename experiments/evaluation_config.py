"""What a training of found cells is told, and its presets."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from darts_jax.genotype import Genotype
from experiments.config import DataConfig, WConfig
from experiments.run_config import RunConfig


@dataclass(frozen=True)
class NetworkConfig:
    """The network of the cells."""

    channels: int = 36
    """Channels of each node in the first cell."""
    layers: int = 20
    """Cells, at least 3: those at 1/3 and 2/3 of the depth are reduction cells."""
    auxiliary: bool = True
    """Train a second classifier, at 2/3 of the depth; needs images of 32x32, or 224x224 with the
    stem of ImageNet."""
    stem: Literal["cifar", "imagenet"] = "cifar"
    """First layers: a convolution, or three that make images 8 times smaller."""
    batch_norm_groups: int = 1
    """Slices of a batch, each normalised by itself; as many as devices: each device's own part."""


@dataclass(frozen=True)
class TrainConfig:
    """Training from scratch."""

    epochs: int = 600
    """Passes over the training images."""
    batch_size: int = 96
    """Images in a batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the weights."""
    portion: float = 1.0
    """Share of the training images to train on. Below 1, the others take the place of the test
    images, to choose a network by."""
    drop_path: float = 0.2
    """Probability that the output of an edge is dropped; rises to this from 0, epoch by epoch."""
    auxiliary_weight: float = 0.4
    """Weight of the loss of the second classifier."""
    label_smoothing: float = 0.0
    """Share of a label's weight that is spread over all classes."""
    precision: Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(aliases=["--precision"])] = (
        "float32"
    )
    """Of the arithmetic of convolutions; parameters, statistics and losses are float32."""
    remat: bool = False
    """Compute the inside of each cell twice, to save memory."""
    w: WConfig = field(default_factory=lambda: WConfig(learning_rate_min=0.0))


@dataclass(frozen=True)
class StreamConfig:
    """How images are read that do not fit into memory: those of ImageNet."""

    size: int = 224
    """Side in pixels to which images are cropped."""
    colours: float = 0.4
    """Change brightness, contrast and saturation by factors of 1 +- this at most."""
    hue: float = 0.2
    """Turn the hue by this at most, 1 being once around the circle."""
    workers: int = 4
    """Processes that read and crop images; 0 for none but the one that trains."""


@dataclass(frozen=True)
class Config:
    """All that decides what is trained."""

    data: DataConfig
    genotype: str | None = None
    """Cells: a JSON file or a published name; None for those of the newest search in runs/."""
    network: NetworkConfig = field(default_factory=NetworkConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    seeds: int = 1
    """Networks to train side by side: by this seed and those that follow it."""
    seeds_at_once: int | None = None
    """Of these networks, how many to compute at a time, to save memory; None for all."""
    seed: int = 0
    """Of everything random: parameters, order of the images, augmentation, drop path."""
    run: tyro.conf.OmitArgPrefixes[RunConfig] = field(default_factory=RunConfig)
    workdir: Path | None = None
    """Folder to write to, and to resume from; None for runs/evaluate_cnn-PRESET-seedSEED."""
    cells: Annotated[Genotype | None, tyro.conf.Suppress] = None
    """What `genotype` stands for."""


# Digits are not mirror symmetric, and an 8x8 image loses a stroke to a shift of more than a pixel.
DIGITS = Config(
    data=DataConfig("digits", crop=1, flip=False),
    network=NetworkConfig(channels=8, layers=5, auxiliary=False),
    train=TrainConfig(epochs=20, batch_size=32, drop_path=0.0, w=WConfig(learning_rate_min=0.0)),
)
# "paper:" is section 3.2.1 and appendix A.2.1 of arXiv 1806.09055v2, "code:" train.py of
# quark0/darts where the paper is silent or differs.
PAPER = Config(
    data=DataConfig(
        "cifar10",
        crop=4,  # code: RandomCrop(32, padding=4)
        flip=True,  # code: RandomHorizontalFlip
        cutout=16,  # paper: cutout; code: of 16 pixels
    ),
    network=NetworkConfig(
        channels=36,  # paper
        layers=20,  # paper
        auxiliary=True,  # paper
    ),
    train=TrainConfig(
        epochs=600,  # paper
        batch_size=96,  # paper
        drop_path=0.2,  # paper
        auxiliary_weight=0.4,  # paper
        label_smoothing=0.0,  # code
        w=WConfig(
            learning_rate=0.025,  # paper
            schedule="cosine",  # paper
            learning_rate_min=0.0,  # paper
            momentum=0.9,  # paper
            weight_decay=3e-4,  # paper
            clip=5.0,  # code
        ),
    ),
    run=RunConfig(log_every=50),  # code: report_freq
)
# Likewise, section 3.2.3 and appendix A.2.3, and train_imagenet.py.
IMAGENET = Config(
    data=DataConfig(
        "imagenet2012",
        crop=0,  # code: RandomResizedCrop instead
        flip=True,  # code: RandomHorizontalFlip
    ),
    network=NetworkConfig(
        channels=48,  # paper: 48
        layers=14,  # paper
        auxiliary=True,  # code
        stem="imagenet",  # code: three convolutions of stride 2
    ),
    train=TrainConfig(
        epochs=250,  # paper
        batch_size=128,  # paper
        drop_path=0.0,  # code
        auxiliary_weight=0.4,  # code
        label_smoothing=0.1,  # code
        w=WConfig(
            learning_rate=0.1,  # paper
            schedule="step",
            decay=0.97,  # paper: after every epoch
            decay_epochs=1,  # paper
            momentum=0.9,  # code
            weight_decay=3e-5,  # paper
            clip=5.0,  # code
        ),
    ),
    stream=StreamConfig(
        size=224,  # paper
        colours=0.4,  # code: ColorJitter
        hue=0.2,  # code
    ),
    run=RunConfig(log_every=100),  # code: report_freq
)
PRESETS = {
    "digits": ("8x8 handwritten digits (embedded), minutes on two cores", DIGITS),
    "mnist5k": (
        "28x28 handwritten digits (embedded), tens of minutes on two cores",
        replace(
            DIGITS,
            data=DataConfig("mnist5k", crop=2, flip=False),
            train=replace(DIGITS.train, epochs=10, batch_size=64),
        ),
    ),
    "cifar10": (
        "CIFAR-10 by TensorFlow Datasets, smaller and shorter than the paper's",
        replace(
            PAPER,
            network=NetworkConfig(channels=16, layers=8),
            train=replace(PAPER.train, epochs=100, drop_path=0.1),
        ),
    ),
    "paper": ("CIFAR-10, the values of the paper", PAPER),
    "cifar100": (
        "CIFAR-100, else as paper",
        replace(PAPER, data=replace(PAPER.data, name="cifar100")),
    ),
    "imagenet": ("ImageNet by TensorFlow Datasets, the values of the paper", IMAGENET),
    "smoke": (
        "a few steps on a few digits, to see that all works",
        replace(
            DIGITS,
            data=replace(DIGITS.data, limit=64),
            network=NetworkConfig(channels=2, layers=3, auxiliary=False),
            train=replace(DIGITS.train, epochs=2, drop_path=0.1),
            run=RunConfig(log_every=1),
        ),
    ),
}
