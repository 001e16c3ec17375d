"""The experiments behind the claims."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.papers.tega.cells import KNOWLEDGE, answer_arrays, cells, reciprocal_ranks
from jaxformer.papers.tega.formula import reversed_operands
from jaxformer.papers.tega.queries import Queries
from jaxformer.papers.tega.recipe import Corpus, corpus_of
from jaxformer.papers.tega.tokens import Vocabulary, rows
from jaxformer.recipe import Batch, Claim, Findings, Recipe, TrainState
from jaxformer.train.sweep import Sweep

PLAIN = {"model__typed": False, "model__guide": "none"}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "APE": {"model__position": "ape", **PLAIN},
    "RPE": PLAIN,
    "TEGA": {},
}
SEEDS = 3  # models of each arm, trained at once on the same graph and queries
CELLS = ("id_known", "id_inferred", "ood_known", "ood_inferred")
TITLES = ("ID(Q)/ID(K)", "ID(Q)/OOD(K)", "OOD(Q)/ID(K)", "OOD(Q)/OOD(K)")


def entailment(lab: Lab) -> Findings:
    """Four cells of filtered MRR for three encoders, and with all operands in the other order."""
    found: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, float]] = {}
    types: dict[str, dict[str, float]] = {}
    for arm, fields in ARMS.items():
        recipe = lab.recipe(**fields)
        sweep = Sweep(lambda recipe=recipe: recipe, [lab.seed + i for i in range(SEEDS)])
        state = lab.fit(sweep.recipe)
        config = ConfigDict(recipe.config)
        corpus = corpus_of(config)
        score = functools.partial(mrr, config, corpus, sweep, state)
        each = score(corpus.test)
        turned = score(
            {
                kind: [q.turned(reversed_operands) for q in queries]
                for kind, queries in corpus.test.items()
            }
        )
        found[arm], spread[arm] = (over(each, f) for f in (np.mean, np.std))
        found[arm]["id_known_turned"] = over(turned, np.mean)["id_known"]
        types[arm] = {t: found[arm][f"{t}_known"] for t in corpus.test}
    frequency = frequent(corpus)
    values = {f"{arm}_{cell}": row[cell] for arm, row in found.items() for cell in CELLS}
    values |= {f"frequency_{cell}": frequency[cell] for cell in CELLS}
    values |= {
        "rpe_gain": found["RPE"]["ood_known"] - found["APE"]["ood_known"],
        "tega_gain": found["TEGA"]["ood_known"] - found["RPE"]["ood_known"],
        "over_frequency": min(
            row[cell] - frequency[cell] for row in found.values() for cell in CELLS
        ),
        **{f"{arm}_turned": row["id_known_turned"] - row["id_known"] for arm, row in found.items()},
    }
    tables = {
        "MRR": [
            {"model": arm, **{t: row[c] for t, c in zip(TITLES, CELLS, strict=True)}}
            for arm, row in {**found, "frequency": frequency}.items()
        ],
        "Standard deviation over models": [
            {"model": arm, **{t: row[c] for t, c in zip(TITLES, CELLS, strict=True)}}
            for arm, row in spread.items()
        ],
        "ID(Q)/ID(K) with operands in the other order": [
            {"model": arm, "as trained": row["id_known"], "reversed": row["id_known_turned"]}
            for arm, row in found.items()
        ],
        "Known answers, by type": [
            {"type": name, **{arm: row[name] for arm, row in types.items()}} for name in corpus.test
        ],
    }
    return Findings(values, tables, [draw(lab, found, spread, frequency, types)])


def mrr(
    config: ConfigDict, corpus: Corpus, sweep: Sweep, state: TrainState, queries: Queries
) -> list[dict[str, float]]:
    """Of every member: the MRR of each type and cell."""
    vocabulary = Vocabulary(config.data.entities, config.data.relations)
    every = [q.query for kind in queries.values() for q in kind]
    tokens = rows(every, vocabulary, config.data.length, config.data.syntax)
    batch = tokens | answer_arrays(queries, config.data.entities)

    def one(recipe: Recipe, alone: TrainState) -> Any:
        key = jax.random.key(0)
        scores = recipe.task.predict(alone.params, alone.extra, batch, key=key)
        return reciprocal_ranks(scores, batch)

    ranks = jax.device_get(jax.jit(functools.partial(sweep.each, one))(state))
    count = len(sweep.seeds)
    return [averaged(jax.tree.map(lambda x, i=i: x[i], ranks), batch, corpus) for i in range(count)]


def averaged(ranks: Any, batch: Batch, corpus: Corpus) -> dict[str, float]:
    """By type and by cell, of reciprocal ranks and whether there are any."""
    names = (*corpus.train_types, *corpus.test_types)
    by_type = {}
    for knowledge in KNOWLEDGE:
        values, has = (np.asarray(x) for x in ranks[knowledge])
        for i, name in enumerate(names):
            of = has & (batch["kind"] == i)
            if of.any():
                by_type[f"{name}_{knowledge}"] = float(values[of].mean())
    return cells(by_type, corpus.train_types, corpus.test_types) | by_type


def over(members: Sequence[Mapping[str, float]], statistic: Any) -> dict[str, float]:
    """A statistic over members of each of their numbers."""
    return {name: float(statistic([one[name] for one in members])) for name in members[0]}


def frequent(corpus: Corpus) -> dict[str, float]:
    """The same numbers where every query is answered by how often entities answer in training."""
    counts = np.zeros(corpus.entities, np.float32)
    for queries in corpus.train.values():
        for one in queries:
            counts[one.answers] += 1 / len(one.answers)
    batch = answer_arrays(corpus.test, corpus.entities)
    scores = jnp.broadcast_to(counts, batch["answers"].shape)
    return averaged(reciprocal_ranks(scores, batch), batch, corpus)


def draw(
    lab: Lab,
    found: Mapping[str, Mapping[str, float]],
    spread: Mapping[str, Mapping[str, float]],
    frequency: Mapping[str, float],
    types: Mapping[str, Mapping[str, float]],
) -> Any:
    """The four cells, the other order of operands, and every type."""
    path = lab.figure("cells")
    fig, axes = figure(path, 3, width=5)
    width = 0.8 / len(found)
    for i, (arm, row) in enumerate(found.items()):
        at = np.arange(len(CELLS)) + (i - 1) * width
        bars = [row[cell] for cell in CELLS]
        axes[0, 0].bar(at, bars, width, yerr=[spread[arm][cell] for cell in CELLS], label=arm)
        both = [row["id_known"], row["id_known_turned"]]
        axes[0, 1].bar(np.arange(2) + (i - 1) * width, both, width, label=arm)
        axes[0, 2].plot(list(types[arm].values()), "o-", label=arm)
    for i, cell in enumerate(CELLS):
        axes[0, 0].plot([i - 0.45, i + 0.45], [frequency[cell]] * 2, "k:")
    axes[0, 0].set_xticks(range(len(CELLS)), TITLES, fontsize=8)
    axes[0, 1].set_xticks(range(2), ["as trained", "operands reversed"])
    axes[0, 2].set_xticks(range(len(types["RPE"])), list(types["RPE"]), fontsize=8)
    titles = ("by cell (dotted: frequency)", "ID(Q)/ID(K)", "known answers by type")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set(title=title, ylabel="filtered MRR", ylim=(0, 1))
        axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    return path


def claim(says: str, source: str, value: str, baseline: str, **limit: float) -> Claim:
    return Claim(says, source, entailment, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "On unseen query types about known facts, relative positions beat absolute ones (MRR).",
        "section 4, table of positions",
        "rpe_gain",
        "APE",
        at_least=0.05,
    ),
    claim(
        "There TEGA is no worse than relative positions (MRR).",
        "section 5",
        "tega_gain",
        "RPE",
        at_least=-0.01,
    ),
    claim(
        "All encoders are ahead of the frequency of answers in all cells (the least, MRR).",
        "section 4",
        "over_frequency",
        "how often an entity answers in training",
        at_least=0.0,
    ),
)
