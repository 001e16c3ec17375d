"""The updates papers share. A paper may bring its own: any value with `init` and `__call__`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Metrics, Params, Task, TrainState
from jaxformer.train.optim import Group, Optimizer, build


@runtime_checkable
class Averages(Protocol):
    """An update whose evaluation weights are not the trained ones (EMA, schedule-free)."""

    def averaged(self, state: TrainState) -> Params: ...


@runtime_checkable
class KeepsOnHost(Protocol):
    """An update that leaves part of its state in the host's memory between steps."""

    @property
    def on_host(self) -> str | None:
        """A regex over the names of those leaves."""
        ...


@runtime_checkable
class Eager(Protocol):
    """An update that is called as it is, not compiled as a whole: a search layer by layer.

    It compiles its own pieces. One program over all layers would hold the activations of all, and
    be compiled for each of them.
    """

    @property
    def eager(self) -> bool: ...


def merge(a: Metrics, b: Metrics) -> Metrics:
    """Both sets of metrics, merged where they share a name."""
    return {**a, **b, **{name: a[name].merge(b[name]) for name in a.keys() & b.keys()}}


def step_key(state: TrainState) -> jax.Array:
    """The key of this step: a function of the base key and the step alone."""
    return jax.random.fold_in(state.key, state.step)


def split_batch(batch: Batch, parts: int) -> Batch:
    """Leaves (B, ...) -> (parts, B/parts, ...); every part takes rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def _without_average(extra: Extra) -> dict[str, Any]:
    return {name: value for name, value in extra.items() if name != "ema"}


@dataclasses.dataclass(frozen=True)
class GradientUpdate:
    """One optimiser step on the task's loss.

    With `accumulate` micro-batches, weighted gradients are summed and divided once, so that the
    step equals the one on the whole batch. A step whose loss or gradient is not finite changes
    nothing but the step counter and is counted in the metric "nonfinite". `ema` keeps an average
    of the parameters in extra["ema"], which evaluators then see. With `offload` the optimiser's
    moments are in the host's memory and cross to the device and back in every step.
    """

    task: Task
    optimizer: Optimizer
    accumulate: int = 1
    ema: float | None = None
    offload: bool = False

    @classmethod
    def of(cls, task: Task, config: Any, groups: Sequence[Group] = ()) -> Self:
        """As `config.optim`, `config.steps` and `config.gradient` say (`jaxformer.config.base`)."""
        gradient = config.gradient
        optimizer = build(config.optim, config.steps, groups)
        ema = gradient.ema or None
        return cls(task, optimizer, gradient.accumulate, ema, config.optim.offload)

    @property
    def on_host(self) -> str | None:
        return r"^opt_state/transform/" if self.offload else None

    def _fetched(self, opt_state: Any) -> Any:
        """The optimiser's state in the device's memory."""
        if not self.offload:
            return opt_state
        device = jax.memory.Space.Device
        return jax.tree.map(lambda x: jax.device_put(x, device) if x.ndim else x, opt_state)

    def init(self, state: TrainState) -> TrainState:
        opt_state = {
            "transform": self.optimizer.transform.init(state.params),
            "count": jnp.zeros((), jnp.int32),
        }
        extra = _without_average(state.extra)
        if self.ema is not None:
            extra["ema"] = jax.tree.map(jnp.copy, state.params)  # a copy: both are donated
        return state.replace(opt_state=opt_state, extra=extra)

    def averaged(self, state: TrainState) -> Params:
        if self.ema is not None:
            return state.extra["ema"]
        opt_state = self._fetched(state.opt_state)
        return self.optimizer.averaged(opt_state["transform"], state.params)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        state = state.replace(opt_state=self._fetched(state.opt_state))
        extra = _without_average(state.extra)
        output, grads = self._gradient(state.params, extra, batch, step_key(state))
        norm = optax.tree.norm(grads)
        count = state.opt_state["count"]
        finite = jnp.isfinite(output.loss) & jnp.isfinite(norm)

        updates, transform = self.optimizer.transform.update(
            grads, state.opt_state["transform"], state.params
        )
        params = optax.apply_updates(state.params, updates)
        new_extra = dict(output.extra)
        if self.ema is not None:
            new_extra["ema"] = optax.incremental_update(params, state.extra["ema"], 1 - self.ema)
        new = state.replace(
            params=params,
            extra=new_extra,
            opt_state={"transform": transform, "count": count + 1},
        )
        kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state.replace(key=new.key))
        metrics = {
            **output.metrics,
            "loss": Mean(jnp.where(finite, output.loss * output.weight, 0), output.weight * finite),
            "gradient_norm": Mean.of(norm, finite),
            "learning_rate": Mean.of(self.optimizer.schedule(count)),
            "nonfinite": Mean.of(~finite),
        }
        return kept.replace(step=state.step + 1), metrics

    def _gradient(
        self, params: Params, extra: Extra, batch: Batch, key: jax.Array
    ) -> tuple[LossOutput, Params]:
        def score(params: Params, extra: Extra, batch: Batch, key: jax.Array) -> Any:
            output = self.task.loss(params, extra, batch, key=key, train=True)
            return output.loss, output

        gradient = jax.grad(score, has_aux=True)
        if self.accumulate == 1:
            grads, output = gradient(params, extra, batch, key)
            return output, grads

        def add(carry: Any, part: Any) -> Any:
            total, loss, weight, extra = carry
            index, rows = part
            grads, out = gradient(params, extra, rows, jax.random.fold_in(key, index))
            total = jax.tree.map(lambda t, g: t + g * out.weight, total, grads)
            carry = (total, loss + out.loss * out.weight, weight + out.weight, out.extra)
            return carry, out.metrics

        zero = jnp.zeros((), jnp.float32)
        start = (jax.tree.map(jnp.zeros_like, params), zero, zero, extra)
        parts = (jnp.arange(self.accumulate), split_batch(batch, self.accumulate))
        (total, loss, weight, extra), stacked = jax.lax.scan(add, start, parts)
        each = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(self.accumulate)]
        scale = 1 / jnp.where(weight == 0, 1, weight)
        grads = jax.tree.map(lambda g: g * scale, total)
        return LossOutput(loss * scale, weight, functools.reduce(merge, each), extra), grads


@dataclasses.dataclass(frozen=True)
class ForwardUpdate:
    """No gradients: fold what a batch shows (observers, scores, statistics) into `extra`."""

    collect: Callable[[TrainState, Batch, jax.Array], tuple[Extra, Metrics]]

    def init(self, state: TrainState) -> TrainState:
        return state.replace(opt_state={})

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        extra, metrics = self.collect(state, batch, step_key(state))
        return state.replace(step=state.step + 1, extra=extra), metrics
