"""The recipe of a config: a knowledge base, its split, a decoder, and a probe of each kind."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, FixedData, ShuffledArrays
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.models.transformer import Transformer, require
from jaxformer.papers.grokked_reasoning import facts, hard, language
from jaxformer.papers.grokked_reasoning.facts import Comparison, Composition, Tables
from jaxformer.papers.grokked_reasoning.language import Form, Items, Vocabulary
from jaxformer.papers.grokked_reasoning.model import AnswerTask, language_model
from jaxformer.recipe import Phase, Recipe
from jaxformer.train.updates import GradientUpdate

TASKS = ("composition", "comparison", "complex")
QUESTIONS = "test_hard"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What a seed makes of a knowledge base: all facts, those trained on, and probes."""

    base: Composition | Comparison
    phi: float
    seed: int
    probes: int = 3000  # rows of each kind, at most
    share: float | None = None  # of comparisons that are given: the complex task

    @property
    def forms(self) -> tuple[Form, Form]:
        return language.forms(self.base, self.share is not None)

    def draw(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, part])

    @functools.cached_property
    def tables(self) -> Tables:
        return self.base.tables(self.draw(0))

    @functools.cached_property
    def train(self) -> Tables:
        if self.share is None:
            return facts.training(self.tables, self.phi, self.draw(1))
        return hard.training(self.tables, self.share, self.draw(1))

    @property
    def kinds(self) -> tuple[str, ...]:
        more = () if self.share is None else ("mixed", QUESTIONS)
        return (*facts.ATOMIC, *facts.INFERRED, *more)

    def probe(self, kind: str) -> np.ndarray:
        """Rows of a kind: of what is trained on, where it is of that, else of the test."""
        if kind == QUESTIONS:
            rows = hard.questions(self.train, self.base.entities)
            return hard.balanced(rows, max(self.probes // 3, 1), self.draw(3))
        rows = self.train.get(kind, self.tables[kind])
        return facts.sample(rows, self.probes, self.draw(2))

    def form(self, kind: str) -> Form:
        return self.forms[0] if kind in facts.ATOMIC else self.forms[1]

    def items(self, vocabulary: Vocabulary) -> Items:
        """All that is trained on."""
        parts = [language.items(vocabulary, t, self.form(k)) for k, t in self.train.items()]
        return language.joined(parts, vocabulary.pad)


def build(config: ConfigDict) -> Recipe:
    """Train on facts and a part of what follows from them; ask for all kinds."""
    data, model = config.data, config.model
    corpus = corpus_of(config)
    if data.folder:
        vocabulary, train, probes = language.read(Path(data.folder), data.pad_vocab_to)
        kinds = {name: (lambda items=items: items) for name, items in probes.items()}
    else:
        vocabulary = Vocabulary(language.symbols(corpus.base), data.pad_vocab_to)
        kinds = {name: functools.partial(_probe, corpus, vocabulary, name) for name in corpus.kinds}
    trunk = Transformer(mlp="gelu_tanh", **model)
    task = AnswerTask(language_model(trunk, vocabulary.size, data.context), vocabulary)

    def training() -> Data:
        items = train if data.folder else corpus.items(vocabulary)
        return ShuffledArrays(items.arrays(data.context), config.batch_size, config.seed)

    row = {
        "tokens": ((data.context + 1,), np.int32),
        "weight": ((data.context,), np.float32),
    }
    every, rows = config.evaluate.every or "end", -(-data.probes // 64) * 64

    def asked(make: object) -> Data:
        def fixed() -> Data:
            arrays = make()[: data.probes].arrays(data.context)  # type: ignore[operator]
            room = rows - len(arrays["tokens"])  # of weight 0, so that devices share the rows
            return FixedData({k: np.pad(x, ((0, room), (0, 0))) for k, x in arrays.items()})

        return Deferred(fixed, rows, row)

    evaluators = [
        MeanEvaluator(task, asked(make), name, every, batches=1) for name, make in kinds.items()
    ]
    update = GradientUpdate.of(task, config)
    phase = Phase("train", config.steps, Deferred(training, config.batch_size, row), update)
    return Recipe(task, [phase], evaluators, unit="tokens")


def _probe(corpus: Corpus, vocabulary: Vocabulary, kind: str) -> Items:
    return language.items(vocabulary, corpus.probe(kind), corpus.form(kind))


def corpus_of(config: ConfigDict) -> Corpus:
    """The knowledge base of a config and its split."""
    data = config.data
    require("data.task", data.task, TASKS)
    base: Composition | Comparison
    if data.task == "composition":
        base = Composition(data.entities, data.relations, data.out_degree, data.ood, data.iid)
    else:
        base = Comparison(data.entities, data.attributes, data.levels, data.ood, data.iid)
    share = data.share if data.task == "complex" else None
    return Corpus(base, data.phi, config.seed, data.probes, share)
