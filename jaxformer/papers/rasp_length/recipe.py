"""The recipe of a config: a decoder trained on packed short examples, asked about longer ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from jaxformer.data.base import Data, DeviceData
from jaxformer.data.packing import Alone, Format, Packed
from jaxformer.evaluation.lengths import LengthSweep
from jaxformer.models.lm import decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.papers.rasp_length import formats
from jaxformer.recipe import Phase, Recipe
from jaxformer.tasks.language import LanguageTask
from jaxformer.train.updates import GradientUpdate

UNSEEN = 2**31  # added to a seed: examples that no training draws

TASKS: Mapping[str, Callable[[ConfigDict], Format]] = {
    "count": lambda data: formats.Count(data.symbols),
    "unique_copy": lambda data: formats.Copy(data.symbols),
    "repeat_copy": lambda data: formats.Copy(2, unique=False),
    "sort": lambda data: formats.Sort(data.symbols),
    "mode": lambda data: formats.Mode(data.symbols, scratchpad=data.scratchpad),
    "parity": lambda data: formats.Parity(2),
    "parity_with_hints": lambda data: formats.ParityWithHints(4, data.hints),
    "and": lambda data: formats.And(2, zeros=tuple(data.zeros)),
    "addition": lambda data: formats.Addition(10, data.hints, reverse=data.reverse),
}


def build(config: ConfigDict) -> Recipe:
    """Next-token prediction of the answers of `config.data.task`."""
    data, model = config.data, dict(config.model)
    format = format_of(data)
    trunk = Transformer(**model)
    lm = decoder_lm(trunk, vocabulary=format.vocabulary, length=data.row, tied=False)
    task = LanguageTask(lm)
    packed = Packed(format, data.shortest, data.longest, data.row, data.shift, data.reset)
    train = DeviceData(packed, config.batch_size, config.seed)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 4
    sweep = LengthSweep(task, unseen(config, format), data.lengths, batches, every=every)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], [sweep], unit="tokens")


def format_of(data: ConfigDict) -> Format:
    """The format of a config's `data`.

    Raises:
        ConfigError: `data.task` is none of `TASKS`.
    """
    require("data.task", data.task, TASKS)
    return TASKS[data.task](data)


def unseen(config: ConfigDict, format: Format) -> Callable[[int], Data]:
    """Fresh examples of a length, one to a row."""

    def examples(length: int) -> Data:
        rows = Alone(format, length, config.data.row)
        return DeviceData(rows, config.data.test_rows, config.seed + UNSEEN)

    return examples
