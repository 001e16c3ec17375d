"""Flowformer: linear attention as a flow network with conserved flows (ICML 2022, 2202.06258)."""

from __future__ import annotations

from collections.abc import Callable

from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData, Epoch, IndexedData
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.recall import Recall
from jaxformer.data.sources.text import NamedTokenizer, Text
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.lm import DecoderLM, decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.nn.linear_attention import LinearAttention
from jaxformer.nn.make import Make
from jaxformer.papers.flowformer.model import FlowAttention
from jaxformer.recipe import Phase, Recipe, Task
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate

CLAIMS = ()


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.data.task`: text, recall or digits."""
    tasks: dict[str, Callable[[ConfigDict], Recipe]] = {
        "text": text,
        "recall": recall,
        "digits": vision,
    }
    require("data.task", config.data.task, tasks)
    return tasks[config.data.task](config)


def mixer(model: ConfigDict) -> Make | None:
    """The mixer that `model.mixer` names; None is softmax attention."""
    require("model.mixer", model.mixer, ("flow", "linear", "softmax"))
    if model.mixer == "flow":
        return Make(
            FlowAttention,
            heads=model.heads,
            clamp=model.clamp or None,
            compete=model.compete,
            allocate=model.allocate,
        )
    return Make(LinearAttention, heads=model.heads) if model.mixer == "linear" else None


def trunk(model: ConfigDict) -> Transformer:
    names = ("width", "depth", "heads", "hidden", "mlp", "norm", "position", "dropout", "scan")
    return Transformer(**{name: model[name] for name in (*names, "remat", "dtype")})


def language_model(config: ConfigDict) -> DecoderLM:
    model = config.model
    return decoder_lm(
        trunk(model),
        vocabulary=model.vocabulary,
        length=config.data.length,
        tied=model.tied,
        mixer=mixer(model),
    )


def training(config: ConfigDict, task: Task, data) -> list[Phase]:
    update = GradientUpdate(
        task,
        optim.build(config.optim, config.steps),
        config.gradient.accumulate,
        config.gradient.ema or None,
    )
    return [Phase("train", config.steps, data, update)]


def text(config: ConfigDict) -> Recipe:
    """A language model on text."""
    data = config.data
    task = LanguageTask(language_model(config), NamedTokenizer(data.tokenizer))
    source = Text(data.text, data.tokenizer, config.model.vocabulary, data.validation)
    held_out = source.held_out(data.length, config.batch_size, config.evaluate.batches or None)
    every = config.evaluate.every or "end"
    evaluator = MeanEvaluator(
        task, held_out, "validation", every, derived={"perplexity": perplexity}
    )
    train = source.train(data.length, config.batch_size, config.seed)
    return Recipe(task, training(config, task, train), [evaluator], unit="tokens")


def recall(config: ConfigDict) -> Recipe:
    """The same language model on associative recall; accuracy of the answers."""
    task = LanguageTask(language_model(config))
    rows = Recall(config.data.length, config.data.pairs, config.model.vocabulary)
    train = DeviceData(rows, config.batch_size, config.seed)
    fresh = DeviceData(rows, config.batch_size, config.seed + 2**31)
    evaluator = MeanEvaluator(task, fresh, "validation", batches=config.evaluate.batches)
    return Recipe(task, training(config, task, train), [evaluator], unit="answers")


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
    task = ClassifyTask(model)
    train = IndexedData(digits("train"), config.batch_size, config.seed)
    evaluator = MeanEvaluator(task, Epoch(digits("test"), config.batch_size), "test")
    return Recipe(task, training(config, task, train), [evaluator], unit="images")
