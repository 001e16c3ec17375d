"""The recipe of a config: a phase on drawn keys, one on all of them, and evaluation by passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from jaxformer.data.base import Data, Epoch, IndexedData
from jaxformer.data.sources.image import digits, divided_digits
from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.ensemble import Ensemble
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.papers.ssa.model import mixer
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.data.task`."""
    require("data.task", config.data.task, ("digits", "text"))
    return images(config) if config.data.task == "digits" else text(config)


def trunk(model: ConfigDict) -> Transformer:
    names = ("width", "depth", "heads", "hidden", "mlp", "norm", "position", "dropout", "scan")
    return Transformer(**{name: model[name] for name in (*names, "remat", "dtype")})


def images(config: ConfigDict) -> Recipe:
    """The 64 pixels of a digit as a sequence, from few images."""

    def task(model: ConfigDict) -> ClassifyTask:
        inside = trunk(model)
        parts = {"image_size": 8, "patch": 1, "classes": 10, "pool": "mean"}
        return ClassifyTask(vit(inside, **parts, mixer=mixer(inside, model)))

    rows, limit = config.batch_size, config.evaluate.batches or None
    few, rest = divided_digits(config.data.images, config.seed)
    test = Epoch(digits("test"), rows, limit=limit)
    recipe = phases(config, task, IndexedData(few, rows, config.seed), test, unit="images")
    # One pass over three times as many images as those that ensembles are tried on.
    unseen = Epoch(rest, rows, limit=limit)
    every = config.evaluate.every or "phase_end"
    evaluators = [*recipe.evaluators, MeanEvaluator(recipe.task, unseen, "unseen", every)]
    return dataclasses.replace(recipe, evaluators=evaluators)


def text(config: ConfigDict) -> Recipe:
    """A language model on text."""
    data = config.data

    def task(model: ConfigDict) -> LanguageTask:
        inside = trunk(model)
        sizes = {"vocabulary": data.vocabulary, "length": data.length}
        lm = decoder_lm(inside, **sizes, mixer=mixer(inside, model))
        return LanguageTask(lm, NamedTokenizer(data.tokenizer))

    source = Text(data.text, data.tokenizer, data.vocabulary, data.validation)
    train = source.train(data.length, config.batch_size, config.seed)
    unseen = source.held_out(data.length, config.batch_size, config.evaluate.batches or None)
    return phases(config, task, train, unseen, unit="tokens")


def phases(
    config: ConfigDict,
    task: Callable[[ConfigDict], Any],
    train: Data,
    unseen: Data,
    unit: str,
) -> Recipe:
    """Drawn keys for most of the steps, all keys for the rest; the parameters are the same."""
    share = config.dense.share
    if not 0.0 <= share < 1.0:
        raise ConfigError(f"dense.share={share}: must be in [0, 1)")
    drawn, dense = task(config.model), task(ConfigDict({**config.model.to_dict(), "draw": "dense"}))
    last = round(share * config.steps)
    first = config.copy_and_resolve_references()
    first.steps = config.steps - last
    second = config.copy_and_resolve_references()
    second.steps = last
    second.optim.learning_rate *= config.dense.rate_scale
    second.optim.warmup_steps = 0
    steps = [Phase("ssa", first.steps, train, GradientUpdate.of(drawn, first))]
    if last:
        steps.append(Phase("dense", last, train, GradientUpdate.of(dense, second)))
    derived = {"perplexity": perplexity} if unit == "tokens" else {}
    every = config.evaluate.every or "phase_end"
    evaluators = [MeanEvaluator(dense, unseen, "dense", every, derived=derived)]
    if config.ensemble.passes:
        for name, passes in (("one pass", 1), ("ensemble", config.ensemble.passes)):
            voices = dataclasses.replace(drawn, model=Ensemble(drawn.model, passes))
            evaluators.append(MeanEvaluator(voices, unseen, name, every))
    return Recipe(dense, steps, evaluators, unit=unit)
