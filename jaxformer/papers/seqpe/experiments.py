"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe

ARMS: Mapping[str, Mapping[str, Any]] = {
    "SeqPE": {},
    "SeqPE without its losses": {"positions__contrast": 0.0, "positions__transfer": 0.0},
    "learned table": {"model__position": "learned"},
}


def measure(lab: Lab, recipe: Recipe) -> dict[str, dict[str, float]]:
    """Train; {evaluator: its numbers}."""
    state, mesh = lab.fit(dataclasses.replace(recipe, evaluators=())), make_mesh()
    with jax.set_mesh(mesh):
        return {e.name: dict(e(state, EvalContext(mesh, "end"))) for e in recipe.evaluators}


def extrapolation(lab: Lab) -> Findings:
    """Looking back in longer sequences than those trained on: one recipe and schedule for all."""
    rows = []
    for name, fields in ARMS.items():
        recipe = lab.recipe(**fields)
        found = measure(lab, recipe)
        lengths = recipe.config["data"]["lengths"]
        row = {f"{n}": 100 * found[f"length_{n}"]["accuracy"] for n in lengths}
        rows.append({"positions": name, **row})
    ours, without, table = ({k: v for k, v in row.items() if k != "positions"} for row in rows)
    trained, long = str(lengths[0]), str(4 * lengths[0])
    values = {
        "at_trained_length": ours[trained],
        "at_four_times": ours[long],
        "without_losses": without[long],
        "gain_of_losses": ours[long] - without[long],
        "table_at_four_times": table[long],
    }
    path = plot(lab, rows)
    return Findings(values, {"Accuracy % by length": rows}, [path])


def plot(lab: Lab, rows: list[dict[str, Any]]) -> Path:
    """Accuracy by length."""
    path = lab.figure("extrapolation")
    fig, ((axis,),) = figure(path, width=6)
    for row in rows:
        lengths = [name for name in row if name != "positions"]
        numbers = [int(n) for n in lengths]
        axis.plot(numbers, [row[n] for n in lengths], "o-", label=row["positions"])
    axis.axvline(numbers[0], linestyle=":", color="k")
    axis.set_xscale("log", base=2)
    axis.set_xticks(numbers, lengths)
    axis.set(
        xlabel="length", ylabel="accuracy %", ylim=(0, 105), title="trained at the dotted line"
    )
    axis.grid(alpha=0.3)
    axis.legend()
    fig.savefig(path, dpi=110)
    return path


def nearest(lab: Lab) -> Findings:
    """The encoder alone, on its two losses."""
    sizes = {"positions__starts": 16, "positions__candidates": 32, "positions__shift_rate": 0.0}
    recipe = lab.recipe(data__task="encoder", steps=1500, evaluate__batches=64, **sizes)
    found = measure(lab, recipe)["fresh"]
    chance = 100 / recipe.config["positions"]["candidates"]
    values = {"nearest": 100 * found["nearest"], "transfer": found["transfer"]}
    return Findings(values, {f"Nearest of candidates, chance {chance:.3g} %": [values]})


CLAIMS = (
    Claim(
        says="A decoder with SeqPE says what came three tokens before (accuracy %, 64 tokens).",
        source="section 4: language models within the trained length",
        experiment=extrapolation,
        value="at_trained_length",
        at_least=90.0,
        baseline="chance: 1 in 32",
    ),
    Claim(
        says="It still does in sequences four times as long.",
        source="section 4: extrapolation",
        experiment=extrapolation,
        value="at_four_times",
        at_least=80.0,
        baseline="a learned table, below",
    ),
    Claim(
        says="That is due to the two losses (points over SeqPE without them).",
        source="section 4: ablations",
        experiment=extrapolation,
        value="gain_of_losses",
        at_least=20.0,
        baseline="SeqPE without its losses, shifted at random alike",
    ),
    Claim(
        says="A learned table knows nothing of positions that it was not trained on.",
        source="section 4: extrapolation",
        experiment=extrapolation,
        value="table_at_four_times",
        at_most=50.0,
        baseline="SeqPE, above",
    ),
    Claim(
        says="After 1500 steps of the two losses alone the nearest of 32 candidates has the "
        "largest product (accuracy %, pivots drawn anew).",
        source="section 3.3",
        experiment=nearest,
        value="nearest",
        at_least=90.0,
        baseline="chance: 1 in 32",
    ),
)
