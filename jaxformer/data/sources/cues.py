"""Images whose class is in two cues: a small texture, and whether two far dots have one colour."""

from __future__ import annotations

import numpy as np

from jaxformer.data.base import Arrays
from jaxformer.recipe import ConfigError

TEXTURES = 4
CLASSES = 2 * TEXTURES
PATCH, DOT, PERIOD = 12, 8, 4  # pixels
COLOURS = np.eye(3, dtype=np.float32)[:2]
NOISE = 0.02


def cues(count: int, size: int = 48, seed: int = 0) -> Arrays:
    """{"image": (size, size, 3) float32, "label": int32} of `count` images; 8 classes.

    A patch of 12x12 pixels has one of four textures, stripes in three directions or a checkerboard,
    of any phase: what a pixel's neighbours tell. Two dots of 8x8, red or green, with at least half
    of the size between them along the rows or the columns, have the same colour in every second
    image: what no neighbourhood tells. The label is twice the texture plus whether they have.

    Raises:
        ConfigError: an image too small for the patch between the dots.
    """
    if size < 32:
        raise ConfigError(f"data.image_size={size}: must be at least 32")
    draw = np.random.default_rng([seed, size])
    images = draw.normal(0.0, NOISE, (count, size, size, 3)).astype(np.float32)
    texture, equal = draw.integers(TEXTURES, size=count), draw.integers(2, size=count)
    for image, kind, same in zip(images, texture, equal, strict=True):
        low, high = (size - PATCH) // 2 - 2, (size - PATCH) // 2 + 3  # around the middle
        top, left = draw.integers(low, high, size=2)
        image[top : top + PATCH, left : left + PATCH] += _texture(kind, draw.integers(PERIOD))
        near = draw.integers(size // 4 - DOT + 1)
        far = size - size // 4 + draw.integers(size // 4 - DOT + 1)
        across = draw.integers(size - DOT + 1, size=2)
        at = [(near, across[0]), (far, across[1])]
        if draw.integers(2):
            at = [place[::-1] for place in at]
        first = draw.integers(2)
        for (row, column), colour in zip(at, (first, first if same else 1 - first), strict=True):
            image[row : row + DOT, column : column + DOT] = COLOURS[colour]
    return Arrays({"image": images, "label": (2 * texture + equal).astype(np.int32)})


def _texture(kind: int, phase: int) -> np.ndarray:
    """(12, 12, 1): +-1/2, stripes along rows, columns or diagonals, or squares."""
    row, column = np.mgrid[:PATCH, :PATCH]
    along = [row, column, row + column][kind] if kind < 3 else None
    if along is not None:
        high = (along + phase) % PERIOD < PERIOD // 2
    else:
        high = ((row + phase) // 2 + (column + phase) // 2) % 2 == 0
    return (high[..., None] - 0.5).astype(np.float32)
