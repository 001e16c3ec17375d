"""The recipe of a config: one trunk, one of three mixers, and the task that it learns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData, Epoch, IndexedData, Source
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.listops import CLASSES, TOKENS, ListOps
from jaxformer.data.sources.recall import PairRecall, Recall
from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.encoder import feature_classifier, token_classifier
from jaxformer.models.lm import DecoderLM, decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.nn.linear_attention import LinearAttention
from jaxformer.nn.make import Make
from jaxformer.papers.flowformer.model import FlowAttention
from jaxformer.recipe import Data, Phase, Recipe, Task
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.data.task`, which is a key of `tasks`."""
    tasks: dict[str, Callable[[ConfigDict], Recipe]] = {
        "text": text,
        "queries": queries,
        "recall": recall,
        "listops": listops,
        "digits": vision,
    }
    require("data.task", config.data.task, tasks)
    return tasks[config.data.task](config)


def mixer(model: ConfigDict) -> Make:
    """The mixer that `model.mixer` names."""
    require("model.mixer", model.mixer, ("flow", "linear", "softmax"))
    if model.mixer == "flow":
        return Make(
            FlowAttention,
            heads=model.heads,
            clamp=model.clamp or None,
            compete=model.compete,
            allocate=model.allocate,
        )
    if model.mixer == "linear":
        return Make(LinearAttention, heads=model.heads)
    return trunk(model).attention()


def trunk(model: ConfigDict) -> Transformer:
    names = ("width", "depth", "heads", "hidden", "mlp", "norm", "position", "dropout", "scan")
    return Transformer(**{name: model[name] for name in (*names, "remat", "dtype")})


def finish(
    config: ConfigDict,
    task: Task,
    train: Data,
    unseen: Data,
    *,
    unit: str,
    batches: int | None = None,
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = MappingProxyType({}),
) -> Recipe:
    """One phase of gradient steps, evaluated on `batches` of unseen data (all of a finite one)."""
    update = GradientUpdate.of(task, config)
    every = config.evaluate.every or "end"
    evaluator = MeanEvaluator(task, unseen, "validation", every, batches, derived)
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit=unit)


def endless(config: ConfigDict, task: Task, rows: Callable, unit: str) -> Recipe:
    """New rows at every step, and others to evaluate on."""
    train = DeviceData(rows, config.batch_size, config.seed)
    unseen = DeviceData(rows, config.batch_size, config.seed + 2**31)
    batches = config.evaluate.batches or 16
    return finish(config, task, train, unseen, unit=unit, batches=batches)


# Causal language models.


def language_model(config: ConfigDict) -> DecoderLM:
    model = config.model
    return decoder_lm(
        trunk(model),
        vocabulary=model.vocabulary,
        length=config.data.length,
        tied=model.tied,
        mixer=mixer(model),
    )


def text(config: ConfigDict) -> Recipe:
    """A language model on text."""
    data = config.data
    task = LanguageTask(language_model(config), NamedTokenizer(data.tokenizer))
    source = Text(data.text, data.tokenizer, config.model.vocabulary, data.validation)
    train = source.train(data.length, config.batch_size, config.seed)
    unseen = source.held_out(data.length, config.batch_size, config.evaluate.batches or None)
    derived = {"perplexity": perplexity}
    return finish(config, task, train, unseen, unit="tokens", derived=derived)


def queries(config: ConfigDict) -> Recipe:
    """The same language model on associative recall with many questions; answers are scored."""
    task = LanguageTask(language_model(config))
    rows = Recall(config.data.length, config.data.pairs, config.model.vocabulary)
    return endless(config, task, rows, "answers")


# Bidirectional classifiers, mean-pooled.


def recall(config: ConfigDict) -> Recipe:
    """Associative recall as the choice of a value for the key that is asked for."""
    data = config.data
    asked = data.asked or data.length - data.pairs
    rows = PairRecall(data.length, data.pairs, data.key_count, data.value_count, asked)
    model = feature_classifier(
        trunk(config.model), length=data.length, classes=data.value_count, mixer=mixer(config.model)
    )
    return endless(config, ClassifyTask(model), rows, "questions")


def listops(config: ConfigDict) -> Recipe:
    """The value of a nested list (LRA)."""
    data = config.data
    model = token_classifier(
        trunk(config.model),
        vocabulary=len(TOKENS),
        length=data.length,
        classes=CLASSES,
        mixer=mixer(config.model),
    )
    train = ListOps(data.size, data.length)
    test = ListOps(data.size // 20, data.length, seed=1)
    return finite(config, ClassifyTask(model), train, test, "lists")


def vision(config: ConfigDict) -> Recipe:
    """A ViT on the 8x8 digits, mean-pooled."""
    model = vit(
        trunk(config.model),
        image_size=8,
        patch=config.data.patch,
        classes=10,
        pool="mean",
        mixer=mixer(config.model),
    )
    return finite(config, ClassifyTask(model), digits("train"), digits("test"), "images")


def finite(config: ConfigDict, task: Task, train: Source, test: Source, unit: str) -> Recipe:
    """Epochs over `train`, evaluated on all of `test` or on its first batches."""
    unseen = Epoch(test, config.batch_size, limit=config.evaluate.batches or None)
    data = IndexedData(train, config.batch_size, config.seed)
    return finish(config, task, data, unseen, unit=unit)
