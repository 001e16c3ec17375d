"""Masks as data: who may attend to whom.

A mask combines with `&` and `|`. It tells a back end two things: `tile_state`, whether a block of
scores can be skipped or needs no mask arithmetic, decided from Python integers while tracing; and
`elem`, the boolean of every score of a tile. Masks that carry arrays are pytrees and go through
`jax.jit`; masks without arrays are static and comparable, so they may sit in a model's config.

Position masks (Causal, Window, Prefix, Diagonal, BlockSparse, MaskMod) see `q_pos` and `k_pos`
where the caller gives them; array masks (Segments, KeyPadding, DenseMask) lie on rows and columns.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention.operands import Block, Idx, Operand, PerK, PerQ, Sizes, Tile


class TileState(enum.Enum):
    """What a mask does to one block of scores."""

    SKIP = "skip"  # nothing is visible
    FULL = "full"  # everything is visible
    PARTIAL = "partial"  # mixed, or not known while tracing


SKIP, FULL, PARTIAL = TileState.SKIP, TileState.FULL, TileState.PARTIAL
Span = range | None  # the positions of a tile's rows or columns; None when they are traced


class Mask:
    """A set of visible (query, key) pairs."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        """SKIP or FULL only where that is certain for every batch row and head."""
        raise NotImplementedError

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
        return jnp.ones((1, 1, 1, 1), bool)


class _Band(Mask):
    """low <= k - q <= high; None is no bound."""

    def _bounds(self) -> tuple[int | None, int | None]:
        raise NotImplementedError

    def tile_state(self, q: Span, k: Span) -> TileState:
        if q is None or k is None:
            return PARTIAL
        low, high = self._bounds()
        least, most = k[0] - q[-1], k[-1] - q[0]
        if (high is not None and least > high) or (low is not None and most < low):
            return SKIP
        if (high is None or most <= high) and (low is None or least >= low):
            return FULL
        return PARTIAL

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        low, high = self._bounds()
        seen = jnp.ones((1, 1, 1, 1), bool)
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
        blocks = np.array(self.blocks, bool)  # a TracerArrayConversionError here: use DenseMask
        if blocks.ndim != 2 or self.block_q < 1 or self.block_k < 1:
            raise ValueError(
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


# ------------------------------------------------------------------------ masks with arrays


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Mask):
    """Everyone sees positions below `n`: an int, or an integer array, one for all or (B,)."""

    n: int | jax.Array

    @property
    def _static(self) -> bool:
        return isinstance(self.n, (int, np.integer))

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        # A Python int stays static through jit, so that whole tiles can still be skipped.
        return ((), int(self.n)) if self._static else ((self.n,), None)

    @classmethod
    def tree_unflatten(cls, static: Any, children: tuple[Any, ...]) -> Prefix:
        return cls(static) if static is not None else cls(*children)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Prefix) and self._static and other._static:
            return self.n == other.n
        return self is other

    def __hash__(self) -> int:
        return hash((Prefix, int(self.n))) if self._static else id(self)

    def tile_state(self, q: Span, k: Span) -> TileState:
        if not self._static or k is None:
            return PARTIAL
        return FULL if k[-1] < self.n else SKIP if k[0] >= self.n else PARTIAL

    def leaf_axes(self) -> tuple[str, ...]:
        return () if self._static else ("b"[: jnp.ndim(self.n)],)

    def operands(self, sizes: Sizes) -> Any:
        if self._static:
            return None
        return PerQ(jnp.asarray(self.n, jnp.int32).reshape(-1, 1, 1))

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return idx.k < (self.n if self._static else aux)


class _ArrayMask(Mask):
    """What the tile sees depends on arrays: nothing is known while tracing."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        return PARTIAL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Segments(_ArrayMask):
    """Packed sequences: visible when the segment numbers agree. `q_ids` (B, L), `kv_ids` (B, S)."""

    q_ids: jax.Array
    kv_ids: jax.Array

    def leaf_axes(self) -> tuple[str, ...]:
        return "bl"[-jnp.ndim(self.q_ids) :], "bs"[-jnp.ndim(self.kv_ids) :]

    def operands(self, sizes: Sizes) -> Any:
        per_row = [jnp.atleast_2d(x)[:, None] for x in (self.q_ids, self.kv_ids)]
        return PerQ(per_row[0]), PerK(per_row[1])

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        q_ids, kv_ids = aux
        return q_ids == kv_ids


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KeyPadding(_ArrayMask):
    """Visible keys of each batch row: booleans (B, S), or integer lengths (B,)."""

    valid: jax.Array

    def leaf_axes(self) -> tuple[str, ...]:
        return ("bs"[: jnp.ndim(self.valid)],)

    def operands(self, sizes: Sizes) -> Any:
        valid = jnp.asarray(self.valid)
        if valid.dtype == bool and valid.ndim == 2:
            return PerK(valid[:, None])
        if jnp.issubdtype(valid.dtype, jnp.integer) and valid.ndim == 1:
            return PerK(jnp.arange(sizes.s) < valid[:, None, None])
        raise ValueError(
            f"KeyPadding: needs booleans (B, S) or integer lengths (B,), "
            f"got {valid.dtype} {valid.shape}"
        )

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return aux


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseMask(_ArrayMask):
    """Booleans broadcastable to (B, H, L, S): quadratic memory, the last resort."""

    visible: jax.Array

    def leaf_axes(self) -> tuple[str, ...]:
        return ("bhls"[-jnp.ndim(self.visible) :],)

    def operands(self, sizes: Sizes) -> Any:
        visible = jnp.asarray(self.visible)
        if visible.dtype != bool:
            raise ValueError(f"DenseMask: needs booleans, got {visible.dtype}")
        return Tile(visible)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return aux


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class And(_Pair):
    """Visible in both."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        states = {self.a.tile_state(q, k), self.b.tile_state(q, k)}
        return SKIP if SKIP in states else FULL if states == {FULL} else PARTIAL

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        a, b = aux or (None, None)
        return self.a.elem(idx, a) & self.b.elem(idx, b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Or(_Pair):
    """Visible in either."""

    def tile_state(self, q: Span, k: Span) -> TileState:
        states = {self.a.tile_state(q, k), self.b.tile_state(q, k)}
        return FULL if FULL in states else SKIP if states == {SKIP} else PARTIAL

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        a, b = aux or (None, None)
        return self.a.elem(idx, a) | self.b.elem(idx, b)
