"""Laws of decision problems: bandits and tabular Markov decision processes.

A law draws problems; a problem is a pytree of arrays, and all functions are pure in it, so that
`jax.vmap` over problems and `jax.lax.scan` over steps serve any of them. Rewards are random, what
an action is worth is not: regret is counted in `gap`, the expected loss of one action.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError

Problem = Any
State = Any  # what changes within a problem; () for bandits
Observation = Any  # what a controller is shown before it acts


class Environment(Protocol):
    """A law of problems with `actions` actions."""

    @property
    def actions(self) -> int: ...

    def draw(self, key: jax.Array) -> Problem: ...

    def start(self, problem: Problem, key: jax.Array) -> State: ...

    def observe(self, problem: Problem, state: State) -> Observation: ...

    def step(
        self, problem: Problem, state: State, action: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, State]:
        """The reward of an action, and where it leads."""
        ...

    def best(self, problem: Problem, state: State) -> jax.Array:
        """The best action, the first of equals."""
        ...

    def gap(self, problem: Problem, state: State, action: jax.Array) -> jax.Array:
        """What an action is worth less than the best: >= 0, the expected regret it adds."""
        ...


class Arms(NamedTuple):
    """A stochastic bandit: features of its arms and their mean rewards."""

    features: jax.Array  # (A, d)
    means: jax.Array  # (A,)


class Bandit:
    """What bandits share: nothing changes, the features of the arms are seen."""

    def start(self, problem: Arms, key: jax.Array) -> tuple[()]:
        del problem, key
        return ()

    def observe(self, problem: Arms, state: tuple[()]) -> jax.Array:
        """The features (A, d)."""
        del state
        return problem.features

    def step(
        self, problem: Arms, state: tuple[()], action: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        return self.reward(problem.means[action], key), state

    def reward(self, mean: jax.Array, key: jax.Array) -> jax.Array:
        """Draw a reward of this mean."""
        raise NotImplementedError

    def best(self, problem: Arms, state: tuple[()]) -> jax.Array:
        del state
        return problem.means.argmax()

    def gap(self, problem: Arms, state: tuple[()], action: jax.Array) -> jax.Array:
        del state
        return problem.means.max() - problem.means[action]


@dataclasses.dataclass(frozen=True)
class LinearBandit(Bandit):
    """Rewards <a, w> + std N(0, 1), of arms a with entries U[-1, 1].

    `prior` is that of w: "uniform" on [0, 1]^d, or "gaussian", N(0, I). `std` is a deviation.

    Raises:
        ConfigError: no arms, no dimension, a negative deviation, or an unknown prior.
    """

    actions: int
    dimension: int
    std: float
    prior: str = "uniform"

    def __post_init__(self) -> None:
        for field in ("actions", "dimension"):
            if getattr(self, field) < 1:
                raise ConfigError(f"LinearBandit.{field}={getattr(self, field)}: at least 1")
        if self.std < 0:
            raise ConfigError(f"LinearBandit.std={self.std}: a deviation is at least 0")
        if self.prior not in ("uniform", "gaussian"):
            raise ConfigError(
                f"LinearBandit.prior={self.prior!r}: must be one of uniform, gaussian"
            )

    def draw(self, key: jax.Array) -> Arms:
        for_w, for_arms = jax.random.split(key)
        law = jax.random.uniform if self.prior == "uniform" else jax.random.normal
        w = law(for_w, (self.dimension,))
        shape = (self.actions, self.dimension)
        features = jax.random.uniform(for_arms, shape, minval=-1.0, maxval=1.0)
        return Arms(features, features @ w)

    def reward(self, mean: jax.Array, key: jax.Array) -> jax.Array:
        return mean + self.std * jax.random.normal(key)


@dataclasses.dataclass(frozen=True)
class BernoulliBandit(Bandit):
    """Rewards 0 and 1, the means of the arms U[0, 1]; arm i has the i-th unit vector as features.

    Raises:
        ConfigError: no arms.
    """

    actions: int

    def __post_init__(self) -> None:
        if self.actions < 1:
            raise ConfigError(f"BernoulliBandit.actions={self.actions}: must be at least 1")

    @property
    def dimension(self) -> int:
        return self.actions

    def draw(self, key: jax.Array) -> Arms:
        return Arms(jnp.eye(self.actions), jax.random.uniform(key, (self.actions,)))

    def reward(self, mean: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, mean).astype(jnp.float32)


class Tables(NamedTuple):
    """A finite MDP, the same at all steps of an episode."""

    transitions: jax.Array  # (S, A, S)
    rewards: jax.Array  # (S, A), means in [0, 1]


class Place(NamedTuple):
    """A state and the step of the episode, both int32."""

    s: jax.Array
    h: jax.Array


def backward_induction(transitions: jax.Array, rewards: jax.Array, horizon: int) -> jax.Array:
    """Q* (H, S, A) of an episode of H steps, from P (S, A, S) and r (S, A), or (H, S, A) of both.

    The value of a state is cut at the number of steps that are left, which optimism may exceed.
    """
    per_step = jnp.broadcast_to(rewards, (horizon, *rewards.shape[-2:]))
    chances = jnp.broadcast_to(transitions, (horizon, *transitions.shape[-3:]))

    def back(value: jax.Array, step: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        reward, chance, left = step
        q = jnp.minimum(reward + chance @ value, left)
        return q.max(-1), q

    left = jnp.arange(horizon, 0, -1).astype(jnp.float32)
    start = jnp.zeros(per_step.shape[1])
    return jax.lax.scan(back, start, (per_step, chances, left), reverse=True)[1]


@dataclasses.dataclass(frozen=True)
class TabularMDP:
    """Episodes of `horizon` steps, one after another, that all begin in state 0.

    Transitions are Dirichlet(`concentration`), rewards Bernoulli with means U[0, 1].

    Raises:
        ConfigError: no states, actions or steps.
    """

    states: int
    actions: int
    horizon: int
    concentration: float = 0.3

    def __post_init__(self) -> None:
        for field in ("states", "actions", "horizon"):
            if getattr(self, field) < 1:
                raise ConfigError(f"TabularMDP.{field}={getattr(self, field)}: at least 1")

    def draw(self, key: jax.Array) -> Tables:
        for_transitions, for_rewards = jax.random.split(key)
        alpha = jnp.full(self.states, self.concentration)
        shape = (self.states, self.actions)
        transitions = jax.random.dirichlet(for_transitions, alpha, shape)
        return Tables(transitions, jax.random.uniform(for_rewards, shape))

    def start(self, problem: Tables, key: jax.Array) -> Place:
        del problem, key
        return Place(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))

    def observe(self, problem: Tables, state: Place) -> Place:
        del problem
        return state

    def step(
        self, problem: Tables, state: Place, action: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, Place]:
        for_reward, for_state = jax.random.split(key)
        reward = jax.random.bernoulli(for_reward, problem.rewards[state.s, action])
        logits = jnp.log(problem.transitions[state.s, action])
        h = (state.h + 1) % self.horizon
        s = jnp.where(h == 0, 0, jax.random.categorical(for_state, logits)).astype(jnp.int32)
        return reward.astype(jnp.float32), Place(s, h)

    def values(self, problem: Tables) -> jax.Array:
        """Q* (H, S, A)."""
        return backward_induction(problem.transitions, problem.rewards, self.horizon)

    def best(self, problem: Tables, state: Place) -> jax.Array:
        return self.values(problem)[state.h, state.s].argmax()

    def gap(self, problem: Tables, state: Place, action: jax.Array) -> jax.Array:
        q = self.values(problem)[state.h, state.s]
        return q.max() - q[action]
