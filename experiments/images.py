"""Batches of images that are taken from the device, and augmented there."""

from collections.abc import Callable

import jax

from darts_jax.augment import augment, normalize
from darts_jax.data import Dataset, Split
from darts_jax.search import Batch
from experiments.config import DataConfig


def make_augment(
    config: DataConfig, dataset: Dataset
) -> Callable[[jax.Array, Split, jax.Array], Batch]:
    """`augmented(key, split, indices) -> Batch`: the images at these indices, drawn anew."""

    def augmented(key: jax.Array, split: Split, indices: jax.Array) -> Batch:
        images = augment(
            key,
            split.images[indices],
            dataset.mean,
            dataset.std,
            padding=config.crop,
            mirror=config.flip,
            cutout_size=config.cutout,
        )
        return Batch(images, split.labels[indices])

    return augmented


def plain_batch(dataset: Dataset, split: Split, indices: jax.Array) -> Batch:
    """The images at these indices as they are, normalised."""
    images = normalize(split.images[indices], dataset.mean, dataset.std)
    return Batch(images, split.labels[indices])
