"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.pictures import grid
from jaxformer.evaluation.report import figure
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe, TrainState
from jaxformer.sampling.diffusion import DDIM, sample

SIZES = (16, 24, 32)  # pixels of a side; the first is trained on
TIMES = (200, 500, 800)  # of 1000, at which noise is told
BATCHES = 16
PLAIN = {"model__pattern": "f"}
ARMS: Mapping[str, Mapping[str, Any]] = {
    "ledit": {},
    "sincos": {**PLAIN, "model__position": "sincos"},
    "rope": {**PLAIN, "model__position": "rope"},
    "nope": {**PLAIN, "model__position": "none"},
}
# Measured with the trained arm alone: how it reaches beyond its size.
REACHES: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "ledit": {"ledit, scores not scaled": {"model__attn_scale": "none"}},
    "sincos": {"sincos, interpolated": {"model__stretch": "interpolate"}},
    "rope": {"rope, YaRN": {"model__stretch": "yarn"}},
}
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "convolution alone": PLAIN,
    "causal blocks alone": {"model__position": "none"},
    "all blocks causal": {"model__pattern": "c"},
    "one causal block, norm after the convolution": {
        "model__pattern": "fcff",
        "model__conv_norm": True,
    },
    "scan a, raster": {"model__scan_order": "raster"},
    "scan b, lower right masked": {"model__scan_order": "mask_lower_right"},
    "scan c, b with neighbours": {"model__scan_order": "unmask_neighborhood"},
}


def train(lab: Lab, **fields: Any) -> TrainState:
    """A finished run, with its averaged weights."""
    recipe = lab.recipe(**fields)
    state = lab.fit(dataclasses.replace(recipe, evaluators=()))
    return state.replace(params=recipe.phases[0].update.averaged(state))  # type: ignore[union-attr]


def at_size(lab: Lab, size: int, **fields: Any) -> Recipe:
    return lab.recipe(**fields, data__height=size, data__width=size)


def error(recipe: Recipe, state: TrainState) -> float:
    """The squared error of the noise on unseen scenes, with labels, over `TIMES`."""
    (held_out,) = recipe.evaluators
    process = dataclasses.replace(recipe.task.process, times=TIMES)  # type: ignore[attr-defined]
    task, mesh = dataclasses.replace(recipe.task, process=process), make_mesh()
    measure = MeanEvaluator(task, held_out.data, batches=BATCHES)  # type: ignore[attr-defined]
    with jax.set_mesh(mesh):
        return measure(state, EvalContext(mesh, "train"))["mse"]


def errors(lab: Lab, state: TrainState, **fields: Any) -> dict[int, float]:
    return {size: error(at_size(lab, size, **fields), state) for size in SIZES}


def sizes(lab: Lab) -> Findings:
    """Each kind of positions, trained at one size and measured at three: one schedule for all."""
    found: dict[str, dict[int, float]] = {}
    states: dict[str, TrainState] = {}
    for arm, fields in ARMS.items():
        states[arm] = train(lab, **fields)
        found[arm] = errors(lab, states[arm], **fields)
        for name, more in REACHES.get(arm, {}).items():
            found[name] = errors(lab, states[arm], **{**fields, **more})
    ratio = {arm: row[SIZES[-1]] / row[SIZES[0]] for arm, row in found.items()}
    values = {
        f"error of {arm} at {size}": x for arm, row in found.items() for size, x in row.items()
    }
    values |= {f"ratio of {arm}": x for arm, x in ratio.items()}
    values["ratio_of_sincos_over_ledit"] = ratio["sincos"] / ratio["ledit"]
    values["ratio_of_rope_over_ledit"] = ratio["rope"] / ratio["ledit"]
    values["nope_over_ledit"] = found["nope"][SIZES[0]] / found["ledit"][SIZES[0]]
    return Findings(values, {"Error of the noise": table(found)}, [plot(lab, found, states)])


def ablations(lab: Lab) -> Findings:
    """What each part brings: the README's table, behind no claim."""
    found = {
        name: errors(lab, train(lab, **fields), **fields)
        for name, fields in {"ledit": {}, **ABLATIONS}.items()
    }
    values = {f"{name} at {size}": x for name, row in found.items() for size, x in row.items()}
    return Findings(values, {"Ablations": table(found)})


def table(found: Mapping[str, Mapping[int, float]]) -> list[dict[str, Any]]:
    last, first = SIZES[-1], SIZES[0]
    return [
        {"arm": arm, **{f"{s} x {s}": x for s, x in row.items()}, "ratio": row[last] / row[first]}
        for arm, row in found.items()
    ]


def plot(
    lab: Lab, found: Mapping[str, Mapping[int, float]], states: Mapping[str, TrainState]
) -> Path:
    """Errors over sizes, and scenes drawn at the largest."""
    path = lab.figure("sizes")
    drawn = ("ledit", "sincos", "rope")
    fig, axes = figure(path, 1 + len(drawn), width=4.0)
    first, *rest = axes.flat
    for arm, row in found.items():
        first.plot(list(row), list(row.values()), "o-" if arm in ARMS else ":", label=arm)
    first.set(xlabel="pixels of a side", ylabel="error of the noise", yscale="log", xticks=SIZES)
    first.legend(fontsize=7)
    for axis, arm in zip(rest, drawn, strict=True):
        axis.imshow(scenes(at_size(lab, SIZES[-1], **ARMS[arm]), states[arm]))
        axis.set(title=f"{arm}, drawn at {SIZES[-1]} x {SIZES[-1]}", xticks=[], yticks=[])
    fig.savefig(path, dpi=110)
    return path


def scenes(recipe: Recipe, state: TrainState, rows: int = 3, columns: int = 4) -> np.ndarray:
    """A grid of drawn scenes, a class per column."""
    size, task = recipe.config["data"]["height"], recipe.task
    images = sample(
        task,  # type: ignore[arg-type]
        state.params,
        state.extra,
        task.examples(rows * columns),  # type: ignore[attr-defined]
        shape=(size, size, 3),
        sampler=DDIM(25),
        key=jax.random.key(0),
        guidance=1.5,
    )
    return grid(images, columns)


def claim(says: str, value: str, baseline: str, at_least: float) -> Claim:
    source = "section 4, tables 1 and 2: sizes beyond the one trained on"
    return Claim(says, source, sizes, value, at_least=at_least, baseline=baseline)


CLAIMS = (
    claim(
        "Beyond the size trained on, error grows less than with sin-cos positions (32 over 16 "
        "pixels, theirs over ours).",
        "ratio_of_sincos_over_ledit",
        "DiT with sin-cos positions",
        1.5,
    ),
    claim(
        "It grows less than with rotary positions, too.",
        "ratio_of_rope_over_ledit",
        "DiT with 2-D rotary positions",
        1.0,
    ),
    claim(
        "At the size trained on, its error is no larger than without any positions (theirs over "
        "ours).",
        "nope_over_ledit",
        "DiT without positions",
        1.0,
    ),
)
