"""Combiner: full attention whose distribution p(j|i) is structured (section 3).

A query i attends to a few positions directly and to summaries of regions that cover the others, in
one softmax; a summary is the mean value of its region under an attention of its own, p(j|region),
which does not know i. Every pattern is a partition of the support into such regions. Axes as in
`jaxformer.nn.regions`; a pattern reads `Tokens` and gives (B, L, H, V).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, KeyPadding, Mask, Window, attention
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.attention import head_sizes
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.dropout import Dropout
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.nn.order import order_and_padding
from jaxformer.nn.regions import (
    FULL,
    UP_TO,
    Part,
    Region,
    along_columns,
    along_rows,
    as_grid,
    joined,
    running,
    summarised,
    valid_grid,
)
from jaxformer.papers.combiner.decode import ReadOn

BEFORE = Causal(-1)
OTHERS = BEFORE | Window(-1, None)  # all but one's own
EPSILON = 1e-6


class Tokens(NamedTuple):
    """What a pattern attends over."""

    q_BxLxHxK: jax.Array
    k_BxLxHxK: jax.Array
    v_BxLxHxV: jax.Array
    x_BxLxD: jax.Array
    valid_BxL: jax.Array | None = None  # None: all

    @property
    def length(self) -> int:
        return self.q_BxLxHxK.shape[1]

    def grid(self, columns: int) -> tuple[jax.Array, ...]:
        """Queries, keys and values as (B, R, C, H, .)."""
        return tuple(as_grid(x, columns) for x in (self.q_BxLxHxK, self.k_BxLxHxK, self.v_BxLxHxV))

    def valid(self, columns: int) -> jax.Array | None:
        return valid_grid(self.valid_BxL, self.length, columns)


class Pattern(nn.Module):
    """Which positions a query sees directly and which as regions; abstract.

    `dropout` is that of the weights of positions that are seen directly.
    """

    dropout: float = 0.0

    def dropped(self, train: bool) -> tuple[float, jax.Array] | None:
        return (self.dropout, self.make_rng("dropout")) if train and self.dropout else None

    def needs(self, *, causal: bool = True, whole: bool = True) -> None:
        """Raise `ConfigError` unless the call is causal and of a whole sequence."""
        if not whole:
            raise DecodeUnsupported(self)
        if not causal:
            raise ConfigError(
                f"model.pattern: {type(self).__name__} is causal and cannot follow the mask Full; "
                "allowed for it: fixed, mixture"
            )


class Fixed(Pattern):
    """Combiner-Fixed: the own segment, and the other segments as regions.

    Causal: earlier positions of the segment, and earlier segments. Otherwise the whole segment and
    all of them; `own` leaves the own segment among the regions too, as the authors' code does.
    """

    segment: int = 8
    own: bool = True

    @nn.compact
    def __call__(self, tokens: Tokens, *, causal: bool, train: bool, decode: bool) -> jax.Array:
        if decode:
            return ReadOn(self.segment, name="state")(*tokens[:3])
        (q, k, v), length = tokens.grid(self.segment), tokens.length
        valid = None if causal else tokens.valid(self.segment)
        order, drop = UP_TO if causal else FULL, self.dropped(train)
        near = along_rows(q, k, v, mask=order, valid_BxRxM=valid, dropout=drop)
        far = self.regions(q, summarised(q, k, v, valid), causal)
        return joined([near, far], length)

    def regions(self, q: jax.Array, region: Region, causal: bool) -> Part:
        """Every query with the segments that it sees as regions."""
        batch, rows, columns = q.shape[:3]
        mask: Mask = FULL if region.seen is None else KeyPadding(region.seen)
        flat = q.reshape(batch, -1, *q.shape[3:])
        last = (jnp.arange(rows) + 1) * columns  # where a segment is over
        if causal:
            call = dict(mask=UP_TO & mask, k_pos=last)
        elif self.own:
            call = dict(mask=mask)
        else:
            row = jnp.arange(rows * columns) // columns
            call = dict(mask=OTHERS & mask, q_pos=row)
        o, lse = attention(flat, region.k, region.v, return_lse=True, **call)
        return Part(
            *(x.reshape(batch, rows, columns, *x.shape[2:]) for x in (o, lse.swapaxes(1, 2)))
        )


class Local(Pattern):
    """The own segment alone: Fixed without its regions, which it is compared with."""

    segment: int = 8

    @nn.compact
    def __call__(self, tokens: Tokens, *, causal: bool, train: bool, decode: bool) -> jax.Array:
        self.needs(whole=not decode)
        valid = None if causal else tokens.valid(self.segment)
        call = dict(mask=UP_TO if causal else FULL, dropout=self.dropped(train))
        near = along_rows(*tokens.grid(self.segment), valid_BxRxM=valid, **call)
        return joined([near], tokens.length)


class Logsparse(Pattern):
    """Combiner-Logsparse: position i, and a block of 2^l positions for every bit l that is 1 in i.

    Block (i >> l) - 1 of that size; together with i they are 0 .. i, each once.
    """

    @nn.compact
    def __call__(self, tokens: Tokens, *, causal: bool, train: bool, decode: bool) -> jax.Array:
        self.needs(causal=causal, whole=not decode)
        q, k, v = tokens.grid(1)
        parts = [along_rows(q, k, v, dropout=self.dropped(train))]
        for level in range((tokens.length - 1).bit_length()):
            size = 2**level
            q, k, v = tokens.grid(2 * size)  # pairs of blocks; the second sees the first
            region = summarised(*(x[:, :, :size] for x in (q, k, v)))
            summary = (x[:, :, None] for x in region[:2])
            parts.append(along_rows(q[:, :, size:], *summary).beside(2, before=size))
        return joined(parts, tokens.length)


class SummaryKey(nn.Module):
    """Keys of summaries that are themselves attention outputs: heads (LN(W r + x))."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, r: jax.Array, x: jax.Array, *, train: bool) -> jax.Array:
        """(B, R, C, H, K) from outputs of that shape and inputs (B, R, C, D)."""
        y = Einsum("...HK,HKD->...D", x.shape[-1:], use_bias=False, name="out")(r)
        y = x + Dropout(self.dropout, name="drop")(y, train=train)
        y = LayerNorm(EPSILON, name="norm")(y)
        return Einsum("...D,DHK->...HK", r.shape[-2:], use_bias=False, name="key")(y)


class Axial(Pattern):
    """Combiner-Axial, row by row: the own row, and every earlier row as the own column sees it.

    That a row is seen whole, from both sides, breaks no order: it is over where it is seen.
    """

    segment: int = 8

    @nn.compact
    def __call__(self, tokens: Tokens, *, causal: bool, train: bool, decode: bool) -> jax.Array:
        self.needs(causal=causal, whole=not decode)
        q, k, v = tokens.grid(self.segment)
        r = along_rows(q, k, v).o_BxRxCxHxV  # that of a last row not filled is seen by nobody
        summary = SummaryKey(self.dropout, name="summary")
        k_row = summary(r, as_grid(tokens.x_BxLxD, self.segment), train=train)
        near = along_rows(q, k, v, mask=UP_TO, dropout=self.dropped(train))
        far = along_columns(q, k_row, r, mask=BEFORE)
        return joined([near, far], tokens.length)


class Mixture(Pattern):
    """Combiner-Mixture: own row and own column, and what lies off both as summaries of both kinds.

    A position off row and column is in one region of its column and in one of its row; a region
    is all of a column before the own row, or of a row before or after the own column.
    """

    segment: int = 8

    @nn.compact
    def __call__(self, tokens: Tokens, *, causal: bool, train: bool, decode: bool) -> jax.Array:
        self.needs(whole=not decode)
        q, k, v = tokens.grid(self.segment)
        valid = None if causal else tokens.valid(self.segment)
        row, column = (UP_TO, BEFORE) if causal else (FULL, OTHERS)
        drop_row, drop_column = self.dropped(train), self.dropped(train)
        parts = [
            along_rows(q, k, v, mask=row, valid_BxRxM=valid, dropout=drop_row),
            along_columns(q, k, v, mask=column, valid_BxMxC=valid, dropout=drop_column),
        ]
        # A summary ends where the query's row or column begins: the one up to t is for t + 1.
        rest, most = slice(1, None), slice(-1)
        turned = [x if x is None else x.swapaxes(1, 2) for x in (q, k, v, valid)]
        for back in (False,) if causal else (False, True):
            queries, keys = (most, rest) if back else (rest, most)
            above = running(*turned, reverse=back).turned().at(rows=keys)
            part = along_rows(q[:, queries], above.k, above.v, mask=OTHERS, valid_BxRxM=above.seen)
            parts.append(part.beside(1, before=not back, after=back))
        for back in (False, True):
            queries, keys = (most, rest) if back else (rest, most)
            left = running(q, k, v, valid, reverse=back).at(columns=keys)
            part = along_columns(
                q[:, :, queries], left.k, left.v, mask=column, valid_BxMxC=left.seen
            )
            parts.append(part.beside(2, before=not back, after=back))
        return joined(parts, tokens.length)


class CombinerAttention(nn.Module):
    """Multi-head attention by a `Pattern`, a `jaxformer.nn.block.Mixer` of a sequence with itself.

    Raises:
        ConfigError: heads do not divide the width, another sequence is given, or the mask is one
            that the pattern cannot follow.
    """

    heads: int
    pattern: Make = Make(Fixed)
    head_size: int | None = None
    use_bias: bool = False

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        del positions
        if kv_BxSxD is not None:
            raise ConfigError("CombinerAttention: its regions are of one sequence; give no other")
        causal, valid_BxL = order_and_padding(self, mask)
        if decode and not causal:
            raise DecodeUnsupported(self)
        width = x_BxLxD.shape[-1]
        _, head_size = head_sizes(width, self.heads, None, self.head_size)

        def project(name: str) -> jax.Array:
            features = (self.heads, head_size)
            return Einsum("...D,DHK->...HK", features, self.use_bias, name=name)(x_BxLxD)

        q, k, v = project("query"), project("key"), project("value")
        tokens = Tokens(q, k, v, x_BxLxD, valid_BxL)
        pattern = self.pattern(name="pattern")
        y_BxLxHxK = pattern(tokens, causal=causal, train=train, decode=decode)
        return Einsum("...HK,HKD->...D", (width,), self.use_bias, name="out")(y_BxLxHxK)


def variant(trunk: Transformer, length: int) -> Variant:
    """Combiner-Fixed in any plain model, with segments of sqrt(length) positions."""
    pattern = Make(Fixed, segment=math.isqrt(length), dropout=trunk.dropout)
    return Variant(Make(CombinerAttention, heads=trunk.heads, pattern=pattern))
