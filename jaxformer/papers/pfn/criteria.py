"""What the outputs of a PFN mean: a law of the target, with its negative log likelihood."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import optax

from jaxformer.nn.bar_distribution import BarDistribution, FullSupportBarDistribution
from jaxformer.papers.pfn.priors import Prior
from jaxformer.recipe import Extra
from jaxformer.tasks.losses import cross_entropy


class Criterion(Protocol):
    """A family of laws with `outputs` parameters."""

    @property
    def outputs(self) -> int: ...

    def init(self, key: jax.Array) -> Extra:
        """What the family itself consists of, drawn once and kept in the state's `extra`."""
        ...

    def nll(self, extra: Extra, output: jax.Array, target: jax.Array) -> jax.Array:
        """-log p(target) (...) for the outputs (..., outputs)."""
        ...


@dataclasses.dataclass(frozen=True)
class Bars:
    """A bar distribution whose borders hold equal shares of the prior's targets."""

    bars: int
    prior: Prior
    samples: int = 50_000
    T: int = 20  # rows of each data set that is drawn for the borders
    law: type[BarDistribution] = FullSupportBarDistribution

    @property
    def outputs(self) -> int:
        return self.bars

    def init(self, key: jax.Array) -> Extra:
        keys = jax.random.split(key, self.samples // self.T)
        targets = jax.vmap(lambda key: self.prior(key, self.T)["target"])(keys)
        return {"borders": self.law.from_prior_samples(targets, self.bars).borders}

    def distribution(self, extra: Extra) -> BarDistribution:
        return self.law(extra["borders"])

    def nll(self, extra: Extra, output: jax.Array, target: jax.Array) -> jax.Array:
        return self.distribution(extra).nll(output, target)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """The outputs are the mean and, in absolute value, the variance."""

    outputs: int = 2

    def init(self, key: jax.Array) -> Extra:
        return {}

    def nll(self, extra: Extra, output: jax.Array, target: jax.Array) -> jax.Array:
        mean, variance = output[..., 0], jnp.maximum(jnp.abs(output[..., 1]), 1e-6)
        return 0.5 * (jnp.log(2 * jnp.pi * variance) + jnp.square(target - mean) / variance)


@dataclasses.dataclass(frozen=True)
class Binary:
    """The output is the logit of class 1."""

    outputs: int = 1

    def init(self, key: jax.Array) -> Extra:
        return {}

    def nll(self, extra: Extra, output: jax.Array, target: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(output[..., 0], target)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """The outputs are logits of classes."""

    outputs: int

    def init(self, key: jax.Array) -> Extra:
        return {}

    def nll(self, extra: Extra, output: jax.Array, target: jax.Array) -> jax.Array:
        return cross_entropy(output, target)
