"""The recipe of a config: a task about positions, a tagger with or without C."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.data.sources.positions import PositionTask
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import Transformer
from jaxformer.papers.urpe.model import Buckets, Offsets, Unique, encoder, tagger
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Train on fresh sequences; evaluate on others."""
    data, model = config.data, config.model
    rows = PositionTask(data.task, data.length, data.vocabulary, data.identical, data.ignore_first)
    names = ("width", "depth", "heads", "hidden", "dropout", "scan", "remat", "dtype")
    trunk = Transformer(order="post", position="none", **{name: model[name] for name in names})
    inside = encoder(
        trunk,
        vocabulary=rows.tokens,
        offsets=offsets(model, data.length),
        position=model.position,
        shared=model.shared,
    )
    task = ClassifyTask(tagger(inside, rows.classes))
    train = DeviceData(rows, config.batch_size, config.seed)
    fresh = DeviceData(rows, config.batch_size, config.seed + 2**31)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 16
    evaluator = MeanEvaluator(task, fresh, "fresh", every, batches)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit="tokens")


def offsets(model: ConfigDict, length: int) -> Offsets:
    """What entries of the tables stand for."""
    kinds = {"unique": Unique(length), "buckets": Buckets(length, model.buckets, model.longest)}
    if model.offsets not in kinds:
        raise ConfigError(f"model.offsets={model.offsets!r}: must be one of {', '.join(kinds)}")
    return kinds[model.offsets]
