"""Image classifiers: a ViT of a config's sizes or an imported one, on digits or on folders."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, Epoch, IndexedData, Source
from jaxformer.data.sources.image import ImageFolder, divided_digits
from jaxformer.data.transforms import Enlarge, Normalize
from jaxformer.errors import ConfigError
from jaxformer.interop.huggingface import port_of
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.tasks.classify import ClassifyTask

SIZES = ("width", "depth", "heads", "hidden", "dropout", "scan", "remat", "dtype")


def classifier(config: ConfigDict) -> Any:
    """The model: a ViT of the config's sizes, or the one that was imported.

    Raises:
        ConfigError: what was imported is no classifier of images, or of those of another size.
    """
    model = config.model
    if not config.huggingface:
        trunk = Transformer(**{name: model[name] for name in SIZES})
        sizes = {"image_size": config.data.size, "classes": config.data.classes}
        return vit(trunk, patch=model.patch, pool=model.pool, **sizes)
    port = port_of(config.huggingface.to_dict(), "config.huggingface", model.dtype)
    if port.task is not ClassifyTask or "image" not in port.batch:
        raise ConfigError(
            f"config.huggingface.model_type={config.huggingface.get('model_type')!r}: must be "
            "a classifier of images, such as vit"
        )
    size = port.batch["image"].shape[1]
    if config.data.size != size:
        raise ConfigError(f"data.size={config.data.size}: the imported model reads {size}")
    if port.model.head:
        return port.model
    return dataclasses.replace(port.model, classes=config.data.classes)


def images(config: ConfigDict, rows: int | None = None) -> tuple[Data, Any]:
    """Images to train and to test on: the digits, enlarged, or folders of one's own.

    Batches have `rows`, by default `config.batch_size`.

    Raises:
        ConfigError: digits of another size, number or classes, or no folder where one is read.
    """
    where, rows = config.data, config.batch_size if rows is None else rows
    limit = config.evaluate.batches or None
    if not where.train:
        if where.size % 8 or where.classes != 10:
            raise ConfigError(
                f"data.size={where.size}: the digits have 10 classes and sides of 8, enlarged to "
                "a multiple; or name folders in data.train and data.test"
            )
        enlarge = (Enlarge(where.size),)
        few, rest = divided_digits(where.images, config.seed)
        train = IndexedData(few, rows, config.seed, enlarge)
        return train, Epoch(rest, rows, transforms=enlarge, limit=limit)
    shape = (where.size, where.size, 3)
    row = {"image": (shape, np.float32), "label": ((), np.int32)}
    normalize = (Normalize(0.5, 0.5),)

    def source(name: str) -> Source:
        if not where[name]:
            raise ConfigError(f"data.{name}: names no folder of images")
        return ImageFolder(where[name], where.size)

    def make_train() -> IndexedData:
        return IndexedData(source("train"), rows, config.seed, normalize)

    def make_test() -> Epoch:
        return Epoch(source("test"), rows, transforms=normalize, limit=limit)

    weighed = {"weight": ((), np.float32), **row}
    return Deferred(make_train, rows, row), Deferred(make_test, rows, weighed)
