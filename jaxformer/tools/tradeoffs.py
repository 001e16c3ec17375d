"""Models of one task beside each other: how good, how large, how much work, how fast."""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.analyze.flops import count
from jaxformer.bench.clock import Deadline, Run, race
from jaxformer.catalogue import compressor_of
from jaxformer.compress.compressor import check_fits, ready
from jaxformer.compress.packed import nbytes
from jaxformer.evaluation.evaluators import MeanEvaluator
from jaxformer.evaluation.report import figure
from jaxformer.recipe import Batch, EvalContext, Extra, Params, TrainState
from jaxformer.train.states import on_device

Row = dict[str, Any]
WORTH = ("accuracy", "pearson", "agreement")  # the first that is known


@dataclasses.dataclass(frozen=True)
class Model:
    """A task and its variables, `links` further than the original; as a config keeps them."""

    name: str
    task: Any
    params: Params
    extra: Extra
    links: tuple[Mapping[str, Any], ...] = ()
    note: str = ""
    seconds: float = 0.0  # that the last method took

    def then(self, method: str, batch: Batch) -> Model:
        """This model, compressed by one more method."""
        compressor = compressor_of(method)
        print(f"jaxformer: {method}", file=sys.stderr)
        start = time.perf_counter()
        params, extra, found = compressor.find(self.task, self.params, self.extra, batch)
        jax.block_until_ready((params, extra))
        seconds = time.perf_counter() - start
        task = compressor.task(self.task, found)
        check_fits(task, params, extra, batch)
        links = (*self.links, {"method": method, "found": found})
        notes = dict.fromkeys(note for note in (self.note, compressor.note) if note)
        name = method if not self.links else f"{self.name} + {method}"
        return Model(name, task, params, extra, links, "; ".join(notes), seconds)

    def chain(self, methods: Sequence[str], batch: Batch) -> list[Model]:
        """The models after each of the methods."""
        found = [self]
        for method in methods:
            found.append(found[-1].then(method, batch))
        return found[1:]

    def predict(self, params: Params, extra: Extra, batch: Batch) -> jax.Array:
        return self.task.predict(params, extra, batch, key=jax.random.key(0))


def measure(models: Sequence[Model], evaluator: MeanEvaluator, seconds: float) -> list[Row]:
    """A row for each model: metrics, how often it answers as the first does, size, work, time.

    Time is that of a test batch, the models taking turns, for `seconds` at most, what is packed
    having been unpacked before; "speed" is how many times faster than the first each is. To be
    called under the mesh of the models.
    """
    context = EvalContext(jax.sharding.get_mesh(), "compress")
    data = evaluator.data
    batch = jax.tree.map(jnp.asarray, on_device(data, data.batch(0)))
    rows: list[Row] = []
    programs: list[Any] = []
    first: list[np.ndarray] = []
    for model in models:
        state = TrainState(0, model.params, model.extra, {}, jax.random.key(0))  # type: ignore[arg-type]
        row: Row = {"model": model.name}
        row |= dataclasses.replace(evaluator, task=model.task)(state, context)
        decide = jax.jit(lambda p, e, b, m=model: decided(m.predict(p, e, b)))
        variables = ready(model.task, model.params, model.extra)
        program = functools.partial(decide.lower(*variables, batch).compile(), *variables)
        programs.append(program)
        found = answers(program, evaluator)
        first = first or found
        flops = count(model.predict, *variables, batch) / data.batch_size
        row |= {"agreement": agreement(first, found)}
        row |= {"bytes": nbytes((model.params, model.extra)), "MFLOP": flops / 1e6}
        rows.append(row)
    builds = {
        str(i): lambda p=program: Run(lambda: p(batch), jax.block_until_ready)
        for i, program in enumerate(programs)
    }
    times = race(builds, Deadline.after(seconds))
    for i, (row, model) in enumerate(zip(rows, models, strict=True)):
        one, own = times["0"], times[str(i)]
        if one.seconds is None or own.seconds is None:
            row["error"] = own.error or one.error
        else:
            row |= {"ms": 1e3 * own.seconds, "speed": one.seconds / own.seconds}
        row |= {"seconds to find": model.seconds, "note": model.note}
    return rows


def decided(y: jax.Array) -> jax.Array:
    """What outputs (..., C) stand for: the likeliest class, or of one output the nearest integer.

    Scores are never equal; of STS-B's, from 0 to 5, integers are the steps people were asked for.
    """
    return jnp.round(y[..., 0]) if y.shape[-1] == 1 else y.argmax(-1)


def answers(program: Callable[[Batch], Any], evaluator: MeanEvaluator) -> list[np.ndarray]:
    """What is decided of each test example (or position), those of no weight left out."""
    data, found = evaluator.data, []
    batches = evaluator.batches if evaluator.batches is not None else len(data)  # type: ignore[arg-type]
    for k in range(batches):
        batch = jax.tree.map(jnp.asarray, on_device(data, data.batch(k)))
        answer = np.asarray(program(batch))
        found.append(answer[np.asarray(batch.get("weight", np.ones(len(answer)))) > 0])
    return found


def agreement(first: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The share of equal answers."""
    return float(
        np.mean(np.concatenate([(a == b).ravel() for a, b in zip(first, found, strict=True)]))
    )


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, worth) those that no other is both cheaper and better than, by cost."""
    best: list[tuple[float, float]] = []
    for cost, worth in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or worth > best[-1][1]:
            best.append((cost, worth))
    return best


def pareto(rows: Sequence[Row], path: Path) -> Path:
    """What a task is judged by (else the share of equal answers) over bytes and over FLOPs."""
    worth = next(name for name in WORTH if name in rows[0])
    fig, axes = figure(path, 2, width=6)
    for axis, cost, unit in zip(axes.flat, ("bytes", "MFLOP"), (1e3, 1.0), strict=True):
        points = [(row[cost] / unit, row[worth]) for row in rows]
        axis.plot(*zip(*frontier(points), strict=True), ":", color="grey", drawstyle="steps-post")
        for i, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
            axis.plot(x, y, "o", color=f"C{i % 10}", label=row["model"])
        axis.set(xlabel={"bytes": "kB", "MFLOP": "MFLOP of an example"}[cost], ylabel=worth)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize="small")
    fig.savefig(path, dpi=110)
    return path
