"""The recipe of a config: a small language model, trained on the synthetic stream."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.data.sources.topics import Topics
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate

UNSEEN = 2**31  # added to a seed: documents that no training draws


def build(config: ConfigDict) -> Recipe:
    """Next-token prediction of documents; nothing in training is about few-shot tasks."""
    trunk = Transformer(**dict(config.model))
    stream = stream_of(config)
    task = LanguageTask(decoder_lm(trunk, vocabulary=stream.vocabulary, length=stream.length))
    train = DeviceData(stream, config.batch_size, config.seed)
    unseen = DeviceData(stream, config.batch_size, config.seed + UNSEEN)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 8
    derived = {"perplexity": perplexity}
    evaluator = MeanEvaluator(task, unseen, "fresh", every, batches, derived)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit="tokens")


def stream_of(config: ConfigDict) -> Topics:
    """The stream of a config, in the language of its seed."""
    return Topics(**dict(config.data), seed=config.seed)
