"""Sequences that repeat themselves: to go on is to look up what stood a fixed way back."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, ConfigError


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Rows for `DeviceData`: `period` random tokens of `symbols`, over and over.

    {"tokens": (length + 1,) int32, "weight": (length,)}: of the predictions, those are scored whose
    token has stood in the row before.

    Raises:
        ConfigError: nothing is repeated, or there are fewer than two symbols.
    """

    length: int
    period: int
    symbols: int

    def __post_init__(self) -> None:
        if not 1 <= self.period < self.length:
            raise ConfigError(
                f"data.period={self.period}: nothing of it is seen again in a data.length of "
                f"{self.length}; allowed: 1 to {self.length - 1}"
            )
        if self.symbols < 2:
            raise ConfigError(f"data.symbols={self.symbols}: must be at least 2")

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        at = jnp.arange(self.length + 1)

        def row(key: jax.Array) -> Batch:
            drawn = jax.random.randint(key, (self.period,), 0, self.symbols)
            weight = (at[1:] >= self.period).astype(jnp.float32)
            return {"tokens": drawn[at % self.period], "weight": weight}

        return jax.vmap(row)(row_keys)
