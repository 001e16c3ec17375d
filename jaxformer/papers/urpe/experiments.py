"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings

TASKS: Mapping[str, Mapping[str, Any]] = {
    "position": {},
    "identical": {"data__identical": True, "steps": 300},
    "even": {"data__task": "even", "steps": 1200, "optim__learning_rate": 3e-3},
}


def accuracies(lab: Lab) -> Findings:
    """Each task with each kind of position: one recipe, one seed, one schedule for all."""
    found: dict[str, dict[str, float]] = {}
    for task, fields in TASKS.items():
        found[task] = {}
        for position in ("urpe", "rpe", *(["none"] if task == "position" else [])):
            recipe = lab.recipe(model__position=position, **fields)
            state = lab.fit(dataclasses.replace(recipe, evaluators=()))
            (evaluator,), mesh = recipe.evaluators, make_mesh()
            with jax.set_mesh(mesh):
                measured = evaluator(state, EvalContext(mesh, "train"))
            found[task][position] = 100 * measured["accuracy"]
    chance = 100 / recipe.config["data"]["length"]
    values = {f"{task}_{position}": x for task, row in found.items() for position, x in row.items()}
    values["even_gain"] = found["even"]["urpe"] - found["even"]["rpe"]
    values["identical_rpe_above_chance"] = found["identical"]["rpe"] - chance
    rows = [{"task": task, **row} for task, row in found.items()]
    path = lab.figure("accuracy")
    fig, axes = figure(path, len(TASKS), width=3)
    for axis, (task, row) in zip(axes.flat, found.items(), strict=True):
        bars = axis.bar(list(row), list(row.values()))
        axis.bar_label(bars, fmt="%.0f")
        axis.axhline(chance, linestyle=":", color="k")
        axis.set(title=task, ylabel="accuracy %", ylim=(0, 110))
    fig.savefig(path, dpi=110)
    return Findings(values, {f"Accuracy %, chance {chance:.3g}": rows}, [path])


def claim(says: str, value: str, baseline: str, **limit: float) -> Claim:
    source = "section 5.1, figure 2: synthetic tasks"
    return Claim(says, source, accuracies, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "With C every position of a random sequence is told (accuracy %).",
        "position_urpe",
        "relative positions alone, below",
        at_least=95.0,
    ),
    claim(
        "With relative positions inside the softmax alone hardly any is.",
        "position_rpe",
        "C as well, above",
        at_most=30.0,
    ),
    claim(
        "Without positions none is, beyond chance.",
        "position_none",
        "chance: one of the positions",
        at_most=10.0,
    ),
    claim(
        "With C positions are told even where all tokens are the same.",
        "identical_urpe",
        "relative positions alone, below",
        at_least=95.0,
    ),
    claim(
        "There relative positions alone give every position the same answer (points above chance).",
        "identical_rpe_above_chance",
        "chance: one of the positions",
        at_most=0.01,
    ),
    claim(
        "With C every second token is found (accuracy %, half of the answers being filler).",
        "even_urpe",
        "relative positions alone",
        at_least=90.0,
    ),
    claim(
        "That is clearly more than with relative positions alone (points).",
        "even_gain",
        "relative positions alone",
        at_least=10.0,
    ),
)
