"""Token embedding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class Embed(nn.Module):
    """Rows of a table (V, D) by token; `dtype` becomes the dtype of the residual stream.

    A token outside the vocabulary gives NaN, so that it is seen.
    """

    vocabulary: int
    width: int
    dtype: Any = jnp.float32

    def setup(self) -> None:
        init = jax.nn.initializers.normal(0.02)  # GPT-2's
        self.table = self.param("table", init, (self.vocabulary, self.width), jnp.float32)

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        return jnp.take(self.table.astype(self.dtype), tokens_BxL, axis=0)

    def attend(self, x_BxLxD: jax.Array) -> jax.Array:
        """Logits (B, L, V) in float32 against the same table: a tied output head."""
        table = self.table.astype(x_BxLxD.dtype)
        return jnp.einsum("...D,VD->...V", x_BxLxD, table, preferred_element_type=jnp.float32)


class TypedEmbed(nn.Module):
    """Tokens and what they are part of: word embedding plus type embedding, as in BERT.

    Tokens (B, L) are all of type 0; (B, L, 2) has the type of each token beside it.
    """

    vocabulary: int
    width: int
    types: int = 2
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        if tokens.ndim == 2:
            tokens = jnp.stack([tokens, jnp.zeros_like(tokens)], axis=-1)
        words = Embed(self.vocabulary, self.width, self.dtype, name="words")
        types = Embed(self.types, self.width, self.dtype, name="types")
        return words(tokens[..., 0]) + types(tokens[..., 1])
