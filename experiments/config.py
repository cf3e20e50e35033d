"""Configs that experiments share, and the optimizers that they stand for."""

from dataclasses import dataclass

import jax
import optax


@dataclass(frozen=True)
class DataConfig:
    """Images, and what is done to them."""

    name: str
    """Dataset: digits, mnist5k, cifar10, cifar100, fashion_mnist or svhn_cropped."""
    path: str | None = None
    """Folder of TensorFlow Datasets, for the last four; None for its default."""
    limit: int | None = None
    """Use this many training images only, the first ones; None for all."""
    train_portion: float = 0.5
    """Share of the training images that trains w; the others train alpha."""
    crop: int = 4
    """Random crop: pixels by which an image is shifted at most; 0 for none."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    cutout: int = 0
    """Side in pixels of a square that is set to zero; 0 for none."""


@dataclass(frozen=True)
class WConfig:
    """Optimizer of the weights: SGD with momentum, the rate a cosine over the epochs."""

    learning_rate: float = 0.025
    """Learning rate of the first epoch."""
    learning_rate_min: float = 0.001
    """Learning rate after the last epoch."""
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
    """step -> learning rate: a cosine over the epochs, constant within each of them."""

    def learning_rate(step: jax.Array) -> jax.Array:
        cosine = jax.numpy.cos(jax.numpy.pi * (step // steps_per_epoch) / epochs)
        span = config.learning_rate - config.learning_rate_min
        return config.learning_rate_min + span * (1 + cosine) / 2

    return learning_rate


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
