"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxformer.analyze.operations import megabytes, operations, products
from jaxformer.compress.binary import BinaryCost
from jaxformer.evaluation.claims import Lab, over
from jaxformer.evaluation.report import figure
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.bivit.model import (
    PositiveScores,
    SoftmaxAware,
    optimal_row_binarisation,
    row_scale,
)
from jaxformer.papers.bivit.recipe import binary_stages, classifier
from jaxformer.recipe import Claim, Findings, Recipe
from jaxformer.train.fit import FitOptions, fit

SEEDS = 3
ARMS: Mapping[str, Mapping[str, Any]] = {
    "cross-layer": {},
    "one stage": {"model__schedule": "one_stage"},
    "positive scores": {"model__schedule": "attention", "model__attention": "positive"},
}


def accuracy(lab: Lab) -> Findings:
    """A ViT on the digits, and what becomes of it in every way, with three seeds."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, start = lab.recipe(), f"{folder}/float"
        alone = dataclasses.replace(recipe, phases=recipe.phases[:1])
        full = by_phase(lab, alone, start)["float"]
        seeds = lab.members(SEEDS)
        rows = [{"float": full, **binary(other, start)} for other in seeds]
    mean = over(rows)
    values = {
        "float": full,
        "attention_gain": mean["attention: softmax-aware"] - mean["attention: positive scores"],
        "cross_layer_gain": mean["all: cross-layer"] - mean["all: one stage"],
        "largest_drop": full - min(mean["all: cross-layer"], mean["all: one stage"]),
    }
    table = [{"seed": lab.seed, **row} for lab, row in zip(seeds, rows, strict=True)]
    path = plot(lab, rows, mean)
    return Findings(values, {"Accuracy %": [*table, {"seed": "mean", **mean}]}, [path])


def binary(lab: Lab, start: str) -> dict[str, float]:
    """Accuracies in percent of what the run `start` becomes, with one seed."""
    row = {}
    for name, fields in ARMS.items():
        recipe = lab.recipe(init_from=start, float_steps=0, **fields)
        with tempfile.TemporaryDirectory() as folder:
            found = by_phase(lab, recipe, folder)
        if name == "cross-layer":
            row["attention: softmax-aware"] = found["attention"]
            row["all: cross-layer"] = found["mlp"]
        elif name == "one stage":
            row["all: one stage"] = found["all"]
        else:
            row["attention: positive scores"] = found["attention"]
    return row


def by_phase(lab: Lab, recipe: Recipe, workdir: str) -> dict[str, float]:
    """Train; {phase: test accuracy in percent at its end}."""
    fit(recipe, workdir=workdir, options=FitOptions(seed=lab.seed, progress=lab.progress))
    rows = read_jsonl(f"{workdir}/metrics.jsonl")
    return {row["phase"]: 100 * row["test/accuracy"] for row in rows if "test/accuracy" in row}


def plot(lab: Lab, rows: list[dict[str, float]], mean: Mapping[str, float]) -> Path:
    """The mean of every model as a bar, the seeds as dots."""
    path = lab.figure("accuracy")
    fig, ((axis,),) = figure(path, width=7)
    names = [name.replace(": ", "\n") for name in mean]
    axis.bar_label(axis.bar(names, list(mean.values())), fmt="%.1f", padding=6)
    for row in rows:
        axis.plot(names, list(row.values()), "k.")
    axis.set(ylabel="accuracy %", ylim=(0, 115), title="digits: what is binary, and how it came so")
    axis.tick_params(axis="x", labelsize=7)
    fig.savefig(path, dpi=110)
    return path


def rows_of_attention(lab: Lab) -> Findings:
    """The error of binary rows: softmax of normal logits, of deviation 2.5, over 64 keys."""
    key = jax.random.key(lab.seed)
    p = 2.5 * jax.random.normal(key, (20_000, 64))
    a = jax.nn.softmax(p)
    mask = SoftmaxAware()(p, a)
    v, b = optimal_row_binarisation(a)
    found = {
        "optimal": v * b,
        "scaled": row_scale(a, mask) * mask,
        "softmax_aware": mask,
        "positive": PositiveScores()(p, a),
    }
    errors = {name: float(jnp.square(x - a).mean()) for name, x in found.items()}
    values = {f"error_{name}": error for name, error in errors.items()}
    order = list(errors.values())
    values["least_step"] = min(y / x for x, y in itertools.pairwise(order))
    path = lab.figure("rows")
    fig, ((left, right),) = figure(path, 2)
    left.bar(list(errors), order)
    left.set(yscale="log", ylabel="mean squared error", title="attention rows as v b")
    most, best = a.max(-1)[:500], v[:500, 0] / 2
    right.plot(most, best, ".", label="optimal threshold v / 2")
    right.plot([0, 1], [0, 0.25], "k:", label="max / 4")
    right.set(xlabel="largest probability of a row", ylabel="threshold")
    right.legend()
    fig.savefig(path, dpi=110)
    return Findings(values, {"Error of a row": [errors]}, [path])


def cost(lab: Lab) -> Findings:
    """Operations and size of DeiT-T and DeiT-B at 224 pixels, whole and binary."""
    rows = []
    for preset in ("paper", "paper_deit_b"):
        config = lab.load(f"{lab.paper}:{preset}").config
        rows.append({"model": preset, **cost_of(config)})
    values = {"operations_deit_t": rows[0]["binary G"], "size_deit_t": rows[0]["binary MB"]}
    return Findings(values, {"OPs = BOPs / 64 + FLOPs": rows})


def cost_of(config: Mapping[str, Any]) -> dict[str, float]:
    """Of the model of a config: 10^9 operations for an image, and 10^6 bytes."""
    config = ConfigDict(config)
    model = list(binary_stages(config, classifier(config)).values())[-1]
    side = config.data.size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), image)
    found, binary = products(model, variables, image), BinaryCost(model.interceptors)
    params = variables["params"]
    return {
        "float G": operations(found, lambda product: 1.0) / 1e9,
        "binary G": operations(found, binary.operations) / 1e9,
        "float MB": megabytes(params, found, lambda product: 32.0),
        "binary MB": megabytes(params, found, binary.bits),
    }


CLAIMS = (
    Claim(
        says="The ViT that becomes binary knows the digits (accuracy %).",
        source="section 4.1: from pretrained models",
        experiment=accuracy,
        value="float",
        at_least=96.0,
        baseline="chance: 10",
    ),
    Claim(
        says="With binary attention alone, the softmax-aware mask is no worse than the mask of "
        "positive scores (points, means of three seeds).",
        source="table of ablations: softmax-aware binarisation",
        experiment=accuracy,
        value="attention_gain",
        at_least=0.0,
        baseline="[P > 0] of BiBERT, same scales, seeds and steps",
    ),
    Claim(
        says="With binary MLP weights too, attention first and MLPs afterwards is no worse than "
        "all at once, but for what seeds differ by (points, means of three seeds).",
        source="table of ablations: cross-layer binarisation",
        experiment=accuracy,
        value="cross_layer_gain",
        at_least=-2.5,
        baseline="one stage of as many steps",
    ),
    Claim(
        says="The binary ViT is near that of full precision (points below it).",
        source="table of results",
        experiment=accuracy,
        value="largest_drop",
        at_most=15.0,
        baseline="the ViT in full precision",
    ),
    Claim(
        says="A row of attention is nearly a scale times the softmax-aware mask (mean squared "
        "error).",
        source="section 3.2",
        experiment=rows_of_attention,
        value="error_scaled",
        at_most=1e-3,
        baseline="the optimal mask: 4.6e-4",
    ),
    Claim(
        says="Errors grow from the optimal rows to the scaled mask, the mask, and positive scores "
        "(least ratio of neighbours).",
        source="section 3.2; table of quantisation errors",
        experiment=rows_of_attention,
        value="least_step",
        at_least=1.0,
        baseline="1: no order",
    ),
    Claim(
        says="DeiT-T at 224 pixels takes 0.39 billion operations for an image.",
        source="table of results on ImageNet",
        experiment=cost,
        value="operations_deit_t",
        at_most=0.395,
        baseline="1.25 in full precision",
    ),
)
