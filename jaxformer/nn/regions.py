"""Attention in parts, of rows, columns and summaries of regions of a grid, in one softmax.

Axes: B batch, R rows, C columns, H heads, K head size, V value size. A sequence of L is a grid of R
rows of C columns, row after row. Parts that see different keys join as if their logits had stood in
one softmax, since each carries its log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Mask, Window, attention, merge

FULL, UP_TO, FROM = Full(), Causal(), Window(0, None)


class Part(NamedTuple):
    """What the queries of a grid read from some keys; one that sees none has LSE -inf."""

    o_BxRxCxHxV: jax.Array
    lse_BxRxCxH: jax.Array

    def turned(self) -> Part:
        """Rows for columns."""
        return Part(*(x.swapaxes(1, 2) for x in self))

    def beside(self, axis: int, *, before: int = 0, after: int = 0) -> Part:
        """With queries that see nothing before and after it along a grid axis (1 or 2)."""

        def pad(x: jax.Array, value: float) -> jax.Array:
            widths = [(before, after) if i == axis else (0, 0) for i in range(x.ndim)]
            return jnp.pad(x, widths, constant_values=value)

        return Part(pad(self.o_BxRxCxHxV, 0.0), pad(self.lse_BxRxCxH, -jnp.inf))


class Region(NamedTuple):
    """Summaries of regions: keys and values (..., H, K), and which regions hold anything."""

    k: jax.Array
    v: jax.Array
    seen: jax.Array | None = None  # (...) bool; None: all

    def turned(self) -> Region:
        """Axis 1 for axis 2."""
        return Region(*(x if x is None else x.swapaxes(1, 2) for x in self))

    def at(self, rows: slice = slice(None), columns: slice = slice(None)) -> Region:
        """A part of a grid of regions."""
        return Region(*(x if x is None else x[:, rows, columns] for x in self))


def as_grid(x_BxLx: jax.Array, columns: int) -> jax.Array:
    """(B, L, ...) to (B, R, C, ...); the last row is filled up with zeros.

    Raises:
        ConfigError: less than one column.
    """
    if columns < 1:
        raise ConfigError(f"model.segment={columns}: must be at least 1")
    batch, length, *rest = x_BxLx.shape
    x = jnp.pad(x_BxLx, [(0, 0), (0, -length % columns), *[(0, 0)] * len(rest)])
    return x.reshape(batch, -1, columns, *rest)


def valid_grid(valid_BxL: jax.Array | None, length: int, columns: int) -> jax.Array | None:
    """(B or 1, R, C) bool, false where a row was filled up; None where all of a grid is valid."""
    if valid_BxL is None and length % columns == 0:
        return None
    return as_grid(jnp.ones((1, length), bool) if valid_BxL is None else valid_BxL, columns)


def along_rows(
    q_BxRxCxHxK: jax.Array,
    k_BxRxMxHxK: jax.Array,
    v_BxRxMxHxV: jax.Array,
    *,
    mask: Mask = FULL,
    valid_BxRxM: jax.Array | None = None,
    dropout: tuple[float, jax.Array] | None = None,
) -> Part:
    """Every query of a row with the M keys of that row."""
    batch, rows = q_BxRxCxHxK.shape[:2]
    if not q_BxRxCxHxK.size or not k_BxRxMxHxK.size:  # of a grid of one row or column
        shape = q_BxRxCxHxK.shape[:-1]
        nothing = jnp.zeros((*shape, v_BxRxMxHxV.shape[-1]), v_BxRxMxHxV.dtype)
        return Part(nothing, jnp.full(shape, -jnp.inf))
    if valid_BxRxM is not None:
        valid = jnp.broadcast_to(valid_BxRxM, k_BxRxMxHxK.shape[:3])
        mask = mask & KeyPadding(valid.reshape(batch * rows, -1))
    flat = (x.reshape(-1, *x.shape[2:]) for x in (q_BxRxCxHxK, k_BxRxMxHxK, v_BxRxMxHxV))
    o, lse = attention(*flat, mask=mask, dropout=dropout, return_lse=True)
    return Part(*(x.reshape(batch, rows, *x.shape[1:]) for x in (o, lse.swapaxes(1, 2))))


def along_columns(
    q_BxRxCxHxK: jax.Array,
    k_BxMxCxHxK: jax.Array,
    v_BxMxCxHxV: jax.Array,
    *,
    mask: Mask = FULL,
    valid_BxMxC: jax.Array | None = None,
    dropout: tuple[float, jax.Array] | None = None,
) -> Part:
    """Every query of a column with the M keys of that column."""
    turned = (x.swapaxes(1, 2) for x in (q_BxRxCxHxK, k_BxMxCxHxK, v_BxMxCxHxV))
    valid = None if valid_BxMxC is None else valid_BxMxC.swapaxes(1, 2)
    return along_rows(*turned, mask=mask, valid_BxRxM=valid, dropout=dropout).turned()


def joined(parts: list[Part], length: int) -> jax.Array:
    """One softmax over the keys of all parts, whose grids may differ: (B, L, H, V)."""

    def flat(part: Part) -> tuple[jax.Array, jax.Array]:
        o, lse = (x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length] for x in part)
        return o, lse.swapaxes(1, 2)

    return merge([flat(part) for part in parts])[0]


def summarised(
    q_BxRxCxHxK: jax.Array,
    k_BxRxCxHxK: jax.Array,
    v_BxRxCxHxV: jax.Array,
    valid_BxRxC: jax.Array | None = None,
) -> Region:
    """Each row as one key, the maximum of its keys, and one value, what their maximal query reads.

    Ren et al. 2021, arXiv 2107.05768, section 3: the local expectation of the values under
    softmax(q . k_j / sqrt(K)), q and k maxima over the row, element by element.
    """
    q, k, seen = q_BxRxCxHxK, k_BxRxCxHxK, None
    if valid_BxRxC is not None:
        q, k = (jnp.where(valid_BxRxC[..., None, None], x, -jnp.inf) for x in (q, k))
        seen = jnp.broadcast_to(valid_BxRxC.any(2), k.shape[:2])
    q, k = q.max(2), k.max(2)
    if seen is not None:
        q, k = (jnp.where(seen[..., None, None], x, 0) for x in (q, k))
    return Region(k, expected(q, k_BxRxCxHxK, v_BxRxCxHxV, valid_BxRxC), seen)


def expected(
    q_BxRxHxK: jax.Array,
    k_BxRxCxHxK: jax.Array,
    v_BxRxCxHxV: jax.Array,
    valid_BxRxC: jax.Array | None = None,
) -> jax.Array:
    """The mean value of each row under the attention of one query: (B, R, H, V)."""
    product = dict(preferred_element_type=jnp.float32)
    s = jnp.einsum("BRHK,BRCHK->BRCH", q_BxRxHxK, k_BxRxCxHxK, **product)
    s = s * q_BxRxHxK.shape[-1] ** -0.5
    where = None if valid_BxRxC is None else valid_BxRxC[..., None]
    p = jax.nn.softmax(s, 2, where=where).astype(v_BxRxCxHxV.dtype)
    mean = jnp.einsum("BRCH,BRCHV->BRHV", p, v_BxRxCxHxV, **product)
    return mean.astype(v_BxRxCxHxV.dtype)


def running(
    q_BxRxCxHxK: jax.Array,
    k_BxRxCxHxK: jax.Array,
    v_BxRxCxHxV: jax.Array,
    valid_BxRxC: jax.Array | None = None,
    *,
    reverse: bool = False,
) -> Region:
    """`summarised` of every beginning of every row, or with `reverse` of every end: (B, R, C, ...).

    That of column t has columns 0 .. t, or t .. C - 1.
    """
    q, k, seen = q_BxRxCxHxK, k_BxRxCxHxK, None
    if valid_BxRxC is not None:
        q, k = (jnp.where(valid_BxRxC[..., None, None], x, -jnp.inf) for x in (q, k))
        seen = jax.lax.cummax(valid_BxRxC.astype(jnp.int32), 2, reverse) > 0
    q, k = (jax.lax.cummax(x, 2, reverse) for x in (q, k))
    if seen is not None:
        q, k = (jnp.where(seen[..., None, None], x, 0) for x in (q, k))
        seen = jnp.broadcast_to(seen, k.shape[:3])
    order = FROM if reverse else UP_TO
    part = along_rows(q, k_BxRxCxHxK, v_BxRxCxHxV, mask=order, valid_BxRxM=valid_BxRxC)
    return Region(k, part.o_BxRxCxHxV, seen)
