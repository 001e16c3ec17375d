"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.recipe import Claim, EvalContext, Evaluator, Findings, Recipe, TrainState

REPEATS = 3  # models of each kind, on other images and with other weights


@dataclasses.dataclass(frozen=True)
class Kept:
    """What evaluators found at the end of every phase."""

    evaluators: Sequence[Evaluator]
    found: list[dict[str, Any]]
    name: str = "kept"
    every: Literal["phase_end"] = "phase_end"

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        self.found.append({each.name: each(state, context) for each in self.evaluators})
        return {}


def measured(lab: Lab, recipe: Recipe) -> list[dict[str, Any]]:
    """{evaluator: its values} after each phase."""
    found: list[dict[str, Any]] = []
    lab.fit(dataclasses.replace(recipe, evaluators=[Kept(recipe.evaluators, found)]))
    return found


def digits(lab: Lab) -> Findings:
    """Dense training and training on a quarter of the keys, as many steps, on the same images."""
    rows: list[dict[str, Any]] = []
    for repeat in range(REPEATS):
        seed = REPEATS * lab.seed + repeat
        for draw in ("dense", "unbiased"):
            kept = measured(lab, lab.recipe(model__draw=draw, seed=seed))
            row = {"trained on": draw, "seed": seed}
            for phase, found in zip(("", ", tuned"), kept, strict=True):
                row |= {f"{name}{phase}": 100 * v["accuracy"] for name, v in found.items()}
            rows.append(row)
    mean = {
        (draw, name): statistics.mean(row[name] for row in rows if row["trained on"] == draw)
        for draw in ("dense", "unbiased")
        for name in rows[0]
        if name not in ("trained on", "seed")
    }
    dense = max(mean["dense", "unseen"], mean["dense", "unseen, tuned"])
    values = {
        "points_above_dense": mean["unbiased", "unseen, tuned"] - dense,
        "ensemble_above_one_pass": mean["unbiased", "ensemble"] - mean["unbiased", "one pass"],
        "ensemble_above_dense_pass": mean["unbiased", "ensemble"] - mean["unbiased", "dense"],
    }
    names = ("one pass", "ensemble", "dense", "unseen, tuned")
    path = _bars(lab, {name: mean["unbiased", name] for name in names} | {"dense training": dense})
    return Findings(values, {"Accuracy % on 360 test digits, and on all unseen": rows}, [path])


def _bars(lab: Lab, at: dict[str, float]) -> Path:
    path = lab.figure("digits")
    fig, ((axis,),) = figure(path, width=6)
    bars = axis.barh(list(at)[::-1], list(at.values())[::-1])
    axis.bar_label(bars, fmt="%.1f", padding=3)
    axis.set(xlabel="accuracy %", xlim=(min(at.values()) - 5, 100), title="trained on a quarter")
    fig.savefig(path, dpi=110)
    return path


def text(lab: Lab) -> Findings:
    """A byte language model, dense and on local draws with a short dense end."""
    found = {}
    for draw in ("dense", "local"):
        recipe = lab.load(f"{lab.paper}:text", seed=lab.seed, model__draw=draw)
        found[draw] = [row["dense"]["loss"] for row in measured(lab, recipe)]
    rows = [
        {"trained on": draw, "nats per byte": losses[-1], "before the dense end": losses[0]}
        for draw, losses in found.items()
    ]
    values = {"nats_above_dense": found["local"][-1] - found["dense"][-1]}
    return Findings(values, {"Bytes of Python's library": rows}, [])


CLAIMS = (
    Claim(
        says="A model that trained on a quarter of the keys, then shortly on all, tells digits at "
        "least as well as one that always saw all (points of accuracy, mean of three).",
        source="leaderboard entries: Swin-T on ImageNet, 81.89 against 81.3",
        experiment=digits,
        value="points_above_dense",
        at_least=-0.5,
        baseline="as many steps on all keys, at its better moment",
    ),
    Claim(
        says="Pathways are an ensemble: 20 passes on drawn keys, averaged, do better than one "
        "(points).",
        source="the self-ensemble of the paper's hypothesis",
        experiment=digits,
        value="ensemble_above_one_pass",
        at_least=0.5,
        baseline="one pass on drawn keys",
    ),
    Claim(
        says="They do at least as well as one pass on all keys before any training on all "
        "(points).",
        source="leaderboard entries: PCQM4Mv2, 0.0865 against 0.0876",
        experiment=digits,
        value="ensemble_above_dense_pass",
        at_least=0.0,
        baseline="the same model on all keys",
    ),
    Claim(
        says="A language model on locally drawn keys, a quarter of them, and a short dense end "
        "reaches the loss of dense training (nats per byte above it).",
        source="abstract: attention at a quarter to an eighth of the cost",
        experiment=text,
        value="nats_above_dense",
        at_most=0.02,
        baseline="as many steps on all keys",
    ),
)
