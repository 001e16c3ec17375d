"""Masks as data: who may attend to whom.

A mask combines with `&` and `|`. It tells a back end two things: which blocks of scores can be
skipped or need no mask arithmetic (`tile_state` of one block from Python integers, while tracing;
`tile_states` of all of them, from arrays too); and `elem`, the boolean of every score of a tile.
Masks that carry arrays (`array_masks.py`) are pytrees and go through `jax.jit`; masks without
arrays are static and comparable, so they may sit in a model's config.

Position masks (Causal, Window, Prefix, Diagonal, BlockSparse, MaskMod) see `q_pos` and `k_pos`
where the caller gives them; array masks (Segments, KeyPadding, DenseMask) lie on rows and columns.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention.operands import Block, Idx, Operand, PerK, PerQ, Sizes


class TileState(enum.IntEnum):
    """What a mask does to a block of scores: `&` is the minimum of two states, `|` the maximum."""

    SKIP = 0  # nothing is visible
    PARTIAL = 1  # mixed, or not known
    FULL = 2  # everything is visible


SKIP, PARTIAL, FULL = TileState.SKIP, TileState.PARTIAL, TileState.FULL
Span = range | None  # the positions of a tile's rows or columns; None when they are traced
Ends = tuple[Any, Any]  # lowest and highest position of tiles, NumPy when they are known


class Grid(NamedTuple):
    """The score matrix cut into tiles of tq x tk, and the positions that the tiles span.

    `q` are the ends of tile rows, (1 or B, nq, 1), and `k` of tile columns, (1 or B, 1, nk).
    """

    sizes: Sizes
    tq: int
    tk: int
    q: Ends
    k: Ends

    @classmethod
    def of(
        cls,
        sizes: Sizes,
        tq: int,
        tk: int,
        q_pos: jax.Array | None = None,
        k_pos: jax.Array | None = None,
    ) -> Grid:
        """The grid of a call; positions as `attention` takes them."""
        q, k = _ends(q_pos, sizes.l, tq), _ends(k_pos, sizes.s, tk)
        return cls(sizes, tq, tk, tuple(x[:, :, None] for x in q), tuple(x[:, None] for x in k))

    @property
    def static(self) -> bool:
        """Whether every position is known while tracing."""
        return all(isinstance(x, np.ndarray) for x in (*self.q, *self.k))

    @property
    def spans(self) -> tuple[list[range], list[range]]:
        """The rows of each tile row, the columns of each tile column."""
        return tuple(
            [range(i, min(i + tile, n)) for i in range(0, n, tile)]
            for n, tile in ((self.sizes.l, self.tq), (self.sizes.s, self.tk))
        )


def _ends(pos: jax.Array | None, length: int, tile: int) -> Ends:
    """Lowest and highest position of each tile, (1 or B, tiles)."""
    if pos is None:
        low = np.arange(0, length, tile)[None]
        return low, np.minimum(low + tile, length) - 1
    pos = jnp.atleast_2d(pos)
    pos = jnp.pad(pos, ((0, 0), (0, -length % tile)), mode="edge")
    pos = pos.reshape(pos.shape[0], -1, tile)
    return pos.min(-1), pos.max(-1)


def states(nothing: Any, everything: Any) -> Any:
    """States from what is surely so, elementwise; NumPy from NumPy."""
    return 1 + everything.astype(np.int32) - nothing.astype(np.int32)


class Mask:
    """A set of visible (query, key) pairs."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        """SKIP or FULL only where that is certain for every batch row and head."""
        raise NotImplementedError

    def tile_states(self, grid: Grid) -> Any:
        """The state of every tile, int32 (1 or B, nq, nk); traced where arrays decide it."""
        rows, cols = grid.spans
        if not grid.static:
            unknown = self.tile_state(None, None)
            return np.full((1, len(rows), len(cols)), unknown, np.int32)
        return np.array([[[self.tile_state(q, k) for k in cols] for q in rows]], np.int32)

    def operands(self, sizes: Sizes) -> Any:
        """The arrays that `elem` reads, a tree of `Operand`; None when it needs none."""
        del sizes
        return None

    def leaf_axes(self) -> tuple[str, ...]:
        """For each array the mask carries, the score axes (b, h, l, s) that its axes lie along."""
        return ()

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        """Visibility, broadcastable to the tile; `aux` is `operands(...)` cut to the tile."""
        raise NotImplementedError

    def __and__(self, other: Mask) -> Mask:
        return And(self, other)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, other)


def dense(
    mask: Mask,
    b: int,
    h: int,
    l: int,
    s: int,
    q_pos: jax.Array | None = None,
    k_pos: jax.Array | None = None,
) -> jax.Array:
    """The mask as one boolean array, broadcastable to (B, H, L, S): for unfused attention."""
    sizes = Sizes(b, h, l, s)
    at = Block.whole(sizes)
    positions = [positions_operand(x, kind, sizes) for x, kind in ((q_pos, PerQ), (k_pos, PerK))]
    aux = ops.read(ops.prepare(mask.operands(sizes), sizes, sizes), at)
    return mask.elem(ops.indices(sizes, at, *positions), aux)


def positions_operand(
    pos: jax.Array | None, kind: type[Operand], sizes: Sizes, padded: Sizes | None = None
) -> Operand | None:
    """Positions (L,) or (B, L), likewise (S,) or (B, S), as an operand in kernel layout."""
    if pos is None:
        return None
    pos = jnp.asarray(pos)
    if not jnp.issubdtype(pos.dtype, jnp.integer) or pos.ndim not in (1, 2):
        raise ValueError(
            f"positions must be integers of shape (length,) or (batch, length), "
            f"got {pos.dtype} {pos.shape}"
        )
    pos = pos.astype(jnp.int32)
    return kind(pos if pos.ndim == 1 else pos[:, None]).prepare(sizes, padded or sizes)


# ------------------------------------------------------------------------------- static masks


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Full(Mask):
    """Everything is visible."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        return FULL

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return jnp.ones_like(idx.k, bool)


class _Band(Mask):
    """low <= k - q <= high; None is no bound."""

    def _bounds(self) -> tuple[int | None, int | None]:
        raise NotImplementedError

    def tile_state(self, q: Span, k: Span) -> TileState:
        if q is None or k is None:
            return PARTIAL
        return TileState(int(self._judge(np.array(k[0] - q[-1]), np.array(k[-1] - q[0]))))

    def tile_states(self, grid: Grid) -> Any:
        return self._judge(grid.k[0] - grid.q[1], grid.k[1] - grid.q[0])

    def _judge(self, least: Any, most: Any) -> Any:
        """States of tiles on which k - q has these extremes."""
        low, high = self._bounds()
        nothing, everything = least > most, least <= most  # False and True, in their shape
        if high is not None:
            nothing, everything = nothing | (least > high), everything & (most <= high)
        if low is not None:
            nothing, everything = nothing | (most < low), everything & (least >= low)
        return states(nothing, everything)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        low, high = self._bounds()
        seen = jnp.ones_like(idx.k, bool)
        if high is not None:
            seen = idx.k <= idx.q + high
        if low is not None:
            seen = seen & (idx.k >= idx.q + low)
        return seen


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Causal(_Band):
    """Key k is visible to query q when k <= q + offset."""

    offset: int = 0

    def _bounds(self) -> tuple[int | None, int | None]:
        return None, self.offset


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Window(_Band):
    """Key k is visible to query q when q - left <= k <= q + right; None is no bound."""

    left: int | None
    right: int | None

    def _bounds(self) -> tuple[int | None, int | None]:
        return None if self.left is None else -self.left, self.right


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Diagonal(_Band):
    """Each query sees the key at its own position: `Prefix(n) | Diagonal()` is the mask of PFNs."""

    def _bounds(self) -> tuple[int | None, int | None]:
        return 0, 0


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """Position q sees position k when `blocks[q // block_q, k // block_k]`.

    `blocks` is a NumPy boolean array, fixed while tracing; positions outside it see nothing.
    """

    blocks: np.ndarray
    block_q: int
    block_k: int

    def __post_init__(self) -> None:
        if isinstance(self.blocks, jax.core.Tracer):
            raise ConfigError(
                "BlockSparse: blocks is traced and must be known while tracing; a table that is "
                "computed is DenseMask(table.repeat(block_q, 0).repeat(block_k, 1)), whose tiles "
                "are skipped as well"
            )
        blocks = np.array(self.blocks, bool)
        if blocks.ndim != 2 or self.block_q < 1 or self.block_k < 1:
            raise ConfigError(
                f"BlockSparse: blocks must be 2-D with positive block sizes, got {blocks.shape}, "
                f"{self.block_q}, {self.block_k}"
            )
        blocks.setflags(write=False)
        object.__setattr__(self, "blocks", blocks)

    def _key(self) -> tuple[Any, ...]:
        return self.blocks.shape, self.blocks.tobytes(), self.block_q, self.block_k

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockSparse) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def tile_state(self, q: Span, k: Span) -> TileState:
        if q is None or k is None:
            return PARTIAL
        rows = slice(max(q[0] // self.block_q, 0), max(q[-1] // self.block_q + 1, 0))
        cols = slice(max(k[0] // self.block_k, 0), max(k[-1] // self.block_k + 1, 0))
        seen = self.blocks[rows, cols]
        if not seen.any():
            return SKIP
        within = (
            q[0] >= 0
            and k[0] >= 0
            and rows.stop <= self.blocks.shape[0]
            and cols.stop <= self.blocks.shape[1]
        )
        return FULL if within and seen.all() else PARTIAL

    def tile_states(self, grid: Grid) -> Any:
        if not grid.static:
            return super().tile_states(grid)
        # Blocks above and left of a corner; tiles by the thousand cost no Python each.
        before = np.pad(self.blocks, ((1, 0), (1, 0))).astype(np.int32).cumsum(0).cumsum(1)
        top, bottom = grid.q[0] // self.block_q, grid.q[1] // self.block_q + 1
        left, right = grid.k[0] // self.block_k, grid.k[1] // self.block_k + 1
        area = (bottom - top) * (right - left)  # of blocks, those outside included
        top, bottom = (np.minimum(x, self.blocks.shape[0]) for x in (top, bottom))
        left, right = (np.minimum(x, self.blocks.shape[1]) for x in (left, right))
        within = before[bottom, right] - before[top, right]
        seen = within - before[bottom, left] + before[top, left]
        return states(seen == 0, seen == area)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        # Negative indices would wrap: send them out of bounds, where the fill value answers.
        outside = max(self.blocks.shape)
        i = jnp.where(idx.q < 0, outside, idx.q // self.block_q)
        j = jnp.where(idx.k < 0, outside, idx.k // self.block_k)
        return jnp.asarray(self.blocks).at[i, j].get(mode="fill", fill_value=False)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class MaskMod(Mask):
    """`fn(idx)` is the visibility; `block_hint(q_range, k_range)` may name a tile's state.

    `fn` is elementwise in the positions and closes over Python values only; for arrays there are
    the masks that carry them. Without a hint every tile is PARTIAL.
    """

    fn: Callable[[Idx], jax.Array]
    block_hint: Callable[[range, range], TileState] | None = None

    def tile_state(self, q: Span, k: Span) -> TileState:
        if self.block_hint is None or q is None or k is None:
            return PARTIAL
        return self.block_hint(q, k)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return self.fn(idx)


# ------------------------------------------------------------------------------- combinations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Pair(Mask):
    a: Mask
    b: Mask

    def leaf_axes(self) -> tuple[str, ...]:
        return (*self.a.leaf_axes(), *self.b.leaf_axes())

    def operands(self, sizes: Sizes) -> Any:
        return self.a.operands(sizes), self.b.operands(sizes)


def _known(*arrays: Any) -> bool:
    return all(isinstance(x, np.ndarray) for x in arrays)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Visible in both."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        return min(self.a.tile_state(q, k), self.b.tile_state(q, k))

    def tile_states(self, grid: Grid) -> Any:
        a, b = self.a.tile_states(grid), self.b.tile_states(grid)
        return np.minimum(a, b) if _known(a, b) else jnp.minimum(a, b)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        a, b = aux or (None, None)
        return self.a.elem(idx, a) & self.b.elem(idx, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Visible in either."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        return max(self.a.tile_state(q, k), self.b.tile_state(q, k))

    def tile_states(self, grid: Grid) -> Any:
        a, b = self.a.tile_states(grid), self.b.tile_states(grid)
        return np.maximum(a, b) if _known(a, b) else jnp.maximum(a, b)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        a, b = aux or (None, None)
        return self.a.elem(idx, a) | self.b.elem(idx, b)
