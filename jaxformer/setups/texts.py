"""Whose model is compressed, and on what it is measured: encoders of text pairs.

A config has `model` (a plain encoder) or `huggingface` (the `config.json` of an imported one), and
`data`: entailment made by rule, or a folder of a task of GLUE or of SQuAD.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, Epoch, IndexedData, Source
from jaxformer.data.sources import glue, squad
from jaxformer.data.sources.entailment import LABELS, VOCABULARY, Entailment
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import Whole
from jaxformer.evaluation.scores import SCORES, Scores
from jaxformer.evaluation.spans import SpanScores
from jaxformer.interop.huggingface import port_of
from jaxformer.models.encoder import Classifier, token_classifier
from jaxformer.models.transformer import Transformer
from jaxformer.nn.embed import TypedEmbed
from jaxformer.nn.heads import EveryPosition, SpanHead
from jaxformer.nn.make import Make
from jaxformer.recipe import FiniteData
from jaxformer.tasks.answers import AnswerTask
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.regress import RegressTask
from jaxformer.tasks.spans import SpanTask

TRUNK = ("width", "depth", "heads", "hidden", "order", "dropout", "scan", "remat", "dtype")
RULE, SQUAD = "entailment", "squad"  # what is no task of GLUE


def text_task(config: ConfigDict, model: Any) -> AnswerTask:
    """`model` as the labels of the data ask: of classes, of a score, or of a span.

    Raises:
        ConfigError: no such task.
    """
    if config.data.task == SQUAD:
        return SpanTask(model)
    scored = config.data.task != RULE and not glue.task_named(config.data.task).labels
    return RegressTask(model) if scored else ClassifyTask(model)


def text_model(config: ConfigDict) -> Classifier:
    """The encoder and its head in float32: the imported one, or one of the config's sizes.

    Raises:
        ConfigError: what was imported is no encoder of texts that has such a head.
    """
    spans = config.data.task == SQUAD
    found = _imported(config) if config.huggingface else _made(config)
    if spans:
        return dataclasses.replace(
            found, classes=2, pool=Make(EveryPosition), head=Make(SpanHead), dropout=0.0
        )
    return dataclasses.replace(found, classes=_outputs(config))


def _outputs(config: ConfigDict) -> int:
    """Classes, or 1 of a score."""
    if config.data.task == RULE:
        return len(LABELS)
    return max(len(glue.task_named(config.data.task).labels), 1)


def _imported(config: ConfigDict) -> Classifier:
    port = port_of(config.huggingface.to_dict(), "config.huggingface", config.model.dtype)
    heads = (ClassifyTask, SpanTask) if config.data.task == SQUAD else (ClassifyTask,)
    if port.task not in heads or "inputs" not in port.batch:
        raise ConfigError(
            f"config.huggingface.architectures={config.huggingface.get('architectures')!r}: must "
            "be a classifier of texts, such as BertForSequenceClassification, or for "
            "data.task='squad' one that answers questions"
        )
    if port.length is not None and config.data.length > port.length:
        raise ConfigError(
            f"data.length={config.data.length}: the imported model reads at most {port.length}"
        )
    return port.model  # type: ignore[return-value]


def _made(config: ConfigDict) -> Classifier:
    model, data = config.model, config.data
    trunk = Transformer(**{name: model[name] for name in TRUNK})
    vocabulary = VOCABULARY if data.task == RULE else data.vocabulary
    found = token_classifier(trunk, vocabulary=vocabulary, length=data.length, classes=1)
    if data.task == RULE:
        return found
    embed = Make(TypedEmbed, vocabulary=vocabulary, width=model.width, dtype=model.dtype)
    return dataclasses.replace(found, encoder=found.encoder.replace(embed=embed))


class Texts(NamedTuple):
    """What is trained and what is tested on, and what is measured there over all rows at once."""

    train: Data
    test: FiniteData
    whole: Whole | None = None


def text_data(config: ConfigDict) -> Texts:
    """As `config.data` says; of files nothing is read yet."""
    data, rows = config.data, config.batch_size
    limit = config.evaluate.batches or None
    if data.task == RULE:
        law = {"near": data.near, "length": data.length}
        train = Entailment(data.train, config.seed, **law)
        test = Entailment(data.test, config.seed, data.train, **law)
        return Texts(
            IndexedData(train, rows, config.seed), Epoch(test, data.test_rows, limit=limit)
        )
    types = not config.huggingface or config.huggingface.model_type == "bert"
    tokenizer = NamedTokenizer(data.tokenizer)
    learn: Source
    unseen: Source
    whole: Whole | None
    if data.task == SQUAD:
        row = squad.row(data.length, types)
        options = (tokenizer, data.length, data.stride, types)
        learn = squad.Squad(data.folder, "train", *options)
        unseen = squad.Squad(data.folder, "dev", *options)
        whole = SpanScores(unseen)
    else:
        row = glue.row(data.task, data.length, types)
        learn, unseen = (
            glue.Glue(data.task, data.folder, split, tokenizer, data.length, types)
            for split in ("train", "dev")
        )
        names = tuple(name for name in glue.task_named(data.task).scores if name in SCORES)
        whole = Scores(names) if names else None

    def make_train() -> Any:
        return IndexedData(learn, rows, config.seed)

    def make_test() -> Any:
        return Epoch(unseen, data.test_rows, limit=limit)

    weighed = {"weight": ((), np.float32), **row}
    test = Deferred(make_test, data.test_rows, weighed)
    return Texts(Deferred(make_train, rows, row), test, whole)
