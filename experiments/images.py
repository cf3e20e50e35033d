"""Images as a training takes them: from the device, or as a stream of batches."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from darts_jax import data, stream
from darts_jax.augment import augment, normalize
from darts_jax.data import Dataset, Split
from darts_jax.search import Batch
from darts_jax.stream import Stream
from experiments import devices
from experiments.command_line import check_at_least
from experiments.config import DataConfig, check_data
from experiments.evaluation_config import Config

PyTree = Any
ImageData = Dataset | Stream


def make_augment(
    config: DataConfig, dataset: ImageData
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


class Images(NamedTuple):
    """What lives on the device: images to train on, and to test by."""

    train: Split
    test: Split


class Feed(NamedTuple):
    """Where a training has its batches from.

    Attributes:
      data: what lives on the device.
      steps_per_epoch: batches in an epoch.
      train_batches: epoch, from 0 -> its items; the first axis of each is that of the seeds.
      eval_batches: the items that all there is to test on is in.
      train_batch: (key, data, item of one seed) -> `Batch`, augmented; for jit.
      eval_batch: (data, item) -> (`Batch`, mask); for jit.
      facts: what identifies the images.
      place: (item, axes of the mesh over which it is spread) -> the item on the devices.
    """

    data: PyTree
    steps_per_epoch: int
    train_batches: Callable[[int], Sequence[Any]]
    eval_batches: Sequence[Any]
    train_batch: Callable[[jax.Array, PyTree, Any], Batch]
    eval_batch: Callable[[PyTree, Any], tuple[Batch, jax.Array]]
    facts: Mapping[str, str]
    place: Callable[[Any, PartitionSpec], Any]


def check(config: Config) -> None:
    """Raises a ValueError for what can be seen to be wrong before anything is loaded."""
    check_data(config.data)
    mesh = devices.mesh(config.seeds, config.seeds_at_once)
    devices.check_batch(mesh, "train.batch-size", config.train.batch_size)
    if config.data.name not in stream.NAMES:
        data.check(config.data.name)
        return
    own = config.stream
    stream.check(config.data.name)
    check_at_least(
        ("stream.size", own.size, 1),
        ("stream.colours", own.colours, 0),
        ("stream.hue", own.hue, 0),
        ("stream.workers", own.workers, 0),
    )
    if config.seeds > 1 or config.train.portion < 1:
        raise ValueError(
            f"{config.data.name} is read as a stream, of one order and as a whole; leave --seeds"
            " and --train.portion at 1"
        )


def load(config: Config) -> ImageData:
    """Loads the dataset of a config, or opens it as a stream."""
    own = config.data
    if own.name in stream.NAMES:
        return stream.load(own.name, own.path, own.limit, config.stream.size)
    return data.load(own.name, own.path, own.limit)


def make_feed(mesh: Mesh, config: Config, dataset: ImageData) -> Feed:
    """The batches of a training.

    Raises:
      ValueError: if the images are too few for a batch.
    """
    if isinstance(dataset, Stream):
        return _stream_feed(mesh, config, dataset)
    return _device_feed(mesh, config, dataset)


def _device_feed(mesh: Mesh, config: Config, dataset: Dataset) -> Feed:
    train, test = dataset.train, dataset.test
    if config.train.portion < 1:
        train, test = data.split_search(dataset.train, config.train.portion)
    batch_size, train_size, test_size = config.train.batch_size, len(train.labels), len(test.labels)
    test_batch = min(batch_size, test_size)
    test_batch += -test_batch % mesh.shape[devices.DATA]
    augmented = make_augment(config.data, dataset)
    seeds = range(config.seed, config.seed + config.seeds)

    def train_batches(epoch: int) -> list[np.ndarray]:
        orders = [data.epoch_indices(seed, epoch, train_size, batch_size) for seed in seeds]
        return list(np.stack(orders, axis=1))

    def eval_batch(images: Images, item: tuple[jax.Array, jax.Array]):
        indices, mask = item
        return plain_batch(dataset, images.test, indices), mask

    return Feed(
        devices.keep(mesh, Images(train, test)),
        len(train_batches(0)),
        train_batches,
        list(data.padded_indices(test_size, test_batch)),
        lambda key, images, indices: augmented(key, images.train, indices),
        eval_batch,
        {"train images": data.fingerprint(train), "test images": data.fingerprint(test)},
        partial(devices.spread, mesh),
    )


def _stream_feed(mesh: Mesh, config: Config, dataset: Stream) -> Feed:
    """Batches from worker processes, which read what is for devices of this process."""
    own, batch_size = config.stream, config.train.batch_size
    jitter = stream.Jitter(own.colours, own.colours, own.colours, own.hue)
    share = devices.share(mesh, batch_size)

    def train_batches(epoch: int) -> stream.Batches:
        return stream.train_batches(
            dataset,
            config.seed,
            epoch,
            batch_size,
            flip=config.data.flip,
            jitter=jitter,
            workers=own.workers,
            share=share,
        )

    def train_batch(key: jax.Array, _: None, split: Split) -> Batch:
        images = augment(
            key,
            split.images,
            dataset.mean,
            dataset.std,
            padding=config.data.crop,
            mirror=False,  # the workers do it
            cutout_size=config.data.cutout,
        )
        return Batch(images, split.labels)

    def eval_batch(_: None, item: tuple[Split, jax.Array]) -> tuple[Batch, jax.Array]:
        split, mask = item
        return Batch(normalize(split.images, dataset.mean, dataset.std), split.labels), mask

    def place(item: PyTree, spec: PartitionSpec) -> PyTree:
        if devices.SEED in spec:  # the seeds are one
            item = jax.tree.map(lambda x: x[None], item)
        return devices.spread_share(mesh, item, spec)

    return Feed(
        None,
        len(train_batches(0)),
        train_batches,
        stream.test_batches(dataset, batch_size, workers=own.workers, share=share),
        train_batch,
        eval_batch,
        {
            "train images": f"{dataset.train_size} of {dataset.fingerprint}",
            "test images": f"{dataset.test_size} of {dataset.fingerprint}",
        },
        place,
    )
