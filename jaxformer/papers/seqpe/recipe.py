"""The recipe of a config: a plain decoder or ViT, its positions, and what it learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from jaxformer.data.base import DeviceData, Epoch, IndexedData, Numbered
from jaxformer.data.sources.image import digits
from jaxformer.data.sources.text import Text
from jaxformer.data.sources.tokenizers import NamedTokenizer
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator, perplexity
from jaxformer.models.lm import DecoderLM, decoder_lm
from jaxformer.models.transformer import Transformer, require
from jaxformer.models.vit import vit
from jaxformer.nn.attention import head_sizes
from jaxformer.nn.make import Make
from jaxformer.papers.seqpe.data import Canvas, LookBack
from jaxformer.papers.seqpe.encoder import SequentialPE, Strings
from jaxformer.papers.seqpe.model import (
    JOINS,
    AddSeqPE,
    GridPE,
    LayerPair,
    Pair,
    SamePair,
    SeqPE,
)
from jaxformer.papers.seqpe.sampler import Sampler
from jaxformer.papers.seqpe.task import Encoder, PositionTask, SequentialTask
from jaxformer.recipe import Batch, Data, Evaluator, Phase, Recipe
from jaxformer.tasks.classify import ClassifyTask
from jaxformer.tasks.language import LanguageTask
from jaxformer.train import optim
from jaxformer.train.updates import GradientUpdate

PAIRS = ("single", "multi", "none")
ENCODER = r"(scheme|position)/encoder/"  # parameters of g


def build(config: ConfigDict) -> Recipe:
    """The recipe of `config.data.task`."""
    tasks: dict[str, Callable[[ConfigDict], Recipe]] = {
        "look_back": look_back,
        "text": text,
        "digits": images,
        "encoder": encoder,
    }
    require("data.task", config.data.task, tasks)
    return tasks[config.data.task](config)


@dataclasses.dataclass(frozen=True)
class Positions:
    """SeqPE as a config has it: what a model takes of it, and what its training adds."""

    config: ConfigDict
    axes: int = 1

    @property
    def used(self) -> bool:
        return self.config.model.position == "seqpe"

    @property
    def trunk(self) -> Transformer:
        model = self.config.model
        names = ("width", "depth", "heads", "hidden", "mlp", "dropout", "scan", "remat", "dtype")
        position = "none" if self.used else model.position
        return Transformer(position=position, **{name: model[name] for name in names})

    @property
    def g(self) -> Make:
        """The encoder of digit strings."""
        model, positions = self.config.model, self.config.positions
        _, head_size = head_sizes(model.width, model.heads)
        out = head_size if model.one_vector else positions.width
        if model.join == "input_add" or (model.pair == "none" and not model.one_vector):
            out = model.width
        names = ("width", "heads", "depth", "dropout")
        return Make(
            SequentialPE,
            strings=Strings(positions.limit, self.axes),
            out=out,
            dtype=self.trunk.compute_dtype,
            **{name: positions[name] for name in names},
        )

    @property
    def pair(self) -> Make:
        """From vectors to what queries and keys are joined with."""
        model = self.config.model
        require("model.join", model.join, JOINS)
        heads = 1 if model.one_vector else model.heads
        how = JOINS[model.join]
        if model.pair == "none":
            return Make(SamePair, heads=heads, how=how)
        _, head_size = head_sizes(model.width, model.heads)
        return Make(Pair, heads=heads, head_size=head_size, how=how)

    @property
    def scheme(self) -> Make | None:
        model = self.config.model
        require("model.pair", model.pair, PAIRS)
        if not self.used or model.join == "input_add":
            return None
        pair = None if model.pair == "multi" else self.pair
        return Make(SeqPE if self.axes == 1 else GridPE, encoder=self.g, pair=pair)

    @property
    def mixer(self) -> Make | None:
        """Attention with pairs of its own, where every layer has them."""
        if self.scheme is None or self.config.model.pair != "multi":
            return None
        return Make(LayerPair, pair=self.pair, mixer=self.trunk.attention())

    def alone(self, path: tuple[str, ...], block: tuple[int, ...]) -> PositionTask:
        """What trains the encoder of a model whose scheme is at `path`."""
        positions = self.config.positions
        names = ("starts", "shift_rate", "pool", "candidates", "near", "compared")
        sampler = Sampler(
            Strings(positions.limit, self.axes), block, **{name: positions[name] for name in names}
        )
        if self.config.batch_size % positions.starts:
            raise ConfigError(
                f"batch_size={self.config.batch_size}: must be a multiple of the "
                f"positions.starts={positions.starts} that its rows are shared out to"
            )
        weights = (positions.contrast, positions.transfer)
        encoder = Encoder(self.g(), path)
        return PositionTask(encoder, sampler, self.config.model.heads, weights, positions.beta)

    def task(self, task: Any, path: tuple[str, ...], block: tuple[int, ...]) -> Any:
        """`task` on a model whose scheme is at `path`, with shifts and losses of positions."""
        return SequentialTask(task, self.alone(path, block)) if self.used else task

    def recipe(self, task: Any, train: Data, evaluators: Sequence[Evaluator], unit: str) -> Recipe:
        """One phase; the gradients of g and of the rest are clipped each by itself."""
        config = self.config
        if not self.used:
            update = GradientUpdate.of(task, config)
            return Recipe(
                task, [Phase("train", config.steps, train, update)], evaluators, unit=unit
            )
        train = Numbered(train, config.seed)
        groups = (optim.Group(ENCODER, weight_decay=0.0), optim.Group(f"^(?!.*{ENCODER})"))
        update = GradientUpdate.of(task, config, groups)
        phases = [Phase("train", config.steps, train, update)]
        return Recipe(task, phases, evaluators, unit=unit)


def language_model(positions: Positions, vocabulary: int, length: int, tied: bool) -> DecoderLM:
    """The plain decoder with these positions."""
    lm = decoder_lm(
        positions.trunk,
        vocabulary=vocabulary,
        length=length,
        tied=tied,
        mixer=positions.mixer,
        scheme=positions.scheme,
    )
    if positions.used and positions.scheme is None:
        return dataclasses.replace(lm, position=Make(AddSeqPE, encoder=positions.g))
    return lm


def look_back(config: ConfigDict) -> Recipe:
    """A decoder that says what came three tokens before, asked about longer sequences too."""
    data, positions = config.data, Positions(config)
    longest = max(data.length, *data.lengths)
    inner = ClassifyTask(language_model(positions, data.vocabulary, longest, tied=False))
    path = ("scheme",) if positions.scheme else ("position",)
    task = positions.task(inner, path, (data.length,))
    train = DeviceData(LookBack(data.length, data.vocabulary), config.batch_size, config.seed)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 4

    def evaluator(length: int) -> MeanEvaluator:
        rows = LookBack(length, data.vocabulary)
        unseen = DeviceData(rows, config.batch_size, config.seed + 2**31)
        return MeanEvaluator(inner, unseen, f"length_{length}", every, batches)

    return positions.recipe(task, train, [evaluator(n) for n in data.lengths], "tokens")


def text(config: ConfigDict) -> Recipe:
    """A language model on text, evaluated on longer windows too."""
    data, positions = config.data, Positions(config)
    vocabulary = data.vocabulary
    model = language_model(positions, vocabulary, max(data.length, *data.lengths), tied=True)
    inner = LanguageTask(model, NamedTokenizer(data.tokenizer))
    path = ("scheme",) if positions.scheme else ("position",)
    task = positions.task(inner, path, (data.length,))
    source = Text(data.text, data.tokenizer, vocabulary, data.validation)
    train = source.train(data.length, config.batch_size, config.seed)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or None
    evaluators = [
        MeanEvaluator(
            inner,
            source.held_out(length, config.batch_size, batches),
            f"length_{length}",
            every,
            None,
            {"perplexity": perplexity},
        )
        for length in data.lengths
    ]
    return positions.recipe(task, train, evaluators, "tokens")


def encoder(config: ConfigDict) -> Recipe:
    """The encoder alone, on its two losses: which candidate is the nearest?"""
    task = Positions(config).alone(("scheme",), (config.data.length,))
    rows, seed = config.batch_size, config.seed
    train, fresh = (Numbered(DeviceData(_no_rows, rows), s) for s in (seed, seed + 2**31))
    every, batches = config.evaluate.every or "end", config.evaluate.batches or 16
    evaluator = MeanEvaluator(task, fresh, "fresh", every, batches)
    update = GradientUpdate.of(task, config)
    return Recipe(task, [Phase("train", config.steps, train, update)], [evaluator], unit="steps")


def _no_rows(step_key: jax.Array, row_keys: jax.Array) -> Batch:
    del step_key, row_keys
    return {}


def images(config: ConfigDict) -> Recipe:
    """A ViT on the 8x8 digits, a patch for each pixel, evaluated on larger canvases too."""
    data, positions = config.data, Positions(config, axes=2)
    if config.model.join == "input_add":
        raise ConfigError("model.join='input_add': is for sequences; allowed here: attn_*")
    size = 8 if positions.used else max(8, *data.lengths)
    model = vit(
        positions.trunk,
        image_size=size,
        patch=1,
        classes=10,
        mixer=positions.mixer,
        scheme=positions.scheme,
    )
    inner = ClassifyTask(model)
    task = positions.task(inner, ("encoder", "scheme"), (8, 8))
    train = IndexedData(digits("train"), config.batch_size, config.seed)
    every, batches = config.evaluate.every or "end", config.evaluate.batches or None
    evaluators = [
        MeanEvaluator(
            inner,
            Epoch(digits("test"), config.batch_size, 0, (Canvas(size),), batches),
            f"size_{size}",
            every,
        )
        for size in data.lengths
    ]
    return positions.recipe(task, train, evaluators, "images")
