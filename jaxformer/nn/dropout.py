"""Dropout of elements and of whole residual branches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn


class Dropout(nn.Module):
    """Zero elements with probability `rate` while training and rescale the others.

    Draws from the key stream "dropout". Axes in `shared` drop as one.
    """

    rate: float
    shared: tuple[int, ...] = ()

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0.0:
            return x
        shape = [1 if i in self.shared else n for i, n in enumerate(x.shape)]
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)
        return jnp.where(kept, x / (1.0 - self.rate), 0).astype(x.dtype)
