"""The recipe of a config: a graph, queries that are trained on and tested, an encoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxformer.data.base import Data, Deferred, Epoch, ShuffledArrays
from jaxformer.data.sources.knowledge_graph import KnowledgeGraph, observe, read_stats, ruled_graph
from jaxformer.errors import ConfigError
from jaxformer.models.transformer import Transformer, require
from jaxformer.papers.tega.cells import AnsweredQueries, FourCells
from jaxformer.papers.tega.model import EntailmentTask, encoder
from jaxformer.papers.tega.queries import Queries, Sampler, read_queries
from jaxformer.papers.tega.tokens import SYNTAXES, Vocabulary, rows
from jaxformer.papers.tega.types import TYPES
from jaxformer.recipe import Batch, Phase, Recipe
from jaxformer.train.optim import Group
from jaxformer.train.updates import GradientUpdate

TEST_ROWS = 64  # queries of a test batch
GAMMA = r"/gamma$"  # the parameters of guides


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A graph made of rules, and queries about it, as a seed has them."""

    entities: int
    out_degree: int
    share: float  # of the triples that are observed
    train_types: tuple[str, ...]
    test_types: tuple[str, ...]
    train_queries: int  # of each type
    test_queries: int
    seed: int

    def draw(self, part: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, part])

    @functools.cached_property
    def full(self) -> KnowledgeGraph:
        return ruled_graph(self.entities, self.out_degree, self.draw(0))

    @functools.cached_property
    def observed(self) -> KnowledgeGraph:
        return observe(self.full, self.share, self.draw(1))

    @functools.cached_property
    def train(self) -> Queries:
        """Queries grounded in what is observed, with the answers there."""
        sampler = Sampler(self.observed, self.observed)
        return self._sampled([sampler], self.train_types, self.train_queries, 2)

    @functools.cached_property
    def test(self) -> Queries:
        """Queries grounded in the full graph; half of them have an answer to be inferred."""
        samplers = [Sampler(self.full, self.observed, inferred) for inferred in (False, True)]
        types = (*self.train_types, *self.test_types)
        return self._sampled(samplers, types, self.test_queries // 2, 3)

    def _sampled(
        self, samplers: Sequence[Sampler], types: Sequence[str], count: int, part: int
    ) -> Queries:
        draw = self.draw(part)
        return {kind: [q for s in samplers for q in s.queries(kind, count, draw)] for kind in types}


@dataclasses.dataclass(frozen=True, eq=False)
class OneAnswer:
    """Batches of `queries` (with their number as "query"), each with one of its answers.

    The answers of query q are `answers[ends[q - 1] : ends[q]]`; which one a row has is drawn anew.
    """

    queries: ShuffledArrays
    answers: np.ndarray
    ends: np.ndarray

    @property
    def batch_size(self) -> int:
        return self.queries.batch_size

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        found = dict(self.queries.batch(step, rows))
        query = found.pop("query")
        draw = np.random.default_rng([self.queries.seed, 1, step]).random(self.batch_size)[rows]
        start = np.where(query > 0, self.ends[query - 1], 0)
        chosen = start + (draw * (self.ends[query] - start)).astype(int)
        return {**found, "answer": self.answers[chosen].astype(np.int32)}

    def spec(self) -> Batch:
        raise NotImplementedError("known to `Deferred`")


def one_answer(queries: Queries, tokens: Mapping[str, np.ndarray], size: int, seed: int) -> Data:
    """Queries in random order, of all types together, those without an answer left out."""
    found = [q.answers for kind in queries.values() for q in kind]
    counts = np.array([len(x) for x in found])
    keep = np.flatnonzero(counts)
    if not len(keep):
        raise ConfigError("data: no training query has an answer")
    arrays = {name: x[keep] for name, x in tokens.items()} | {"query": np.arange(len(keep))}
    answers = np.concatenate([found[i] for i in keep])
    return OneAnswer(ShuffledArrays(arrays, size, seed), answers, np.cumsum(counts[keep]))


def build(config: ConfigDict) -> Recipe:
    """Train on observed answers of seen types; test all types, by known and inferred answers."""
    data, model = config.data, config.model
    require("data.syntax", data.syntax, SYNTAXES)
    for name in (*data.train_types, *data.test_types):
        if not data.folder:
            require("data.train_types and data.test_types", name, TYPES)
    corpus = corpus_of(config)
    vocabulary = Vocabulary(data.entities, data.relations)
    names = ("width", "depth", "heads", "hidden", "order", "dropout", "scan", "remat", "dtype")
    trunk = Transformer(position="none", **{name: model[name] for name in names})
    variant = {n: model[n] for n in ("position", "longest", "typed", "guide", "split_terms")}
    task = EntailmentTask(
        encoder(trunk, vocabulary, length=data.length, **variant), model.smoothing
    )

    def queries(part: str) -> Queries:
        if data.folder:
            return folder_queries(config, part)
        return corpus.train if part == "train" else corpus.test

    def tokens(found: Queries) -> dict[str, np.ndarray]:
        every = [q.query for kind in found.values() for q in kind]
        return rows(every, vocabulary, data.length, data.syntax)

    def training() -> Data:
        found = queries("train")
        return one_answer(found, tokens(found), config.batch_size, config.seed)

    def testing() -> Data:
        found = queries("test")
        return Epoch(AnsweredQueries(tokens(found), found, data.entities), TEST_ROWS)

    row = {
        "tokens": ((data.length,), np.int32),
        "spans": ((data.length, 2), np.int32),
    }
    of_answers = {name: ((data.entities,), np.bool_) for name in ("answers", "observed")}
    test_row = row | of_answers | {"kind": ((), np.int32), "weight": ((), np.float32)}
    test = FourCells(
        task,
        Deferred(testing, TEST_ROWS, test_row),
        tuple(data.train_types),
        tuple(data.test_types),
        every=config.evaluate.every or "end",
    )
    train = Deferred(training, config.batch_size, row | {"answer": ((), np.int32)})
    groups = (Group(GAMMA, config.guide_rate), Group(f"^(?!.*{GAMMA})"))
    update = GradientUpdate.of(task, config, groups)
    return Recipe(task, [Phase("train", config.steps, train, update)], [test], unit="queries")


def corpus_of(config: ConfigDict) -> Corpus:
    """The graph of a config and the queries about it."""
    data = config.data
    names = ("entities", "out_degree", "train_queries", "test_queries")
    return Corpus(
        share=data.observed,
        train_types=tuple(data.train_types),
        test_types=tuple(data.test_types),
        seed=config.seed,
        **{name: data[name] for name in names},
    )


def folder_queries(config: ConfigDict, part: str) -> Queries:
    """`<part>_queries.json` of a folder with `stats.txt`; types are named as they are there.

    Raises:
        ConfigError: the files cannot be read, are of another graph, or lack a type.
    """
    data, folder = config.data, Path(config.data.folder).expanduser()
    sizes = read_stats(folder / "stats.txt")
    if sizes != (data.entities, data.relations):
        raise ConfigError(
            f"data.entities={data.entities}, data.relations={data.relations}: {folder} has "
            f"{sizes[0]} and {sizes[1]}; give these"
        )
    found = read_queries(folder / f"{part}_queries.json")
    types = data.train_types if part == "train" else (*data.train_types, *data.test_types)
    names = {name: name if name in found else TYPES.get(name, name) for name in types}
    missing = [name for name, there in names.items() if there not in found]
    if missing:
        raise ConfigError(f"data.folder: {folder} has no queries of type {missing[0]!r}")
    return {name: found[there] for name, there in names.items()}
