"""The experiment behind the claims: one trained ViT, evaluated with fewer tokens in every way."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.data.base import DeviceData
from jaxformer.data.sources.shapes import Shapes, Standardized
from jaxformer.evaluation.claims import Lab, over
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.report import figure
from jaxformer.papers.zero_tprune.recipe import PrunedTask
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe, TrainState

AFTER, VOTES, REMOVED = 3, 5, 10  # block, iterations and r of the one pruning layer
KEEP = {0.25: 0.3, 0.5: 0.6, 0.75: 0.89}  # share of 64 tokens: rho, of the 54 that r leaves
METHODS = ("zero_tprune", "importance", "class_attention")
SEEDS = 5  # of random drops
ROWS, BATCHES = 128, 16
MADE = Standardized(Shapes())


def zero_shot(lab: Lab) -> Findings:
    """Accuracy and recall of foreground patches, of no, some and random pruning."""
    recipe = lab.recipe()
    state = lab.fit(dataclasses.replace(recipe, evaluators=()))
    before = digest(state)

    def measured(share: float, **fields: Any) -> dict[str, float]:
        layers = ((AFTER, KEEP[share], REMOVED, VOTES),)
        pruned = lab.recipe(prune__layers=layers, **{f"prune__{k}": v for k, v in fields.items()})
        return evaluate(pruned, state, lab.seed)

    whole = evaluate(lab.recipe(prune__method="none"), state, lab.seed)
    rows, by_seed = [], []
    for share in KEEP:
        found = {method: measured(share, method=method) for method in METHODS}
        seeds = range(SEEDS if share == 0.5 else 1)
        draws = [measured(share, method="random", seed=100 * seed) for seed in seeds]
        found["random"] = over(draws)
        rows += [{"tokens kept": share, "method": m, **row} for m, row in found.items()]
        if share == 0.5:
            half, by_seed = found, draws
    values = {
        "whole": whole["accuracy"],
        **{f"{method}_{name}": x for method, row in half.items() for name, x in row.items()},
        "gain_on_random": half["zero_tprune"]["accuracy"] - half["random"]["accuracy"],
        "gain_on_importance": half["zero_tprune"]["accuracy"] - half["importance"]["accuracy"],
        "recall_ratio": half["zero_tprune"]["recall"] / half["random"]["recall"],
        "changed": float(digest(state) != before),
    }
    tables = {
        f"Accuracy and recall %, with all tokens {whole['accuracy']:.4g}": rows,
        "Five random halves": by_seed,
    }
    figures = [plot(lab, whole["accuracy"], rows), show(lab, state)]
    return Findings(values, tables, figures)


def evaluate(recipe: Recipe, state: TrainState, seed: int) -> dict[str, float]:
    """Accuracy and recall in percent, of images that no training saw."""
    data = DeviceData(MADE, ROWS, seed + 2**31)
    evaluator, mesh = MeanEvaluator(recipe.task, data, batches=BATCHES), make_mesh()
    with jax.set_mesh(mesh):
        found = evaluator(state, EvalContext(mesh, "test"))
    return {name: 100 * found[name] for name in ("accuracy", "recall")}


def digest(state: TrainState) -> str:
    """Of all bytes of the parameters."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get(state.params)):
        found.update(np.ascontiguousarray(leaf).tobytes())
    return found.hexdigest()


def plot(lab: Lab, whole: float, rows: list[dict[str, Any]]) -> Path:
    """Accuracy and recall over the share of tokens that are left."""
    path = lab.figure("accuracy")
    fig, axes = figure(path, 2)
    for axis, name in zip(axes.flat, ("accuracy", "recall"), strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            found = [row for row in rows if row["method"] == method]
            x, y = ([row[key] for row in found] for key in ("tokens kept", name))
            axis.plot([*x, 1.0], [*y, whole if name == "accuracy" else 100], "o-", label=method)
        axis.set(xlabel=f"share of tokens kept after block {AFTER}", ylabel=f"{name} %")
    axes.flat[0].axhline(whole, linestyle=":", color="k", label="all tokens")
    axes.flat[0].legend()
    fig.savefig(path, dpi=110)
    return path


def show(lab: Lab, state: TrainState, count: int = 8) -> Path:
    """Images, and what two methods keep half of."""
    path = lab.figure("kept")
    methods = ("zero_tprune", "random")
    fig, axes = figure(path, count, 1 + len(methods), width=1.3)
    drawn, shown = (DeviceData(rows, count, lab.seed + 2**31) for rows in (MADE, MADE.draw_rows))
    batch = drawn.draw(drawn.batch(0))
    image = np.asarray(shown.draw(shown.batch(0))["image"])  # the same, in their colours
    pictures = {"image": image}
    for method in methods:
        task = lab.recipe(prune__method=method).task
        assert isinstance(task, PrunedTask)
        kept = np.asarray(jax.jit(task.kept)(state.params, batch))[:, 1:] - 1
        side, patch = image.shape[1], lab.recipe().config["model"]["patch"]
        left = np.zeros((count, (side // patch) ** 2), bool)
        np.put_along_axis(left, kept, True, axis=1)
        left = left.reshape(count, side // patch, side // patch).repeat(patch, 1).repeat(patch, 2)
        pictures[method] = np.where(left[..., None], image, 1.0)
    for row, (name, found) in zip(axes, pictures.items(), strict=True):
        row[0].set_ylabel(name)
        for axis, picture in zip(row, found, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
    fig.savefig(path, dpi=110)
    return path


def claim(says: str, value: str, baseline: str, limit: Mapping[str, float]) -> Claim:
    source = "table 2 and section 4: DeiT-S with a third less FLOPs, no fine-tuning"
    return Claim(says, source, zero_shot, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "The ViT whose tokens are dropped knows the shapes (accuracy %).",
        "whole",
        "chance: 12.5",
        {"at_least": 90.0},
    ),
    claim(
        "With half of the tokens dropped after block 3 it is above random drops (points).",
        "gain_on_random",
        "random drop, mean of 5 draws",
        {"at_least": 3.0},
    ),
    claim(
        "The S-stage does no harm to the I-stage (points).",
        "gain_on_importance",
        "the I-stage alone, as many tokens",
        {"at_least": -0.5},
    ),
    claim(
        "What is kept is what the image is about (recall of foreground patches, a ratio).",
        "recall_ratio",
        "random drop, mean of 5 draws",
        {"at_least": 1.3},
    ),
    claim(
        "No parameter changes (1 if one did).",
        "changed",
        "the digest of all parameters before",
        {"at_most": 0.0},
    ),
)
