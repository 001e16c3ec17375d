"""SeqPE (section 3): a small Transformer reads the digits of a position and emits its vector.

Symbols of the paper: g is the encoder of digit strings, s_i = g(i) the vector of position i,
(a_i, b_i) = W s_i its parts for queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.position import At, Mods, Scheme, stream_positions
from jaxformer.papers.seqpe.encoder import SequentialPE, Strings, encode

GIVEN = "given"  # the collection in which a training step hands over vectors it has encoded itself

# --------------------------------------------------- how vectors of positions enter attention

Join = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class AddScores:
    """(q . k + weight a . b) / sqrt(K), by [q, weight a] . [k, b]: no array of scores is made."""

    weight: float = 1.0

    def __call__(
        self, q: jax.Array, k: jax.Array, a: jax.Array, b: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return jnp.concatenate([q, self.weight * a], -1), jnp.concatenate([k, b], -1)


def multiply(q: jax.Array, k: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q * a and k * b, element by element."""
    return q * a, k * b


def add(q: jax.Array, k: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q + a and k + b."""
    return q + a, k + b


JOINS: dict[str, Join] = {"attn_scalar": AddScores(), "attn_mul": multiply, "attn_add": add}


@dataclasses.dataclass(frozen=True, eq=False)
class Vectors:
    """The vectors s (b, L, D) of a call; row i of a batch has those of block `block[i]` (B,).

    Without `block` there is one for all rows, or one for each. A scheme without effect of its own.
    """

    s: jax.Array
    block: jax.Array | None = None

    def mods(self, heads: int, at: At) -> Mods:
        del heads, at
        return Mods()


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(Vectors):
    """Also (a, b), each (b, L, heads or 1, K), which `how` joins to queries and keys."""

    a: jax.Array | None = None
    b: jax.Array | None = None
    how: Join = AddScores()

    def join(self, q_BxLxHxK: jax.Array, k_BxLxGxK: jax.Array) -> tuple[jax.Array, jax.Array]:
        def like(x: jax.Array, part: jax.Array | None) -> jax.Array:
            assert part is not None
            part = part if self.block is None else part[self.block]
            return jnp.broadcast_to(part.astype(x.dtype), x.shape)

        return self.how(q_BxLxHxK, k_BxLxGxK, like(q_BxLxHxK, self.a), like(k_BxLxGxK, self.b))


class Pair(nn.Module):
    """pe_qk: (a, b) = W s, `heads` for queries and `kv_heads` for keys, of `head_size` each."""

    heads: int
    head_size: int
    kv_heads: int | None = None
    how: Join = AddScores()

    @nn.compact
    def __call__(self, vectors: Vectors) -> Pairs:
        kv_heads = self.heads if self.kv_heads is None else self.kv_heads

        def project(heads: int, name: str) -> jax.Array:
            return Einsum("...D,DHK->...HK", (heads, self.head_size), name=name)(vectors.s)

        a, b = project(self.heads, "query"), project(kv_heads, "key")
        return Pairs(vectors.s, vectors.block, a, b, self.how)


class SamePair(nn.Module):
    """Without pe_qk: a = b = s, its heads side by side."""

    heads: int
    how: Join = AddScores()

    @nn.compact
    def __call__(self, vectors: Vectors) -> Pairs:
        s = vectors.s.reshape(*vectors.s.shape[:-1], self.heads, -1)
        return Pairs(vectors.s, vectors.block, s, s, self.how)


class LayerPair(nn.Module):
    """A mixer whose layer makes pairs of its own (`multi`) from the vectors that layers share."""

    pair: Make
    mixer: Make

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, *args: Any, scheme: Vectors, **options: Any
    ) -> jax.Array:
        pairs = self.pair(name="pair")(scheme)
        return self.mixer(name="mixer")(x_BxLxD, *args, scheme=pairs, **options)


# ------------------------------------------------------------------- the schemes of models


class SeqPE(nn.Module):
    """The scheme of sequences: s_i for every position of a call, paired for all layers (`single`).

    Without a `pair` the layers do it (`LayerPair`). While decoding, positions are encoded as they
    come, once for all layers, and b stays in the cache with the keys.
    """

    encoder: Make
    pair: Make | None = None

    @nn.compact
    def place(
        self,
        x_BxLxD: jax.Array,
        positions: jax.Array | None = None,
        *,
        train: bool = False,
        decode: bool = False,
    ) -> Scheme:
        encoder = self.encoder(name="encoder")
        options = {"train": train, "decode": decode}
        vectors = sequence_vectors(self, encoder, x_BxLxD, positions, **options)
        return vectors if self.pair is None else self.pair(name="pair")(vectors)


class GridPE(nn.Module):
    """The scheme of images: s_(row, column) for a square grid; a learned vector for each token
    in front of it, 0 at the start.
    """

    encoder: Make
    pair: Make | None = None
    class_tokens: int = 1

    @nn.compact
    def place(
        self,
        x_BxLxD: jax.Array,
        positions: jax.Array | None = None,
        *,
        train: bool = False,
        decode: bool = False,
    ) -> Scheme:
        if positions is not None or decode:
            raise ConfigError("GridPE: the positions of an image are its grid; give none")
        encoder = self.encoder(name="encoder")
        vectors = given(self)
        if vectors is None:
            grid = square(x_BxLxD.shape[1] - self.class_tokens)
            vectors = Vectors(encode(encoder, grid[None], train=train))
        s = vectors.s
        if self.class_tokens:
            zeros, shape = jax.nn.initializers.zeros, (self.class_tokens, s.shape[-1])
            front = self.param("class_tokens", zeros, shape, jnp.float32)
            front = jnp.broadcast_to(front.astype(s.dtype), (len(s), *shape))
            vectors = Vectors(jnp.concatenate([front, s], axis=1), vectors.block)
        return vectors if self.pair is None else self.pair(name="pair")(vectors)


class AddSeqPE(nn.Module):
    """`input_add`: s_i is added to the token embeddings, instead of acting in attention."""

    encoder: Make

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, positions: jax.Array | None = None, *, decode: bool = False
    ) -> jax.Array:
        encoder = self.encoder(name="encoder")
        vectors = sequence_vectors(self, encoder, x_BxLxD, positions, decode=decode)
        s = vectors.s if vectors.block is None else vectors.s[vectors.block]
        return x_BxLxD + s.astype(x_BxLxD.dtype)


def given(module: nn.Module) -> Vectors | None:
    """The vectors that a training step hands over, if it does."""
    if not module.has_variable(GIVEN, "vectors"):
        return None
    return Vectors(*(module.get_variable(GIVEN, name) for name in ("vectors", "block")))


def sequence_vectors(
    module: nn.Module,
    encoder: Any,
    x_BxLxD: jax.Array,
    positions: jax.Array | None,
    *,
    train: bool = False,
    decode: bool = False,
) -> Vectors:
    """Those given to `module`, or those of the positions of a stream."""
    vectors = given(module)
    if vectors is None:
        at = stream_positions(module, x_BxLxD, positions, decode)
        vectors = Vectors(encode(encoder, at if at.ndim == 2 else at[None], train=train))
    return vectors


def square(count: int) -> jax.Array:
    """(row, column) of `count` patches, (count, 2) int32.

    Raises:
        ConfigError: they are no square.
    """
    side = math.isqrt(count)
    if side * side != count:
        raise ConfigError(f"GridPE: {count} patches are no square grid; give square images")
    return jnp.stack(jnp.divmod(jnp.arange(count, dtype=jnp.int32), side), axis=-1)


def scheme(strings: Strings, heads: int, head_size: int, *, g: Make | None = None) -> Make:
    """SeqPE as the scheme of a language model: vectors of its width, attn_scalar, one pe_qk.

    `g` makes the encoder, by default two blocks as wide and with as many heads as the model.
    """
    width = heads * head_size
    g = g or Make(SequentialPE, strings=strings, width=width, heads=heads, out=width)
    return Make(SeqPE, encoder=g, pair=Make(Pair, heads=heads, head_size=head_size))


def variant(trunk: Transformer, length: int) -> Variant:
    """SeqPE for any plain model; its encoder learns from the model's task alone."""
    head_size = trunk.width // trunk.heads
    return Variant(scheme=scheme(Strings(length), trunk.heads, head_size), position="none")
