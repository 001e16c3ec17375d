"""Calibration as a phase of a run: the update that finds the state of every quantiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.compress.intercepted import Intercepted
from jaxformer.compress.quantized import COLLECTION, Quantized
from jaxformer.compress.walk import Procedure, walk
from jaxformer.nn.attention import Fused, Unfused
from jaxformer.nn.make import Make, swap
from jaxformer.nn.patch import PatchMerge
from jaxformer.recipe import Batch, Data, Mean, Metrics, Params, Task, TrainState
from jaxformer.train.states import on_device


def opened(task: Any) -> Any:
    """A task whose model's attention is spelt out, product by product.

    Merged patches get the bias that surgery of the norm before them needs; see `completed`.
    """
    model = swap(task.model, Fused, Unfused)
    model = swap(model, PatchMerge, Make(PatchMerge, use_bias=True))
    return dataclasses.replace(task, model=model)


def completed(task: Any, params: Params, batch: Batch) -> Params:
    """Parameters with zeros for those biases of an opened task that its model had not before."""
    made = paths.leaves(jax.eval_shape(lambda b: task.init(jax.random.key(0), b)[0], batch))
    named = paths.leaves(params)
    new = [name for name in made if name not in named and name.endswith("/reduction/bias")]
    if not new:
        return params
    return paths.nest({**named, **{name: jnp.zeros(made[name].shape) for name in new}})


def quantized_task(task: Any, rules: Quantized) -> Any:
    """The same task of the quantised model."""
    task = opened(task)
    return dataclasses.replace(task, model=Intercepted(task.model, (rules,)))


class ChangesParameters(Procedure):
    """A procedure of several `passes` over the batch, which may change parameters as it goes."""

    passes: int
    params: Params


@dataclasses.dataclass(frozen=True)
class CalibrationUpdate:
    """One step finds all scales on one batch, without labels, by a new `procedure(params)`."""

    task: Any  # the float one
    rules: Quantized
    data: Data
    procedure: Callable[[Params], ChangesParameters]
    eager: bool = True

    def init(self, state: TrainState) -> TrainState:
        rows = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.data.spec())
        task: Task = quantized_task(self.task, self.rules)
        batch = on_device(self.data, rows)
        _, extra = task.init(jax.random.key(0), batch)
        extra = {**state.extra, COLLECTION: extra[COLLECTION]}
        params = completed(opened(self.task), state.params, batch)
        return state.replace(opt_state={}, params=params, extra=extra)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        task, procedure = opened(self.task), self.procedure(state.params)
        extra = {name: value for name, value in state.extra.items() if name != COLLECTION}

        def run() -> Any:
            return task.predict(state.params, extra, batch, key=jax.random.key(0))

        for _ in range(procedure.passes):
            states = walk(run, state.params, self.rules, procedure)
        metrics = {"calibrated": Mean.of(float(len(jax.tree.leaves(states))))}
        extra = {**extra, COLLECTION: states}
        return state.replace(step=state.step + 1, params=procedure.params, extra=extra), metrics
