"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxformer.analyze import patching
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.nn.attention import Fused, Unfused
from jaxformer.nn.make import swap
from jaxformer.papers.graph_search import circuits
from jaxformer.papers.graph_search.merging import PathMerger
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Batch, Claim, EvalContext, Findings, Recipe

ARMS: Mapping[str, Mapping[str, Any]] = {
    "balanced": {},
    "naive": {"data__graphs": "naive", "data__lookahead": -1},
}
TRACED = 24  # searches of the largest look-ahead whose circuits are extracted


def searching(lab: Lab) -> Findings:
    """Balanced graphs against naive ones, and the circuits of what was trained on the first."""
    accuracy: dict[str, dict[str, float]] = {}
    states = {}
    for arm, fields in ARMS.items():
        recipe = lab.recipe(**fields)
        states[arm] = lab.fit(dataclasses.replace(recipe, evaluators=()))
        (test,), mesh = recipe.evaluators, make_mesh()
        with jax.set_mesh(mesh):
            accuracy[arm] = test(states[arm], EvalContext(mesh, "train"))
    recipe = lab.recipe()
    steps, tested = range(recipe.task.difficulties + 1), tests_of(recipe)
    by_ahead = {arm: [found[f"accuracy_{k}"] for k in steps] for arm, found in accuracy.items()}
    guessing = guess(tested)
    merged, example = explained(recipe, states["balanced"].params, tested)
    values = {
        "near": by_ahead["balanced"][1],
        "far": by_ahead["balanced"][-1],
        "far_gain": by_ahead["balanced"][-1] - by_ahead["naive"][-1],
        "by_hand": right(PathMerger(recipe.task.model.length, 3), {}, tested),
        **{f"explained_{name.replace(' ', '_')}": row["explained"] for name, row in merged.items()},
        "found_by_hand": merged["by hand"]["finds a path"],
        "found_trained": merged["trained"]["finds a path"],
        "found_random": merged["random"]["finds a path"],
    }
    rows = [
        {"look-ahead": k, **{arm: row[k] for arm, row in by_ahead.items()}, "guessing": guessing[k]}
        for k in steps
    ]
    tables = {
        "Accuracy by look-ahead": rows,
        "Circuits": [{"model": name, **row} for name, row in merged.items()],
    }
    return Findings(values, tables, [draw(lab, by_ahead, guessing, example)])


def tests_of(recipe: Recipe, batches: int = 4) -> Batch:
    """Held-out searches of every look-ahead."""
    data = recipe.evaluators[0].data
    parts = [jax.device_get(jax.jit(data.draw)(data.batch(i))) for i in range(batches)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def guess(tested: Batch) -> list[float]:
    """The accuracy of naming one of the start's children at random, by look-ahead."""
    found: dict[int, list[float]] = {}
    for inputs, right_ones, ahead in zip(
        tested["inputs"], tested["useful"], tested["difficulty"], strict=True
    ):
        edges = circuits.edges_of(inputs.tolist(), circuits.Tokens(len(inputs)))
        children = [b for a, b in edges if a == inputs[-1]]
        found.setdefault(int(ahead), []).append(right_ones.sum() / len(children))
    return [float(np.mean(found[k])) for k in sorted(found)]


def right(model: Any, variables: Any, tested: Batch) -> float:
    """How often a model says a useful token."""
    logits = jax.jit(lambda v, x: model.apply(v, x)[:, -1])(variables, tested["inputs"])
    said = np.asarray(logits.argmax(-1))
    return float(np.take_along_axis(tested["useful"], said[:, None], 1).mean())


def explained(recipe: Recipe, params: Any, tested: Batch) -> tuple[dict[str, Any], np.ndarray]:
    """How much of their circuits merging of paths explains: trained, random and built by hand.

    The second are the attention weights (layers, n, n) of the trained model on one search.
    """
    model = swap(recipe.task.model, Fused, Unfused)
    new = model.init(jax.random.key(1), tested["inputs"][:1])
    models = {
        "trained": (model, {"params": jax.device_get(params)}),
        "random": (model, jax.device_get(new)),
        "by hand": (PathMerger(model.length, 3), {}),
    }
    searches = [
        inputs
        for inputs, ahead in zip(tested["inputs"], tested["difficulty"], strict=True)
        if ahead == tested["difficulty"].max() - 1 and has_unused(inputs)
    ][:TRACED]
    rows: dict[str, Any] = {}
    for name, (one, variables) in models.items():
        found = [circuits.extract(one, variables, inputs) for inputs in searches]
        checked = [
            circuits.check(circuit, inputs) for circuit, inputs in zip(found, searches, strict=True)
        ]
        ops = sum(len(circuit.ops) for circuit in found)
        rows[name] = {
            "searches": len(searches),
            "ops": ops,
            "explained": sum(len(m.explained) for m in checked) / max(ops, 1),
            "finds a path": float(np.mean([m.finds for m in checked])),
        }
    seen = circuits.capture(
        model, models["trained"][1], searches[0][None], sites=[patching.WEIGHTS]
    ).values[0]
    return rows, np.stack([calls[0][0, 0] for calls in seen.values()])


def has_unused(inputs: np.ndarray) -> bool:
    try:
        circuits.unused(inputs)
    except circuits.NoUnusedVertex:
        return False
    return True


def draw(lab: Lab, by_ahead: Any, guessing: list[float], attention: np.ndarray) -> Any:
    """Accuracy by look-ahead, and the attention of the trained model on one search."""
    path = lab.figure("search")
    fig, axes = figure(path, 1 + len(attention), width=3.6)
    for arm, row in by_ahead.items():
        axes[0, 0].plot(range(len(row)), row, "o-", label=f"trained on {arm} graphs")
    axes[0, 0].plot(range(len(guessing)), guessing, "k:", label="a child at random")
    axes[0, 0].set(xlabel="look-ahead", ylabel="accuracy", ylim=(0, 1.05))
    axes[0, 0].set_xticks(range(len(guessing)))
    axes[0, 0].legend(fontsize=8)
    for i, weights in enumerate(attention):
        axis = axes[0, 1 + i]
        axis.imshow(weights, vmin=0, vmax=1, cmap="magma")
        axis.set(title=f"attention of layer {i}", xlabel="read", ylabel="by")
    fig.savefig(path, dpi=110)
    return path


def claim(says: str, source: str, value: str, baseline: str, **limit: float) -> Claim:
    return Claim(says, source, searching, value, baseline=baseline, **limit)


CLAIMS = (
    claim(
        "Trained on balanced graphs, a small transformer searches 1 step ahead (accuracy).",
        "section 3.4, figure 3",
        "near",
        "a child at random",
        at_least=0.9,
    ),
    claim(
        "2 steps ahead it is better than one trained as long on naive graphs (difference).",
        "section 3.4, figure 3",
        "far_gain",
        "the same model on naive graphs",
        at_least=0.05,
    ),
    claim(
        "Merging paths, with 3 layers, finds the way in all tests (accuracy).",
        "section 4, the algorithm",
        "by_hand",
        "trained models",
        at_least=1.0,
    ),
    claim(
        "All that such a model does is recognised as merging of paths (share of its ops).",
        "section 4, the analysis",
        "explained_by_hand",
        "random weights",
        at_least=1.0,
    ),
    claim(
        "In most searches a path is merged in the circuit of the trained model (share of them).",
        "section 4, figure 6",
        "found_trained",
        "random weights",
        # .79 to 1.00 of three seeds; what 24 searches say is uncertain by .08 (random: .25 to .29).
        at_least=0.75,
    ),
    claim(
        "Random weights merge one by chance alone (share of searches).",
        "section 4, figure 6",
        "found_random",
        "the trained model",
        at_most=0.5,
    ),
)
