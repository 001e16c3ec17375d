"""Which tiles are the fastest: tries them all, writes tiles.json for `jaxformer.kernels.tuned`."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import jax

from jaxformer.bench.clock import race
from jaxformer.bench.linear import both_run, linear_kernels
from jaxformer.bench.softmax import RUNS, Shape, kernels, ours
from jaxformer.bench.stage import Stage
from jaxformer.kernels.attention import Causal, Full
from jaxformer.kernels.linear_attention import Tiles, linear_attention

ATTENTION = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (64, 256))
LINEAR = tuple(
    Tiles(chunk, columns, segments)
    for chunk in (64, 128)
    for columns in (32, 64, 128)
    for segments in (1, 4, 16)
)


def measure(stage: Stage) -> None:
    """The tiles of each case take turns; one that does not compile loses by its error."""
    entries: list[dict[str, Any]] = []
    for case in _cases(stage.tiny):
        if stage.leaves_out(case):
            continue
        candidates = _candidates(case, stage.tiny)
        builds = {str(i): build for i, (_, build) in enumerate(candidates)}
        timings = race(builds, stage.deadline)
        for i, (tiles, _) in enumerate(candidates):
            stage.add(case | {"tiles": list(tiles)}, timings[str(i)])
        won = [i for i in range(len(candidates)) if timings[str(i)].seconds]
        if won:
            best = min(won, key=lambda i: timings[str(i)].seconds)
            entries.append(case | {"tiles": list(candidates[best][0])})
        found = {"device": jax.devices()[0].device_kind, "entries": entries}
        (stage.out / "tiles.json").write_text(json.dumps(found, indent=1) + "\n")


def _cases(tiny: bool) -> Iterator[dict[str, Any]]:
    for length in (32,) if tiny else (4096, 16384, 1024):
        for size in (8,) if tiny else (128, 64, 256):
            common = {"head_size": size, "L": length}
            for impl in kernels()[:1]:
                for causal in (True,) if tiny else (True, False):
                    for direction in ("forward", "backward"):
                        case = {"op": "attention", "impl": impl, "causal": causal}
                        yield case | common | {"pass": direction}
            for impl in linear_kernels():
                yield {"op": "linear_attention", "impl": impl, "causal": True} | common


def _candidates(case: dict[str, Any], tiny: bool) -> list[tuple[Any, Any]]:
    """(tiles, what builds their program) of a case."""
    shape = Shape.of(case["L"], case["head_size"], tiny=tiny)
    if case["op"] == "attention":
        mask = Causal() if case["causal"] else Full()
        run, attend = RUNS[case["pass"]], functools.partial(ours, case["impl"], mask=mask)
        choices = ATTENTION
    else:
        run, attend = both_run, functools.partial(_linear, case["impl"])
        choices = LINEAR
    if tiny:
        choices = choices[:2]
    return [(tiles, functools.partial(run, attend(tiles=tiles), shape)) for tiles in choices]


def _linear(impl: str, tiles: Tiles) -> Any:
    return lambda q, k, v: linear_attention(q, k, v, causal=True, impl=impl, tiles=tiles)
