"""What masks and modifications may read, and how a tile of it is cut out.

Axes: B batch, H query heads, L query length, S key length. A tile is a (B, H, tq, tk) block of the
score matrix. Because every operand declares its access, each back end knows which part to load for
a tile; nothing is gathered by index inside a kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax


class Idx(NamedTuple):
    """Positions of a tile: int32, broadcastable against each other to the tile's shape."""

    b: jax.Array
    h: jax.Array
    q: jax.Array
    k: jax.Array


class Sizes(NamedTuple):
    """Batch, query heads, query length, key length."""

    b: int
    h: int
    l: int
    s: int


class Block(NamedTuple):
    """A tile: first row and column (int or int32 scalar), its size, the (padded) key length."""

    row: Any
    col: Any
    tq: int
    tk: int
    s: int

    @classmethod
    def whole(cls, sizes: Sizes) -> Block:
        """The tile that is the whole score matrix."""
        return cls(0, 0, sizes.l, sizes.s, sizes.s)


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """An array and how it lies over the scores; `axes` names the score axes it may have.

    Leading axes may be absent and any axis may be 1, as in NumPy broadcasting.
    """

    value: jax.Array
    axes: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        jax.tree_util.register_dataclass(cls, data_fields=["value"], meta_fields=[])

    @property
    def differentiable(self) -> bool:
        return jnp.issubdtype(jnp.result_type(self.value), jnp.floating)

    def prepare(self, sizes: Sizes, padded: Sizes) -> Self:
        """The operand in kernel layout: four axes, each 1 or full, lengths zero-padded.

        Raises ValueError when `value` does not broadcast to the named axes of `sizes`.
        """
        x = jnp.asarray(self.value)
        full = tuple(getattr(sizes, axis) for axis in self.axes)
        x = x.reshape((1,) * (len(full) - x.ndim) + x.shape)
        if x.ndim != len(full) or any(n not in (1, m) for n, m in zip(x.shape, full, strict=True)):
            raise ValueError(
                f"{type(self).__name__}: shape {jnp.shape(self.value)} does not broadcast to "
                f"({', '.join(self.axes.upper())}) = {full}"
            )
        x = x.reshape([x.shape[self.axes.index(a)] if a in self.axes else 1 for a in "bhls"])
        grow = [
            to - n if m == n != 1 else 0 for m, n, to in zip(x.shape, sizes, padded, strict=True)
        ]
        return dataclasses.replace(self, value=jnp.pad(x, [(0, n) for n in grow]))

    def load(self, at: Block) -> jax.Array:
        """The part of a prepared operand that the tile `at` reads."""
        x = self.value
        if x.shape[2] > 1:
            x = lax.dynamic_slice_in_dim(x, at.row, at.tq, 2)
        if x.shape[3] > 1:
            x = lax.dynamic_slice_in_dim(x, at.col, at.tk, 3)
        return x

    def spread(self, part: jax.Array, at: Block) -> jax.Array:
        """A loaded part, broadcastable to the tile's (B, H, tq, tk); differentiable in `part`."""
        del at
        return part

    def deposit(self, total: jax.Array, part: jax.Array, at: Block) -> jax.Array:
        """Add the cotangent of a loaded part to the cotangent of the prepared operand."""
        start = (0, 0, at.row if total.shape[2] > 1 else 0, at.col if total.shape[3] > 1 else 0)
        old = lax.dynamic_slice(total, start, part.shape)
        return lax.dynamic_update_slice(total, old + part.astype(total.dtype), start)


class Scalar(Operand):
    """One number: ()."""

    axes = ""


class PerHead(Operand):
    """One number per query head: (H,)."""

    axes = "h"


class PerQ(Operand):
    """One number per query: broadcastable to (B, H, L)."""

    axes = "bhl"


class PerK(Operand):
    """One number per key: broadcastable to (B, H, S), H the query heads."""

    axes = "bhs"


class Tile(Operand):
    """One number per score: broadcastable to (B, H, L, S). Quadratic memory, its gradient too."""

    axes = "bhls"


class Toeplitz(Operand):
    """A band, (L + S - 1,) or (H, L + S - 1): row i, column j reads `value[..., i - j + S - 1]`.

    Rows and columns are counted in the arrays, not by `q_pos` and `k_pos`. Relative-position
    tables (T5 buckets, Shaw, URPE) are gathered into the band outside, at linear cost.
    """

    axes = "hd"  # heads and diagonals

    def prepare(self, sizes: Sizes, padded: Sizes) -> Self:
        x = jnp.atleast_2d(self.value)
        diagonals = sizes.l + sizes.s - 1
        if x.ndim != 2 or x.shape[0] not in (1, sizes.h) or x.shape[1] != diagonals:
            raise ValueError(
                f"Toeplitz: shape {jnp.shape(self.value)} must be (L + S - 1,) or (H, L + S - 1) = "
                f"{(sizes.h, diagonals)}"
            )
        grow = ((0, 0), (padded.s - sizes.s, padded.l - sizes.l))
        return dataclasses.replace(self, value=jnp.pad(x, grow))

    def _start(self, at: Block) -> Any:
        """Where i - j of the tile's first row and last column lies in the band."""
        return at.row - at.col - at.tk + at.s

    def load(self, at: Block) -> jax.Array:
        return lax.dynamic_slice_in_dim(self.value, self._start(at), at.tq + at.tk - 1, 1)

    def spread(self, part: jax.Array, at: Block) -> jax.Array:
        """Row a, column c is part[a - c + tk - 1].

        Rows of width n + 1 read as rows of width n are each shifted by one: a gather of tq * tk
        elements is several times slower on every back end, and its transpose is a scatter.
        """
        heads, n = part.shape
        rows = jnp.pad(part[:, ::-1], ((0, 0), (0, 1)))
        rows = jnp.broadcast_to(rows[:, None], (heads, at.tq, n + 1)).reshape(heads, -1)
        return rows[:, : at.tq * n].reshape(1, heads, at.tq, n)[..., at.tq - 1 :]

    def deposit(self, total: jax.Array, part: jax.Array, at: Block) -> jax.Array:
        start = (0, self._start(at))
        old = lax.dynamic_slice(total, start, part.shape)
        return lax.dynamic_update_slice(total, old + part.astype(total.dtype), start)


def read(operands: Any, at: Block) -> Any:
    """Every operand of a tree as a tile: what `Mask.elem` and the mods receive."""
    return jax.tree.map(
        lambda x: x.spread(x.load(at), at), operands, is_leaf=lambda x: isinstance(x, Operand)
    )


def prepare(operands: Any, sizes: Sizes, padded: Sizes) -> Any:
    """Every operand of a tree in kernel layout."""
    return jax.tree.map(
        lambda x: x.prepare(sizes, padded), operands, is_leaf=lambda x: isinstance(x, Operand)
    )


def indices(
    sizes: Sizes, at: Block, q_pos: Operand | None = None, k_pos: Operand | None = None
) -> Idx:
    """The positions of a tile; row and column numbers where no positions are given."""

    def axis(n: int, d: int) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (1,) * d + (n,) + (1,) * (3 - d), d)

    q = axis(at.tq, 2) + at.row if q_pos is None else q_pos.load(at)
    k = axis(at.tk, 3) + at.col if k_pos is None else k_pos.load(at)
    return Idx(axis(sizes.b, 0), axis(sizes.h, 1), q, k)


Aux = Mapping[str, jax.Array]
