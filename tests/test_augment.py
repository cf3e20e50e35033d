from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from darts_jax import augment

KEY = jax.random.key(3)


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return random.integers(1, 256, (64, 6, 10, 3), dtype=np.uint8)


def test_crop_is_a_window_of_the_padded_image(images):
    cropped = np.asarray(augment.crop(KEY, images, padding=2))
    assert cropped.shape == images.shape
    assert cropped.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    seen = Counter()
    for i in range(len(images)):
        windows = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if (padded[i, row : row + 6, column : column + 10] == cropped[i]).all()
        ]
        assert len(windows) == 1
        seen.update(windows)
    assert {row for row, _ in seen} == {column for _, column in seen} == set(range(5))


def test_crop_positions_are_uniform():
    # The one bright pixel tells the position: 4000 images, 25 positions, 160 each expected.
    images = np.zeros((4000, 5, 5, 1), np.uint8)
    images[:, 2, 2] = 1
    counts = np.asarray(augment.crop(KEY, images, padding=2), int).sum((0, 3))
    assert counts.sum() == 4000
    assert abs(counts - 160).max() < 5 * np.sqrt(160)


def test_flip_mirrors_half_of_the_images(images):
    flipped = np.asarray(augment.flip(KEY, images))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert 16 < same.sum() < 48  # four standard deviations from 32


def test_normalize(images, x64):
    mean, std = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)
    normalized = augment.normalize(jnp.asarray(images), mean, std)
    assert normalized.dtype == jnp.float32
    expected = (images / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(normalized, expected, rtol=0, atol=2e-6)


def test_cutout_masks_are_the_recorded_ones(oracle):
    recorded = oracle("misc.npz")
    centres = jnp.asarray(recorded["cutout16/centres_yx"])
    masks = augment.cutout_mask(centres, 32, 32, size=16)
    np.testing.assert_array_equal(masks, recorded["cutout16/masks"].astype(bool))


def test_cutout_mask_of_odd_size():
    (mask,) = augment.cutout_mask(jnp.array([[2, 0]]), 5, 7, size=3)
    hole = np.zeros((5, 7), bool)
    hole[1:4, 0:2] = True
    np.testing.assert_array_equal(mask, ~hole)


def test_cutout_sets_a_square_to_zero(images):
    floats = images.astype(np.float32)
    cut = np.asarray(augment.cutout(KEY, floats, size=4))
    assert cut.dtype == np.float32
    kept = cut == floats
    assert (kept | (cut == 0)).all()
    assert (kept.all(-1) == kept.any(-1)).all()  # in all channels at once
    possible = augment.cutout_mask(
        jnp.array([(row, column) for row in range(6) for column in range(10)]), 6, 10, size=4
    )
    possible = {mask.tobytes() for mask in np.asarray(possible)}
    drawn = {mask.tobytes() for mask in kept[..., 0]}
    assert drawn <= possible
    assert len(drawn) > 20


def test_cutout_centres_are_uniform_over_the_pixels():
    images = jnp.ones((4000, 4, 6, 1))
    counts = 4000 - np.asarray(augment.cutout(KEY, images, size=1)).sum((0, 3))
    assert counts.sum() == 4000
    assert abs(counts - 4000 / 24).max() < 5 * np.sqrt(4000 / 24)


def test_augment_is_crop_flip_normalize_cutout(images):
    mean, std = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)
    whole = augment.augment(KEY, images, mean, std, padding=2, cutout_size=4)
    crop_key, flip_key, cutout_key = jax.random.split(KEY, 3)
    steps = augment.flip(flip_key, augment.crop(crop_key, images, 2))
    steps = augment.cutout(cutout_key, augment.normalize(steps, mean, std), 4)
    np.testing.assert_array_equal(whole, steps)
    # Pixels that were cut out are zeros of the normalised image.
    assert 0 < np.mean(np.asarray(whole) == 0) < 0.5


def test_augment_without_anything_normalises(images):
    mean, std = (0.5, 0.25, 0.125), (0.3, 0.2, 0.1)
    plain = augment.augment(KEY, images, mean, std, padding=0, mirror=False)
    np.testing.assert_array_equal(plain, augment.normalize(jnp.asarray(images), mean, std))


def test_augment_is_fixed_by_the_key_and_the_same_inside_jit(images):
    def run(key):
        return augment.augment(key, images, (0.5,) * 3, (0.25,) * 3, cutout_size=2)

    np.testing.assert_array_equal(run(KEY), run(KEY))
    np.testing.assert_allclose(jax.jit(run)(KEY), run(KEY), rtol=0, atol=1e-6)
    assert (np.asarray(run(KEY)) != np.asarray(run(jax.random.key(4)))).any()
