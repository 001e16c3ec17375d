"""A decoder-only language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Causal, Mask
from jaxformer.models.transformer import Transformer
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.embed import Embed
from jaxformer.nn.heads import lm_head
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import shared_scheme
from jaxformer.parallel.sharding import constrain

CAUSAL = Causal()


class DecoderLM(nn.Module):
    """Tokens (B, L) to the logits (B, L, V) of the next ones.

    `scheme` makes a position scheme that all layers share. Without a `head` the logits come from
    the embedding table. With decode=True the tokens go on from those read before, the state is the
    collection "cache", and the logits (B, 1, V) are those after the last token: of a prompt no
    others are asked for.
    """

    vocabulary: int
    width: int
    stack: Make
    position: Make | None = None
    scheme: Make | None = None
    norm: Make | None = Make(LayerNorm)
    head: Make | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_BxL: jax.Array,
        *,
        mask: Mask = CAUSAL,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        embed = Embed(self.vocabulary, self.width, self.dtype, name="embed")
        x_BxLxD = embed(tokens_BxL)
        if self.position is not None:
            x_BxLxD = self.position(name="position")(x_BxLxD, positions, decode=decode)
        x_BxLxD = Dropout(self.dropout, name="dropout")(x_BxLxD, train=train)
        x_BxLxD = constrain(x_BxLxD, ("batch", "length", "embed"))
        options = {"positions": positions, "train": train, "decode": decode}
        if self.scheme is not None:
            options["scheme"] = shared_scheme(self.scheme(name="scheme"), x_BxLxD, **options)
        x_BxLxD = self.stack(name="stack")(x_BxLxD, mask=mask, **options)
        x_BxLxD = x_BxLxD[:, -1:] if decode else x_BxLxD
        if self.norm is not None:
            x_BxLxD = self.norm(name="norm")(x_BxLxD)
        head = embed.attend if self.head is None else self.head(name="head")
        return constrain(head(x_BxLxD), ("batch", "length", "vocab"))


def decoder_lm(
    trunk: Transformer,
    *,
    vocabulary: int,
    length: int,
    tied: bool = True,
    mixer: Make | None = None,
    scheme: Make | None = None,
) -> DecoderLM:
    """A `DecoderLM`; `length` is that of the table of learned positions, if there is one."""
    return DecoderLM(
        vocabulary=vocabulary,
        width=trunk.width,
        stack=trunk.stack(mixer),
        position=trunk.stream_position(length),
        scheme=scheme,
        norm=trunk.final_norm(),
        head=None if tied else lm_head(vocabulary),
        dropout=trunk.dropout,
        dtype=trunk.compute_dtype,
    )
