"""Whose model is compressed, and on what it is measured: encoders of text pairs.

A config has `model` (a plain encoder) or `huggingface` (the `config.json` of an imported one), and
`data`: entailment made by rule, or a folder of GLUE.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, Epoch, IndexedData
from jaxformer.data.sources import glue
from jaxformer.data.sources.entailment import LABELS, VOCABULARY, Entailment
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.errors import ConfigError
from jaxformer.interop.huggingface import port_of
from jaxformer.models.encoder import Classifier, token_classifier
from jaxformer.models.transformer import Transformer
from jaxformer.nn.embed import TypedEmbed
from jaxformer.nn.make import Make
from jaxformer.recipe import FiniteData
from jaxformer.tasks.classify import ClassifyTask

TRUNK = ("width", "depth", "heads", "hidden", "order", "dropout", "scan", "remat", "dtype")


def text_model(config: ConfigDict) -> Classifier:
    """The classifier in float32: the imported one, or one of the config's sizes.

    Raises:
        ConfigError: what was imported is no classifier of texts.
    """
    classes = len(labels(config))
    if config.huggingface:
        port = port_of(config.huggingface.to_dict(), "config.huggingface", config.model.dtype)
        if port.task is not ClassifyTask or "inputs" not in port.batch:
            raise ConfigError(
                f"config.huggingface.model_type={config.huggingface.get('model_type')!r}: must be "
                "a classifier of texts, such as bert"
            )
        if port.length is not None and config.data.length > port.length:
            raise ConfigError(
                f"data.length={config.data.length}: the imported model reads at most {port.length}"
            )
        return dataclasses.replace(port.model, classes=classes)
    model, data = config.model, config.data
    trunk = Transformer(**{name: model[name] for name in TRUNK})
    vocabulary = data.vocabulary if is_glue(config) else VOCABULARY
    found = token_classifier(trunk, vocabulary=vocabulary, length=data.length, classes=classes)
    encoder = found.encoder
    if is_glue(config):
        embed = Make(TypedEmbed, vocabulary=vocabulary, width=model.width, dtype=model.dtype)
        encoder = encoder.replace(embed=embed)
    return dataclasses.replace(found, encoder=encoder)


def is_glue(config: ConfigDict) -> bool:
    return config.data.task != "entailment"


def labels(config: ConfigDict) -> tuple[str, ...]:
    """The classes of the data.

    Raises:
        ConfigError: no such task, or one whose labels are scores.
    """
    if not is_glue(config):
        return LABELS
    found = glue.task_named(config.data.task).labels
    if not found:
        raise ConfigError(f"data.task={config.data.task!r}: has scores, and no classes to tell")
    return found


def text_data(config: ConfigDict) -> tuple[Data, FiniteData]:
    """What is trained and what is tested on; of GLUE nothing is read yet."""
    data, rows = config.data, config.batch_size
    limit = config.evaluate.batches or None
    labels(config)
    if not is_glue(config):
        train = Entailment(data.train, config.seed, length=data.length)
        test = Entailment(data.test, config.seed, data.train, length=data.length)
        return IndexedData(train, rows, config.seed), Epoch(test, data.test_rows, limit=limit)
    types = not config.huggingface or config.huggingface.model_type == "bert"
    row = glue.row(data.task, data.length, types)
    tokenizer = NamedTokenizer(data.tokenizer)

    def source(split: str) -> glue.Glue:
        return glue.Glue(data.task, data.folder, split, tokenizer, data.length, types)

    def make_train() -> Any:
        return IndexedData(source("train"), rows, config.seed)

    def make_test() -> Any:
        return Epoch(source("dev"), data.test_rows, limit=limit)

    weighed = {"weight": ((), np.float32), **row}
    return Deferred(make_train, rows, row), Deferred(make_test, data.test_rows, weighed)
