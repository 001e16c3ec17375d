"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.analyze.flops import count
from jaxformer.analyze.implied import implied_weights
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.kernels.attention import Full
from jaxformer.papers.l2vit.model import ClampedLinearAttention, l2vit
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe, TrainState

ARMS: Mapping[str, Mapping[str, Any]] = {
    "whole": {},
    "without concentration": {"model__local": False},
    "windows alone": {"model__blocks": "window"},
}
SIDES = (224, 448)


def accuracy(lab: Lab) -> Findings:
    """The whole model and two that lack a part: one recipe, one seed, one schedule for all."""
    rows = []
    for name, fields in ARMS.items():
        recipe = lab.recipe(**fields)
        state = lab.fit(dataclasses.replace(recipe, evaluators=()))
        (evaluator,), mesh = recipe.evaluators, make_mesh()
        with jax.set_mesh(mesh):
            found = evaluator(state, EvalContext(mesh, "train"))
        entropy = attention_entropy(recipe, state)
        rows.append({"model": name, "accuracy %": 100 * found["accuracy"], "entropy": entropy})
    at = {row["model"]: row["accuracy %"] for row in rows}
    values = {f"accuracy of {name} %": x for name, x in at.items()}
    values["points_above_windows"] = at["whole"] - at["windows alone"]
    values["points_of_concentration"] = at["whole"] - at["without concentration"]
    path = lab.figure("accuracy")
    fig, ((axis,),) = figure(path, width=5)
    axis.bar_label(axis.bar(list(at), list(at.values())), fmt="%.1f")
    axis.set(ylabel="accuracy %", ylim=(0, 110), title="a local and a global cue, chance 12.5 %")
    fig.savefig(path, dpi=110)
    title = "Accuracy, and entropy of the implied weights as a fraction of that of equal ones"
    return Findings(values, {title: rows}, [path])


def attention_entropy(recipe: Recipe, state: TrainState) -> float | str:
    """Mean entropy of the rows of linear attention over log N, on unseen images; 1 is no focus."""
    image = jnp.asarray(recipe.evaluators[0].data.batch(0)["image"][:16])
    layers: list[tuple[nn.Module, Any, jax.Array]] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if isinstance(module, ClampedLinearAttention) and context.method_name == "__call__":
            layers.append((module.clone(parent=None, name=None), module.variables, args[0]))
        return call(*args, **kwargs)

    variables = {"params": state.params, "batch_stats": state.extra.get("batch_stats", {})}
    with nn.intercept_methods(watch):
        recipe.task.model.apply(variables, image)
    found = []
    for layer, its_own, x in layers:
        weights = implied_weights(layer, its_own, x, mask=Full())
        p = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-9)
        entropy = -(p * jnp.log(jnp.maximum(p, 1e-9))).sum(-1) / jnp.log(p.shape[-1])
        found.append(float(entropy.mean()))
    return sum(found) / len(found) if found else ""


def cost(lab: Lab) -> Findings:
    """Multiply-adds of the paper's smallest model by the side of the image."""
    work = []
    for side in SIDES:
        fields = lab.load(f"{lab.paper}:paper").config["model"]
        names = ("widths", "depths", "heads", "window", "classes")
        model = l2vit(image_size=(side, side), **{name: fields[name] for name in names})
        image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
        variables = jax.eval_shape(lambda x, model=model: model.init(jax.random.key(0), x), image)
        work.append(count(model.apply, variables, image) / 2e9)
    rows = [{"side": side, "GMAC": x} for side, x in zip(SIDES, work, strict=True)]
    return Findings({"work_of_four_times_the_pixels": work[1] / work[0]}, {"Work": rows})


CLAIMS = (
    Claim(
        says="Linear attention over the whole map finds what windows do not (points of accuracy).",
        source="abstract; section 3.1",
        experiment=accuracy,
        value="points_above_windows",
        at_least=5.0,
        baseline="windows of softmax attention in every block",
    ),
    Claim(
        says="Local concentration after linear attention costs nothing (points of accuracy).",
        source="section 3.2; ablations",
        experiment=accuracy,
        value="points_of_concentration",
        at_least=-1.0,
        baseline="the same model without the concentration module",
    ),
    Claim(
        says="Four times the pixels are four times the work.",
        source="section 3, complexity",
        experiment=cost,
        value="work_of_four_times_the_pixels",
        at_most=4.1,
        baseline="attention over the whole map would grow sixteenfold",
    ),
)
