"""The experiments behind the claims."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict

from jaxformer.analyze.operations import MAPS, Product, megabytes, products, spike_energy
from jaxformer.evaluation.claims import Lab, over
from jaxformer.evaluation.report import figure
from jaxformer.observe.metrics import read_jsonl
from jaxformer.papers.qsd_transformer.model import ATTENTION_GAIN, quantized
from jaxformer.papers.qsd_transformer.recipe import network
from jaxformer.recipe import Claim, Findings, Recipe, TrainState
from jaxformer.tasks.distill import TEACHER
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import start_run

SEEDS = 6
IMAGES = 897  # of the digits; networks are compared on the other 900
# Levels are compared early: after 400 steps binary neurons too are good enough for the digits.
# Distillation is compared late: before its lesson is learnt it costs accuracy.
EARLY = 150
ARMS: Mapping[str, Mapping[str, Any]] = {
    "integer": {"model__fgd": 0.0},
    "integer, distilled": {},
    "integer, early": {"model__fgd": 0.0, "steps": EARLY},
    "binary, early": {"model__fgd": 0.0, "model__levels": 1, "steps": EARLY},
}


def accuracy(lab: Lab) -> Findings:
    """Six seeds of a network of floats and of the spiking networks beside it."""
    seeds = lab.members(SEEDS)
    rows = [one(other) for other in seeds]
    mean = over(rows)
    best = max(mean["integer"], mean["integer, distilled"])
    values = {
        "levels_gain": mean["integer, early"] - mean["binary, early"],
        "distillation_gain": mean["integer, distilled"] - mean["integer"],
        "mismatch_ratio": mean["mismatch, integer, distilled"] / mean["mismatch, integer"],
        "float_gain": mean["float"] - best,
        "energy_ratio": mean["mJ, float"] / mean["mJ, integer, distilled"],
    }
    table = [{"seed": lab.seed, **row} for lab, row in zip(seeds, rows, strict=True)]
    path = plot(lab, rows, mean)
    return Findings(values, {"Accuracy %": [*table, {"seed": "mean", **mean}]}, [path])


def one(lab: Lab) -> dict[str, float]:
    """Test accuracies in percent, mismatches and energies of one seed."""
    recipe = lab.recipe(data__images=IMAGES)
    teacher = run(lab, dataclasses.replace(recipe, phases=recipe.phases[:1]))
    row = {"float": 100 * teacher.found["accuracy"]}
    for name, fields in ARMS.items():
        recipe = lab.recipe(data__images=IMAGES, **fields)
        alone = dataclasses.replace(recipe, phases=recipe.phases[1:])
        student = run(lab, alone, teacher.state)
        row[name] = 100 * student.found["accuracy"]
        row[f"mismatch, {name}"] = student.found["mismatch"]
        if name == "integer, distilled":
            row["mJ, float"], row[f"mJ, {name}"] = energies(recipe, student.state)
    return row


@dataclasses.dataclass(frozen=True)
class Trained:
    """The state at the end of a run, and its measures on the test images."""

    state: TrainState
    found: Mapping[str, float]


def run(lab: Lab, recipe: Recipe, start: TrainState | None = None) -> Trained:
    """Train one phase, from the state that another has left."""
    with tempfile.TemporaryDirectory() as folder:
        if start is not None:
            zero = jnp.zeros_like(start.step)
            start_run(recipe, folder, start.replace(step=zero, opt_state={}))
        options = FitOptions(seed=lab.seed, progress=lab.progress)
        state = fit(recipe, workdir=folder, options=options)
        rows = read_jsonl(f"{folder}/metrics.jsonl")
    last = [row for row in rows if "test/accuracy" in row][-1]
    found = {name.removeprefix("test/"): x for name, x in last.items() if name.startswith("test/")}
    return Trained(state, found)


def energies(recipe: Recipe, state: TrainState) -> tuple[float, float]:
    """Millijoules for one image: as floats, and as spikes at the rates of the test images."""
    task = recipe.task.stages[1].student
    image = jnp.asarray(recipe.evaluators[0].data.batch(0)["image"])
    extra = {name: tree for name, tree in state.extra.items() if name != TEACHER}
    variables = {"params": state.params, **extra}
    found = products(task.model, variables, image[:1])
    rates = firing(task.model, variables, image)
    return spike_energy(found, {}), spike_energy(found, rates)


def firing(model: Any, variables: Any, image: jax.Array) -> dict[str, float]:
    """{path: spikes of an input, over all its steps} of the maps whose inputs are spikes."""
    levels = model.model.neuron().levels

    @jax.jit
    def rates(variables: Any, image: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        seen = {}

        def watch(method: Any, args: Any, kwargs: Any, context: Any) -> Any:
            layer = context.module
            if isinstance(layer, MAPS) and context.method_name == "contract":
                path = "/".join(layer.path)
                gain = ATTENTION_GAIN if path.endswith("/out/pointwise_1") else 1.0
                n = levels * args[0] / gain
                seen[path] = (n == jnp.round(n)).all() & (n >= 0).all(), n.mean()
            return method(*args, **kwargs)

        with nn.intercept_methods(watch):
            model.apply(variables, image)
        return seen

    found = rates(variables, image)
    stem = next(iter(found))  # an image of few grey levels may look like spikes
    return {path: float(n) for path, (spikes, n) in found.items() if bool(spikes) and path != stem}


def plot(lab: Lab, rows: list[dict[str, float]], mean: Mapping[str, float]) -> Path:
    """Accuracies and mismatches: means as bars, seeds as dots."""
    path = lab.figure("accuracy")
    fig, ((left, right),) = figure(path, 2)
    for axis, names in (
        (left, ["float", *ARMS]),
        (right, [f"mismatch, {name}" for name in ARMS]),
    ):
        labels = [name.removeprefix("mismatch, ").replace(", ", "\n") for name in names]
        bars = axis.bar(labels, [mean[name] for name in names])
        axis.bar_label(bars, fmt="%.3g", padding=6)
        for row in rows:
            axis.plot(labels, [row[name] for name in names], "k.")
        axis.margins(y=0.2)
    left.set(ylabel="accuracy %", title="digits, weights of 4 bits")
    right.set(ylabel="mismatch", title="attention against the network of floats")
    fig.savefig(path, dpi=110)
    return path


def sizes(lab: Lab) -> Findings:
    """Parameters of the paper's three networks, in millions of floats of 32 bits."""
    rows = []
    for preset, paper in (("paper", 1.8), ("paper_31m", 3.9), ("paper_55m", 6.8)):
        config = ConfigDict(lab.load(f"{lab.paper}:{preset}").config)
        rows.append({"model": preset, **size_of(config), "paper": paper})
    values = {"times_smaller": min(row["float M"] / row["quantised M"] for row in rows)}
    return Findings(values, {"Millions of parameters": rows})


def size_of(config: ConfigDict) -> dict[str, float]:
    """Parameters of the network of a config, in millions, and of the quantised one at 32 bits."""
    model = quantized(network(config), config.model.bits)
    side = config.data.size
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, jax.random.key(0)), image)
    found = products(model, variables, image)

    def bits(product: Product) -> float:
        return config.model.bits if product.weights else 32.0

    params = variables["params"]
    whole, small = (megabytes(params, found, b) / 4 for b in (lambda product: 32.0, bits))
    return {"float M": whole, "quantised M": small}


CLAIMS = (
    Claim(
        says="Neurons of four levels are better than binary ones after as few steps (points, means "
        "of six seeds).",
        source="section 4.1; ablations",
        experiment=accuracy,
        value="levels_gain",
        at_least=3.0,
        baseline="one level: a binary neuron",
    ),
    Claim(
        says="Distilling attention costs nothing (points, means of six seeds).",
        source="section 4.2; ablations",
        experiment=accuracy,
        value="distillation_gain",
        at_least=-0.3,
        baseline="the same without distillation",
    ),
    Claim(
        says="Its queries and keys are nearer to those of the network of floats (ratio of "
        "mismatches).",
        source="section 4.2",
        experiment=accuracy,
        value="mismatch_ratio",
        at_most=1.0,
        baseline="the same without distillation: 1",
    ),
    Claim(
        says="The network of floats is no worse than any of spikes (points, means).",
        source="table of results",
        experiment=accuracy,
        value="float_gain",
        at_least=0.0,
        baseline="the better of the spiking networks of four levels",
    ),
    Claim(
        says="With weights of 4 bits the paper's networks are more than 7 times smaller, norms, "
        "biases and steps counted, which stay floats (the least ratio of three).",
        source="table of results: 8.1 times",
        experiment=sizes,
        value="times_smaller",
        at_least=7.0,
        baseline="full precision: 1",
    ),
)
