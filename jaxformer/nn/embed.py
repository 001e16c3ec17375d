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
