"""Configs that experiments share, and the optimizers that they stand for."""

from dataclasses import dataclass
from typing import Literal

import optax

from experiments.command_line import check_at_least, check_below_one, check_positive


@dataclass(frozen=True)
class DataConfig:
    """Images, and what is done to them."""

    name: str
    """Dataset: digits, mnist5k, cifar10, cifar100, fashion_mnist, svhn_cropped; or imagenet2012,
    which evaluate_cnn alone can read."""
    path: str | None = None
    """Folder of TensorFlow Datasets, for the last five; None for its default."""
    limit: int | None = None
    """Use this many training and test images only, the first ones; None for all."""
    crop: int = 4
    """Random crop: pixels by which an image is shifted at most; 0 for none."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    cutout: int = 0
    """Side in pixels of a square that is set to zero; 0 for none."""


@dataclass(frozen=True)
class WConfig:
    """Optimizer of the weights: SGD with momentum, its rate constant within an epoch."""

    learning_rate: float = 0.025
    """Learning rate of the first epoch."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How it falls: to learning_rate_min as half of a cosine, or by steps of one factor."""
    learning_rate_min: float = 0.001
    """cosine: learning rate after the last epoch."""
    decay: float = 0.97
    """step: the factor."""
    decay_epochs: int = 1
    """step: epochs from one to the next."""
    momentum: float = 0.9
    """Momentum."""
    weight_decay: float = 3e-4
    """L2 penalty, added to the gradient once that is clipped."""
    clip: float = 5.0
    """Largest global norm of the gradient."""


@dataclass(frozen=True)
class AlphaConfig:
    """Optimizer of alpha: Adam."""

    learning_rate: float = 3e-4
    """Learning rate."""
    b1: float = 0.5
    """Decay of the mean of gradients."""
    b2: float = 0.999
    """Decay of the mean of squared gradients."""
    weight_decay: float = 1e-3
    """L2 penalty, added to the gradient."""


def w_schedule(config: WConfig, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """step -> learning rate."""
    rate = config.learning_rate
    if config.schedule == "step":
        of_epoch = optax.exponential_decay(rate, config.decay_epochs, config.decay, staircase=True)
    else:
        ratio = config.learning_rate_min / rate if rate else 0.0
        of_epoch = optax.cosine_decay_schedule(rate, epochs, alpha=ratio)
    return lambda step: of_epoch(step // steps_per_epoch)


def w_optimizer(
    config: WConfig, learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """SGD that clips the gradient of the loss, then adds weight decay, then momentum.

    On one flat vector: XLA takes minutes to compile a global norm over hundreds of arrays.
    """
    return optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(learning_rate, config.momentum),
        )
    )


def alpha_optimizer(config: AlphaConfig) -> optax.GradientTransformation:
    """Adam with an L2 penalty: weight decay goes into the moments, unlike AdamW."""
    return optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.adam(config.learning_rate, config.b1, config.b2),
    )


def check_groups(groups: int, batch_size: int) -> None:
    """Raises a ValueError if a batch cannot be cut into so many slices for batch norm."""
    check_at_least(("network.batch-norm-groups", groups, 1))
    if batch_size % groups:
        raise ValueError(
            f"--network.batch-norm-groups is {groups}; give a divisor of the batch, {batch_size}"
        )


def check_data(config: DataConfig) -> None:
    """Raises a ValueError for a field out of range."""
    check_at_least(("data.crop", config.crop, 0), ("data.cutout", config.cutout, 0))


def check_w(config: WConfig, prefix: str) -> None:
    """Raises a ValueError for a field out of range; prefix is that of its flags, as "search.w"."""
    check_at_least(
        (f"{prefix}.learning-rate", config.learning_rate, 0),
        (f"{prefix}.learning-rate-min", config.learning_rate_min, 0),
        (f"{prefix}.momentum", config.momentum, 0),
        (f"{prefix}.weight-decay", config.weight_decay, 0),
        (f"{prefix}.decay-epochs", config.decay_epochs, 1),
    )
    check_positive((f"{prefix}.decay", config.decay))
    if not config.clip > 0:
        raise ValueError(f"--{prefix}.clip is {config.clip}; give more than 0")
    check_below_one((f"{prefix}.momentum", config.momentum))
