import io
import sys

import numpy as np
import pytest

from darts_jax import data


@pytest.mark.parametrize(
    ("name", "train", "test", "side"), [("digits", 1437, 360, 8), ("mnist5k", 4000, 1000, 28)]
)
def test_embedded_datasets(name, train, test, side):
    dataset = data.load(name)
    assert dataset.train.images.shape == (train, side, side, 1)
    assert dataset.test.images.shape == (test, side, side, 1)
    for split in (dataset.train, dataset.test):
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert split.images.max() == 255
        assert len(split.labels) == len(split.images)
        # In any order but the one by class.
        assert np.bincount(split.labels[:100], minlength=10).min() >= 3
    assert dataset.num_classes == 10
    scaled = dataset.train.images / 255
    np.testing.assert_allclose(dataset.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, scaled.std((0, 1, 2)), rtol=1e-12)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset = data.load("digits")
    images = np.concatenate([dataset.train.images, dataset.test.images])[..., 0]
    labels = np.concatenate([dataset.train.labels, dataset.test.labels])
    original = load_digits()
    levels = np.rint(images / 255 * 16).astype(int)
    ours = sorted((label, *level.ravel()) for label, level in zip(labels, levels, strict=True))
    theirs = sorted(
        (label, *level.ravel())
        for label, level in zip(original.target, original.images.astype(int), strict=True)
    )
    assert ours == theirs


def test_loading_twice_gives_the_same():
    for first, second in zip(data.load("digits").train, data.load("digits").train, strict=True):
        np.testing.assert_array_equal(first, second)


def test_limit_keeps_the_first_images_and_the_constants():
    whole, part = data.load("digits"), data.load("digits", limit=100)
    np.testing.assert_array_equal(part.train.images, whole.train.images[:100])
    np.testing.assert_array_equal(part.test.labels, whole.test.labels[:100])
    assert (part.mean, part.std, part.num_classes) == (whole.mean, whole.std, 10)
    with pytest.raises(ValueError, match="a limit of 0 images keeps none; give at least 1"):
        data.load("digits", limit=0)


def test_unknown_dataset_names_the_nearest():
    with pytest.raises(ValueError, match="unknown dataset 'cifar-10'; use one of: cifar10"):
        data.load("cifar-10")
    with pytest.raises(ValueError, match="digits, mnist5k, cifar10, cifar100, fashion_mnist, svhn"):
        data.load("?")


def prepare(folder):
    """A small CIFAR-10, as TensorFlow Datasets would have prepared it."""
    import tensorflow_datasets as tfds
    from PIL import Image

    def png(value):
        file = io.BytesIO()
        Image.fromarray(np.full((32, 32, 3), value, np.uint8)).save(file, "png")
        file.seek(0)
        return file

    version = tfds.builder("cifar10", data_dir=folder).version
    # The real CIFAR-10 stays the one of that name.
    with tfds.core.registered.skip_registration():

        class Cifar10(tfds.core.GeneratorBasedBuilder):
            VERSION = version

            def _info(self):
                image, label = tfds.features.Image(shape=(32, 32, 3)), tfds.features.ClassLabel
                features = {"image": image, "label": label(num_classes=10)}
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, _):
                return {"train": self._generate_examples(20), "test": self._generate_examples(8)}

            def _generate_examples(self, size):
                for i in range(size):
                    yield i, {"image": png(i), "label": i % 10}

    Cifar10(data_dir=folder, file_format="array_record").download_and_prepare()


@pytest.fixture
def tfds():
    return pytest.importorskip("tensorflow_datasets")


@pytest.mark.filterwarnings("ignore")  # TensorFlow Datasets' own
def test_prepared_dataset_is_read_without_tensorflow(tfds, tmp_path, monkeypatch):
    prepare(tmp_path)
    small = data.Contents(20, 8, (32, 32, 3), 10)
    monkeypatch.setattr(data, "CONTENTS", {"cifar10": small})
    dataset = data.load("cifar10", path=str(tmp_path))
    assert dataset.train.images.shape == (20, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.test.images.shape == (8, 32, 32, 3)
    for split, size in ((dataset.train, 20), (dataset.test, 8)):
        values = split.images[:, 0, 0, 0]
        assert sorted(values) == list(range(size))
        assert (split.images == values[:, None, None, None]).all()
        np.testing.assert_array_equal(split.labels, values % 10)
    assert dataset.mean == (0.49139968, 0.48215827, 0.44653124)
    assert "tensorflow" not in sys.modules


@pytest.mark.filterwarnings("ignore")
def test_prepared_dataset_that_is_another_one(tfds, tmp_path):
    prepare(tmp_path)
    message = (
        r"'cifar10' has 20 labels and uint8\[20, 32, 32, 3\] images in its train split, not 50000"
        r" of uint8\[32, 32, 3\]; prepare it again"
    )
    with pytest.raises(ValueError, match=message):
        data.load("cifar10", path=str(tmp_path))


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0, 1, 3, 2], [-1, 0, 1, 2]])
def test_labels_are_all_classes_and_no_others(monkeypatch, labels):
    monkeypatch.setattr(data, "CONTENTS", {"x": data.Contents(4, 3, (2, 2, 1), 3)})
    test = data.Split(np.zeros((3, 2, 2, 1), np.uint8), np.arange(3))
    train = data.Split(np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 2, 0]))
    data._verify("x", train, test)
    with pytest.raises(ValueError, match="'x' has other labels than 0 to 2 in its train split"):
        data._verify("x", train._replace(labels=np.array(labels)), test)


def test_a_fingerprint_tells_contents_and_order_apart():
    split = data.load("digits").train
    same = data.Split(split.images.copy(), split.labels.copy())
    assert data.fingerprint(split) == data.fingerprint(same)
    assert len(data.fingerprint(split)) == 16
    first, second = data.split_search(split)
    changed = split.images.copy()
    changed[5, 3, 3, 0] ^= 1
    others = [
        first,
        second,
        data.Split(split.images[::-1], split.labels[::-1]),
        split._replace(images=changed),
        split._replace(labels=split.labels.astype(np.int64)),
    ]
    assert len({data.fingerprint(other) for other in [split, *others]}) == 6


@pytest.mark.filterwarnings("ignore")
def test_dataset_that_is_not_prepared_names_the_command(tfds, tmp_path, capfd):
    with pytest.raises(ValueError) as error:
        data.load("svhn_cropped", path=str(tmp_path))
    message = str(error.value)
    assert message.startswith(f"dataset 'svhn_cropped' is not prepared in {tmp_path}")
    assert "pip install -e '.[tfds-prepare]' && python -c" in message
    code = message.split('python -c "')[1].rstrip('"')
    assert code.endswith(".download_and_prepare()")
    assert "\n" not in message
    # The command is right as far as can be seen offline: it makes a builder that could prepare.
    scope = {}
    exec(
        code.removesuffix(".download_and_prepare()").replace("tfds.builder", "b = tfds.builder"),
        scope,
    )
    assert scope["b"].data_dir.startswith(str(tmp_path))
    assert scope["b"].info.file_format.value == "array_record"


@pytest.mark.filterwarnings("ignore")
def test_dataset_in_another_format(tfds, tmp_path):
    prepare(tmp_path)
    (info,) = tmp_path.glob("cifar10/*/dataset_info.json")
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(ValueError, match="another format than array_record; move it away and prep"):
        data.load("cifar10", path=str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_errors_of_the_library_are_not_disguised(tfds, tmp_path, monkeypatch):
    """Only what is known to be a dataset that is not prepared is called so."""

    def fail(*_, **__):
        raise ValueError("a defect")

    monkeypatch.setattr(tfds, "builder", fail)
    with pytest.raises(ValueError, match="^a defect$"):
        data.load("cifar10", path=str(tmp_path))


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [("tensorflow_datasets", "prepare it: pip i"), ("array_record", "pip install array_record$")],
)
def test_without_a_package(monkeypatch, missing, remedy):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(ValueError, match=f"'cifar100' needs {missing}; {remedy}"):
        data.load("cifar100")


def test_split_search_is_in_file_order():
    train = data.Split(np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1), np.arange(11))
    first, second = data.split_search(train)
    np.testing.assert_array_equal(first.labels, np.arange(5))
    np.testing.assert_array_equal(second.images.ravel(), np.arange(5, 11))
    first, second = data.split_search(train, 0.8)
    assert (len(first.labels), len(second.images)) == (8, 3)


@pytest.mark.parametrize("portion", [0.0, 1.0, -0.5, 1.5, 0.01, float("nan")])
def test_split_search_refuses_an_empty_part(portion):
    with pytest.raises(ValueError, match="of 11 images empty; give one between 0 and 1"):
        data.split_search(data.Split(np.zeros((11, 1, 1, 1)), np.zeros(11)), portion)


def test_epoch_indices():
    batches = data.epoch_indices(seed=1, epoch=2, size=50, batch=8)
    assert batches.shape == (6, 8)
    assert batches.dtype == np.int32
    assert len(set(batches.ravel())) == 48
    assert set(batches.ravel()) <= set(range(50))
    np.testing.assert_array_equal(batches, data.epoch_indices(1, 2, 50, 8))
    for other in ((1, 3), (2, 2)):
        assert (batches != data.epoch_indices(*other, 50, 8)).any()


def test_random_indices():
    batches = data.random_indices(seed=1, epoch=2, steps=200, size=20, batch=8)
    assert batches.shape == (200, 8)
    assert batches.dtype == np.int32
    assert all(len(set(batch)) == 8 for batch in batches)
    # Every sample is as likely in every batch: 80 expected, standard deviation 6.9.
    counts = np.bincount(batches.ravel(), minlength=20)
    assert len(counts) == 20
    assert abs(counts - 80).max() < 5 * 6.9
    np.testing.assert_array_equal(batches, data.random_indices(1, 2, 200, 20, 8))
    for other in ((1, 3), (2, 2)):
        assert (batches != data.random_indices(*other, 200, 20, 8)).any()


@pytest.mark.parametrize("batch", [0, -1, 51])
def test_batches_that_cannot_be_filled(batch):
    match = f"50 images fill no batch of {batch}; give a batch size of 1 to 50"
    with pytest.raises(ValueError, match=match):
        data.epoch_indices(0, 0, 50, batch)
    with pytest.raises(ValueError, match=match):
        data.random_indices(0, 0, 3, 50, batch)


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_padded_indices(size, batch):
    batches = list(data.padded_indices(size, batch))
    seen = np.concatenate([indices[mask] for indices, mask in batches])
    np.testing.assert_array_equal(seen, np.arange(size))
    assert {(x.shape, m.shape) for x, m in batches} == {((batch,), (batch,))}
    assert all((indices < size).all() and indices.dtype == np.int32 for indices, _ in batches)
