"""Images whose class is in two cues: a small texture, and whether two far bars have one colour."""

from __future__ import annotations

import numpy as np

from jaxformer.data.base import Arrays
from jaxformer.recipe import ConfigError

TEXTURES = 4
CLASSES = 2 * TEXTURES
PERIOD = 4  # pixels
NOISE = 0.02


def cues(count: int, size: int = 96, seed: int = 0) -> Arrays:
    """{"image": (size, size, 3) float32, "label": int32} of `count` images; 8 classes.

    A patch around the middle, a quarter of the image wide, has one of four textures, stripes in
    three directions or a checkerboard, of any phase: what a pixel's neighbours tell. Two bars along
    opposite borders, each an eighth of the image wide and red or green, have the same colour in
    every second image: what no neighbourhood tells, and no sum over places either. The label is
    twice the texture plus whether they have.

    Raises:
        ConfigError: an image too small for the patch between the bars.
    """
    if size < 32:
        raise ConfigError(f"data.image_size={size}: must be at least 32")
    draw, patch = np.random.default_rng([seed, size]), size // 4
    images = draw.normal(0.0, NOISE, (count, size, size, 3)).astype(np.float32)
    texture, equal = draw.integers(TEXTURES, size=count), draw.integers(2, size=count)
    for image, kind, same in zip(images, texture, equal, strict=True):
        middle = (size - patch) // 2
        top, left = draw.integers(middle - 2, middle + 3, size=2)
        at = slice(top, top + patch), slice(left, left + patch)
        image[at] += _texture(kind, patch, draw.integers(PERIOD))
        first = draw.integers(2)
        turned = image if draw.integers(2) else image.swapaxes(0, 1)
        turned[: size // 8, :, first] += 1
        turned[-(size // 8) :, :, first if same else 1 - first] += 1
    return Arrays({"image": images, "label": (2 * texture + equal).astype(np.int32)})


def _texture(kind: int, side: int, phase: int) -> np.ndarray:
    """(side, side, 1): +-1/2, stripes along rows, columns or diagonals, or squares."""
    row, column = np.mgrid[:side, :side]
    along = [row, column, row + column][kind] if kind < 3 else None
    if along is not None:
        high = (along + phase) % PERIOD < PERIOD // 2
    else:
        high = ((row + phase) // 2 + (column + phase) // 2) % 2 == 0
    return (high[..., None] - 0.5).astype(np.float32)
