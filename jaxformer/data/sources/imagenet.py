"""ImageNet's layout: root/train/<class>/* to train on, root/val/<class>/* to evaluate on."""

from __future__ import annotations

import numpy as np

from jaxformer.data.base import Deferred, Epoch, IndexedData
from jaxformer.data.sources.image import ImageFolder
from jaxformer.data.transforms import Normalize, RandomCrop, RandomFlip

NORMALIZE = Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CROP = 0.875  # of an image's side: 224 pixels of 256


def imagenet(
    root: str, side: int, batch_size: int, seed: int = 0, limit: int | None = None
) -> tuple[Deferred, Deferred]:
    """Random crops of `side` pixels, flipped or not; and one pass, or `limit` batches, of the rest.

    Folders are read when the first batch is asked for.
    """
    row = {"image": ((side, side, 3), np.float32), "label": ((), np.int32)}

    def train() -> IndexedData:
        images = ImageFolder(f"{root}/train", round(side / CROP))
        return IndexedData(images, batch_size, seed, [RandomCrop(side), RandomFlip(), NORMALIZE])

    def unseen() -> Epoch:
        images = ImageFolder(f"{root}/val", side)
        return Epoch(images, batch_size, transforms=[NORMALIZE], limit=limit)

    weighed = {**row, "weight": ((), np.float32)}
    return Deferred(train, batch_size, row), Deferred(unseen, batch_size, weighed)
