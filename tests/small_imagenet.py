"""A small ImageNet on the disk, of real PNG bytes."""

import io

import numpy as np
import pytest
from PIL import Image

from darts_jax import stream

SIZE, TRAIN, TEST, CLASSES = 40, 26, 9, 4


def expect(monkeypatch, train=TRAIN, test=TEST, classes=1000):
    """Makes the small one what ImageNet is known to hold; its classes are those of the real one."""
    contents = {"imagenet2012": stream.Contents(train, test, classes)}
    monkeypatch.setattr(stream, "CONTENTS", contents)


def png(value):
    """An image of one grey, whose left half is blue: bytes."""
    pixels = np.full((SIZE, SIZE + 10, 3), value, np.uint8)
    pixels[:, : SIZE // 2, 2] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    file.seek(0)
    return file


def prepare(folder):
    """A small ImageNet, as TensorFlow Datasets would have prepared it: array_record of PNGs."""
    tfds = pytest.importorskip("tensorflow_datasets")
    version = tfds.builder("imagenet2012", data_dir=folder).version
    with tfds.core.registered.skip_registration():  # the real one stays the one of that name

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = version

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=CLASSES),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {
                    "train": self._generate_examples(TRAIN),
                    "validation": self._generate_examples(TEST),
                }

            def _generate_examples(self, size):
                for i in range(size):
                    yield i, {"image": png(5 * i), "label": i % CLASSES}

    Imagenet2012(data_dir=folder, file_format="array_record").download_and_prepare()
