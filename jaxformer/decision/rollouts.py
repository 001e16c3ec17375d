"""A controller at work on a problem, step by step, and the trajectories it leaves as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.decision.controllers import Controller
from jaxformer.decision.environments import Environment, Observation, Problem, State
from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch


class Trajectory(NamedTuple):
    """What happened: leading axis (T,)."""

    states: State  # () for bandits
    actions: jax.Array  # int32
    rewards: jax.Array


def rollout(
    environment: Environment,
    problem: Problem,
    controller: Controller,
    steps: int,
    key: jax.Array,
) -> Trajectory:
    """`steps` steps of a controller on one problem; `jax.vmap` it over problems and keys."""
    for_start, for_steps = jax.random.split(key)
    state = environment.start(problem, for_start)
    memory = controller.start(environment.observe(problem, state))

    def step(carry: Any, key: jax.Array) -> tuple[Any, Trajectory]:
        memory, state = carry
        for_action, for_step = jax.random.split(key)
        seen = environment.observe(problem, state)
        action = controller.act(memory, seen, for_action).astype(jnp.int32)
        reward, after = environment.step(problem, state, action, for_step)
        memory = controller.learn(memory, seen, action, reward, environment.observe(problem, after))
        return (memory, after), Trajectory(state, action, reward)

    return jax.lax.scan(step, (memory, state), jax.random.split(for_steps, steps))[1]


def regret(environment: Environment, problem: Problem, trajectory: Trajectory) -> jax.Array:
    """(T,) the expected reward that was lost up to each step."""
    gap = jax.vmap(environment.gap, (None, 0, 0))
    return jnp.cumsum(gap(problem, trajectory.states, trajectory.actions))


def log_ratio(p: jax.Array, q: jax.Array, trajectory: Trajectory) -> jax.Array:
    """The log of prod_t p(a_t) / q(a_t), of log-probabilities (A,) or (T, A).

    Its exponential, averaged over trajectories of p, is the distribution ratio 1 + chi^2(p, q).
    """
    chosen = trajectory.actions[:, None]
    difference = jnp.broadcast_to(p - q, (len(chosen), p.shape[-1]))
    return jnp.take_along_axis(difference, chosen, -1).sum()


# (arms (A, d), actions (T,), rewards (T,), step) -> the logits (A,) of the action at `step`; only
# what stands before `step` may be read.
Policy = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


class History(NamedTuple):
    """Actions and rewards so far, of a fixed length with zeros to come, and how many there are."""

    actions: jax.Array  # (T,) int32
    rewards: jax.Array  # (T,)
    count: jax.Array


@dataclasses.dataclass(frozen=True)
class InContext:
    """A model as the controller of a bandit: all it learns is the context that grows.

    The history is padded to `steps`, so that one compiled program serves every step; a causal
    `policy` does not see the padding. It samples from its softmax, or takes the likeliest action
    with `greedy`.
    """

    policy: Policy
    steps: int
    greedy: bool = False

    def start(self, observation: Observation) -> History:
        del observation
        none = jnp.zeros(self.steps)
        return History(none.astype(jnp.int32), none, jnp.zeros((), jnp.int32))

    def act(self, memory: History, observation: jax.Array, key: jax.Array) -> jax.Array:
        logits = self.policy(observation, *memory)
        return logits.argmax() if self.greedy else jax.random.categorical(key, logits)

    def learn(
        self,
        memory: History,
        observation: jax.Array,
        action: jax.Array,
        reward: jax.Array,
        after: jax.Array,
    ) -> History:
        del observation, after
        actions = memory.actions.at[memory.count].set(action)
        return History(actions, memory.rewards.at[memory.count].set(reward), memory.count + 1)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Rows for `DeviceData`: bandit problems and what a controller did on them.

    {"arms": (A, d), "actions": (T,) int32, "rewards": (T,), "best": int32}, "best" being the best
    arm. Of several controllers each row has one, drawn with the `shares`.

    Raises:
        ConfigError: no steps, or shares that do not add up to 1.
    """

    environment: Environment
    controllers: tuple[Controller, ...]
    steps: int
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"Trajectories.steps={self.steps}: must be at least 1")
        if len(self.shares) != len(self.controllers) or abs(sum(self.shares) - 1) > 1e-6:
            raise ConfigError(
                f"Trajectories.shares={self.shares}: give {len(self.controllers)} that add up to 1"
            )

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self._row)(row_keys)

    def _row(self, key: jax.Array) -> Batch:
        for_problem, for_which, for_steps = jax.random.split(key, 3)
        problem = self.environment.draw(for_problem)
        each = [
            rollout(self.environment, problem, controller, self.steps, for_steps)
            for controller in self.controllers
        ]
        which = jax.random.choice(for_which, len(each), p=jnp.asarray(self.shares))
        _, actions, rewards = jax.tree.map(lambda *x: jnp.stack(x)[which], *each)
        best = self.environment.best(problem, ()).astype(jnp.int32)
        return {"arms": problem.features, "actions": actions, "rewards": rewards, "best": best}
