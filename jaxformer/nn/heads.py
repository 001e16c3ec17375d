"""From the stream to an answer: pooling and output heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make


def lm_head(vocabulary: int) -> Make:
    """An output head (B, L, D) -> (B, L, V) with weights of its own; logits in float32."""
    equation = "...D,DV->...V"
    features = (vocabulary,)
    return Make(Einsum, equation=equation, features=features, use_bias=False, out_dtype=jnp.float32)


def class_head(classes: int) -> Make:
    """A linear classifier (B, D) -> (B, C); logits in float32."""
    return Make(Einsum, equation="...D,DC->...C", features=(classes,), out_dtype=jnp.float32)


class FirstToken(nn.Module):
    """The first position: a class token."""

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        del valid_BxL
        return x_BxLxD[:, 0]


class MeanPool(nn.Module):
    """The mean over valid positions, in float32; 0 for a row without any."""

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        x = x_BxLxD.astype(jnp.float32)
        if valid_BxL is None:
            return x.mean(1).astype(x_BxLxD.dtype)
        total = jnp.where(valid_BxL[..., None], x, 0).sum(1)
        count = jnp.maximum(valid_BxL.sum(1, keepdims=True), 1)
        return (total / count).astype(x_BxLxD.dtype)
