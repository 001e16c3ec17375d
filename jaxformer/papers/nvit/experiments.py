"""The experiment behind the claims: digits at half of the latency, pruned by three rankings."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.analyze.latency import TimedBlock
from jaxformer.analyze.summary import parameter_count
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import figure
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.nvit.model import ModelWidths
from jaxformer.parallel.mesh import make_mesh
from jaxformer.recipe import Claim, EvalContext, Findings, Recipe, TrainState
from jaxformer.train.fit import FitOptions, fit

SEEDS = 3
RANKINGS = ("hessian", "magnitude", "random")


def accuracy(recipe: Recipe, state: TrainState) -> float:
    """Of all test images, in percent."""
    (evaluator,), mesh = recipe.evaluators, make_mesh()
    with jax.set_mesh(mesh):
        return 100 * evaluator(state, EvalContext(mesh, "test"))["accuracy"]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A model that was pruned and fine-tuned."""

    accuracy: float
    widths: ModelWidths
    share: float  # of the whole model's estimated latency
    steps: int  # of pruning, until the target
    parameters: int

    @property
    def row(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "latency": self.share,
            "steps of pruning": self.steps,
            "parameters": self.parameters,
            "embedding": self.widths.embedding,
            "heads, qk, value, mlp": " ".join("/".join(map(str, b)) for b in self.widths.blocks),
        }


def pruned(lab: Lab, start: str, seed: int, **fields: Any) -> Pruned:
    """From the trained model of `start`: prune, make dense, fine-tune."""
    with tempfile.TemporaryDirectory() as folder:
        options = FitOptions(seed=seed, progress=lab.progress, log_every=10)
        given = {"seed": seed, "steps": 0, "init_from": start, **fields}

        def train(**more: Any) -> tuple[Recipe, TrainState]:
            recipe = lab.recipe(**given, **more)
            bare = dataclasses.replace(recipe, evaluators=())
            return recipe, fit(bare, workdir=folder, options=options)

        train()
        rows = [row for row in read_jsonl(Path(folder) / "metrics.jsonl") if "latency" in row]
        recipe, state = train(dense_from=folder)
        target = recipe.config["prune"]["target"]
        steps = next(row["step"] for row in rows if row["latency"] <= target)
        widths = ModelWidths.read(recipe.config["widths"])
        found = accuracy(recipe, state)
        return Pruned(found, widths, rows[-1]["latency"], steps, parameter_count(state.params))


def trained(lab: Lab, folder: str, seed: int) -> float:
    """Train the whole model; its accuracy."""
    recipe = lab.recipe(seed=seed)
    first = dataclasses.replace(recipe, phases=recipe.phases[:1], evaluators=())
    options = FitOptions(seed=seed, progress=lab.progress)
    return accuracy(recipe, fit(first, workdir=folder, options=options))


def continued(lab: Lab, start: str, seed: int) -> float:
    """The whole model after as many further steps as a pruned one has: its accuracy."""
    recipe = lab.recipe(seed=seed, steps=0, init_from=start)
    prune, tune = recipe.config["prune"], recipe.config["fine_tune"]
    fields = {"optim__learning_rate": tune["learning_rate"], "optim__warmup_steps": 0}
    recipe = lab.recipe(
        seed=seed, steps=prune["steps"] + tune["steps"], init_from=start, **fields
    )
    first = dataclasses.replace(recipe, phases=recipe.phases[:1], evaluators=())
    return accuracy(recipe, fit(first, options=FitOptions(seed=seed, progress=lab.progress)))


def half_the_latency(lab: Lab) -> Findings:
    """Accuracy of every ranking at the same latency, over seeds; and what eta does."""
    runs: dict[str, list[Pruned]] = {name: [] for name in (*RANKINGS, "eta 0")}
    whole, dense = [], []
    for seed in range(lab.seed, lab.seed + SEEDS):
        with tempfile.TemporaryDirectory() as start:
            whole.append(trained(lab, start, seed))
            dense.append(continued(lab, start, seed))
            for ranking in RANKINGS:
                runs[ranking].append(pruned(lab, start, seed, prune__ranking=ranking))
            runs["eta 0"].append(pruned(lab, start, seed, prune__eta=0.0))
    mean = {name: float(np.mean([run.accuracy for run in found])) for name, found in runs.items()}
    before = parameter_count(
        jax.eval_shape(lambda: lab.recipe().task.init(jax.random.key(0), rows(lab)))[0]
    )

    def cost(name: str) -> float:
        return float(np.mean([(before - run.parameters) * run.steps for run in runs[name]]))

    values = {
        "trained": float(np.mean(whole)),
        "dense": float(np.mean(dense)),
        **mean,
        "gain_on_magnitude": mean["hessian"] - mean["magnitude"],
        "gain_on_random": mean["hessian"] - mean["random"],
        "behind_dense": float(np.mean(dense)) - mean["hessian"],
        "cost_of_eta": cost("hessian") / cost("eta 0"),
    }
    table = [
        {"ranking": name, "seed": lab.seed + i, **run.row}
        for name, found in runs.items()
        for i, run in enumerate(found)
    ]
    return Findings(values, {"Runs": table}, [plot(lab, values, runs)])
