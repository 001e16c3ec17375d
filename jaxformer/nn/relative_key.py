"""Relative positions that act on content: on queries, and on keys too.

A module of this file makes the scheme of one layer (`LayerScheme`). Offsets are those of a key from
a query, j - i; beyond `longest` they count as that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import ScoreMod, Tile
from jaxformer.nn.make import Make
from jaxformer.nn.position import At, Mods, ReadsContent, Scheme

INIT = jax.nn.initializers.normal(0.02)


def entries(at: At, longest: int) -> jax.Array:
    """The row of a table of 2 longest + 1 for every score: (L, S) or (B, L, S)."""
    q = jnp.arange(at.queries) if at.q_pos is None else at.q_pos
    k = jnp.arange(at.keys) if at.k_pos is None else at.k_pos
    return jnp.clip(k[..., None, :] - q[..., :, None], -longest, longest) + longest


def _add(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score + aux["bias"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Read:
    """A scheme that has read queries and keys."""

    scheme: Any
    q: jax.Array
    k: jax.Array
    scale: float

    def mods(self, heads: int, at: At) -> Mods:
        del heads
        bias_BxHxLxS = self.scale * self.scheme.scores(self.q, self.k, at)
        return Mods(_add, aux={"bias": Tile(bias_BxHxLxS)})


@dataclasses.dataclass(frozen=True, eq=False)
class RelativeKeyScheme:
    """q_i . a_{j-i}, and with types t (B, L) also q_i . b^{(t_i, t_j)}_{j-i}.

    a is (2 longest + 1, K), b (T, T, 2 longest + 1, K).
    """

    a: jax.Array
    longest: int
    b: jax.Array | None = None
    types: jax.Array | None = None

    def read(self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, scale: float) -> Scheme:
        return _Read(self, q_BxLxHxK, k_BxSxGxK, scale)

    def mods(self, heads: int, at: At) -> Mods:
        raise ConfigError("relative keys act on queries: the mixer must be Attention")

    def scores(self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, at: At) -> jax.Array:
        """What is added to q . k, (B, H, L, S) float32."""
        del k_BxSxGxK
        entry = entries(at, self.longest)
        keys = jnp.take(self.a, entry, axis=0)  # (L, S, K) or (B, L, S, K)
        if self.b is not None and self.types is not None:
            # One gather of rows of a flat table: its transpose is one scatter.
            count, rows = len(self.b), self.b.shape[2]
            pair = self.types[:, :, None] * count + self.types[:, None, :]
            b = self.b.reshape(-1, self.b.shape[-1])
            keys = keys + jnp.take(b, pair * rows + entry, axis=0)
        axes = "BLSK" if keys.ndim == 4 else "LSK"
        keys = keys.astype(q_BxLxHxK.dtype)
        equation = f"BLHK,{axes}->BHLS"
        return jnp.einsum(equation, q_BxLxHxK, keys, preferred_element_type=jnp.float32)


class RelativeKey(nn.Module):
    """Vectors by offset that queries meet beside the keys, shared by the heads of a layer.

    Shaw et al. 2018, arXiv 1803.02155, eq. 4, without the values' part. (`relative_key` of Hugging
    Face counts i - j: its tables are these in reverse.) With `types`, the number of
    kinds of tokens, also vectors by offset and by the kinds of query and key (`typed_relative_key`
    of TEGA, arXiv 2501.00759); they start at 0, where the layer is the one without.
    """

    head_size: int
    longest: int
    types: int = 0

    @nn.compact
    def __call__(self, types_BxL: jax.Array | None = None) -> RelativeKeyScheme:
        rows = 2 * self.longest + 1
        a = self.param("offset", INIT, (rows, self.head_size), jnp.float32)
        if not self.types:
            return RelativeKeyScheme(a, self.longest)
        shape = (self.types, self.types, rows, self.head_size)
        b = self.param("typed", jax.nn.initializers.zeros, shape, jnp.float32)
        return RelativeKeyScheme(a, self.longest, b, types_BxL)


@dataclasses.dataclass(frozen=True, eq=False)
class DisentangledScheme:
    """q_i . key_{j-i} + k_j . query_{j-i}; tables (2 longest + 1, H, K)."""

    key: jax.Array
    query: jax.Array
    longest: int

    read = RelativeKeyScheme.read
    mods = RelativeKeyScheme.mods

    def scores(self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, at: At) -> jax.Array:
        """What is added to q . k, (B, H, L, S) float32."""
        entry = entries(at, self.longest)
        lead = "B" if entry.ndim == 3 else ""
        k_BxSxHxK = jnp.repeat(k_BxSxGxK, q_BxLxHxK.shape[2] // k_BxSxGxK.shape[2], axis=2)
        total = jnp.zeros((), jnp.float32)
        for table, content, axes in (
            (self.key, q_BxLxHxK, "BLHK"),
            (self.query, k_BxSxHxK, "BSHK"),
        ):
            rows = jnp.take(table.astype(content.dtype), entry, axis=0)
            equation = f"{axes},{lead}LSHK->BHLS"
            total += jnp.einsum(equation, content, rows, preferred_element_type=jnp.float32)
        return total


class Disentangled(nn.Module):
    """Content to position and position to content, as in DeBERTa.

    He et al. 2020, arXiv 2006.03654, eq. 4, with the products of its relative embeddings and
    projections as tables of the layer. Its scores are divided by sqrt(3 K), which is the `scale` of
    the attention.
    """

    heads: int
    head_size: int
    longest: int

    @nn.compact
    def __call__(self) -> DisentangledScheme:
        shape = (2 * self.longest + 1, self.heads, self.head_size)
        key, query = (self.param(name, INIT, shape, jnp.float32) for name in ("key", "query"))
        return DisentangledScheme(key, query, self.longest)


# --------------------------------------------------------------------- schemes in layers


@dataclasses.dataclass(frozen=True)
class _Chain:
    """Score mods one after another; the operands of number i are called "i/..."."""

    mods: tuple[ScoreMod, ...]

    def __call__(self, score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
        for i, mod in enumerate(self.mods):
            own = {n.partition("/")[2]: x for n, x in aux.items() if n.startswith(f"{i}/")}
            score = mod(score, at, own)
        return score


@dataclasses.dataclass(frozen=True, eq=False)
class Together:
    """Several schemes that change scores, one after another."""

    schemes: Sequence[Any]

    def read(self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, scale: float) -> Scheme:
        return Together(
            [
                s.read(q_BxLxHxK, k_BxSxGxK, scale) if isinstance(s, ReadsContent) else s
                for s in self.schemes
            ]
        )

    def mods(self, heads: int, at: At) -> Mods:
        found = [scheme.mods(heads, at) for scheme in self.schemes]
        if any(mods.prob_mod is not None for mods in found):
            raise ConfigError("Together: takes schemes that change scores alone")
        found = [mods for mods in found if mods.score_mod is not None]
        aux = {f"{i}/{n}": x for i, mods in enumerate(found) for n, x in (mods.aux or {}).items()}
        return Mods(_Chain(tuple(mods.score_mod for mods in found)) if found else None, aux=aux)


class LayerScheme(nn.Module):
    """A mixer whose layer makes a scheme of its own, from what layers share as `scheme`."""

    own: Make
    mixer: Make

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, *args: Any, scheme: Any = None, **options: Any
    ) -> jax.Array:
        own = self.own(name="own")
        own = own() if scheme is None else own(scheme)
        return self.mixer(name="mixer")(x_BxLxD, *args, scheme=own, **options)
