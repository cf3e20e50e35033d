"""Images read by worker processes: what is in a batch, and what is done to an image."""

import shutil
import sys

import numpy as np
import pytest
from PIL import Image
from small_imagenet import CLASSES, TEST, TRAIN, expect, prepare

from darts_jax import data, stream
from darts_jax.stream import Jitter, Stream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepare(folder)
    return str(folder)


@pytest.fixture
def images(folder, monkeypatch):
    expect(monkeypatch)
    return stream.load("imagenet2012", folder, None, 16)


pytestmark = pytest.mark.filterwarnings("ignore")  # TensorFlow Datasets' own, and Grain's


def test_loading(images):
    assert (images.train_size, images.test_size, images.num_classes) == (TRAIN, TEST, 1000)
    assert images.image_shape == (16, 16, 3)
    assert "tensorflow" not in sys.modules


def test_limit(folder, images):
    limited = stream.load("imagenet2012", folder, 10, 16)
    assert (limited.train_size, limited.test_size) == (10, TEST)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"train": 27}, "has 26 images in its train split, not 27; "),
        ({"test": 50_000}, "has 9 images in its validation split, not 50000; "),
        ({"classes": 4}, "has 1000 classes, not 4; "),
    ],
)
def test_other_numbers_than_known_are_refused(folder, monkeypatch, known, message):
    expect(monkeypatch, **known)
    with pytest.raises(ValueError) as caught:
        stream.load("imagenet2012", folder, None, 16)
    assert str(caught.value).startswith(f"dataset 'imagenet2012' in {folder}/imagenet2012/")
    assert str(caught.value).endswith(f"{message}move it away and prepare it again")


def test_what_imagenet_holds():
    """Table 1 of arXiv 1409.0575."""
    assert stream.CONTENTS["imagenet2012"] == (1_281_167, 50_000, 1000)


def prepared_copy(folder, tmp_path, split):
    """Another folder of the same: its path, and the file of a split."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (file,) = copy.rglob(f"*-{split}.*")
    return str(copy), file


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "its train split that cannot be read (open() failed: No such"),
        (lambda file: file.write_bytes(file.read_bytes()[:70_000]), "that cannot be read ("),
        (
            lambda file: shutil.copy(next(file.parent.glob("*-validation.*")), file),
            "has 9 images in the files of its train split, not 26;",
        ),
    ],
    ids=["missing", "cut off", "another"],
)
def test_files_that_hold_something_else_are_refused(folder, images, tmp_path, damage, message):
    copy, file = prepared_copy(folder, tmp_path, "train")
    damage(file)
    with pytest.raises(ValueError) as caught:
        stream.load("imagenet2012", copy, None, 16)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_fingerprint_is_that_of_the_index(folder, images, tmp_path):
    copy, file = prepared_copy(folder, tmp_path, "train")
    assert stream.load("imagenet2012", copy, 10, 16).fingerprint == images.fingerprint
    index = file.parent / "dataset_info.json"
    index.write_text(index.read_text().replace('"numBytes": "', '"numBytes": "1'))
    assert stream.load("imagenet2012", copy, None, 16).fingerprint != images.fingerprint


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_is_a_function_of_seed_and_epoch(images, workers):
    make = lambda seed, epoch, workers=0: list(  # noqa: E731
        stream.train_batches(images, seed, epoch, 8, workers=workers)
    )
    epoch = make(3, 1, workers)
    assert len(epoch) == TRAIN // 8 == len(stream.train_batches(images, 3, 1, 8))
    order = data.epoch_indices(3, 1, TRAIN, 8)
    for batch, again, indices in zip(epoch, make(3, 1), order, strict=True):
        assert batch.images.shape == (8, 16, 16, 3) and batch.images.dtype == np.uint8
        assert batch.labels.dtype == np.int32
        np.testing.assert_array_equal(batch.images, again.images)
        np.testing.assert_array_equal(batch.labels % CLASSES, batch.labels)
        assert batch.labels.shape == indices.shape
    other = make(3, 2)
    assert not np.array_equal(epoch[0].images, other[0].images)


def test_samples_are_those_of_the_order(images):
    plain = Jitter(0, 0, 0, 0)
    batches = stream.train_batches(images, 0, 0, 8, flip=False, jitter=plain)
    order = data.epoch_indices(0, 0, TRAIN, 8)
    samples = [images.train[int(i)] for i in order[2]]
    np.testing.assert_array_equal(batches[2].labels, [sample["label"] for sample in samples])
    for image, sample in zip(batches[2].images, samples, strict=True):
        assert set(image[..., 0].ravel()) == {sample["image"][0, 0, 0]}
    rest = list(batches[1:])  # where a run goes on
    np.testing.assert_array_equal(rest[1].images, batches[2].images)


def test_half_is_flipped(images):
    batches = stream.train_batches(images, 0, 0, 13, jitter=Jitter(0, 0, 0, 0))
    found = np.concatenate([batch.images for batch in batches]).astype(int)
    blue = found[..., 2] - found[..., 0]
    left, right = blue[:, :, 0].mean(1), blue[:, :, -1].mean(1)
    assert (left > right + 20).sum() > 3 and (right > left + 20).sum() > 3


@pytest.mark.parametrize("workers", [0, 1])
def test_test_images_come_once_and_in_order(images, workers):
    batches = list(stream.test_batches(images, 4, workers=workers))
    masks = np.concatenate([mask for _, mask in batches])
    assert masks.tolist() == [True] * TEST + [False] * 3
    labels = np.concatenate([split.labels for split, _ in batches])[masks]
    np.testing.assert_array_equal(labels, [sample["label"] for sample in images.test])


def test_mocked_imagenet():
    """The names and types of the real one, of which TensorFlow Datasets makes some images up."""
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=6):
        builder = tfds.builder("imagenet2012")
        train, test = (builder.as_data_source(split=split) for split in ("train", "validation"))
        classes = builder.info.features["label"].num_classes
        images = Stream("imagenet2012", train, test, 6, 6, classes, 24)
        batches = list(stream.train_batches(images, 0, 0, 2))
    assert classes == 1000
    assert [batch.images.shape for batch in batches] == [(2, 24, 24, 3)] * 3
    assert all(0 <= batch.labels.min() <= batch.labels.max() < 1000 for batch in batches)


def coordinates(width, height):
    """An image that tells where each of its pixels is from."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([rows, columns, rows * 0], -1).astype(np.uint8))


def test_random_crops_are_of_the_areas_and_shapes_they_should():
    rng, image = np.random.default_rng(0), coordinates(120, 90)
    areas, ratios = [], []
    for _ in range(400):
        crop = np.asarray(stream.random_resized_crop(rng, image, 10)).astype(float)
        (h, w), edge = np.ptp(crop[..., :2], axis=(0, 1)) + 0, 10 / 9
        areas.append(h * w * edge**2 / (120 * 90))
        ratios.append(w / h)
    assert 0.06 < min(areas) < 0.12 and 0.85 < max(areas) < 1.1
    # An area a fits in if width over height is 4 a / 3 at least; the logarithm of that is uniform.
    a = np.linspace(0.08, 1, 1000)
    fits = np.clip(-np.log(a) / np.log(16 / 9), 0, 1)
    np.testing.assert_allclose(np.mean(areas), (a * fits).sum() / fits.sum(), atol=0.03)
    assert 0.7 < min(ratios) < 0.8 and 1.25 < max(ratios) < 1.45


@pytest.mark.parametrize("size", [(200, 4), (4, 200)])
def test_crop_of_an_image_that_is_too_narrow(size):
    rng = np.random.default_rng(0)
    crop = np.asarray(stream.random_resized_crop(rng, coordinates(*size), 8)).astype(int)
    long = crop[..., 1] if size[0] > size[1] else crop[..., 0]
    assert 95 < long.min() < long.max() < 105  # its centre


def test_centre_crop():
    found = np.asarray(stream.centre_crop(coordinates(160, 64), 56)).astype(int)
    np.testing.assert_allclose(found[:, 0, 0], 4 + np.arange(56), atol=1)
    np.testing.assert_allclose(found[0, :, 1], 52 + np.arange(56), atol=1)


def test_colours():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(60, 120, (8, 8, 3)).astype(np.uint8))
    same = stream.jitter_colours(rng, image, Jitter(0, 0, 0, 0))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))
    means = []
    for _ in range(300):
        bright = stream.jitter_colours(rng, image, Jitter(0.5, 0, 0, 0))
        means.append(np.asarray(bright).mean() / np.asarray(image).mean())
    assert 0.49 < min(means) < 0.55 and 1.45 < max(means) < 1.51
    plain = np.asarray(stream.jitter_colours(rng, image, Jitter(0, 0, 1.0, 0))).astype(float)
    assert (
        abs(np.ptp(plain, axis=-1) / np.ptp(np.asarray(image).astype(float), axis=-1)).std() < 0.2
    )
    contrast = np.asarray(stream.jitter_colours(rng, image, Jitter(0, 0.5, 0, 0))).astype(float)
    np.testing.assert_allclose(contrast.mean(), np.asarray(image).mean(), atol=4)
    assert contrast.std() != np.asarray(image).std()


@pytest.mark.parametrize(
    ("turns", "expected"), [(1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (1, (255, 0, 0))]
)
def test_hue(turns, expected):
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    np.testing.assert_allclose(np.asarray(stream.shift_hue(red, turns))[0, 0], expected, atol=6)


def test_imagenet_that_is_not_prepared(tmp_path):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="'imagenet2012' is not prepared in .* prepare it: pip"):
        stream.load("imagenet2012", str(tmp_path), None, 224)


def test_without_grain(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs grain; pip install -e '.\\[imagenet\\]'"):
        stream.load("imagenet2012", None, None, 224)


def test_a_process_reads_its_share_of_each_batch(images):
    share = slice(2, 4)
    whole, part = (
        list(stream.train_batches(images, 1, 0, 8, **options)) for options in ({}, {"share": share})
    )
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a.images[share], b.images)
        np.testing.assert_array_equal(a.labels[share], b.labels)
    whole, part = (
        list(stream.test_batches(images, 4, **options)) for options in ({}, {"share": share})
    )
    for (a, a_mask), (b, b_mask) in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a.images[share], b.images)
        np.testing.assert_array_equal(a_mask[share], b_mask)
