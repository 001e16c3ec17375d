"""The recipe of a config: a ViT with or without the layer, on objects, films or folders."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Deferred, DeviceData, Epoch, IndexedData
from jaxformer.data.sources.ftpv import Pairs, Trajectories, Triplets
from jaxformer.data.sources.imagenet import imagenet
from jaxformer.data.sources.views import CLASSES, Films, Views
from jaxformer.evaluation.alignment import Alignment
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.encoder import Classifier
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.make import Make
from jaxformer.papers.tokens3d.model import Control, Tokens3D, viewpoint_vit
from jaxformer.recipe import Data, Phase, Recipe, Task
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.contrastive import AlignTask
from jaxformer.train.updates import GradientUpdate

UNSEEN = 2**31  # added to a seed: rows that no training draws


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.data.task`."""
    kinds = {"views": views, "films": films, "folder": folder, "ftpv": ftpv}
    require("data.task", config.data.task, kinds)
    return kinds[config.data.task](config)


def classifier(config: ConfigDict, classes: int) -> Classifier:
    """The model of a config."""
    model = config.model
    names = ("width", "heads", "hidden", "dropout", "drop_path", "remat", "dtype")
    trunk = Transformer(depth=model.depth_blocks, **{name: model[name] for name in names})
    sizes = {"image_size": config.data.image_size, "patch": model.patch, "classes": classes}
    return viewpoint_vit(trunk, layer=layer(model), at=model.at, **sizes)


def layer(model: ConfigDict) -> Make | None:
    """What stands between the blocks."""
    require("model.layer", model.layer, ("tokens3d", "concat", "control", "none"))
    if model.layer == "none":
        return None
    if model.layer == "control":
        return Make(Control)
    concat = model.layer == "concat"
    return Make(Tokens3D, source=model.source, depth=model.depth, concat=concat)


def views(config: ConfigDict) -> Recipe:
    """Objects from azimuths that were trained on, and from others."""
    data, size = config.data, config.batch_size
    task = ClassifyTask(classifier(config, CLASSES), config.model.label_smoothing)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 16
    evaluators = []
    for name in ("seen", "unseen"):
        rows = DeviceData(Views(data.image_size, *data[name]), size, config.seed + UNSEEN)
        evaluators.append(MeanEvaluator(task, rows, name, every, batches))
    train = DeviceData(Views(data.image_size, *data.seen), size, config.seed)
    return finish(config, task, train, evaluators)


def folder(config: ConfigDict) -> Recipe:
    """ImageNet's layout: train/<class>/* and val/<class>/*."""
    data, limit = config.data, config.evaluate.batches or None
    task = ClassifyTask(classifier(config, data.classes), config.model.label_smoothing)
    train, unseen = imagenet(data.root, data.image_size, config.batch_size, config.seed, limit)
    evaluator = MeanEvaluator(task, unseen, "validation", config.evaluate.every or "end")
    return finish(config, task, train, [evaluator])


def films(config: ConfigDict) -> Recipe:
    """Two views of one rendered happening, moment by moment."""
    data, size = config.data, config.batch_size
    task = AlignTask(classifier(config, config.model.embed_dim))
    train = DeviceData(Films(data.image_size, data.frames, data.near), size, config.seed)
    whole = Films(data.image_size, data.frames, data.near, whole=True)
    unseen = DeviceData(whole, size, config.seed + UNSEEN)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 1
    return finish(config, task, train, [Alignment(task, unseen, batches, every)])


def ftpv(config: ConfigDict) -> Recipe:
    """Films in folders, train/ and test/, the latter all views."""
    data, size, side = config.data, config.batch_size, config.data.image_size
    task = AlignTask(classifier(config, config.model.embed_dim))

    def train() -> IndexedData:
        source = Triplets(Trajectories(f"{data.root}/train", data.train_views), side, data.near)
        return IndexedData(source, size, config.seed, [source.draw])

    def unseen() -> Epoch:
        limit = config.evaluate.batches or None
        return Epoch(Pairs(Trajectories(f"{data.root}/test"), side), size, limit=limit)

    row = {"views": ((2, 3, side, side, 3), np.float32)}
    whole = {"frames": ((2, data.frames, side, side, 3), np.float32), "weight": ((), np.float32)}
    every = config.evaluate.every or "end"
    evaluator = Alignment(task, Deferred(unseen, size, whole), every=every)
    return finish(config, task, Deferred(train, size, row), [evaluator])


def finish(config: ConfigDict, task: Task, train: Data, evaluators: Any) -> Recipe:
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], evaluators, unit="images")
