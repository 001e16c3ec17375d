"""A model imported from a Hugging Face folder, evaluated and trained on like any other."""

from __future__ import annotations

from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Deferred, Epoch, IndexedData, Source
from jaxformer.data.sources.image import ImageFolder
from jaxformer.data.sources.jsonl import JsonLines, Labelled, Pairs
from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.data.transforms import Normalize
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.interop.huggingface import port_of
from jaxformer.recipe import Data, FiniteData, Phase, Recipe
from jaxformer.tasks.rewrite import RewriteTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """The recipe of the model that `config.huggingface`, a `config.json`, describes.

    It reads what that model reads: text, folders of images, or lines of JSON. `data.train` and
    `data.test` name files of one's own; a language model has text without.
    """
    port = port_of(config.huggingface.to_dict(), "config.huggingface", config.dtype)
    tokenizer = NamedTokenizer(config.data.tokenizer)
    task: Any = port.make_task(tokenizer)
    unit = "tokens"
    if "image" in port.batch:
        unit, (train, unseen) = "images", _images(config, port.batch["image"].shape[1:])
    elif isinstance(task, RewriteTask):
        train, unseen = _lines(config, Pairs(tokenizer, config.data.length))
    elif "inputs" in port.batch:
        unit, (train, unseen) = "texts", _lines(config, Labelled(tokenizer, config.data.length))
    else:
        train, unseen = _text(config)
    every = config.evaluate.every or "end"
    derived = {"perplexity": perplexity} if unit == "tokens" else {}
    evaluator = MeanEvaluator(task, unseen, "validation", every, None, derived)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit=unit)


def _text(config: ConfigDict) -> tuple[Data, FiniteData]:
    data = config.data
    source = Text(
        data.train or "python-stdlib",
        data.tokenizer,
        config.huggingface.vocab_size,
        data.test or data.validation,
    )
    train = source.train(data.length, config.batch_size, config.seed)
    return train, source.held_out(data.length, config.batch_size, config.evaluate.batches or None)


def _images(config: ConfigDict, shape: tuple[int, int, int]) -> tuple[Data, FiniteData]:
    """Folders of images, normalised as those that the model has seen."""
    size, _, channels = shape
    normalize = Normalize(tuple(config.data.mean), tuple(config.data.std))
    row = {"image": (shape, np.float32), "label": ((), np.int32)}

    def read(path: str) -> Source:
        return ImageFolder(path, size, "RGB" if channels == 3 else "L")

    return _split(config, read, row, normalize)


def _lines(config: ConfigDict, form: Labelled | Pairs) -> tuple[Data, FiniteData]:
    return _split(config, lambda path: JsonLines(path, form), dict(form.row))


def _split(config: ConfigDict, read: Any, row: Any, *transforms: Any) -> tuple[Data, FiniteData]:
    """`data.train` to train on, `data.test` to evaluate on."""
    rows, limit = config.batch_size, config.evaluate.batches or None

    def source(field: str) -> Source:
        if not config.data[field]:
            raise ConfigError(f"config.data.{field}: names no files; give what the model reads")
        return read(config.data[field])

    def train() -> IndexedData:
        return IndexedData(source("train"), rows, config.seed, transforms)

    def test() -> Epoch:
        return Epoch(source("test"), rows, transforms=transforms, limit=limit)

    weighed = {"weight": ((), np.float32), **row}
    return Deferred(train, rows, row), Deferred(test, rows, weighed)
