"""Measurements of a state, in the loop or on the checkpoints of a run."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import jax

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


def perplexity(values: Mapping[str, float]) -> float:
    """Exp of the mean cross-entropy in nats."""
    return math.exp(min(values["loss"], 700.0))


def bits(values: Mapping[str, float]) -> float:
    """The mean cross-entropy in bits: of pixels, bits per dimension."""
    return values["loss"] / math.log(2)


@dataclasses.dataclass(frozen=True)
class MeanEvaluator:
    """The task's own metrics, exact over `batches` batches of `data` (all of a finite one).

    `derived` adds numbers computed from the means, such as `perplexity`.
    """

    task: Task
    data: Data
    name: str = "eval"
    every: int | Literal["phase_end", "end"] = "end"
    batches: int | None = None
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = dataclasses.field(
        default_factory=dict
    )

    @functools.cached_property
    def _score(self) -> Callable[..., Metrics]:
        def score(params: Params, extra: Extra, batch: Batch, index: int) -> Metrics:
            key = jax.random.fold_in(jax.random.key(0), index)
            output = self.task.loss(
                params, extra, on_device(self.data, batch), key=key, train=False
            )
            return {"loss": Mean(output.loss * output.weight, output.weight), **output.metrics}

        return jax.jit(score)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        count = self.batches if self.batches is not None else len(self.data)  # type: ignore[arg-type]
        rows = host_rows(self.data, context.mesh)
        totals: Metrics = {}
        for index in range(count):
            context.alive()
            batch = place_batch(self.data.batch(index, rows), context.mesh, self.data.batch_size)
            totals = merge(
                totals, jax.device_get(self._score(state.params, state.extra, batch, index))
            )
        values = {name: float(metric.value()) for name, metric in totals.items()}
        return values | {name: function(values) for name, function in self.derived.items()}


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
