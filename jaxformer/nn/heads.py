"""From the stream to an answer: pooling and output heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.nn.activation import GELU, TANH
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm


def lm_head(vocabulary: int) -> Make:
    """An output head (B, L, D) -> (B, L, V) with weights of its own; logits in float32."""
    equation = "...D,DV->...V"
    features = (vocabulary,)
    return Make(Einsum, equation=equation, features=features, use_bias=False, out_dtype=jnp.float32)


def class_head(classes: int) -> Make:
    """A linear classifier (B, D) -> (B, C); logits in float32."""
    return Make(Einsum, equation="...D,DC->...C", features=(classes,), out_dtype=jnp.float32)


class TokenHeads(nn.Module):
    """A classifier on each of several tokens (B, T, D), and the mean of their logits (B, C).

    That of DeiT is on a class and a distillation token (Touvron et al. 2020, arXiv 2012.12877).
    """

    classes: int

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        head = Einsum("...TD,TDC->...TC", (self.classes,), out_dtype=jnp.float32, name="head")
        return head(x_BxTxD).mean(-2)


class SpanHead(nn.Module):
    """Logits (B, 2, L) of the first and of the last position of an answer, in float32."""

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        linear = Einsum("...D,DC->...C", (2,), out_dtype=jnp.float32, name="linear")
        return linear(x_BxLxD).swapaxes(-1, -2)


class MaskedHead(nn.Module):
    """Logits (B, L, V) of BERT: a layer, then the embedding's own `table`, and a bias."""

    activation: Make = GELU
    norm: Make = Make(LayerNorm)

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, table_VxD: jax.Array) -> jax.Array:
        width = x_BxLxD.shape[-1:]
        x_BxLxD = Einsum("...D,DE->...E", width, name="dense")(x_BxLxD)
        x_BxLxD = self.norm(name="norm")(self.activation(name="activation")(x_BxLxD))
        bias = self.param("bias", jax.nn.initializers.zeros, table_VxD.shape[:1], jnp.float32)
        table_VxD = table_VxD.astype(x_BxLxD.dtype)
        logits = jnp.einsum("...D,VD->...V", x_BxLxD, table_VxD, preferred_element_type=jnp.float32)
        return logits + bias


class EveryPosition(nn.Module):
    """No pooling: a class for each position."""

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        del valid_BxL
        return x_BxLxD


class FirstToken(nn.Module):
    """The first position: a class token."""

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        del valid_BxL
        return x_BxLxD[:, 0]


class FirstTokens(nn.Module):
    """The first `count` positions, (B, T, D): a class token and those beside it."""

    count: int

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        del valid_BxL
        return x_BxLxD[:, : self.count]


class DensePool(nn.Module):
    """activation(dense(first position)): the pooler of BERT and of what follows it."""

    activation: Make = TANH

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        del valid_BxL
        x_BxD = x_BxLxD[:, 0]
        x_BxD = Einsum("...D,DE->...E", x_BxD.shape[-1:], name="dense")(x_BxD)
        return self.activation(name="activation")(x_BxD)


class MeanPool(nn.Module):
    """The mean over valid positions, in float32; 0 for a row without any."""

    def __call__(self, x_BxLxD: jax.Array, valid_BxL: jax.Array | None = None) -> jax.Array:
        x = x_BxLxD.astype(jnp.float32)
        if valid_BxL is None:
            return x.mean(1).astype(x_BxLxD.dtype)
        total = jnp.where(valid_BxL[..., None], x, 0).sum(1)
        count = jnp.maximum(valid_BxL.sum(1, keepdims=True), 1)
        return (total / count).astype(x_BxLxD.dtype)
