"""The plain decoder language model on text: GPT-2 and Llama by their sizes."""

from __future__ import annotations

from ml_collections import ConfigDict

from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate


def build(config: ConfigDict) -> Recipe:
    """Next-token prediction; every field of `config.model` but two is one of `Transformer`."""
    data = config.data
    model = dict(config.model)
    vocabulary, tied = model.pop("vocabulary"), model.pop("tied")
    trunk = Transformer(**model)
    language_model = decoder_lm(trunk, vocabulary=vocabulary, length=data.length, tied=tied)
    task = LanguageTask(language_model, NamedTokenizer(data.tokenizer))
    source = Text(data.text, data.tokenizer, vocabulary, data.validation)
    train = source.train(data.length, config.batch_size, config.seed)
    unseen = source.held_out(data.length, config.batch_size, config.evaluate.batches or None)
    update = GradientUpdate.of(task, config)
    every = config.evaluate.every or "end"
    evaluator = MeanEvaluator(task, unseen, "validation", every, None, {"perplexity": perplexity})
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit="tokens")
