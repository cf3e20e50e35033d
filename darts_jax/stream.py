"""ImageNet: images that fit no memory, cropped and changed by worker processes.

They are read by TensorFlow Datasets, without TensorFlow, and brought to the host by Grain. What a
batch holds depends on seed, epoch and its place in the epoch alone: not on the number of workers,
nor on what was read before.
"""

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageEnhance

from darts_jax import data
from darts_jax.data import Split


class Contents(NamedTuple):
    """What a dataset is known to hold: images to train and to test, classes."""

    train: int
    test: int
    num_classes: int


CONTENTS: Mapping[str, Contents] = MappingProxyType(
    {"imagenet2012": Contents(1_281_167, 50_000, 1000)}
)
NAMES = tuple(CONTENTS)
TRAIN, TEST = "train", "validation"  # splits of the prepared files
# Of the training images scaled to [0, 1], as quark0/darts gives them.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Of the random crop: share of the area, and width over height.
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
TRIES = 10
CENTRE = 224 / 256  # share of the shorter side that is tested on
PREFETCH = 2  # batches that a worker keeps ready
WHOLE = slice(None)  # of a batch


class Stream(NamedTuple):
    """A dataset that is read as it is needed.

    Attributes:
      name: as given to `load`.
      train: samples by their number: mappings of "image", uint8 [height, width, 3], each of its own
        size, and "label".
      test: so too.
      train_size: how many of them are used, the first ones.
      test_size: so too.
      num_classes: number of different labels.
      size: side in pixels to which images are cropped.
      mean: per channel, of the training images scaled to [0, 1].
      std: likewise, the standard deviation.
      fingerprint: tells the prepared files apart from others, by what their index says of them.
    """

    name: str
    train: Sequence[Any]
    test: Sequence[Any]
    train_size: int
    test_size: int
    num_classes: int
    size: int
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    fingerprint: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the cropped images."""
        return self.size, self.size, len(self.mean)


class Jitter(NamedTuple):
    """How far colours are changed at most: factors of 1 +- each, and hue in turns."""

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.2


JITTER = Jitter()  # quark0/darts's


class Batches(Sequence):
    """Batches that are made when they are taken, and ahead of that while iterating.

    Args:
      batches: a `grain.MapDataset` of them.
      workers: processes that make them; 0 for this one.
    """

    def __init__(self, batches: Any, workers: int):
        self._batches, self._workers = batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int | slice) -> Any:
        found = self._batches[index]
        return Batches(found, self._workers) if isinstance(index, slice) else found

    def __iter__(self) -> Iterator[Any]:
        if not self._workers:
            return iter(self._batches)
        import grain
        from absl import flags

        # Grain's workers read flags of the command line, which is not absl's here.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        options = grain.multiprocessing.MultiprocessingOptions(
            num_workers=self._workers, per_worker_buffer_size=PREFETCH
        )
        return iter(self._batches.to_iter_dataset().mp_prefetch(options))


def check(name: str) -> None:
    """Raises a ValueError if what reads the dataset is not installed."""
    if importlib.util.find_spec("grain") is None:
        raise ValueError(f"dataset {name!r} needs grain; pip install -e '.[imagenet]'")


def load(name: str, path: str | None, limit: int | None, size: int) -> Stream:
    """Opens a dataset by its name, one of `NAMES`.

    The images in its files are counted, not read.

    Args:
      name: of the dataset.
      path: the folder of TensorFlow Datasets (its data_dir); None for its default.
      limit: how many of the training and of the test images to use, the first ones; None for all.
      size: side in pixels to crop images to.

    Raises:
      ValueError: if the dataset is not prepared, naming the command that does it, or not what it
        should be.
    """
    check(name)
    builder = data.open_prepared(name, path)
    _verify(name, builder)
    with data.quiet_absl():
        train, test = (builder.as_data_source(split=split) for split in (TRAIN, TEST))
    sizes = (len(source) if limit is None else min(limit, len(source)) for source in (train, test))
    classes = CONTENTS[name].num_classes
    return Stream(name, train, test, *sizes, classes, size, fingerprint=_fingerprint(builder))


def _verify(name: str, builder: Any) -> None:
    """Raises a ValueError if prepared files hold other numbers than a dataset is known to."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    known, where = CONTENTS[name], f"dataset {name!r} in {builder.data_dir}"
    again = "move it away and prepare it again"
    classes = builder.info.features["label"].num_classes
    if classes != known.num_classes:
        raise ValueError(f"{where} has {classes} classes, not {known.num_classes}; {again}")
    for split, size in ((TRAIN, known.train), (TEST, known.test)):
        info = builder.info.splits.get(split)
        found = info.num_examples if info else 0
        if found != size:
            raise ValueError(
                f"{where} has {found} images in its {split} split, not {size}; {again}"
            )
        try:
            found = len(ArrayRecordDataSource([str(path) for path in info.filepaths]))
        except RuntimeError as error:
            text = " ".join(str(error).split()) or "it is cut off"
            raise ValueError(
                f"{where} has a file in its {split} split that cannot be read ({text}); {again}"
            ) from error
        if found != size:
            raise ValueError(
                f"{where} has {found} images in the files of its {split} split, not {size}; {again}"
            )


def _fingerprint(builder: Any) -> str:
    """16 characters that tell prepared files apart from others, by what their index holds."""
    splits = [builder.info.splits[name] for name in (TRAIN, TEST)]
    held = [(s.name, s.filenames, s.shard_lengths, int(s.num_bytes)) for s in splits]
    text = json.dumps([str(builder.info.version), held])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def train_batches(
    stream: Stream,
    seed: int,
    epoch: int,
    batch: int,
    *,
    flip: bool = True,
    jitter: Jitter = JITTER,
    workers: int = 0,
    share: slice = WHOLE,
) -> Batches:
    """The batches of an epoch, `Split` each, in the order of `data.epoch_indices`.

    Each image is cropped at random and resized, flipped with probability 1/2, and changes colour.
    Of every batch, only a share of its places is read.
    """
    import grain

    indices = data.epoch_indices(seed, epoch, stream.train_size, batch)[:, share]
    make = partial(_train_batch, stream.train, stream.size, (seed, epoch), flip, jitter)
    return Batches(grain.MapDataset.source(indices).map(make), workers)


def test_batches(stream: Stream, batch: int, *, workers: int = 0, share: slice = WHOLE) -> Batches:
    """All test images in order, their centre: (`Split`, mask) as of `data.padded_indices`.

    Of every batch, only a share of its places is read.
    """
    import grain

    indices = [
        (indices[share], mask[share])
        for indices, mask in data.padded_indices(stream.test_size, batch)
    ]
    make = partial(_test_batch, stream.test, stream.size)
    return Batches(grain.MapDataset.source(indices).map(make), workers)


def _train_batch(source, size, entropy, flip, jitter, indices) -> Split:
    def read(index, sample):
        rng = np.random.default_rng((*entropy, index))
        image = random_resized_crop(rng, Image.fromarray(sample["image"]), size)
        if flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return jitter_colours(rng, image, jitter)

    return _stack(source, indices, read)


def _test_batch(source, size, item) -> tuple[Split, np.ndarray]:
    indices, mask = item
    read = lambda _, sample: centre_crop(Image.fromarray(sample["image"]), size)  # noqa: E731
    return _stack(source, indices, read), mask


def _stack(source, indices, read) -> Split:
    samples = [source[int(index)] for index in indices]
    images = [np.asarray(read(int(i), sample)) for i, sample in zip(indices, samples, strict=True)]
    return Split(np.stack(images), np.array([sample["label"] for sample in samples], np.int32))


def random_resized_crop(rng: np.random.Generator, image: Image.Image, size: int) -> Image.Image:
    """A rectangle of random area and shape, resized to a square (arXiv 1409.4842, section 6).

    Where none of ten fits into the image, its centre, as wide or as high as the shapes allow.
    """
    width, height = image.size
    for _ in range(TRIES):
        area = width * height * rng.uniform(*AREA)
        ratio = np.exp(rng.uniform(*np.log(RATIO)))
        w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:
        w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The square in the middle of an image, 7/8 of the shorter side, resized."""
    side = CENTRE * min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def jitter_colours(rng: np.random.Generator, image: Image.Image, jitter: Jitter) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order, each by a random amount."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for place in rng.permutation(len(jitter)):
        amount = jitter[place]
        if not amount:
            continue
        if place < len(enhancers):
            factor = rng.uniform(max(0.0, 1 - amount), 1 + amount)
            image = enhancers[place](image).enhance(factor)
        else:
            image = shift_hue(image, rng.uniform(-amount, amount))
    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """Turns the hue, 1 being once around the circle."""
    hue, saturation, value = image.convert("HSV").split()
    shift = round(256 * turns)
    hue = hue.point([(i + shift) % 256 for i in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
