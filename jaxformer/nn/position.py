"""Position schemes: added to the residual stream, or, as a `Position`, acting inside attention."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import (
    Operand,
    PerHead,
    PerK,
    PerQ,
    ProbMod,
    ScoreMod,
)
from jaxformer.nn.cache import count_positions
from jaxformer.nn.rotary import Frequencies


def stream_positions(
    module: nn.Module, x_BxLxD: jax.Array, positions: jax.Array | None, decode: bool
) -> jax.Array:
    """Positions (L,) or (B, L) of a stream: as given, counted while decoding, or 0, 1, 2, ..."""
    batch, length = x_BxLxD.shape[:2]
    if decode:
        if positions is not None:
            raise ValueError("positions: decode=True counts them itself; pass None")
        return count_positions(module, batch, length)
    return jnp.arange(length, dtype=jnp.int32) if positions is None else positions


class LearnedPosition(nn.Module):
    """Adds row p of a learned table (length, D) at position p.

    Raises:
        ConfigError: the sequence is longer than the table.
    """

    length: int
    offset: int = 0  # RoBERTa's first position has row 2 of a table that is so much longer

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, positions: jax.Array | None = None, *, decode: bool = False
    ) -> jax.Array:
        length, width = x_BxLxD.shape[1:]
        if length > self.length:
            raise ConfigError(
                f"LearnedPosition.length={self.length}: shorter than a sequence of {length}; "
                f"give at least {length}"
            )
        init = jax.nn.initializers.normal(0.02)
        table = self.param("table", init, (self.length + self.offset, width), jnp.float32)
        at = stream_positions(self, x_BxLxD, positions, decode) + self.offset
        return x_BxLxD + jnp.take(table.astype(x_BxLxD.dtype), at, axis=0)


class SinusoidalPosition(nn.Module):
    """Adds sin(p w_i) and cos(p w_i), w_i = base^(-2i/D) (Vaswani et al. 2017, section 3.5).

    Sines fill the first half of the width and cosines the second.
    """

    base: float = 10000.0

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, positions: jax.Array | None = None, *, decode: bool = False
    ) -> jax.Array:
        at = stream_positions(self, x_BxLxD, positions, decode)
        angles = Frequencies(self.base).angles(at, x_BxLxD.shape[-1])
        code = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
        return x_BxLxD + code.astype(x_BxLxD.dtype)


class Mods(NamedTuple):
    """What `jaxformer.kernels.attention.attention` takes to change scores and probabilities."""

    score_mod: ScoreMod | None = None
    prob_mod: ProbMod | None = None
    aux: Mapping[str, Operand] | None = None


class At(NamedTuple):
    """Where the scores of a call lie: L queries, S keys, and their positions.

    `q_pos` (L,) or (B, L) and `k_pos` likewise are there where positions are not the numbers of
    rows and columns.
    """

    queries: int
    keys: int
    q_pos: jax.Array | None = None
    k_pos: jax.Array | None = None


class Scheme(Protocol):
    """What changes scores and probabilities by position: a `Position`, or what layers share."""

    def mods(self, heads: int, at: At) -> Mods: ...


@runtime_checkable
class Joins(Protocol):
    """A scheme that also changes the queries and keys of a call, at whose positions it was placed.

    It may make them wider, both alike: scores keep the scale of the head size.
    """

    def join(self, q_BxLxHxK: jax.Array, k_BxLxGxK: jax.Array) -> tuple[jax.Array, jax.Array]: ...


@runtime_checkable
class ReadsContent(Protocol):
    """A scheme whose changes of scores depend on the queries and keys of a call.

    `scale` is that of the scores q . k, which what is added to them should have too.
    """

    def read(self, q_BxLxHxK: jax.Array, k_BxSxGxK: jax.Array, scale: float) -> Scheme: ...


@runtime_checkable
class Placed(Protocol):
    """A module whose scheme depends on where the stream of a call lies."""

    def place(
        self,
        x_BxLxD: jax.Array,
        positions: jax.Array | None = None,
        *,
        train: bool = False,
        decode: bool = False,
    ) -> Scheme: ...


def shared_scheme(
    module: nn.Module,
    x_BxLxD: jax.Array,
    positions: jax.Array | None = None,
    *,
    train: bool = False,
    decode: bool = False,
) -> Scheme:
    """The scheme that the layers of a call share, of the module that makes it."""
    if isinstance(module, Placed):
        return module.place(x_BxLxD, positions, train=train, decode=decode)
    return module()


class Position(nn.Module):
    """A scheme that acts inside attention: on queries and keys, or on scores and probabilities."""

    def rotate(self, x_BxLxHxK: jax.Array, positions: jax.Array) -> jax.Array:
        """Queries or keys at `positions`, (L,) or (B, L)."""
        del positions
        return x_BxLxHxK

    def mods(self, heads: int, at: At) -> Mods:
        """Changes of the scores and probabilities `at`."""
        del heads, at
        return Mods()


class RoPE(Position):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864), eq. 34: component i pairs with i + K/2.

    Raises:
        ConfigError: the head size is odd.
    """

    frequencies: Frequencies = Frequencies()

    def rotate(self, x_BxLxHxK: jax.Array, positions: jax.Array) -> jax.Array:
        head_size = x_BxLxHxK.shape[-1]
        if head_size % 2:
            raise ConfigError(f"model.head_size={head_size}: RoPE needs an even head size")
        angles = self.frequencies.angles(positions, head_size)[..., None, :]
        sin, cos = (f(angles) * self.frequencies.gain for f in (jnp.sin, jnp.cos))
        first, second = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
        turned = [first * cos - second * sin, second * cos + first * sin]
        return jnp.concatenate(turned, -1).astype(x_BxLxHxK.dtype)


class ALiBi(Position):
    """Adds -slope_h |q - k| to the scores (Press et al. 2021, arXiv 2108.12409)."""

    def mods(self, heads: int, at: At) -> Mods:
        aux = {"slope": PerHead(jnp.asarray(alibi_slopes(heads)))}
        if at.q_pos is None or at.k_pos is None:
            return Mods(_alibi_by_index, aux=aux)
        aux |= {"q": PerQ(at.q_pos[..., None, :]), "k": PerK(at.k_pos[..., None, :])}
        return Mods(_alibi_by_position, aux=aux)


def alibi_slopes(heads: int) -> np.ndarray:
    """(H,) float32: 2^(-8i/H) for i = 1..H where H is a power of two.

    Otherwise those of the next lower power of two, then every other one of the next higher.
    """

    def powers(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    lower = 2 ** int(math.log2(heads))
    return np.asarray(powers(lower) + powers(2 * lower)[0::2][: heads - lower], np.float32)


def _alibi_by_index(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    return score - aux["slope"] * jnp.abs(at.q - at.k)


def _alibi_by_position(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score - aux["slope"] * jnp.abs(aux["q"] - aux["k"])
