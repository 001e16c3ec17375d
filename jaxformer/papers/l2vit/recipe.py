"""The recipe of a config: the hierarchy, whole or without one of its parts, on images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Deferred, Epoch, IndexedData, Source, Transform
from jaxformer.data.sources.cues import cues
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.data.transforms import Enlarge
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.encoder import Classifier
from jaxformer.models.transformer import require
from jaxformer.papers.l2vit.model import l2vit
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Train on shuffled images, evaluate on others."""
    kinds = {"cues": made, "digits": enlarged, "folder": folder}
    require("data.task", config.data.task, kinds)
    train, unseen = kinds[config.data.task](config)
    task = ClassifyTask(classifier(config), config.model.label_smoothing)
    update = GradientUpdate.of(task, config)
    evaluator = MeanEvaluator(task, unseen, "validation", config.evaluate.every or "end")
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit="images")


def classifier(config: ConfigDict) -> Classifier:
    """The model of a config."""
    names = ("widths", "depths", "heads", "window", "mlp_ratio", "blocks", "local", "drop_path")
    fields = {name: config.model[name] for name in (*names, "classes", "dtype")}
    side = config.data.image_size
    return l2vit(image_size=(side, side), clamp=config.model.clamp or None, **fields)


def made(config: ConfigDict) -> tuple[Deferred, Deferred]:
    """Images whose class is in a local and a global cue."""
    data = config.data

    def images(count: int, seed: int) -> Source:
        return cues(count, data.image_size, seed)

    return deferred(config, lambda: images(data.size, 0), lambda: images(1000, 1))


def enlarged(config: ConfigDict) -> tuple[Deferred, Deferred]:
    """The 8x8 digits, each pixel as many."""
    to = [Enlarge(config.data.image_size)]
    return deferred(config, lambda: digits("train"), lambda: digits("test"), to, to, channels=1)


def folder(config: ConfigDict) -> tuple[Deferred, Deferred]:
    """ImageNet's layout: train/<class>/* and val/<class>/*."""
    data, limit = config.data, config.evaluate.batches or None
    return imagenet(data.root, data.image_size, config.batch_size, config.seed, limit)


def deferred(
    config: ConfigDict,
    train: Callable[[], Source],
    unseen: Callable[[], Source],
    augment: Sequence[Transform] = (),
    prepare: Sequence[Transform] = (),
    channels: int = 3,
) -> tuple[Deferred, Deferred]:
    """Training batches and one pass over the others, read when the first batch is asked for."""
    size, side = config.batch_size, config.data.image_size
    row = {"image": ((side, side, channels), np.float32), "label": ((), np.int32)}
    limit = config.evaluate.batches or None

    def batches() -> IndexedData:
        return IndexedData(train(), size, config.seed, augment)

    def others() -> Epoch:
        return Epoch(unseen(), size, transforms=prepare, limit=limit)

    weighed = {**row, "weight": ((), np.float32)}
    return Deferred(batches, size, row), Deferred(others, size, weighed)
