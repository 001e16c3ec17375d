"""Normalisation of the last axis, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class Norm(nn.Module):
    """What interceptions look for; computed in float32, returned in the dtype of the input."""


class LayerNorm(Norm):
    """scale * (x - mean) / sqrt(var + epsilon) + bias (Ba et al. 2016, arXiv 1607.06450)."""

    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1:]
        y = x.astype(jnp.float32)
        mean, variance = self.moments(y)
        y = (y - mean) * jax.lax.rsqrt(variance + self.epsilon)
        if self.use_scale:
            y = y * self.param("scale", jax.nn.initializers.ones, width, jnp.float32)
        if self.use_bias:
            y = y + self.param("bias", jax.nn.initializers.zeros, width, jnp.float32)
        return y.astype(x.dtype)

    def moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and variance (..., 1): what those intercept for whom not all channels count."""
        mean = x.mean(-1, keepdims=True)
        return mean, jnp.square(x - mean).mean(-1, keepdims=True)


class RMSNorm(Norm):
    """scale * x / sqrt(mean(x^2) + epsilon) (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        y = y * self.param("scale", jax.nn.initializers.ones, x.shape[-1:], jnp.float32)
        return y.astype(x.dtype)
