"""Regret: how much controllers, and a model among them, lose on fresh problems."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from jaxformer.decision.controllers import Controller
from jaxformer.decision.environments import Environment
from jaxformer.decision.rollouts import InContext, Policy, regret, rollout
from jaxformer.recipe import EvalContext, Extra, Params, TrainState


def regret_curve(
    environment: Environment,
    controller: Controller,
    *,
    problems: int,
    steps: int,
    key: jax.Array,
) -> jax.Array:
    """(steps,) the mean cumulative regret over problems; the same problems for the same key."""

    def one(key: jax.Array) -> jax.Array:
        for_problem, for_steps = jax.random.split(key)
        problem = environment.draw(for_problem)
        trajectory = rollout(environment, problem, controller, steps, for_steps)
        return regret(environment, problem, trajectory)

    return jax.vmap(one)(jax.random.split(key, problems)).mean(0)


@dataclasses.dataclass(frozen=True)
class OnlineRegret:
    """The mean regret after `steps` steps of a model that acts on the context it makes itself.

    `policy(params, extra)` is the model as an `InContext` policy. Gives "sampled", where actions
    are drawn from its softmax, and "greedy"; `curve` has all steps.
    """

    environment: Environment
    policy: Callable[[Params, Extra], Policy]
    problems: int
    steps: int
    seed: int = 0
    name: str = "regret"
    every: int | Literal["phase_end", "end"] = "end"

    @functools.cached_property
    def _curve(self) -> Callable[..., jax.Array]:
        def measure(params: Params, extra: Extra, key: jax.Array, greedy: bool) -> jax.Array:
            controller = InContext(self.policy(params, extra), self.steps, greedy)
            sizes = {"problems": self.problems, "steps": self.steps}
            return regret_curve(self.environment, controller, **sizes, key=key)

        return jax.jit(measure, static_argnums=3)

    def curve(self, state: TrainState, greedy: bool = False) -> np.ndarray:
        """(steps,) the mean cumulative regret."""
        key = jax.random.key(self.seed)
        return np.asarray(self._curve(state.params, state.extra, key, greedy))

    def __call__(self, state: TrainState, context: EvalContext) -> Mapping[str, float]:
        context.alive()
        ways = {"sampled": False, "greedy": True}
        return {name: float(self.curve(state, greedy)[-1]) for name, greedy in ways.items()}
