"""The recipe of a config: one causal language model, its attention by a pattern, on three texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData, Epoch, IndexedData
from jaxformer.data.sources.image import digit_sequences
from jaxformer.data.sources.repeat import Repeat
from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator, bits, perplexity
from jaxformer.kernels.attention import Full, Window
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.nn.attention import Attention
from jaxformer.nn.make import Make
from jaxformer.papers.combiner.model import (
    Axial,
    CombinerAttention,
    Fixed,
    Local,
    Logsparse,
    Mixture,
)
from jaxformer.recipe import Data, Phase, Recipe
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate

PATTERNS = {
    "fixed": Fixed,
    "logsparse": Logsparse,
    "axial": Axial,
    "mixture": Mixture,
    "local": Local,  # this and those below are what the patterns are compared with
}
PLAIN = ("softmax", "window")
LEVELS = 18  # tokens of a digit: 17 grey levels and a start


class Sequences(NamedTuple):
    """What to train on and what to evaluate on."""

    train: Data
    unseen: Data
    unit: str
    batches: int | None = None  # of endless data
    tokenizer: Any = None
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = MappingProxyType({})


def build(config: ConfigDict) -> Recipe:
    """Next-token prediction on the sequences that `config.data.task` names."""
    kinds = {"digits": digits, "repeat": repeat, "text": text}
    require("data.task", config.data.task, kinds)
    data, model = kinds[config.data.task](config), config.model
    names = ("width", "depth", "heads", "hidden", "mlp", "position", "dropout", "scan", "remat")
    trunk = Transformer(**{name: model[name] for name in (*names, "dtype")})
    language_model = decoder_lm(
        trunk,
        vocabulary=model.vocabulary,
        length=config.data.length,
        tied=model.tied,
        mixer=mixer(model),
    )
    task = LanguageTask(language_model, data.tokenizer)
    update = GradientUpdate.of(task, config)
    every = config.evaluate.every or "end"
    evaluator = MeanEvaluator(task, data.unseen, "validation", every, data.batches, data.derived)
    phase = Phase("train", config.steps, data.train, update)
    return Recipe(task, [phase], [evaluator], unit=data.unit)


def mixer(model: ConfigDict) -> Make:
    """The attention that `model.pattern` names; "window" sees `model.segment` positions back."""
    require("model.pattern", model.pattern, (*PATTERNS, *PLAIN))
    if model.pattern in PLAIN:
        window = Window(model.segment - 1, 0) if model.pattern == "window" else Full()
        heads, dropout = model.heads, model.attention_dropout
        return Make(Attention, heads=heads, use_bias=False, window=window, dropout=dropout)
    parts = {} if model.pattern == "logsparse" else {"segment": model.segment}
    pattern = Make(PATTERNS[model.pattern], dropout=model.attention_dropout, **parts)
    return Make(CombinerAttention, heads=model.heads, pattern=pattern)


def holds(config: ConfigDict, tokens: int) -> None:
    """Raise a `ConfigError` where the vocabulary has not so many tokens."""
    if config.model.vocabulary < tokens:
        raise ConfigError(
            f"model.vocabulary={config.model.vocabulary}: data.task={config.data.task!r} has "
            f"{tokens} tokens; give at least {tokens}"
        )


def digits(config: ConfigDict) -> Sequences:
    """The density of 8x8 digits, pixel after pixel, in bits per dimension."""
    holds(config, LEVELS)
    train = IndexedData(digit_sequences("train"), config.batch_size, config.seed)
    limit = config.evaluate.batches or None
    unseen = Epoch(digit_sequences("test"), config.batch_size, limit=limit)
    return Sequences(train, unseen, "pixels", derived={"bits_per_dim": bits})


def repeat(config: ConfigDict) -> Sequences:
    """A random sequence that is then repeated."""
    data, batches = config.data, config.evaluate.batches or 8
    holds(config, data.symbols)
    rows = Repeat(data.length, data.period or data.length // 2, data.symbols)
    train = DeviceData(rows, config.batch_size, config.seed)
    unseen = DeviceData(rows, config.batch_size, config.seed + 2**31)
    return Sequences(train, unseen, "tokens", batches)


def text(config: ConfigDict) -> Sequences:
    """Text."""
    data, size = config.data, config.batch_size
    source = Text(data.text, data.tokenizer, config.model.vocabulary, data.validation)
    train = source.train(data.length, size, config.seed)
    unseen = source.held_out(data.length, size, config.evaluate.batches or None)
    tokenizer, derived = NamedTokenizer(data.tokenizer), {"perplexity": perplexity}
    return Sequences(train, unseen, "tokens", tokenizer=tokenizer, derived=derived)
