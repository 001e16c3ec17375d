"""How noise is mixed into examples, what a network is asked for, and how far off its answer is.

A process is plain numbers, hashable, and knows no network: `DiffusionTask` scores with it, the
samplers of `jaxformer.sampling.diffusion` walk it backwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import jax
import jax.numpy as jnp


class Process(Protocol):
    """Noise mixed into examples x (B, ...) at times t (B,)."""

    def outputs(self, channels: int) -> int:
        """Channels of the network's answer."""
        ...

    def draw(self, key: jax.Array) -> jax.Array:
        """A time to train at."""
        ...

    def mix(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array: ...

    def network_time(self, t: jax.Array) -> jax.Array:
        """The times that the network is told."""
        ...

    def losses(
        self, output: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array
    ) -> Mapping[str, jax.Array]:
        """Named losses (B,), whose sum is the objective."""
        ...


def per_row(values: jax.Array, x: jax.Array) -> jax.Array:
    """Values (B,) that broadcast against x (B, ...)."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def row_mean(x: jax.Array) -> jax.Array:
    """(B, ...) to (B,)."""
    return x.astype(jnp.float32).mean(tuple(range(1, x.ndim)))


@dataclasses.dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines to noise, x_t = (1 - t) x + t noise, 0 <= t <= 1 (Liu et al., 2209.03003).

    The network predicts the velocity, noise - x, and is told `scale` t. `logit_normal` draws
    sigmoid of a normal in place of a uniform t (Esser et al. 2024, arXiv 2403.03206).
    """

    scale: float = 1000.0
    logit_normal: bool = False

    def outputs(self, channels: int) -> int:
        return channels

    def draw(self, key: jax.Array) -> jax.Array:
        if self.logit_normal:
            return jax.nn.sigmoid(jax.random.normal(key))
        return jax.random.uniform(key)

    def mix(self, x: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        t = per_row(t, x)
        return (1 - t) * x + t * noise

    def network_time(self, t: jax.Array) -> jax.Array:
        return self.scale * t

    def losses(
        self, output: jax.Array, x: jax.Array, noise: jax.Array, t: jax.Array
    ) -> dict[str, jax.Array]:
        """That of the velocity, "mse"."""
        del t
        return {"mse": row_mean(jnp.square(output.astype(jnp.float32) - (noise - x)))}
