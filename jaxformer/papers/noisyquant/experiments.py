"""The experiments behind the claims."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.compress.quantized import COLLECTION, operands
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import accuracy_bars, figure
from jaxformer.nn.einsum import Einsum
from jaxformer.papers.noisyquant.model import expected_error, rounding_error, rules
from jaxformer.papers.noisyquant.recipe import Procedure
from jaxformer.recipe import Claim, Findings
from jaxformer.setups.post_training import Bench, Method
from jaxformer.tasks.staged import StagedTask

DRAWS = 5  # of the images to calibrate on, and of the noise
WAYS = {
    "EasyQuant": {"shift": False, "noise": False},
    "shift": {"noise": False},
    "noise": {"shift": False},
    "shift and noise": {},
}


def spike(lab: Lab) -> Findings:
    """Values that crowd away from the bins' centres, with a tail: what activations look like."""
    keys = jax.random.split(jax.random.key(lab.seed), 4)
    b, count = 1.0, 200_000
    crowd = 0.8 * b + 0.05 * b * jax.random.normal(keys[0], (count,))
    tail = jax.random.uniform(keys[1], (count,), minval=-8 * b, maxval=8 * b)
    x = jnp.where(jax.random.uniform(keys[2], (count,)) < 0.9, crowd, tail)
    n = jax.random.uniform(keys[3], (count,), minval=-b, maxval=b)
    before = jnp.square(rounding_error(x, b)).mean()
    after = jnp.square(rounding_error(x + n, b)).mean()
    path = lab.figure("spike")
    fig, ((axis,),) = figure(path)
    at = jnp.linspace(-3, 3, 601)
    axis.plot(at, jnp.square(rounding_error(at, b)), label="no noise")
    for part in (0.5, 1.0, 1.4):
        axis.plot(at, expected_error(at, part * b, b), label=f"n = {part} b")
    axis.set(xlabel="x / b", ylabel="expected squared error / b^2")
    axis.legend(fontsize=8)
    fig.savefig(path, dpi=110)
    values = {
        "error_ratio": float(after / before),
        "expected_ratio": float(expected_error(x, b, b).mean() / before),
    }
    return Findings(values, {}, [path])


def digits(lab: Lab) -> Findings:
    """One trained ViT with outliers, at W4A4 in the four published ways, with several draws."""
    bench = Bench(lab)
    rows: list[dict[str, Any]] = []
    errors: dict[str, list[Mapping[str, float]]] = {}
    for way, choices in WAYS.items():
        for draw in range(DRAWS):
            method = Method(way, rules, Procedure(seed=draw, **choices))
            made, state = bench.calibrated(method, 4, 4, draw)
            errors.setdefault(way, []).append(layer_errors(made, state))
            quality = bench.quality_of(made, state)
            row = {"accuracy %": quality.accuracy, "error of logits": quality.error}
            rows.append({"way": way, "draw": draw, **row})
    pairs = zip(errors["EasyQuant"], errors["shift and noise"], strict=True)
    better = [statistics.mean(noisy[x] < plain[x] for x in plain) for plain, noisy in pairs]
    mean, error = (
        {way: statistics.mean(row[name] for row in rows if row["way"] == way) for way in WAYS}
        for name in ("accuracy %", "error of logits")
    )
    values = {
        "float": bench.float_accuracy,
        "points_above_plain": mean["shift and noise"] - mean["EasyQuant"],
        "error_ratio_of_logits": error["shift and noise"] / error["EasyQuant"],
        "layers_better": statistics.mean(better),
    }
    layers = [
        {"layer": layer, **{way: statistics.mean(f[layer] for f in errors[way]) for way in WAYS}}
        for layer in errors["EasyQuant"][0]
    ]
    tables = {
        f"Accuracy %, in float {bench.float_accuracy:.4g}": rows,
        "Squared error of each layer's output, by activations": layers,
    }
    path = accuracy_bars(lab.figure("digits"), {"W4A4": mean}, bench.float_accuracy)
    return Findings(values, tables, [path])


def layer_errors(made: Any, state: Any) -> dict[str, float]:
    """The mean squared error that quantised inputs make in each layer's output, on unseen images.

    Each layer is given what it would read in the quantised model; its kernel is quantised in both.
    """
    assert isinstance(made.task, StagedTask)
    task, found = made.task.stages[-1], {}
    (evaluator,) = made.evaluators
    (interceptor,) = task.model.interceptors

    def watch(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if operands(context) and isinstance(context.module, Einsum):
            module = context.module
            ruled = [interceptor.rule(module, name) for name in ("input", "kernel")]
            if all(ruled):
                x, kernel, _ = args
                states = [module.get_variable(COLLECTION, n) for n in ("input", "kernel")]
                x_hat, k_hat = (
                    rule.quantizer(value, **own)
                    for rule, value, own in zip(ruled, (x, kernel), states, strict=True)
                )
                # Not by `method`, which quantises once more.
                error = jnp.einsum(module.equation, x_hat - x, k_hat)
                found["/".join(module.path)] = float(jnp.square(error).mean())
        return method(*args, **kwargs)

    with nn.intercept_methods(watch):
        batch = evaluator.data.batch(0)
        task.predict(state.params, state.extra, batch, key=jax.random.key(0))
    return found


CLAIMS = (
    Claim(
        says="Where 90 % of the values lie .8 of half a bin from their centre, noise of one bin "
        "lowers the squared error of rounding (ratio).",
        source="theorem 1, and figure 2",
        experiment=spike,
        value="error_ratio",
        at_most=0.65,
        baseline="no noise",
    ),
    Claim(
        says="Logits of a ViT of digits, with outliers in its norms, are nearer to those of floats "
        "at W4A4 with shift and noise (ratio of squared errors, means of five draws).",
        source="table 1: DeiT-S, W6A6, 76.37 against 75.27",
        experiment=digits,
        value="error_ratio_of_logits",
        at_most=1.0,
        baseline="EasyQuant: the same quantisers without",
    ),
    Claim(
        says="Layers whose outputs err less on unseen images (share).",
        source="table 5: the output error of fc2 falls by 19 %",
        experiment=digits,
        value="layers_better",
        at_least=0.6,
        baseline="EasyQuant",
    ),
)
