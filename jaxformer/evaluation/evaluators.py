"""Measurements of a state, in the loop or on the checkpoints of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.parallel.multihost import everywhere
from jaxformer.parallel.sharding import host_rows, place_batch
from jaxformer.recipe import (
    Batch,
    ConfigError,
    Data,
    EvalContext,
    Extra,
    Mean,
    Metrics,
    Params,
    Recipe,
    Task,
    TrainState,
)
from jaxformer.train.states import on_device
from jaxformer.train.sweep import Sweep
from jaxformer.train.updates import merge


def placed_batches(data: Data, context: EvalContext, count: int | None = None) -> Iterator[Batch]:
    """The first `count` batches of `data`, all of a finite one, on the mesh of `context`."""
    rows = host_rows(data, context.mesh)
    for index in range(len(data) if count is None else count):  # type: ignore[arg-type]
        context.alive()
        yield place_batch(data.batch(index, rows), context.mesh, data.batch_size)


def perplexity(values: Mapping[str, float]) -> float:
    """Exp of the mean cross-entropy in nats."""
    return math.exp(min(values["loss"], 700.0))


def bits(values: Mapping[str, float]) -> float:
    """The mean cross-entropy in bits: of pixels, bits per dimension."""
    return values["loss"] / math.log(2)


class Whole(Protocol):
    """Numbers of all rows at once, which are no means of their batches: F1, a correlation.

    `columns` are entries of the batches that it reads beside the answers.
    """

    @property
    def columns(self) -> tuple[str, ...]: ...

    def __call__(self, rows: Mapping[str, np.ndarray]) -> Mapping[str, float]:
        """Of "answer", what the task predicts, and the columns: (N, ...) each, in order."""
        ...


@dataclasses.dataclass(frozen=True)
class MeanEvaluator:
    """The task's own metrics, exact over `batches` batches of `data` (all of a finite one).

    `derived` adds numbers computed from the means, such as `perplexity`; `whole` those of the
    answers to all rows whose weight is not 0, of a task that `Predicts`. They are gathered on every
    process, in the pass that the means are of.
    """

    task: Task
    data: Data
    name: str = "eval"
    every: int | Literal["phase_end", "end"] = "end"
    batches: int | None = None
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = dataclasses.field(
        default_factory=dict
    )
    whole: Whole | None = None

    @functools.cached_property
    def _score(self) -> Callable[..., tuple[Metrics, dict[str, jax.Array]]]:
        def score(params: Params, extra: Extra, batch: Batch, index: int) -> Any:
            key = jax.random.fold_in(jax.random.key(0), index)
            batch = on_device(self.data, batch)
            output = self.task.loss(params, extra, batch, key=key, train=False)
            metrics = {"loss": Mean(output.loss * output.weight, output.weight), **output.metrics}
            if self.whole is None:
                return metrics, {}
            task: Any = self.task  # the compiler finds that both ask the same of the model
            answer = task.predict(params, extra, batch, key=key)
            weight = jnp.broadcast_to(jnp.asarray(batch.get("weight", 1.0)), answer.shape[:1])
            columns = {name: batch[name] for name in self.whole.columns}
            return metrics, {"answer": answer, "weight": weight, **columns}

        return jax.jit(score)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        totals: Metrics = {}
        kept: list[dict[str, np.ndarray]] = []
        for index, batch in enumerate(placed_batches(self.data, context, self.batches)):
            metrics, columns = self._score(state.params, state.extra, batch, index)
            totals = merge(totals, jax.device_get(metrics))
            kept.append({name: everywhere(column) for name, column in columns.items()})
        values = {name: float(metric.value()) for name, metric in totals.items()}
        values |= {name: function(values) for name, function in self.derived.items()}
        if self.whole is None:
            return values
        gathered = {name: np.concatenate([part[name] for part in kept]) for name in kept[0]}
        counts = gathered.pop("weight") != 0
        found = self.whole({name: column[counts] for name, column in gathered.items()})
        return values | {name: float(value) for name, value in found.items()}


@dataclasses.dataclass(frozen=True)
class EachMember:
    """What `measure(recipe, state)` finds, {name: scalar}, of every member: "<name>/<member>"."""

    sweep: Sweep
    measure: Callable[[Recipe, TrainState], Mapping[str, jax.Array]]
    name: str = "members"
    every: int | Literal["phase_end", "end"] = "end"

    @functools.cached_property
    def _measure(self) -> Callable[[TrainState], Mapping[str, jax.Array]]:
        return jax.jit(functools.partial(self.sweep.each, self.measure))

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        del context
        found = jax.device_get(self._measure(state))
        return {f"{name}/{i}": float(x) for name, xs in found.items() for i, x in enumerate(xs)}


def select_steps(saved: list[int], which: str) -> list[int]:
    """The steps that "last", "all", "100" or "100:500" (both ends included) names.

    Raises:
        ConfigError: nothing saved is named.
    """
    if which in ("last", "all"):
        return saved[-1:] if which == "last" else saved
    first, colon, last = which.partition(":")
    try:
        low = int(first) if first else 0
        high = (int(last) if last else saved[-1]) if colon else low
    except ValueError:
        raise ConfigError(f"steps: {which!r} is not last, all, N or N:M") from None
    chosen = [step for step in saved if low <= step <= high]
    if not chosen:
        raise ConfigError(
            f"steps: {which} names no checkpoint; saved: {', '.join(map(str, saved))}"
        )
    return chosen
