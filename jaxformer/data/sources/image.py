"""Labelled images: scikit-learn's digits, and folders with one sub-folder per class.

Examples are {"image": (H, W, C) float32 in [0, 1], "label": int32}.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Literal

import numpy as np

from jaxformer.data.base import Arrays, Example
from jaxformer.recipe import ConfigError

__all__ = ["ImageFolder", "digit_sequences", "digits", "divided_digits"]

_SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"]
)


def digits(split: Literal["train", "test"]) -> Arrays:
    """The 8x8 handwritten digits that scikit-learn carries: 1,437 to train on, 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if split not in ("train", "test"):
        raise ConfigError(f"data.split: {split!r}; the digits have 'train' and 'test'")
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    x, y = (train_images, train_labels) if split == "train" else (test_images, test_labels)
    return Arrays(
        {"image": np.float32(x).reshape(-1, 8, 8, 1) / 16, "label": np.asarray(y, np.int32)}
    )


def divided_digits(count: int, seed: int) -> tuple[Arrays, Arrays]:
    """`count` digits to train on, drawn by the seed, and all others; 0: as `digits` has them.

    The fewer are trained on, the finer is the accuracy on the others.

    Raises:
        ConfigError: `count` is negative, or more than there are to train on.
    """
    source, test = digits("train"), digits("test")
    if not 0 <= count <= len(source):
        raise ConfigError(f"data.images={count}: there are {len(source)} to train on; 0: all")
    if not count:
        return source, test
    order = np.random.default_rng(seed).permutation(len(source))
    few = {name: array[order[:count]] for name, array in source.arrays.items()}
    rest = {
        name: np.concatenate([array[order[count:]], test.arrays[name]])
        for name, array in source.arrays.items()
    }
    return Arrays(few), Arrays(rest)


def digit_sequences(split: Literal["train", "test"]) -> Arrays:
    """The digits pixel by pixel, {"tokens": (65,) int32}: token 0, then 1 + the level, 0 to 16."""
    images = digits(split).arrays["image"]
    levels = np.rint(16 * images).astype(np.int32).reshape(len(images), -1)
    return Arrays({"tokens": np.pad(levels + 1, ((0, 0), (1, 0)))})


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images in `root/<class>/**`, decoded when asked for; classes are numbered in sorted order.

    Each image is scaled to cover (size, size) and cut at its centre. `mode` is Pillow's: "RGB"
    gives C = 3, "L" gives C = 1. A file that is no image raises `ConfigError` naming it.
    """

    root: str | Path
    size: int
    mode: Literal["RGB", "L"] = "RGB"

    def __post_init__(self) -> None:
        if not Path(self.root).is_dir():
            raise ConfigError(
                f"data.root: {str(self.root)!r} is not a folder; give one with a sub-folder of "
                "images per class"
            )
        if not self._files:
            raise ConfigError(
                f"data.root: no images in the sub-folders of {str(self.root)!r}; put them at "
                f"root/<class>/*, ending in one of {' '.join(sorted(_SUFFIXES))}"
            )

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted(p.name for p in Path(self.root).iterdir() if p.is_dir()))

    @functools.cached_property
    def _files(self) -> list[tuple[Path, int]]:
        return [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted(Path(self.root, name).rglob("*"))
            if path.suffix.lower() in _SUFFIXES
        ]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        path, label = self._files[index]
        return {"image": read_image(path, self.size, self.mode), "label": np.int32(label)}


def read_image(path: Path, size: int, mode: Literal["RGB", "L"] = "RGB") -> np.ndarray:
    """(size, size, C) float32 in [0, 1], scaled to cover the square and cut at its centre.

    Raises:
        ConfigError: the file is no image; names it.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            file.draft(mode, (size, size))  # JPEG: decode at a fraction
            image = ImageOps.exif_transpose(file).convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
        raise ConfigError(
            f"data.root: {str(path)!r} cannot be read as an image ({error}); repair or remove it"
        ) from error
    image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, np.float32).reshape(size, size, -1) / 255
