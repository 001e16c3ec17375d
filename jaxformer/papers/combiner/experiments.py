"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.analyze.flops import count
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.kernels.attention import Causal
from jaxformer.papers.combiner.recipe import mixer
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe

DENSITIES = ("fixed", "local", "window", "softmax")
LOOKUPS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {},
    "mixture": {"model__segment": 16},
    "window": {},
}
LENGTHS = (1024, 4096, 16384)


def trained(lab: Lab, recipe: Recipe) -> Mapping[str, float]:
    """What the recipe's evaluator measures after training."""
    state = lab.fit(dataclasses.replace(recipe, evaluators=()))
    (evaluator,), mesh = recipe.evaluators, make_mesh()
    with jax.set_mesh(mesh):
        return evaluator(state, EvalContext(mesh, "train"))


def density(lab: Lab) -> Findings:
    """Digits pixel by pixel with each attention: one recipe, one seed, one schedule for all."""
    found = {name: trained(lab, lab.recipe(model__pattern=name)) for name in DENSITIES}
    at = {name: row["bits_per_dim"] for name, row in found.items()}
    values = {f"bits per dim of {name}": x for name, x in at.items()}
    values["fixed_over_softmax"] = at["fixed"] / at["softmax"]
    values["bits_below_local"] = at["local"] - at["fixed"]
    rows = [{"attention": name, "bits/dim": x} for name, x in at.items()]
    path = bars(lab, "density", at, "bits per dimension", "digits, pixel by pixel")
    return Findings(values, {"Density of digits": rows}, [path])


def lookup(lab: Lab) -> Findings:
    """A sequence that repeats itself, by patterns that see all of it and by a window."""
    at = {}
    for name, fields in LOOKUPS.items():
        recipe = lab.load(f"{lab.paper}:repeat", seed=lab.seed, model__pattern=name, **fields)
        at[name] = 100 * trained(lab, recipe)["accuracy"]
    chance = 100 / recipe.config["data"]["symbols"]
    values = {f"lookup_{name}": x for name, x in at.items()}
    values["window_above_chance"] = at["window"] - chance
    rows = [{"attention": name, "accuracy %": x} for name, x in at.items()]
    path = bars(lab, "lookup", at, "accuracy %", f"repetition, chance {chance:.3g} %")
    return Findings(values, {f"Repetition, chance {chance:.3g} %": rows}, [path])


def bars(lab: Lab, name: str, at: Mapping[str, float], label: str, title: str) -> Path:
    path = lab.figure(name)
    fig, ((axis,),) = figure(path)
    axis.bar_label(axis.bar(list(at), list(at.values())), fmt="%.3g")
    axis.set(ylabel=label, title=title)
    axis.margins(y=0.15)
    fig.savefig(path, dpi=110)
    return path


def cost(lab: Lab) -> Findings:
    """Work and memory of one layer, forwards and backwards, with segments of sqrt(L)."""
    model = lab.recipe().config["model"]
    rows = []
    for length in LENGTHS:
        x = jax.ShapeDtypeStruct((1, length, model["width"]), jnp.float32)
        for name in ("fixed", "logsparse", "mixture", "softmax"):
            from ml_collections import ConfigDict

            fields = {**model, "pattern": name, "segment": round(length**0.5)}
            module = mixer(ConfigDict(fields))()
            params = jax.eval_shape(
                lambda x, module=module: module.init(jax.random.key(0), x, mask=Causal()), x
            )

            def loss(params: Any, x: jax.Array, module: Any = module) -> jax.Array:
                return jnp.square(module.apply(params, x, mask=Causal())).sum()

            flops = count(jax.grad(loss, (0, 1)), params, x)
            rows.append({"attention": name, "L": length, "GFLOP": flops / 1e9})
    return Findings({}, {"One layer": rows})


def claim(says: str, source: str, experiment: Any, value: str, baseline: str, **limit: float):
    return Claim(says, source, experiment, value, baseline=baseline, **limit)


CLAIMS = ()
