"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.analyze.flops import count
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.kernels.attention import Causal, attention
from jaxformer.papers.combiner.model import Fixed, Logsparse, Mixture, Tokens
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe

DENSITIES = ("fixed", "local", "window", "softmax")
LOOKUPS: Mapping[str, Mapping[str, Any]] = {
    "fixed": {},
    "mixture": {"model__segment": 16, "steps": 250},
    "window": {},
}
LENGTHS = (256, 1024, 4096, 16384)
HEADS, HEAD_SIZE = 4, 16


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
    values = {f"bits per dim, {name}": x for name, x in at.items()}
    values["fixed_over_softmax"] = at["fixed"] / at["softmax"]
    values["bits_that_regions_save"] = at["local"] - at["fixed"]
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
    axis.bar_label(axis.bar(list(at), list(at.values())), fmt="%.4g")
    axis.set(ylabel=label, title=title)
    axis.margins(y=0.15)
    fig.savefig(path, dpi=110)
    return path


def cost(lab: Lab) -> Findings:
    """Products of one causal attention by length, with segments of sqrt(L)."""
    work: dict[str, list[int]] = {}
    for length in LENGTHS:
        segment = round(length**0.5)
        patterns = {
            "fixed": Fixed(segment=segment),
            "mixture": Mixture(segment=segment),
            "logsparse": Logsparse(),
            "softmax": None,
        }
        for name, pattern in patterns.items():
            work.setdefault(name, []).append(products(pattern, length))
    values = {f"growth_{name}": x[-1] / x[-2] for name, x in work.items()}
    rows = [
        {"attention": name, **dict(zip(map(str, LENGTHS), (x / 1e6 for x in row), strict=True))}
        for name, row in work.items()
    ]
    path = lab.figure("cost")
    fig, ((axis,),) = figure(path)
    for name, row in work.items():
        axis.loglog(LENGTHS, row, "o-", label=name)
    axis.set(xlabel="length", ylabel="FLOPs", title="one causal attention")
    axis.legend()
    axis.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    return Findings(values, {"MFLOPs by length": rows}, [path])


def products(pattern: nn.Module | None, length: int) -> int:
    """FLOPs of the products of an attention of `length` positions; None: softmax attention."""

    def run(x: jax.Array) -> jax.Array:
        if pattern is None:
            return attention(x, x, x, mask=Causal())
        tokens = Tokens(x, x, x, x)
        return pattern.apply({}, tokens, causal=True, train=False, decode=False)

    return count(run, jax.ShapeDtypeStruct((1, length, HEADS, HEAD_SIZE), jnp.float32))


CLAIMS = (
    Claim(
        says="Combiner-Fixed models the density of digits as well as full attention (ratio of "
        "bits per dimension).",
        source="tables 1 and 2: densities of CIFAR-10 and ImageNet-64",
        experiment=density,
        value="fixed_over_softmax",
        at_most=1.03,
        baseline="softmax attention, same steps, schedule and seed",
    ),
    Claim(
        says="It is the regions that do it (bits per dimension that they save).",
        source="section 5: every pattern against its sparse counterpart",
        experiment=density,
        value="bits_that_regions_save",
        at_least=0.05,
        baseline="the own segment alone, which is Fixed without regions",
    ),
    Claim(
        says="Through summaries alone Fixed finds what stood at one exact place far back "
        "(accuracy %).",
        source="abstract: full attention capability",
        experiment=lookup,
        value="lookup_fixed",
        at_least=95.0,
        baseline="a window of as many positions, below",
    ),
    Claim(
        says="So does Mixture (accuracy %).",
        source="abstract",
        experiment=lookup,
        value="lookup_mixture",
        at_least=95.0,
        baseline="a window of as many positions, below",
    ),
    Claim(
        says="A window does not (points above chance).",
        source="abstract",
        experiment=lookup,
        value="window_above_chance",
        at_most=3.0,
        baseline="chance: one of the symbols",
    ),
    Claim(
        says="Four times the length is eight times the work.",
        source="section 4: O(L sqrt L)",
        experiment=cost,
        value="growth_fixed",
        at_most=8.4,
        baseline="softmax attention: 16",
    ),
    Claim(
        says="With Logsparse it is little more than four times.",
        source="section 4: O(L log L)",
        experiment=cost,
        value="growth_logsparse",
        at_most=5.0,
        baseline="softmax attention: 16",
    ),
)
