"""One model, one task, one schedule, and every attention in turn: quality, time and memory by L."""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.analyze.flops import count
from jaxformer.catalogue import paper_module
from jaxformer.config import base, papers
from jaxformer.errors import ConfigError
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.report import figure, markdown_table
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.linear_attention import LinearAttention
from jaxformer.nn.make import Make
from jaxformer.parallel.mesh import make_mesh
from jaxformer.parallel.sharding import place_batch
from jaxformer.recipe import EvalContext, Phase, Recipe, Task
from jaxformer.tools.testbeds import TESTBEDS
from jaxformer.train.fit import FitOptions, fit
from jaxformer.train.states import on_device
from jaxformer.train.updates import GradientUpdate

Rows = list[dict[str, Any]]


def _softmax(trunk: Transformer, length: int) -> Variant:
    del trunk, length
    return Variant()


def _linear(trunk: Transformer, length: int) -> Variant:
    del length
    return Variant(Make(LinearAttention, heads=trunk.heads))


PLAIN: Mapping[str, Callable[[Transformer, int], Variant]] = {
    "softmax": _softmax,
    "linear": _linear,
}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and how much of it.

    Models are trained at the first of the `lengths` for `steps` steps with each of the `seeds` and
    scored at all lengths; with steps=0 time and memory alone are measured.

    Raises:
        ConfigError: an unknown mixer or task, or no length.
    """

    mixers: tuple[str, ...]
    task: str
    lengths: tuple[int, ...]
    steps: int = 300
    seeds: tuple[int, ...] = (0,)
    batch: int = 8
    width: int = 64
    depth: int = 2
    heads: int = 4
    learning_rate: float = 3e-3
    turns: int = 3

    def __post_init__(self) -> None:
        if self.task not in TESTBEDS:
            raise ConfigError(f"task: {self.task!r}; allowed: {', '.join(TESTBEDS)}")
        if not self.lengths or not self.mixers:
            raise ConfigError("lengths, mixers: give at least one of each")
        for mixer in self.mixers:
            variant_of(mixer)

    def parts(self, mixer: str) -> Task:
        """The task of a mixer's model; it takes any of the lengths."""
        trunk = Transformer(self.width, self.depth, self.heads, position="none")
        variant = variant_of(mixer)(trunk, max(self.lengths))
        trunk = dataclasses.replace(trunk, position=variant.position)
        return TESTBEDS[self.task].task(trunk, variant, self.lengths[0])

    def recipe(self, mixer: str, seed: int) -> Recipe:
        """Training at the first length, as every mixer has it."""
        config = base("compare")
        config.update({"seed": seed, "steps": self.steps, "batch_size": self.batch})
        warmup = min(50, self.steps // 10)
        config.optim.update(learning_rate=self.learning_rate, warmup_steps=warmup, final=0.1)
        task = self.parts(mixer)
        data = TESTBEDS[self.task].train(self.lengths[0], self.batch, seed)
        return Recipe(task, [Phase("train", self.steps, data, GradientUpdate.of(task, config))])


def variant_of(mixer: str) -> Callable[[Transformer, int], Variant]:
    """The variant of a plain attention or of a paper.

    Raises:
        ConfigError: there is none of that name.
    """
    if mixer in PLAIN:
        return PLAIN[mixer]
    made = getattr(paper_module(mixer), "variant", None) if mixer in papers() else None
    if made is None:
        raise ConfigError(f"mixers: {mixer!r} is not one of {', '.join(offered())}")
    return made


def offered() -> list[str]:
    """The names that can be compared."""
    return [*PLAIN, *(paper for paper in papers() if hasattr(paper_module(paper), "variant"))]


def compare(what: Comparison, folder: Path) -> Path:
    """Measure; write `<task>.json`, `<task>.md` and figures to `folder`; the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    scores = quality(what) if what.steps else []
    costs = cost(what)
    found = {"comparison": dataclasses.asdict(what), "quality": scores, "cost": costs}
    (folder / f"{what.task}.json").write_text(json.dumps(found, indent=1) + "\n")
    page = folder / f"{what.task}.md"
    page.write_text(_page(what, scores, costs, folder))
    return page


def quality(what: Comparison) -> Rows:
    """The score of every mixer and seed at every length, where it has one."""
    bed, rows = TESTBEDS[what.task], []
    mesh = make_mesh()
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    for seed in what.seeds:
        for mixer in what.mixers:
            recipe = what.recipe(mixer, seed)
            _tell(f"{mixer}, seed {seed}: {what.steps} steps at {what.lengths[0]}")
            state = fit(recipe, options=FitOptions(seed=seed, progress=False))
            for length in what.lengths:
                batch = max(what.batch * what.lengths[0] // length // ways, 1) * ways
                # As many tokens at each length, but no fewer than 16 rows.
                batches = max(64 * what.lengths[0] // length, 16 // batch, 1)
                unseen = bed.unseen(length, batch)
                batches = min(batches, len(unseen)) if hasattr(unseen, "__len__") else batches
                score = MeanEvaluator(recipe.task, unseen, batches=batches)
                row = {"mixer": mixer, "seed": seed, "L": length}
                with jax.set_mesh(mesh):
                    row[bed.score] = score(state, EvalContext(mesh, "train"))[bed.score]
                rows.append(row)
    return rows


def cost(what: Comparison) -> Rows:
    """Time, memory and work of one training step on one row; mixers take turns at each length."""
    rows = []
    for length in what.lengths:
        _tell(f"one row of {length}: {', '.join(what.mixers)}")
        steps = {mixer: _Step(what, mixer, length) for mixer in what.mixers}
        turns = [{m: step.seconds() for m, step in steps.items()} for _ in range(what.turns + 1)]
        for mixer, step in steps.items():
            seconds = statistics.median(turn[mixer] for turn in turns[1:])  # the first warms up
            row = {"mixer": mixer, "L": length, "ms": 1e3 * seconds}
            rows.append({**row, "temporary MiB": step.temporary, "GFLOP": step.gflop})
    return rows


class _Step:
    """Loss and gradient of one row, compiled."""

    def __init__(self, what: Comparison, mixer: str, length: int) -> None:
        task, mesh = what.parts(mixer), make_mesh(devices=jax.devices()[:1])
        data = TESTBEDS[what.task].train(length, 1, 0)
        key = jax.random.key(0)
        with jax.set_mesh(mesh):
            batch = on_device(data, place_batch(data.batch(0), mesh, 1))
            params, extra = jax.jit(task.init)(key, batch)

            def gradient(params: Any, extra: Any, batch: Any, key: jax.Array) -> Any:
                def loss(params: Any) -> jax.Array:
                    return task.loss(params, extra, batch, key=key, train=True).loss

                return jax.value_and_grad(loss)(params)

            self.arguments = (params, extra, batch, key)
            self.gflop = count(gradient, *self.arguments) / 1e9
            self.program = jax.jit(gradient).lower(*self.arguments).compile()
        self.temporary = self.program.memory_analysis().temp_size_in_bytes / 2**20

    def seconds(self) -> float:
        start = time.perf_counter()
        jax.block_until_ready(self.program(*self.arguments))
        return time.perf_counter() - start


def _tell(text: str) -> None:
    print(f"compare: {text}", file=sys.stderr, flush=True)


def _page(what: Comparison, scores: Rows, costs: Rows, folder: Path) -> str:
    bed, first = TESTBEDS[what.task], what.lengths[0]
    text = [
        f"# {what.task}: {bed.says}",
        "",
        f"A model of {what.depth} layers, width {what.width}, {what.heads} heads; the attention "
        "alone differs, with the positions that it brings (else sinusoidal).",
        "",
    ]
    if scores:
        seeds = ", ".join(map(str, what.seeds))
        text += [
            f"## {bed.score.capitalize()}",
            "",
            f"Trained for {what.steps} steps of {what.batch} rows at L = {first}, scored on "
            f"unseen rows of each length; mean over seeds {seeds}.",
            "",
            markdown_table(_wide(scores, bed.score)),
            "",
            _plot(folder / f"{what.task}-quality.png", {bed.score: scores}),
            "",
        ]
    panels = {name: costs for name in ("ms", "temporary MiB")}
    text += ["## One training step on one row", ""]
    for name in ("ms", "temporary MiB", "GFLOP"):
        text += [f"{name}:", "", markdown_table(_wide(costs, name)), ""]
    text += [_plot(folder / f"{what.task}-cost.png", panels, log=True), ""]
    return "\n".join(text)


def _wide(rows: Rows, name: str) -> Rows:
    """A row per mixer, a column per length; the mean of what is found there."""
    table = []
    for mixer, at in _by_length(rows, name).items():
        table.append({"mixer": mixer, **{f"L={length}": value for length, value in at.items()}})
    return table


def _by_length(rows: Rows, name: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        found.setdefault(row["mixer"], {}).setdefault(row["L"], []).append(row[name])
    return {
        mixer: {length: float(np.mean(values)) for length, values in at.items()}
        for mixer, at in found.items()
    }


def _plot(path: Path, panels: Mapping[str, Rows], log: bool = False) -> str:
    fig, axes = figure(path, len(panels))
    for axis, (name, rows) in zip(axes.flat, panels.items(), strict=True):
        lengths: Sequence[int] = sorted({row["L"] for row in rows})
        for mixer, at in _by_length(rows, name).items():
            axis.plot(list(at), list(at.values()), "o-", label=mixer)
        axis.set_xscale("log", base=2)
        if log:
            axis.set_yscale("log")
        axis.set_xticks(lengths, lengths)
        axis.set(xlabel="L", title=name)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    fig.savefig(path, dpi=110)
    return f"![{path.stem}]({path.name})"
