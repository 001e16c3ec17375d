"""Many members of one experiment trained at once: seeds and settings under one `vmap`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.data.wrappers import Undrawn
from jaxformer.recipe import (
    Batch,
    ConfigError,
    DrawsOnDevice,
    Extra,
    LossOutput,
    Mean,
    Metrics,
    Params,
    Phase,
    Recipe,
    TrainState,
)
from jaxformer.train.states import averaged, new_state, on_device
from jaxformer.train.updates import Eager, merge


@dataclasses.dataclass(frozen=True, eq=False)
class Sweep:
    """Members that differ in their seed and in numbers, such as a learning rate, as one recipe.

    Member i is `fit(make(**setting), options=FitOptions(seed=seeds[i]))`, its setting being the
    i-th of each of `settings`, which `make` receives traced. Data that draws on the device does so
    for each member, the member's seed added to its own; other batches are shared. All of the state
    but step and key has a first axis of members. The seed of `fit` changes nothing.
    """

    make: Callable[..., Recipe]
    seeds: Sequence[int]
    settings: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in {"seeds": self.seeds, **self.settings}.items():
            real = all(isinstance(value, numbers.Real) for value in values)
            if not real or not len(values) == len(self.seeds) > 0:
                raise ConfigError(f"Sweep.{name}: {values}; give one number for each member")

    @classmethod
    def grid(cls, make: Callable[..., Recipe], seeds: Sequence[int], **values: Any) -> Sweep:
        """Every combination of `values` with every seed; the seed changes fastest."""
        *settings, seeds = zip(*itertools.product(*values.values(), seeds), strict=True)
        return cls(make, seeds, dict(zip(values, settings, strict=True)))

    @functools.cached_property
    def recipe(self) -> Recipe:
        """For `fit`, without evaluators; metrics are those of all members together."""
        first = self.make(**{name: values[0] for name, values in self.settings.items()})
        if any(isinstance(phase.update, Eager) for phase in first.phases):
            raise ConfigError("Sweep.make: an update that is not jitted as a whole has no members")
        phases = [
            Phase(
                phase.name,
                phase.steps,
                data=None if phase.data is None else Undrawn(phase.data),
                update=phase.update and _Update(self, index),
                enter=functools.partial(self._enter, index),
            )
            for index, phase in enumerate(first.phases)
        ]
        return Recipe(_Task(self), phases, config=first.config, unit=first.unit)

    def each(self, function: Callable[..., Any], state: TrainState, *mapped: Any) -> Any:
        """`function(recipe, state, *mapped)` of every member; all have a first axis of members."""

        def one(seed: jax.Array, setting: Mapping[str, jax.Array], parts: Any, rest: Any) -> Any:
            alone = TrainState(step=state.step, key=jax.random.key(seed), **parts)
            return function(self.make(**setting), alone, *rest)

        settings = {name: jnp.asarray(values) for name, values in self.settings.items()}
        return jax.vmap(one)(jnp.asarray(self.seeds, jnp.uint32), settings, _parts(state), mapped)

    def member(self, state: TrainState, index: int) -> TrainState:
        """The state of one member, as its own run leaves it."""
        own = jax.tree.map(lambda x: x[index], _parts(state))
        return TrainState(step=state.step, key=jax.random.key(self.seeds[index]), **own)

    def _enter(self, phase: int, state: TrainState) -> TrainState:
        return _joined(state, self.each(lambda r, s: r.phases[phase].enter(s), state))


def _parts(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, name) for name in ("params", "extra", "opt_state")}


def _joined(state: TrainState, members: TrainState) -> TrainState:
    return members.replace(step=state.step, key=state.key)


@dataclasses.dataclass(frozen=True)
class _Task:
    sweep: Sweep

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        empty = TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, key)
        new = self.sweep.each(lambda recipe, alone: new_state(recipe, alone.key), empty)
        return new.params, new.extra

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        def score(recipe: Recipe, alone: TrainState) -> LossOutput:
            return recipe.task.loss(alone.params, alone.extra, batch, key=key, train=train)

        found = self.sweep.each(score, TrainState(jnp.zeros(()), params, extra, {}, key))
        loss, weight = found.loss.mean(), found.weight.sum()
        return LossOutput(loss, weight, _merged(found.metrics), found.extra)


@dataclasses.dataclass(frozen=True)
class _Update:
    sweep: Sweep
    phase: int

    def init(self, state: TrainState) -> TrainState:
        new = self.sweep.each(lambda r, s: r.phases[self.phase].update.init(s), state)
        return _joined(state, new)

    def averaged(self, state: TrainState) -> Params:
        return self.sweep.each(lambda r, s: averaged(r.phases[self.phase].update, s).params, state)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def step(recipe: Recipe, alone: TrainState, seed: jax.Array) -> Any:
            phase = recipe.phases[self.phase]
            own = _seeded(phase.data, batch, seed)
            return phase.update(alone, on_device(phase.data, own))  # type: ignore[misc]

        new, metrics = self.sweep.each(step, state, jnp.asarray(self.sweep.seeds, jnp.uint32))
        metrics = _merged(metrics)
        if bad := metrics.get("nonfinite"):  # one that diverges does not stop the others
            metrics |= {"diverged": bad, "nonfinite": Mean.of(bad.total == bad.weight)}
        return _joined(state, new).replace(step=state.step + 1), metrics


def _seeded(data: Any, batch: Batch, seed: jax.Array) -> Batch:
    """`batch` with the seed added to those that its data draws with."""
    if not isinstance(data, DrawsOnDevice):
        return batch
    return paths.map_named(lambda name, x: x + seed if name.endswith("seed") else x, batch)


def _merged(metrics: Metrics) -> dict[str, Any]:
    """The metrics of all members as one."""
    first, rest = (jax.tree.map(lambda x, s=s: x[s], dict(metrics)) for s in (0, slice(1, None)))
    return jax.lax.scan(lambda a, b: (merge(a, b), None), first, rest)[0]
