"""Spiking neurons: whole numbers of spikes while training, single spikes at inference.

Sources: Yao et al. 2024, arXiv 2411.16061 (integer training, spikes at inference); Qiu et al. 2025,
arXiv 2501.13492 (IE-LIF). Streams are (steps B, ...), the steps of time outermost.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def integer_spikes(x: jax.Array, levels: int) -> jax.Array:
    """floor(clip(levels x, 0, levels) + 1/2) / levels: 0, 1 / levels, ..., 1; halves round up.

    The derivative is 1 where 0 < x < 1 and 0 elsewhere, the ends included.
    """
    return jnp.floor(jnp.clip(levels * x, 0, levels) + 0.5) / levels


@integer_spikes.defjvp
def _integer_spikes_jvp(
    levels: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    return integer_spikes(x, levels), jnp.where((x > 0) & (x < 1), dx, 0)


class Neuron(nn.Module):
    """What interceptors look for: an elementwise function that ends in spikes, or stands for one.

    `gain` multiplies its output: a firing threshold of 1 / gain.
    """

    gain: float = 1.0


class IntegerLIF(Neuron):
    """IE-LIF: up to `levels` spikes at once, n / levels.

    Without a `leak` it has no memory. With one the membrane keeps u_t = leak (u_t-1 - S_t-1) + x_t
    over `steps` steps of time and fires S_t = `integer_spikes`(u_t): the reset is a subtraction.

    Raises:
        ConfigError: fewer levels than one, or a batch that the steps do not divide.
    """

    levels: int = 4
    leak: float | None = None
    steps: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.levels < 1:
            raise ConfigError(f"model.levels={self.levels}: must be at least 1")
        if self.leak is None or self.steps == 1:
            return self.gain * integer_spikes(x, self.levels)
        if len(x) % self.steps:
            raise ConfigError(
                f"model.steps={self.steps}: must divide the {len(x)} rows of a stream of as many "
                "steps of time"
            )

        def step(kept: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            u = self.leak * kept + x
            spikes = integer_spikes(u, self.levels)
            return u - spikes, spikes

        x_TxB = x.reshape(self.steps, -1, *x.shape[1:])
        _, spikes = jax.lax.scan(step, jnp.zeros_like(x_TxB[0]), x_TxB)
        return self.gain * spikes.reshape(x.shape)


class Rectifier(Neuron):
    """gain max(x, 0), up to gain `limit`: what a spiking neuron is in a network of floats.

    With a limit of 1 it is `IntegerLIF` with more and more levels.
    """

    limit: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.gain * jnp.clip(x, 0, self.limit)


def unroll(spikes: jax.Array, levels: int) -> jax.Array:
    """(levels, ...) of 0 and 1 whose mean is `spikes`: in sub-step d fires what has more than d.

    A linear map of the mean is the mean of linear maps, so that inference only adds.
    """
    n = jnp.round(levels * spikes)
    steps = jnp.arange(levels, dtype=n.dtype)
    return (n > steps.reshape(-1, *(1,) * spikes.ndim)).astype(spikes.dtype)
