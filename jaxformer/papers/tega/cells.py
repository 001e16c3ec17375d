"""The four cells of the test: seen or unseen types of queries, known or inferred answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.evaluation.evaluators import placed_batches
from jaxformer.evaluation.ranking import reciprocal_rank
from jaxformer.papers.tega.queries import Queries, Query
from jaxformer.recipe import (
    Batch,
    Data,
    EvalContext,
    Extra,
    Mean,
    Metrics,
    Params,
    Predicts,
    TrainState,
)
from jaxformer.train.updates import merge

KNOWLEDGE = ("known", "inferred")  # ID(K) and OOD(K)


def answer_arrays(queries: Queries, entities: int) -> dict[str, np.ndarray]:
    """Arrays "answers" and "observed" (Q, N) bool, and "kind" (Q,), the number of the type."""
    rows = AnsweredQueries({}, queries, entities)
    every = [rows[i] for i in range(len(rows))]
    return {name: np.stack([row[name] for row in every]) for name in every[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class AnsweredQueries:
    """A source of queries with their answers, written out over all entities only when asked for."""

    tokens: Mapping[str, np.ndarray]
    queries: Queries
    entities: int

    @functools.cached_property
    def _rows(self) -> list[tuple[int, Query]]:
        return [(i, q) for i, found in enumerate(self.queries.values()) for q in found]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kind, query = self._rows[index]
        answers, observed = np.zeros((2, self.entities), bool)
        answers[query.answers] = True
        observed[query.observed] = True
        inputs = {name: x[index] for name, x in self.tokens.items()}
        return {**inputs, "answers": answers, "observed": observed, "kind": np.int32(kind)}


def reciprocal_ranks(scores_QxN: jax.Array, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
    """(Q,) filtered reciprocal ranks of known and of inferred answers, and which queries have any.

    Wrong are entities that answer on neither graph. Those that answer on the observed graph alone,
    as under a negation, are neither right nor wrong.
    """
    answers, observed = (jnp.asarray(batch[name]) for name in ("answers", "observed"))
    targets = {"known": answers & observed, "inferred": answers & ~observed}
    wrong = ~(answers | observed)
    return {name: reciprocal_rank(scores_QxN, x, wrong) for name, x in targets.items()}


def cells(
    by_type: Mapping[str, float], seen: Sequence[str], unseen: Sequence[str]
) -> dict[str, float]:
    """The mean over types of each cell, of {"<type>_known": mrr, ...}; types without any left out.

    "id_known" is ID(Q)/ID(K), "ood_inferred" is OOD(Q)/OOD(K).
    """
    found = {}
    for query, types in (("id", seen), ("ood", unseen)):
        for knowledge in KNOWLEDGE:
            values = [by_type[f"{t}_{knowledge}"] for t in types if f"{t}_{knowledge}" in by_type]
            if values:
                found[f"{query}_{knowledge}"] = float(np.mean(values))
    return found


@dataclasses.dataclass(frozen=True)
class FourCells:
    """The filtered MRR by type and by cell, on data with `answer_arrays` beside its inputs."""

    task: Predicts
    data: Data
    seen: tuple[str, ...]
    unseen: tuple[str, ...]
    name: str = "mrr"
    every: int | Literal["phase_end", "end"] = "end"

    @functools.cached_property
    def _score(self) -> Callable[..., Metrics]:
        def score(params: Params, extra: Extra, batch: Batch) -> Metrics:
            scores = self.task.predict(params, extra, batch, key=jax.random.key(0))
            found = {}
            for name, (ranks, has) in reciprocal_ranks(scores, batch).items():
                for i, kind in enumerate((*self.seen, *self.unseen)):
                    of_kind = (batch["kind"] == i) & has & (batch["weight"] > 0)
                    found[f"{kind}_{name}"] = Mean.of(ranks, of_kind)
            return found

        return jax.jit(score)

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]:
        totals: Metrics = {}
        for batch in placed_batches(self.data, context):
            found = jax.device_get(self._score(state.params, state.extra, batch))
            totals = merge(totals, found)
        by_type = {name: float(x.value()) for name, x in totals.items() if x.weight}
        return cells(by_type, self.seen, self.unseen) | by_type
