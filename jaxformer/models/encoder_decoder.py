"""A model that reads one sequence and writes another (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Causal, Full, KeyPadding, Mask
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.embed import Embed
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import shared_scheme
from jaxformer.parallel.sharding import constrain

FULL, CAUSAL = Full(), Causal()


class EncoderDecoder(nn.Module):
    """Inputs (B, S) and the tokens (B, L) written so far to the logits (B, L, V) of the next.

    `encoder` is a stack of `Block`s, `decoder` of `CrossBlock`s; `*_scheme` make the position
    schemes that the layers of each share. Without a `head` the logits come from the embedding,
    of the stream times `gain`.
    """

    vocabulary: int
    width: int
    encoder: Make
    decoder: Make
    encoder_scheme: Make | None = None
    decoder_scheme: Make | None = None
    norm: Make = Make(LayerNorm)
    head: Make | None = None
    gain: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embed = Embed(self.vocabulary, self.width, self.dtype)
        self.encoder_stack, self.decoder_stack = self.encoder(), self.decoder()
        self.encoder_norm, self.decoder_norm = self.norm(), self.norm()
        if self.encoder_scheme is not None:
            self.encoder_bias = self.encoder_scheme()
        if self.decoder_scheme is not None:
            self.decoder_bias = self.decoder_scheme()
        if self.head is not None:
            self.output = self.head()
        self.drop = Dropout(self.dropout)

    def __call__(
        self,
        inputs_BxS: jax.Array,
        tokens_BxL: jax.Array,
        *,
        valid_BxS: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        memory_BxSxD = self.read(inputs_BxS, valid_BxS=valid_BxS, train=train)
        return self.write(memory_BxSxD, tokens_BxL, valid_BxS=valid_BxS, train=train)

    def read(
        self, inputs_BxS: jax.Array, *, valid_BxS: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """The memory (B, S, D) of the inputs; those that are not `valid` are not seen."""
        x_BxSxD = self._embed(inputs_BxS, train)
        scheme = {}
        if self.encoder_scheme is not None:
            scheme["scheme"] = shared_scheme(self.encoder_bias, x_BxSxD, train=train)
        x_BxSxD = self.encoder_stack(x_BxSxD, mask=_seen(valid_BxS), train=train, **scheme)
        return self.drop(self.encoder_norm(x_BxSxD), train=train)

    def write(
        self,
        memory_BxSxD: jax.Array,
        tokens_BxL: jax.Array,
        *,
        valid_BxS: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        """Logits (B, L, V); with decode=True the tokens go on from those read before."""
        x_BxLxD = self._embed(tokens_BxL, train)
        options: dict[str, Any] = {"train": train, "decode": decode}
        if self.decoder_scheme is not None:
            options["scheme"] = shared_scheme(self.decoder_bias, x_BxLxD, **options)
        options["kv_mask"] = _seen(valid_BxS)
        x_BxLxD = self.decoder_stack(x_BxLxD, memory_BxSxD, mask=CAUSAL, **options)
        x_BxLxD = self.drop(self.decoder_norm(x_BxLxD), train=train)
        head = self.embed.attend if self.head is None else self.output
        return constrain(head(x_BxLxD * self.gain), ("batch", "length", "vocab"))

    def _embed(self, tokens: jax.Array, train: bool) -> jax.Array:
        x = self.drop(self.embed(tokens), train=train)
        return constrain(x, ("batch", "length", "embed"))


def _seen(valid: jax.Array | None) -> Mask:
    return FULL if valid is None else KeyPadding(valid)
