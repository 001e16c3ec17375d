"""A bidirectional encoder of tokens, features or patches, and a classifier on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Full, KeyPadding, Mask
from jaxformer.models.transformer import Transformer
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.embed import Embed
from jaxformer.nn.heads import MaskedHead, MeanPool, class_head
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import shared_scheme
from jaxformer.parallel.sharding import constrain

FULL = Full()


class Encoder(nn.Module):
    """Whatever `embed` reads, to (B, L, D).

    `class_tokens` learned vectors go in front of the sequence; `embed_norm` is of the sum of
    embedding and position; `scheme` makes a position scheme that all layers share. Positions that
    are not `valid` are padding: nobody attends to them. Modules inserted between blocks are handed
    the bound `position`, which they may add again.
    """

    embed: Make
    stack: Make
    position: Make | None = None
    scheme: Make | None = None
    embed_norm: Make | None = None
    norm: Make | None = Make(LayerNorm)
    class_tokens: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        valid_BxL: jax.Array | None = None,
        mask: Mask = FULL,
        positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        x_BxLxD = self.embed(name="embed")(inputs)
        batch, _, width = x_BxLxD.shape
        if self.class_tokens:
            init = jax.nn.initializers.normal(0.02)
            shape = (self.class_tokens, width)
            tokens = self.param("class_tokens", init, shape, jnp.float32)
            tokens = jnp.broadcast_to(tokens.astype(x_BxLxD.dtype), (batch, *shape))
            x_BxLxD = jnp.concatenate([tokens, x_BxLxD], axis=1)
        if valid_BxL is not None:
            front = jnp.ones((batch, self.class_tokens), bool)
            mask = mask & KeyPadding(jnp.concatenate([front, valid_BxL], axis=1))
        position = None if self.position is None else self.position(name="position")
        if position is not None:
            x_BxLxD = position(x_BxLxD, positions)
        if self.embed_norm is not None:
            x_BxLxD = self.embed_norm(name="embed_norm")(x_BxLxD)
        x_BxLxD = Dropout(self.dropout, name="dropout")(x_BxLxD, train=train)
        x_BxLxD = constrain(x_BxLxD, ("batch", "length", "embed"))
        options = {"positions": positions, "train": train}
        if self.scheme is not None:
            options["scheme"] = shared_scheme(self.scheme(name="scheme"), x_BxLxD, **options)
        if dict(self.stack.arguments).get("inserts"):
            options["between"] = {"position": position}
        x_BxLxD = self.stack(name="stack")(x_BxLxD, mask=mask, **options)
        return x_BxLxD if self.norm is None else self.norm(name="norm")(x_BxLxD)


class Classifier(nn.Module):
    """Inputs to class logits (B, C): an encoder, a pool over positions and a head, linear if None.

    `positions` and `valid_BxL` are for encoders that take them.
    """

    encoder: Make
    classes: int
    pool: Make = Make(MeanPool)
    head: Make | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs: jax.Array,
        *,
        valid_BxL: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        given = {"valid_BxL": valid_BxL, "positions": positions}
        given = {name: x for name, x in given.items() if x is not None}
        x_BxLxD = self.encoder(name="encoder")(inputs, train=train, **given)
        x = self.pool(name="pool")(x_BxLxD, valid_BxL)
        x = Dropout(self.dropout, name="dropout")(x, train=train)
        logits = (self.head or class_head(self.classes))(name="head")(x)
        return constrain(logits, ("batch", *["length"] * (logits.ndim - 2), "vocab"))


class MaskedLM(nn.Module):
    """Tokens, some of them masked, to the logits (B, L, V) of all: BERT's pre-training model.

    `table` is the path of the embedding's table in the encoder, which the head shares.
    """

    encoder: Make
    head: Make = Make(MaskedHead)
    table: tuple[str, ...] = ("embed", "table")

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        valid_BxL: jax.Array | None = None,
        positions: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        encoder = self.encoder(name="encoder")
        x_BxLxD = encoder(tokens, valid_BxL=valid_BxL, positions=positions, train=train)
        table = encoder.variables["params"]
        for name in self.table:
            table = table[name]
        logits = self.head(name="head")(x_BxLxD, table)
        return constrain(logits, ("batch", "length", "vocab"))


def token_classifier(
    trunk: Transformer,
    *,
    vocabulary: int,
    length: int,
    classes: int,
    mixer: Make | None = None,
    scheme: Make | None = None,
) -> Classifier:
    """Sequences of tokens (B, L) to classes, mean-pooled."""
    embed = Make(Embed, vocabulary=vocabulary, width=trunk.width, dtype=trunk.compute_dtype)
    return Classifier(_encoder(trunk, embed, length, mixer, scheme), classes)


def feature_classifier(
    trunk: Transformer, *, length: int, classes: int, mixer: Make | None = None
) -> Classifier:
    """Sequences of feature vectors (B, L, F) to classes, mean-pooled."""
    equation = "...F,FD->...D"
    embed = Make(Einsum, equation=equation, features=(trunk.width,), dtype=trunk.compute_dtype)
    return Classifier(_encoder(trunk, embed, length, mixer), classes)


def _encoder(
    trunk: Transformer, embed: Make, length: int, mixer: Make | None, scheme: Make | None = None
) -> Make:
    return Make(
        Encoder,
        embed=embed,
        stack=trunk.stack(mixer),
        position=trunk.stream_position(length),
        scheme=scheme,
        norm=trunk.final_norm(),
        dropout=trunk.dropout,
    )
