"""Models whose grid of positions shrinks from stage to stage."""

from __future__ import annotations

import jax
from flax import linen as nn

from jaxformer.kernels.attention import Full
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.parallel.sharding import constrain


class Hierarchy(nn.Module):
    """Images to (B, L, D) by stages: each a stack, with a merge in front of all but the first."""

    embed: Make
    stages: tuple[Make, ...]
    merges: tuple[Make, ...]
    embed_norm: Make | None = None
    norm: Make | None = Make(LayerNorm)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        x_BxLxD = self.embed(name="embed")(image, train=train)
        if self.embed_norm is not None:
            x_BxLxD = self.embed_norm(name="embed_norm")(x_BxLxD)
        x_BxLxD = Dropout(self.dropout, name="dropout")(x_BxLxD, train=train)
        x_BxLxD = constrain(x_BxLxD, ("batch", "length", "embed"))
        for i, stage in enumerate(self.stages):
            if i:
                x_BxLxD = self.merges[i - 1](name=f"merge_{i}")(x_BxLxD)
            x_BxLxD = stage(name=f"stage_{i}")(x_BxLxD, mask=Full(), train=train)
        return x_BxLxD if self.norm is None else self.norm(name="norm")(x_BxLxD)
