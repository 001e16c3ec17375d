"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxformer.decision.controllers import Controller
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.regret import OnlineRegret, regret_curve
from jaxformer.evaluation.report import figure
from jaxformer.papers.icrl.recipe import controller
from jaxformer.recipe import Claim, Findings, Recipe
from jaxformer.train.states import new_state

COMPARED = ("linucb", "thompson", "empirical_mean", "uniform")
Curves = dict[str, np.ndarray]


def measured(lab: Lab, recipe: Recipe, untrained: bool = False) -> Curves:
    """Train; the mean cumulative regret of the model and of controllers, on the same problems."""
    (online,) = (e for e in recipe.evaluators if isinstance(e, OnlineRegret))
    state = lab.fit(dataclasses.replace(recipe, evaluators=()))
    curves = {"transformer": online.curve(state), "its argmax": online.curve(state, greedy=True)}
    if untrained:
        fresh = new_state(recipe, jax.random.key(lab.seed))
        curves["untrained"] = online.curve(fresh)
    sizes = {"problems": online.problems, "steps": online.steps}
    for name in COMPARED:
        curves[name] = alone(controller(name, online.environment), online, sizes)
    return curves


def alone(acting: Controller, online: OnlineRegret, sizes: Mapping[str, int]) -> np.ndarray:
    key = jax.random.key(online.seed)
    curve = jax.jit(lambda key: regret_curve(online.environment, acting, **sizes, key=key))
    return np.asarray(curve(key))


def rows(curves: Curves) -> list[dict[str, float | str]]:
    """Where each curve ends, halfway and at the end."""
    half = len(next(iter(curves.values()))) // 2
    return [
        {"actor": name, f"regret at {half}": float(x[half - 1]), "at the end": float(x[-1])}
        for name, x in curves.items()
    ]


def distillation(lab: Lab) -> Findings:
    """LinUCB on linear bandits, imitated."""
    curves = measured(lab, lab.recipe(), untrained=True)
    end = {name: float(x[-1]) for name, x in curves.items()}
    values = {
        "ad_over_linucb": end["its argmax"] / end["linucb"],
        "ad_over_uniform": end["its argmax"] / end["uniform"],
        "ad_sampled_over_linucb": end["transformer"] / end["linucb"],
        "untrained_over_uniform": end["untrained"] / end["uniform"],
    }
    path = plot(lab, "distillation", {"linear bandit, imitates LinUCB": curves})
    return Findings(values, {"Linear bandit: mean cumulative regret": rows(curves)}, [path])


def pretraining(lab: Lab) -> Findings:
    """Best arms of Bernoulli bandits, told on contexts that are half uniform or nearly all."""
    bernoulli = dataclasses.replace(lab, preset="bernoulli")
    found = {}
    for share in (0.5, 0.9):
        recipe = bernoulli.recipe(data__shares=(share, 1 - share))
        found[f"{share:.0%} uniform contexts"] = measured(bernoulli, recipe)
    even, uneven = found.values()
    end = {name: float(x[-1]) for name, x in even.items()}
    values = {
        "dpt_over_thompson": end["transformer"] / end["thompson"],
        "dpt_over_uniform": end["transformer"] / end["uniform"],
        "dpt_greedy_over_thompson": end["its argmax"] / end["thompson"],
        "mismatched_over_thompson": float(uneven["transformer"][-1]) / end["thompson"],
    }
    path = plot(lab, "pretraining", found)
    tables = {f"Bernoulli bandit, {name}": rows(curves) for name, curves in found.items()}
    return Findings(values, tables, [path])


def plot(lab: Lab, name: str, panels: Mapping[str, Curves]) -> Path:
    """Cumulative regret by step."""
    path = lab.figure(name)
    fig, axes = figure(path, len(panels), width=5.5)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=True):
        for label, curve in curves.items():
            bold = label == "transformer"
            axis.plot(1 + np.arange(len(curve)), curve, lw=3 if bold else 1.5, label=label)
        axis.set(xlabel="step", ylabel="cumulative regret", title=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    return path


CLAIMS: Sequence[Claim] = (
    Claim(
        says="A transformer that imitates LinUCB, which draws nothing, has about its regret on "
        "fresh problems when it takes the likeliest action (after 50 steps, over LinUCB's).",
        source="section 5: linear bandit, algorithm distillation",
        experiment=distillation,
        value="ad_over_linucb",
        at_most=1.25,
        baseline="LinUCB itself",
    ),
    Claim(
        says="That is far below the regret of uniform actions (over that).",
        source="section 5",
        experiment=distillation,
        value="ad_over_uniform",
        at_most=0.5,
        baseline="uniform actions",
    ),
    Claim(
        says="Without training it acts about uniformly (regret over that of uniform actions).",
        source="the same network at its start",
        experiment=distillation,
        value="untrained_over_uniform",
        at_least=0.7,
        baseline="uniform actions",
    ),
    Claim(
        says="Told the best arms of Bernoulli bandits, on contexts half uniform and half of "
        "Thompson sampling, it acts about as Thompson sampling (regret over that).",
        source="section 5: Bernoulli bandit, DPT",
        experiment=pretraining,
        value="dpt_over_thompson",
        at_most=1.4,
        baseline="Thompson sampling itself",
    ),
    Claim(
        says="That too is far below uniform actions (over their regret).",
        source="section 5",
        experiment=pretraining,
        value="dpt_over_uniform",
        at_most=0.5,
        baseline="uniform actions",
    ),
)
