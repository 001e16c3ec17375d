"""Per-example transforms: pure functions of an example and its random generator.

An example is a mapping with "image" (H, W, C) float32; the other keys pass through.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxformer.data.base import Example
from jaxformer.recipe import ConfigError

__all__ = ["Enlarge", "Normalize", "RandomCrop", "RandomFlip", "RowSeed"]


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cut a random (size, size) window out of the image padded by `padding` zeros on each side."""

    size: int
    padding: int = 0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        p = self.padding
        image = np.pad(example["image"], ((p, p), (p, p), (0, 0)))
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ConfigError(
                f"data.crop: {self.size} exceeds the {height}x{width} of a padded image; "
                "use a smaller crop, larger images or more padding"
            )
        top = rng.integers(height - self.size + 1)
        left = rng.integers(width - self.size + 1)
        return {**example, "image": image[top : top + self.size, left : left + self.size]}


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirror left and right with probability 1/2."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        image = example["image"]
        return {**example, "image": image[:, ::-1] if rng.random() < 0.5 else image}


@dataclasses.dataclass(frozen=True)
class Normalize:
    """(image - mean) / std per channel, as float32; mean 0 and std 255 scale uint8 to [0, 1]."""

    mean: float | Sequence[float]
    std: float | Sequence[float]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        del rng
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return {**example, "image": (example["image"].astype(np.float32) - mean) / std}


@dataclasses.dataclass(frozen=True)
class Enlarge:
    """Repeat the pixels of a square image up to sides of `size`, a multiple of its own."""

    size: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        del rng
        times, rest = divmod(self.size, len(example["image"]))
        if rest:
            raise ConfigError(
                f"data.image_size={self.size}: must be a multiple of {len(example['image'])}"
            )
        return {**example, "image": example["image"].repeat(times, 0).repeat(times, 1)}


@dataclasses.dataclass(frozen=True)
class RowSeed:
    """Adds "seed" (uint32), from which a task draws for the row, whatever rows are beside it."""

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return {**example, "seed": np.uint32(rng.integers(2**32))}
