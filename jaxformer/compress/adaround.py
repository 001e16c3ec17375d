"""Rounding up or down, learned for every weight (AdaRound, Nagel et al. 2020, arXiv 2004.10568)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.compress.quantizers import check_bits
from jaxformer.compress.straight_through import clip_ste

LOW, HIGH = -0.1, 1.1  # the sigmoid is stretched, so that it reaches 0 and 1


@dataclasses.dataclass(frozen=True)
class AdaRound:
    """(clip(floor(x / s) + h + z) - z) s, codes clipped as `Uniform`'s, h between 0 and 1.

    h = clip(1.2 sigmoid(alpha) - 0.1, 0, 1) is soft while alpha is learned, and then 0 or 1.
    """

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def __call__(
        self, x: jax.Array, scale: jax.Array, zero: jax.Array, alpha: jax.Array
    ) -> jax.Array:
        return self.rounded(x, scale, zero, up(alpha))

    def hard(self, x: jax.Array, scale: jax.Array, zero: jax.Array, alpha: jax.Array) -> jax.Array:
        return self.rounded(x, scale, zero, (alpha >= 0).astype(x.dtype))

    def unclipped(self, x: jax.Array, scale: jax.Array, alpha: jax.Array) -> jax.Array:
        """The weights that are hard rounded, to be clipped whenever they are quantised."""
        return (jnp.floor(x / scale) + (alpha >= 0)) * scale

    def rounded(self, x: jax.Array, scale: jax.Array, zero: jax.Array, h: jax.Array) -> jax.Array:
        u = clip_ste(jnp.floor(x / scale) + h + zero, 0, 2**self.bits - 1)
        return (u - zero) * scale


def up(alpha: jax.Array) -> jax.Array:
    """H: how much of a step a weight is rounded up."""
    return jnp.clip(jax.nn.sigmoid(alpha) * (HIGH - LOW) + LOW, 0.0, 1.0)


def start(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The alpha at which every weight keeps its value, if none is clipped."""
    rest = x / scale - jnp.floor(x / scale)
    return -jnp.log((HIGH - LOW) / (rest - LOW) - 1)


def indecision(alpha: jax.Array, sharpness: jax.Array) -> jax.Array:
    """Sum of 1 - |2 h - 1|^b: 0 once every weight is rounded up or down."""
    return (1 - jnp.abs(2 * up(alpha) - 1) ** sharpness).sum()
