"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxformer.evaluation.claims import Lab, over
from jaxformer.evaluation.report import figure
from jaxformer.papers.grokked_reasoning import facts, language, probes
from jaxformer.papers.grokked_reasoning.language import Vocabulary
from jaxformer.papers.grokked_reasoning.model import altered, reciprocal_ranks
from jaxformer.papers.grokked_reasoning.recipe import corpus_of
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe, TrainState

ARMS: Mapping[str, Mapping[str, Any]] = {
    "composition": {},
    "composition, phi 1": {"data__phi": 1.0},
    "comparison": {
        "data__task": "comparison",
        "data__entities": 200,
        "data__attributes": 1,
        "data__phi": 18.0,
        "optim__weight_decay": 1.0,
        "optim__schedule": "linear",
        "steps": 900,
    },
}
# Models of an arm, each on facts of its own: OOD comparisons are where they differ (.74 to 1.00).
MODELS = {"comparison": 6}
TRACED = 128  # facts that are looked into
SHOWN = ("train_inferred", "test_inferred_iid", "test_inferred_ood")


@dataclasses.dataclass(frozen=True)
class Curves:
    """The share of each kind of question that is answered in full, as training goes."""

    recipe: Recipe
    every: int
    name: str = "curves"
    rows: list[dict[str, float]] = dataclasses.field(default_factory=list, compare=False)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        found = {e.name: e(state, context)["exact"] for e in self.recipe.evaluators}
        self.rows.append({"step": int(state.step), **found})
        return found


def reasoning(lab: Lab) -> Findings:
    """Composition with many and few inferred facts, and comparison; then what is inside."""
    curves: dict[str, list[dict[str, float]]] = {}
    inside: dict[str, dict[str, np.ndarray]] = {}
    for arm, fields in ARMS.items():
        runs = [watched(each, fields) for each in lab.members(MODELS.get(arm, 1))]
        recipe, state, _ = runs[0]
        curves[arm] = [over(rows) for rows in zip(*(rows for *_, rows in runs), strict=True)]
        if arm != "composition, phi 1":
            inside[arm] = look_inside(ConfigDict(recipe.config), recipe, state)
    last = {arm: rows[-1] for arm, rows in curves.items()}
    iid, ood = SHOWN[1:]
    many, few, compared = (last[arm] for arm in ARMS)
    values = {
        "composition_iid": many[iid],
        "composition_gap": many[iid] - many[ood],
        "composition_ood_facts": many["ood_atomic"],
        "phi_gain": many[iid] - few[iid],
        "comparison_train": compared["train_inferred"],
        "comparison_iid": compared[iid],
        "comparison_ood": compared[ood],
    }
    table = {
        "Questions answered in full, at the end": [
            {"arm": arm, **{k: v for k, v in row.items() if k != "step"}}
            for arm, row in last.items()
        ]
    }
    for arm, found in inside.items():
        depth = len(next(iter(found.values())))
        table[f"Inside of {arm}: by layer that is read"] = [
            {"layer": i, **{name: float(x[i]) for name, x in found.items()}} for i in range(depth)
        ]
    return Findings(values, table, [draw(lab, curves, inside)])


def watched(
    lab: Lab, fields: Mapping[str, Any]
) -> tuple[Recipe, TrainState, list[dict[str, float]]]:
    """A trained model of an arm, and its curves to the end."""
    recipe = lab.recipe(**fields)
    watch = Curves(recipe, max(recipe.steps // 9, 1))
    state = lab.fit(dataclasses.replace(recipe, evaluators=[watch]))
    if watch.rows[-1]["step"] < recipe.steps:
        mesh = make_mesh()
        with jax.set_mesh(mesh):
            watch(state, EvalContext(mesh, "train"))
    return recipe, state, watch.rows


def look_inside(config: ConfigDict, recipe: Recipe, state: TrainState) -> dict[str, np.ndarray]:
    """Inverse ranks of symbols in the stream, and how often a patched state changes the answer.

    Of each layer, from the embedding (0) on; after the last nothing is patched.
    """
    corpus, draw = corpus_of(config), np.random.default_rng([config.seed, 4])
    vocabulary = Vocabulary(language.symbols(corpus.base), config.data.pad_vocab_to)
    rows = facts.sample(corpus.train["train_inferred"], TRACED, draw)

    def asked(rows: np.ndarray) -> np.ndarray:
        return language.questions(vocabulary, rows, corpus.form("train_inferred"))

    atomic = np.concatenate([corpus.tables[name] for name in facts.ATOMIC])
    if isinstance(corpus.base, facts.Composition):
        size = (corpus.base.entities, corpus.base.relations)
        tail = probes.tails(atomic, *size)
        bridge = tail[rows[:, 0], rows[:, 1]]
        symbols = {
            "bridge at r1": (1, [language.E.format(b) for b in bridge]),
            "r2 at r2": (2, [language.R.format(r) for r in rows[:, 2]]),
            "answer at r2": (2, [language.E.format(t) for t in rows[:, 3]]),
        }
        changes = probes.composition(corpus.tables, rows, *size, draw)
    else:
        size = (corpus.base.entities, corpus.base.attributes)
        value = np.zeros(size, int)
        value[atomic[:, 0], atomic[:, 1]] = atomic[:, 2]
        first, second = (value[rows[:, i], rows[:, 0]] for i in (1, 2))
        symbols = {
            "value 1 at e1": (2, [language.V.format(v) for v in first]),
            "value 2 at e2": (4, [language.V.format(v) for v in second]),
        }
        changes = probes.comparison(corpus.tables, rows, size, draw)

    model, params, inputs = recipe.task.model, jax.device_get(state.params), asked(rows)
    wanted = [
        (at, np.array([vocabulary.encode(x)[0] for x in names])) for at, names in symbols.values()
    ]
    ranks = np.asarray(jax.jit(lambda p, x: reciprocal_ranks(model, p, x, wanted))(params, inputs))
    found = {f"1/rank of {name}": ranks[:, i] for i, name in enumerate(symbols)}
    for name, other in changes.items():
        run = jax.jit(
            lambda p, x, y, valid, at=other.positions: altered(model, p, x, y, [at], valid)
        )
        share = np.asarray(run(params, inputs, asked(other.rows), other.valid))[:, 0]
        found[f"changed by {name}"] = np.append(share, np.nan)
    return found


def draw(lab: Lab, curves: Mapping[str, Any], inside: Mapping[str, Any]) -> Any:
    """Accuracy as training goes, and what patching each layer changes."""
    path = lab.figure("reasoning")
    fig, axes = figure(path, len(curves), 2, width=3.8)
    for axis, (arm, rows) in zip(axes[0], curves.items(), strict=True):
        for kind in SHOWN:
            axis.plot([r["step"] for r in rows], [r[kind] for r in rows], label=kind)
        axis.set(title=arm, xlabel="step", ylabel="answered", ylim=(-0.03, 1.03))
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    for axis, (arm, found) in zip(axes[1], inside.items(), strict=False):
        for name, by_layer in found.items():
            style = "o-" if name.startswith("changed") else "s:"
            axis.plot(range(len(by_layer)), by_layer, style, label=name)
        axis.set(title=f"inside of {arm}", xlabel="layer read", ylim=(-0.03, 1.03))
        axis.set_xticks(range(len(by_layer)))
        axis.legend(fontsize=7)
    axes[1, -1].remove()
    fig.savefig(path, dpi=110)
    return path


def claim(says: str, source: str, value: str, baseline: str, **limit: float) -> Claim:
    return Claim(says, source, reasoning, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "Questions of two hops over facts seen in training deductions are answered in part (of 1).",
        "section 3.2, figure 2",
        "composition_iid",
        "one of 50 entities: 0.02",
        at_least=0.35,
    ),
    claim(
        "They are answered more often than those over facts that no deduction used (difference).",
        "section 3.2, figure 2",
        "composition_gap",
        "those out of distribution",
        at_least=0.3,
    ),
    claim(
        "Although those facts themselves are known (share of them).",
        "section 3.1",
        "composition_ood_facts",
        "one of 50 entities: 0.02",
        at_least=0.8,
    ),
    claim(
        "More inferred facts for each fact, not more facts, make the difference (difference).",
        "section 3.2, figure 3",
        "phi_gain",
        "phi of 1, the same facts and steps",
        at_least=0.2,
    ),
    claim(
        "Comparisons in training are learned (of 1).",
        "section 4.2, figure 5",
        "comparison_train",
        "always the likeliest label: about 0.44",
        at_least=0.95,
    ),
    claim(
        "New comparisons of entities that training compared are answered.",
        "section 4.2, figure 5",
        "comparison_iid",
        "always the likeliest label: about 0.44",
        at_least=0.9,
    ),
    claim(
        "And so are, unlike in composition, those of entities that training never compared "
        f"(mean of {MODELS['comparison']} models).",
        "section 4.2, figure 5",
        "comparison_ood",
        "always the likeliest label: about 0.44",
        at_least=0.75,
    ),
)
