"""Augmentation of images, pure and inside jit.

Every function maps a batch [B, height, width, channels] to one of the same shape, and draws anew
for each image of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def augment(
    key: jax.Array,
    images: jax.Array,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    padding: int = 4,
    mirror: bool = True,
    cutout_size: int = 0,
) -> jax.Array:
    """Crops, flips, normalises and cuts out, in this order.

    Args:
      key: a PRNG key.
      images: uint8 [B, height, width, channels].
      mean: per channel, of images scaled to [0, 1].
      std: per channel, likewise.
      padding: pixels that a crop may be off the centre; 0 for no crop.
      mirror: whether to flip half of the images.
      cutout_size: side of the square to cut out in pixels; 0 for none.

    Returns:
      float32 [B, height, width, channels].
    """
    crop_key, flip_key, cutout_key = jax.random.split(key, 3)
    if padding:
        images = crop(crop_key, images, padding)
    if mirror:
        images = flip(flip_key, images)
    images = normalize(images, mean, std)
    return cutout(cutout_key, images, cutout_size) if cutout_size else images


def crop(key: jax.Array, images: jax.Array, padding: int = 4) -> jax.Array:
    """Shifts each image by -padding to padding pixels in either direction, zeros moving in.

    The same as a random crop out of the image with a border of zeros.
    """
    border = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1)

    def window(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(window)(jnp.pad(images, border), corners)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image, left to right, with probability 1/2."""
    flipped = jax.random.bernoulli(key, shape=(len(images), 1, 1, 1))
    return jnp.where(flipped, images[:, :, ::-1], images)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Scales uint8 images to [0, 1], then to zero mean and unit deviation per channel: float32."""
    # The two scalings are one; the constants are computed in double precision.
    scale = [1 / (255 * s) for s in std]
    shift = [m / s for m, s in zip(mean, std, strict=True)]
    return images.astype(jnp.float32) * jnp.float32(scale) - jnp.float32(shift)


def cutout(key: jax.Array, images: jax.Array, size: int) -> jax.Array:
    """Sets a square to zero in each image, centred on any of its pixels (arXiv 1708.04552)."""
    height, width = images.shape[1:3]
    centres = jax.random.randint(
        key, (len(images), 2), 0, jnp.array([height, width]), dtype=jnp.int32
    )
    return images * cutout_mask(centres, height, width, size)[..., None].astype(images.dtype)


def cutout_mask(centres: jax.Array, height: int, width: int, size: int) -> jax.Array:
    """Returns the masks of `cutout`, False inside the squares, which end at the border.

    A square of even size reaches one pixel less far below and right of its centre.

    Args:
      centres: int [B, 2], row and column of each.
      height: of the images in pixels.
      width: likewise.
      size: side of the squares in pixels.

    Returns:
      bool [B, height, width].
    """

    def inside(positions: jax.Array, centre: jax.Array) -> jax.Array:
        start = centre[:, None] - size // 2
        return (start <= positions) & (positions < start + size)

    rows = inside(jnp.arange(height), centres[:, 0])
    columns = inside(jnp.arange(width), centres[:, 1])
    return ~(rows[:, :, None] & columns[:, None, :])
