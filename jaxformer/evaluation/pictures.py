"""Examples as pictures in a grid."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from jaxformer.errors import ConfigError

LEAST = 64  # pixels of a side in the grid: smaller pictures are enlarged


def grid(images: Any, columns: int) -> np.ndarray:
    """(B, H, W, 1 or 3) in [0, 1] as one uint8 picture, row by row, enlarged where small.

    Raises:
        ConfigError: other channels.
    """
    images = np.asarray(images, np.float32)
    count, height, width, channels = images.shape
    if channels not in (1, 3):
        raise ConfigError(f"pictures: have 1 or 3 channels, these have {channels}")
    times = max(1, -(-LEAST // min(height, width)))
    pixels = (np.clip(np.nan_to_num(images), 0, 1) * 255).round().astype(np.uint8)
    pixels = pixels.repeat(times, 1).repeat(times, 2).repeat(3 // channels, 3)
    rows, gap = -(-count // columns), 2
    height, width = height * times + gap, width * times + gap
    whole = np.full((rows * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        top, left = i // columns * height + gap, i % columns * width + gap
        whole[top : top + height - gap, left : left + width - gap] = picture
    return whole


def write_examples(images: Any, columns: int, path: Any) -> epath.Path:
    """Write the grid to `path` as PNG; what is no picture goes beside it as .npy. The file.

    Of several processes the first writes.
    """
    path, images = epath.Path(path), np.asarray(images, np.float32)
    picture = images.shape[-1] in (1, 3)
    path = path if picture else path.with_suffix(".npy")
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            if picture:
                Image.fromarray(grid(images, columns)).save(file, format="PNG")
            else:
                np.save(file, images)
    return path
