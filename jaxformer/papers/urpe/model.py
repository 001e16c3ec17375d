"""Relative positions that stay relative and can still tell where they are (section 4).

Symbols of the paper: B[i, j] = b_{j-i} is added to the scores, C[i, j] = c_{j-i} multiplies the
probabilities, and nothing renormalises the product: (softmax(Q K^T / sqrt(d) + B) * C) V.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.models.encoder import Classifier, Encoder
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.attention import Attention
from jaxformer.nn.embed import Embed
from jaxformer.nn.heads import EveryPosition
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.position import At, Mods, Position
from jaxformer.nn.relative import TableScheme, log_buckets


class Offsets(Protocol):
    """Which entry of a table an offset j - i has."""

    length: int  # the longest sequence

    @property
    def entries(self) -> int: ...

    def __call__(self, offset: np.ndarray) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Unique:
    """An entry for each offset of sequences of at most `length`: 2 length - 1."""

    length: int

    @property
    def entries(self) -> int:
        return 2 * self.length - 1

    def __call__(self, offset: np.ndarray) -> np.ndarray:
        return (offset + self.length - 1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Buckets:
    """T5's buckets with a sign; entries in the middle are unused, as in the authors' code.

    Offsets of at least 0 move up by 2, then the least index that sequences of `length` have
    becomes 0: for short ones that is a smaller shift.
    """

    length: int
    buckets: int = 64
    longest: int = 128

    @property
    def entries(self) -> int:
        return self.buckets + 1

    def signed(self, offset: np.ndarray) -> np.ndarray:
        """The bucket of |offset| with the sign of the offset."""
        return np.sign(offset) * log_buckets(np.abs(offset), self.buckets // 2, self.longest)

    def __call__(self, offset: np.ndarray) -> np.ndarray:
        lowest = self.signed(np.array(1 - self.length))
        signed = self.signed(offset)
        return (signed + np.where(signed >= 0, 2, 0) - lowest).astype(np.int32)


class Tables(nn.Module):
    """The tables b and, unless `weigh` is False, c: called, the scheme that layers share.

    c starts at 1, where a model is the plain one with relative positions.
    """

    offsets: Any  # Offsets
    heads: int
    weigh: bool = True

    @nn.compact
    def __call__(self) -> TableScheme:
        shape = (self.offsets.entries, self.heads)
        b = self.param("bias", jax.nn.initializers.normal(0.02), shape, jnp.float32)
        c = None
        if self.weigh:
            c = self.param("scale", jax.nn.initializers.ones, shape, jnp.float32)
        return TableScheme(self.offsets, self.offsets.length - 1, b, c, strict=True)


class OwnTables(Position):
    """Tables of one layer alone."""

    tables: Make

    @nn.compact
    def mods(self, heads: int, at: At) -> Mods:
        return self.tables(name="tables")().mods(heads, at)


class PaddedEmbed(nn.Module):
    """Normalised embeddings; that of token `pad` is 0."""

    vocabulary: int
    width: int
    pad: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        x_BxLxD = Embed(self.vocabulary, self.width, self.dtype, name="tokens")(tokens_BxL)
        x_BxLxD = LayerNorm(name="norm")(x_BxLxD)
        if self.pad is None:
            return x_BxLxD
        return jnp.where((tokens_BxL == self.pad)[..., None], 0, x_BxLxD)


POSITIONS = ("urpe", "rpe", "none")


def encoder(
    trunk: Transformer,
    *,
    vocabulary: int,
    offsets: Offsets,
    position: str = "urpe",
    shared: bool = True,
    pad: int | None = None,
) -> Make:
    """A post-norm encoder without absolute positions.

    `position` is "urpe" (B and C), "rpe" (B alone) or "none"; `shared` has one pair of tables for
    all layers, as the authors have.

    Raises:
        ConfigError: no such position.
    """
    if position not in POSITIONS:
        raise ConfigError(f"model.position={position!r}: must be one of {', '.join(POSITIONS)}")
    tables = Make(Tables, offsets=offsets, heads=trunk.heads, weigh=position == "urpe")
    plain = position == "none"
    inside = Make(Position) if shared or plain else Make(OwnTables, tables=tables)
    mixer = Make(Attention, heads=trunk.heads, position=inside, dropout=trunk.dropout)
    return Make(
        Encoder,
        embed=Make(
            PaddedEmbed,
            vocabulary=vocabulary,
            width=trunk.width,
            pad=pad,
            dtype=trunk.compute_dtype,
        ),
        stack=trunk.stack(mixer),
        scheme=tables if shared and not plain else None,
        norm=None,
    )


def tagger(encoder: Make, classes: int) -> Classifier:
    """A class for every position of a sequence."""
    return Classifier(encoder, classes, Make(EveryPosition))


def variant(trunk: Transformer, length: int) -> Variant:
    """B and C by bucket, which distances beyond those of training share, for any plain model."""
    return Variant(scheme=Make(Tables, offsets=Buckets(length), heads=trunk.heads), position="none")
