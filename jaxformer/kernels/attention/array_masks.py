"""Masks that carry arrays: pytrees that go through `jax.jit`, `jax.grad` and `jax.vmap`.

Their tiles are judged while the program runs, from the extremes of what a tile reads; `tile_state`,
which has Python integers only, knows nothing of them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention.masks import (
    FULL,
    PARTIAL,
    SKIP,
    Grid,
    Mask,
    Span,
    TileState,
    states,
)
from jaxformer.kernels.attention.operands import Idx, PerK, PerQ, Sizes, Tile


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

    def tile_states(self, grid: Grid) -> Any:
        n = np.array(self.n) if self._static else jnp.reshape(self.n, (-1, 1, 1))
        by_column = states(grid.k[0] >= n, grid.k[1] < n)
        shape = (*by_column.shape[:1], len(grid.spans[0]), by_column.shape[2])
        broadcast = np if isinstance(by_column, np.ndarray) else jnp
        return broadcast.broadcast_to(by_column, shape)

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

    def tile_states(self, grid: Grid) -> Any:
        q_low, q_high = _extremes(jnp.atleast_2d(self.q_ids)[:, :, None], grid.tq, 1)
        k_low, k_high = _extremes(jnp.atleast_2d(self.kv_ids)[:, None], grid.tk, 2)
        nothing = (q_high < k_low) | (q_low > k_high)
        return states(nothing, (q_low == k_high) & (q_high == k_low))

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

    def tile_states(self, grid: Grid) -> Any:
        seen = self.operands(grid.sizes).value
        low, high = _extremes(jnp.broadcast_to(seen, (*seen.shape[:2], grid.sizes.s)), grid.tk, 2)
        by_column = states(~high, low)
        shape = (by_column.shape[0], len(grid.spans[0]), by_column.shape[2])
        return jnp.broadcast_to(by_column, shape)

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

    def tile_states(self, grid: Grid) -> Any:
        seen = self.operands(grid.sizes).prepare(grid.sizes, grid.sizes).value
        seen = jnp.broadcast_to(seen, (*seen.shape[:2], *grid.sizes[2:]))
        low, high = seen.all(1), seen.any(1)
        for axis, tile in ((1, grid.tq), (2, grid.tk)):
            low, high = _extremes(low, tile, axis)[0], _extremes(high, tile, axis)[1]
        return states(~high, low)

    def leaf_axes(self) -> tuple[str, ...]:
        return ("bhls"[-jnp.ndim(self.visible) :],)

    def operands(self, sizes: Sizes) -> Any:
        visible = jnp.asarray(self.visible)
        if visible.dtype != bool:
            raise ValueError(f"DenseMask: needs booleans, got {visible.dtype}")
        return Tile(visible)

    def elem(self, idx: Idx, aux: Any = None) -> jax.Array:
        return aux


def _extremes(x: jax.Array, tile: int, axis: int) -> tuple[jax.Array, jax.Array]:
    """Least and greatest element of each tile along an axis; for booleans `all` and `any`."""
    n = x.shape[axis]
    x = jnp.pad(x, [(0, -n % tile if d == axis else 0) for d in range(x.ndim)], mode="edge")
    x = x.reshape(*x.shape[:axis], -1, tile, *x.shape[axis + 1 :])
    return x.min(axis + 1), x.max(axis + 1)
