"""A model with random parts as the mean of what it says in several passes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError


def mean_probabilities(logits: jax.Array) -> jax.Array:
    """Logits (S, ..., C) of S passes to the log of the mean of their probabilities, (..., C)."""
    logs = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(logits.shape[0])


def mean_values(values: jax.Array) -> jax.Array:
    """Values (S, ...) of S passes to their mean."""
    return values.mean(0)


@dataclasses.dataclass(frozen=True)
class Ensemble:
    """`model` where a task wants one: trained as it is, evaluated by `passes` in training mode.

    Whatever is random in training (dropout, drawn keys) is so in every pass, by the keys
    fold_in(key(seed), pass). With passes=0 it is the model alone, in evaluation mode.

    Raises:
        ConfigError: a negative number of passes.
    """

    model: nn.Module
    passes: int
    average: Callable[[jax.Array], jax.Array] = mean_probabilities
    seed: int = 0

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise ConfigError(f"Ensemble.passes={self.passes}: must not be negative")

    def init(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.init(*args, **kwargs)

    def apply(
        self,
        variables: Any,
        *args: Any,
        train: bool = False,
        rngs: Any = None,
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """As of a module; what passes change, or sow, is dropped."""
        if train or not self.passes:
            options = {"train": train, "rngs": rngs, "mutable": mutable}
            return self.model.apply(variables, *args, **options, **kwargs)

        def once(index: jax.Array) -> jax.Array:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(self.seed), index)}
            return self.model.apply(variables, *args, train=True, rngs=rngs, **kwargs)

        y = self.average(jax.lax.map(once, jnp.arange(self.passes)))
        return (y, {}) if mutable else y
