"""The recipe of a config: a small language model, trained on the synthetic stream."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData
from jaxformer.data.sources.topics import Topics
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate

UNSEEN, LATER = 2**31, 2**30  # added to a seed: documents of the test, and of the second phase


def build(config: ConfigDict) -> Recipe:
    """Next-token prediction of documents; nothing in training is about few-shot tasks.

    First the mappings of documents stay, until recall is learned; then they drift, so that it
    learns to trust the latest pairs most. From drifting ones alone it was not learned in 1,400
    steps.
    """
    trunk = Transformer(**dict(config.model))
    stream = stream_of(config)
    task = LanguageTask(decoder_lm(trunk, vocabulary=stream.vocabulary, length=stream.length))

    def drawn(stream: Topics, part: int) -> DeviceData:
        return DeviceData(stream, config.batch_size, config.seed + part)

    later = config.copy_and_resolve_references()
    with later.unlocked():
        later.steps = config.drifting.steps
        later.optim.learning_rate = config.drifting.learning_rate
    staying = dataclasses.replace(stream, drift=0.0)
    phases = [
        Phase("stay", config.steps, drawn(staying, 0), GradientUpdate.of(task, config)),
        Phase("drift", later.steps, drawn(stream, LATER), GradientUpdate.of(task, later)),
    ]
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 8
    derived = {"perplexity": perplexity}
    evaluator = MeanEvaluator(task, drawn(stream, UNSEEN), "fresh", every, batches, derived)
    return Recipe(task, phases, [evaluator], unit="tokens")


def stream_of(config: ConfigDict) -> Topics:
    """The stream of a config, in the language of its seed."""
    return Topics(**dict(config.data), seed=config.seed)
