"""What compression is worth in time: models of DeiT-S's sizes against the dense one, in one run.

Weights are random, for times do not depend on them; accuracy is what `jaxformer compress` reports.
"""

from __future__ import annotations

import dataclasses
import re
import resource
import sys
import time
from typing import Any

import jax

from jaxformer import paths
from jaxformer.analyze.flops import count
from jaxformer.bench.clock import Deadline, program, race
from jaxformer.compress.compressor import ready
from jaxformer.compress.factored import LINEAR
from jaxformer.compress.factors import FactorSpec, size_of
from jaxformer.compress.matrix import as_matrix
from jaxformer.compress.packed import nbytes
from jaxformer.models.transformer import Transformer
from jaxformer.models.vit import vit
from jaxformer.papers import adalog, dsformer, nvit, zero_tprune
from jaxformer.recipe import Batch
from jaxformer.tasks.classify import ClassifyTask

Row = dict[str, Any]
RATIO = 2.8  # of DSFormer
KEPT = 0.7  # of the saving in FLOPs should be saved in time
TOKENS = 1.35  # images/s of the token-pruned model, in those of the dense one
MINUTES, GIGABYTES = 15, 3  # of calibration and search on 32 images


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of the model, and how much is measured."""

    width: int = 384
    depth: int = 12
    heads: int = 6
    hidden: int = 1536
    image: int = 224
    patch: int = 16
    classes: int = 1000
    rows: int = 4
    examples: int = 32  # calibrated on
    columns: int = 64  # q of DSFormer
    seconds: float = 120.0


def bench_compress(sizes: Sizes | None = None, calibrate: bool = True) -> list[Row]:
    """Rows of times beside the dense model's, then one of what AdaLog's calibration takes."""
    sizes = sizes or Sizes()
    trunk = Transformer(sizes.width, sizes.depth, sizes.heads, hidden=sizes.hidden)
    model = vit(trunk, image_size=sizes.image, patch=sizes.patch, classes=sizes.classes)
    task = ClassifyTask(model)
    batch = images(sizes, sizes.rows)
    params, _ = jax.jit(task.init)(jax.random.key(0), batch)
    rows = times(task, params, batch, sizes)
    return [*rows, calibration(task, params, images(sizes, sizes.examples))] if calibrate else rows


def images(sizes: Sizes, rows: int) -> Batch:
    """Noise, and labels of it."""
    key = jax.random.key(1)
    image = jax.random.uniform(key, (rows, sizes.image, sizes.image, 3))
    return {"image": image, "label": jax.random.randint(key, (rows,), 0, sizes.classes)}


def times(task: Any, params: Any, batch: Batch, sizes: Sizes) -> list[Row]:
    """Dense, token-pruned, densified and factorised models, taking turns."""
    models = {"dense": (task, params, {})}
    for name, method in (
        ("zero_tprune:0.65", zero_tprune.compressor("0.65")),
        ("nvit:0.5", nvit.compressor("0.5")),
    ):
        print(f"jaxformer: {name}", file=sys.stderr)
        own, extra, found = method.find(task, params, {}, batch)
        models[name] = method.task(task, found), own, extra
    factors = factorised(task, params, sizes)
    models[f"dsformer:{RATIO}"] = factors, *jax.jit(factors.init)(jax.random.key(0), batch)
    stored = {name: nbytes(variables) for name, (_, *variables) in models.items()}
    models = {name: (model[0], *ready(*model)) for name, model in models.items()}
    calls = {
        name: lambda p, e, b, t=t: t.predict(p, e, b, key=jax.random.key(0))
        for name, (t, _, _) in models.items()
    }
    flops = {name: count(calls[name], *models[name][1:], batch) for name in models}
    builds = {
        name: lambda name=name: program(calls[name], *models[name][1:], batch) for name in models
    }
    measured = race(builds, Deadline.after(sizes.seconds))
    dense = measured["dense"].seconds
    rows = []
    for name in models:
        one, share = measured[name], flops[name] / flops["dense"]
        row: Row = {"model": name, "MB": stored[name] / 1e6, "FLOPs": share}
        if one.seconds is None or dense is None:
            rows.append({**row, "error": one.error})
            continue
        row |= {"images/s": sizes.rows / one.seconds, "speed": dense / one.seconds}
        if name.startswith("zero_tprune"):
            row |= {"target": f"speed >= {TOKENS}", "met": row["speed"] >= TOKENS}
        elif name != "dense":
            kept = (1 - one.seconds / dense) / (1 - share)
            row |= {"target": f"{kept:.0%} of the saving; >= {KEPT:.0%}", "met": kept >= KEPT}
        rows.append({**row, "turns": one.samples})
    return rows


def factorised(task: Any, params: Any, sizes: Sizes) -> Any:
    """The task with layers as DSFormer's factors at 2.8 times, r = q / 2 and the s that is left."""
    q, found = sizes.columns, []
    for name, kernel in paths.leaves(params).items():
        path, _, leaf = name.rpartition("/")
        if leaf == "kernel" and re.search(LINEAR, path):
            outputs, inputs = as_matrix(name, kernel).shape
            one, none = (size_of(FactorSpec(q, q // 2, s), outputs, inputs).bits for s in (1, 0))
            s = int((outputs * inputs * 32 / RATIO - none) / (one - none))
            found.append([path, q, q // 2, min(s, q // 2), None])
    return dsformer.compressor(str(RATIO)).task(task, {"factors": found})


def calibration(task: Any, params: Any, batch: Batch) -> Row:
    """Minutes and the most memory of this process, all before included."""
    print("jaxformer: adalog:w4a4", file=sys.stderr)
    start = time.perf_counter()
    found = adalog.compressor("w4a4").find(task, params, {}, batch)[:2]
    jax.block_until_ready(found)
    minutes = (time.perf_counter() - start) / 60
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    target = f"{minutes:.1f} min, {peak:.1f} GB; <= {MINUTES} min, {GIGABYTES} GB"
    met = minutes <= MINUTES and peak <= GIGABYTES
    return {"model": "adalog:w4a4, found", "MB": nbytes(found) / 1e6, "target": target, "met": met}
