"""Controllers: algorithms that act, see a reward, and act better.

A controller's memory is a pytree; `act` and `learn` are pure, for `jax.lax.scan` over steps and
`jax.vmap` over problems (`jaxformer.decision.rollouts`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxformer.decision.environments import Observation, Place, backward_induction

Memory = Any


class Controller(Protocol):
    """An algorithm for problems of one kind."""

    def start(self, observation: Observation) -> Memory:
        """What it knows before the first step; `observation` gives the shapes."""
        ...

    def act(self, memory: Memory, observation: Observation, key: jax.Array) -> jax.Array: ...

    def learn(
        self,
        memory: Memory,
        observation: Observation,
        action: jax.Array,
        reward: jax.Array,
        after: Observation,
    ) -> Memory:
        """What it knows once it has seen the reward, and the observation that follows."""
        ...


class Counts(NamedTuple):
    """How often each arm was tried, and the sum of its rewards; (A,) float32."""

    tries: jax.Array
    total: jax.Array


class Counting:
    """Controllers that remember every arm by itself."""

    def start(self, observation: jax.Array) -> Counts:
        zero = jnp.zeros(observation.shape[0])
        return Counts(zero, zero)

    def learn(
        self,
        memory: Counts,
        observation: jax.Array,
        action: jax.Array,
        reward: jax.Array,
        after: jax.Array,
    ) -> Counts:
        del observation, after
        return Counts(memory.tries.at[action].add(1.0), memory.total.at[action].add(reward))


@dataclasses.dataclass(frozen=True)
class Fixed(Counting):
    """The same probabilities of all actions at all steps; uniform where they are None."""

    probabilities: tuple[float, ...] | None = None

    def log_probabilities(self, observation: jax.Array) -> jax.Array:
        """(A,)."""
        if self.probabilities is None:
            return jnp.full(observation.shape[0], -jnp.log(observation.shape[0]))
        return jnp.log(jnp.asarray(self.probabilities))

    def act(self, memory: Counts, observation: jax.Array, key: jax.Array) -> jax.Array:
        del memory
        return jax.random.categorical(key, self.log_probabilities(observation))


UNIFORM = Fixed()


@dataclasses.dataclass(frozen=True)
class EmpiricalMean(Counting):
    """The arm with the best mean so far, one that was not tried counting as 0.

    With `explore` every arm is tried once first, the lowest index before others.
    """

    explore: bool = True

    def act(self, memory: Counts, observation: jax.Array, key: jax.Array) -> jax.Array:
        del observation, key
        untried = memory.tries == 0
        means = memory.total / jnp.maximum(memory.tries, 1.0)
        best = means.argmax()
        return jnp.where(untried.any(), untried.argmax(), best) if self.explore else best


@dataclasses.dataclass(frozen=True)
class BernoulliUCB(Counting):
    """The largest s / (1 + n) + 1 / sqrt(1 + n) of s successes in n tries, ties at random."""

    def values(self, memory: Counts) -> jax.Array:
        return memory.total / (1 + memory.tries) + 1 / jnp.sqrt(1 + memory.tries)

    def act(self, memory: Counts, observation: jax.Array, key: jax.Array) -> jax.Array:
        del observation
        values = self.values(memory)
        return jax.random.categorical(key, jnp.where(values == values.max(), 0.0, -jnp.inf))


@dataclasses.dataclass(frozen=True)
class BernoulliThompson(Counting):
    """Thompson sampling: the best of one draw per arm from Beta(1 + successes, 1 + failures)."""

    def posterior(self, memory: Counts) -> tuple[jax.Array, jax.Array]:
        """Both parameters of the Beta laws, (A,) each."""
        return 1 + memory.total, 1 + memory.tries - memory.total

    def act(self, memory: Counts, observation: jax.Array, key: jax.Array) -> jax.Array:
        del observation
        return jax.random.beta(key, *self.posterior(memory)).argmax()


class Ridge(NamedTuple):
    """Of features a and rewards r: (regularisation I + sum a a^T)^-1, sum a r, and how many."""

    inverse: jax.Array  # (d, d)
    moment: jax.Array  # (d,)
    count: jax.Array

    @property
    def weights(self) -> jax.Array:
        return self.inverse @ self.moment


def sherman_morrison(inverse: jax.Array, a: jax.Array) -> jax.Array:
    """(A + a a^T)^-1 from A^-1."""
    u = inverse @ a
    return inverse - jnp.outer(u, u) / (1 + a @ u)


class LinearModel:
    """Controllers that remember a ridge regression of rewards on the features of arms."""

    @property
    def penalty(self) -> float:
        """The factor of I."""
        raise NotImplementedError

    def start(self, observation: jax.Array) -> Ridge:
        d = observation.shape[-1]
        return Ridge(jnp.eye(d) / self.penalty, jnp.zeros(d), jnp.zeros((), jnp.int32))

    def learn(
        self,
        memory: Ridge,
        observation: jax.Array,
        action: jax.Array,
        reward: jax.Array,
        after: jax.Array,
    ) -> Ridge:
        del after
        a = observation[action]
        inverse = sherman_morrison(memory.inverse, a)
        return Ridge(inverse, memory.moment + a * reward, memory.count + 1)


@dataclasses.dataclass(frozen=True)
class LinUCB(LinearModel):
    """The largest <a, theta> + bonus sqrt(a^T V^-1 a), V = regularisation I + sum a a^T.

    The first action is uniform, ties go to the lowest index. bonus=0 is greedy ridge regression.
    """

    bonus: float = 2.0
    regularisation: float = 1.0

    @property
    def penalty(self) -> float:
        return self.regularisation

    def values(self, memory: Ridge, arms: jax.Array) -> jax.Array:
        width = jnp.einsum("ai,ij,aj->a", arms, memory.inverse, arms)
        return arms @ memory.weights + self.bonus * jnp.sqrt(jnp.maximum(width, 0.0))

    def act(self, memory: Ridge, observation: jax.Array, key: jax.Array) -> jax.Array:
        first = jax.random.randint(key, (), 0, len(observation))
        best = self.values(memory, observation).argmax()
        return jnp.where(memory.count == 0, first, best)


@dataclasses.dataclass(frozen=True)
class LinearThompson(LinearModel):
    """The best arm for one draw of w from its posterior, under w ~ N(0, prior_std^2 I)."""

    std: float  # of the noise
    prior_std: float = 1.0

    @property
    def penalty(self) -> float:
        return self.std**2 / self.prior_std**2

    def posterior(self, memory: Ridge) -> tuple[jax.Array, jax.Array]:
        """Mean (d,) and covariance (d, d) of w."""
        return memory.weights, self.std**2 * memory.inverse

    def act(self, memory: Ridge, observation: jax.Array, key: jax.Array) -> jax.Array:
        w = jax.random.multivariate_normal(key, *self.posterior(memory), method="cholesky")
        return (observation @ w).argmax()


class Visits(NamedTuple):
    """What was seen of an MDP, by step of the episode, and the Q (H, S, A) in use."""

    moves: jax.Array  # (H, S, A, S)
    rewards: jax.Array  # (H, S, A)
    q: jax.Array


@dataclasses.dataclass(frozen=True)
class UCBVI:
    """Optimistic value iteration on a finite MDP (Azar et al. 2017, arXiv 1703.05449).

    After every episode Q is computed anew, from the frequencies of moves, the mean rewards and a
    bonus of `bonus` H sqrt(1 / n) for n visits; what was never visited is worth all steps left.
    """

    states: int
    actions: int
    horizon: int
    bonus: float = 0.1

    def start(self, observation: Place) -> Visits:
        del observation
        shape = (self.horizon, self.states, self.actions)
        moves, rewards = jnp.zeros((*shape, self.states)), jnp.zeros(shape)
        return Visits(moves, rewards, self.optimistic(moves, rewards))

    def optimistic(self, moves: jax.Array, rewards: jax.Array) -> jax.Array:
        """Q (H, S, A) of the counts; of none, the steps that are left."""
        visits = moves.sum(-1)
        n = jnp.maximum(visits, 1.0)
        bonus = jnp.where(visits > 0, self.bonus * self.horizon / jnp.sqrt(n), 2.0 * self.horizon)
        return backward_induction(moves / n[..., None], rewards / n + bonus, self.horizon)

    def act(self, memory: Visits, observation: Place, key: jax.Array) -> jax.Array:
        q = memory.q[observation.h, observation.s]
        return jax.random.categorical(key, jnp.where(q == q.max(), 0.0, -jnp.inf))

    def learn(
        self,
        memory: Visits,
        observation: Place,
        action: jax.Array,
        reward: jax.Array,
        after: Place,
    ) -> Visits:
        at = (observation.h, observation.s, action)
        moves = memory.moves.at[(*at, after.s)].add(1.0)
        rewards = memory.rewards.at[at].add(reward)
        q = jax.lax.cond(after.h == 0, lambda: self.optimistic(moves, rewards), lambda: memory.q)
        return Visits(moves, rewards, q)
