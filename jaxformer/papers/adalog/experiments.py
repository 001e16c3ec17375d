"""The experiments behind the claims."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from jaxformer.compress.reconstruction import Reconstruction
from jaxformer.compress.synthetic import attention, baselines, best_state
from jaxformer.evaluation.claims import Lab
from jaxformer.evaluation.report import accuracy_bars
from jaxformer.papers.adalog.model import AdaLog, rules
from jaxformer.papers.adalog.search import BASES, AdaLogSearch
from jaxformer.recipe import Claim, Findings
from jaxformer.setups.post_training import MIN_MAX, REPQ, Bench, Method

RECONSTRUCTION = Reconstruction.of(500)
ADALOG = Method("AdaLog", rules, AdaLogSearch, RECONSTRUCTION)
BITS = (3, 4)
DRAWS = 3  # of the images
BASELINES = (MIN_MAX, REPQ)


def probabilities(lab: Lab) -> Findings:
    """Quantisers of softmax attention without a model: their errors in what attention gives."""
    p, v = attention(lab.seed)
    q = jnp.arange(BASES[0], BASES[1] + 1)
    rows: list[dict[str, Any]] = []
    values = {}
    for bits in BITS:
        found = baselines(bits, p, v)
        state, error = best_state(AdaLog(bits), {"q": q, "scale": jnp.ones_like(q)}, p, v)
        rows.append({"bits": bits, **found, "AdaLog": error, "its q": float(state["q"])})
        values[f"error_ratio_{bits}"] = error / min(found.values())
    return Findings(values, {"Relative squared error of the output": rows}, [])


def digits(lab: Lab) -> Findings:
    """One trained ViT with outliers, calibrated in three ways, on three draws, at 4 and 3 bits.

    After AdaLog's calibration its blocks are reconstructed, on 1,024 images.
    """
    bench = Bench(lab)
    rows: list[dict[str, float]] = []
    errors: list[dict[str, float]] = []
    for bits in BITS:
        found = {m.name: bench.quality(m, bits, bits, DRAWS) for m in BASELINES}
        phases = bench.qualities(ADALOG, bits, bits, DRAWS)
        found |= {"AdaLog": phases["calibrate"], "reconstructed": phases["reconstruct"]}
        rows.append({"bits": bits, **{name: x.accuracy for name, x in found.items()}})
        errors.append({"bits": bits, **{name: x.error for name, x in found.items()}})
    three, four = rows
    left = {e["bits"]: e["reconstructed"] / e["AdaLog"] for e in errors}
    values = {
        "float": bench.float_accuracy,
        "points_above_min_max": four["AdaLog"] - four["min-max"],
        "points_below_float": bench.float_accuracy - four["AdaLog"],
        "points_above_repq_at_3": three["AdaLog"] - three["RepQ-ViT"],
        "points_by_reconstruction_at_3": three["reconstructed"] - three["AdaLog"],
        "points_by_reconstruction_at_4": four["reconstructed"] - four["AdaLog"],
        "error_left_by_reconstruction_at_3": left[3],
        "error_left_by_reconstruction_at_4": left[4],
    }
    name = f"Accuracy %, in float {bench.float_accuracy:.4g}"
    panels = {
        f"W{row['bits']}A{row['bits']}": {k: v for k, v in row.items() if k != "bits"}
        for row in rows
    }
    path = accuracy_bars(lab.figure("digits"), panels, bench.float_accuracy)
    tables = {name: rows, "Squared error of logits, over their variance": errors}
    return Findings(values, tables, [path])


def _error(bits: int) -> Claim:
    return Claim(
        says=f"With {bits} bits for softmax attention of random scores, a searched base errs less "
        "in the output than uniform codes, log2 and log sqrt(2) (ratio to the best of them).",
        source="section 3.2: a base for every tensor",
        experiment=probabilities,
        value=f"error_ratio_{bits}",
        at_most=1.0,
        baseline="the best of the three",
    )


CLAIMS = (
    _error(4),
    _error(3),
    Claim(
        says="A ViT of digits, with outliers in its norms, knows the digits (accuracy %).",
        source="the model that is quantised",
        experiment=digits,
        value="float",
        at_least=95.0,
        baseline="chance: 10",
    ),
    Claim(
        says="At W4A4 it keeps far more than with plain ranges (points).",
        source="table 1: ImageNet, W4A4",
        experiment=digits,
        value="points_above_min_max",
        at_least=10.0,
        baseline="min-max, uniform",
    ),
    Claim(
        says="At W4A4 it is near the float model (points below).",
        source="table 1: ImageNet, W4A4, DeiT-B 1.8 below",
        experiment=digits,
        value="points_below_float",
        at_most=5.0,
        baseline="float",
    ),
    Claim(
        says="At W3A3 it is no worse than RepQ-ViT (points, mean of three draws of 32 images).",
        source="table 1: ImageNet, W3A3, where RepQ-ViT has 0.1",
        experiment=digits,
        value="points_above_repq_at_3",
        at_least=0.0,
        baseline="RepQ-ViT",
    ),
    Claim(
        says="Reconstruction of blocks makes up for some of what W3A3 lost (squared error of "
        "logits, over that before it, means of three draws).",
        source="table of the authors' repository: ImageNet, W3A3, ViT-S 13.88 -> 62.50",
        experiment=digits,
        value="error_left_by_reconstruction_at_3",
        at_most=1.0,
        baseline="calibration alone",
    ),
)
