"""Latents of images, computed before and kept in a folder."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from jaxformer.data.base import Example
from jaxformer.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """`folder/{split}_latents.npy` (N, C, h, w), any float, and `folder/{split}_labels.npy` (N,).

    Examples are {"image": (h, w, C) float32, "label": int32}. The files are mapped into memory.

    Raises:
        ConfigError: a file is missing, or the two do not fit.
    """

    folder: str
    split: str

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for name in ("latents", "labels"):
            path = Path(self.folder) / f"{self.split}_{name}.npy"
            if not path.is_file():
                raise ConfigError(
                    f"data.folder: {str(path)!r} is missing; write it, or name another"
                )
            found.append(np.load(path, mmap_mode="r"))
        latents, labels = found
        if latents.ndim != 4 or labels.shape != latents.shape[:1]:
            raise ConfigError(
                f"data.folder={self.folder!r}: latents {latents.shape} and labels {labels.shape} "
                "do not fit; must be (N, C, h, w) and (N,)"
            )
        return latents, labels

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, index: int) -> Example:
        latents, labels = self._arrays
        image = np.float32(latents[index]).transpose(1, 2, 0)
        return {"image": image, "label": np.int32(labels[index])}
