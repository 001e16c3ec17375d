"""Grids of positions, as of the patches of an image: what each may see, and where it lies.

Position i of a grid of rows x columns lies in row i // columns and column i % columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, Idx, Mask, MaskMod, TileState
from jaxformer.nn.position import Position
from jaxformer.nn.rotary import Frequencies

Grid = tuple[int, int]  # rows, columns
GridMask = Callable[[Grid], Mask]  # what positions see once the grid is known


def places(grid: Grid) -> jax.Array:
    """(rows columns, 2) int32: row and column of every position."""
    rows, columns = grid
    at = np.stack(np.divmod(np.arange(rows * columns), columns), axis=-1)
    return jnp.asarray(at, jnp.int32)


# --------------------------------------------------------------------------------------- masks


def _ends(span: range, columns: int, axis: int) -> tuple[int, int]:
    """Least and greatest row (axis 0) or column (axis 1) of a stretch of positions."""
    first, last = span[0] // columns, span[-1] // columns
    if axis == 0:
        return first, last
    return (span[0] % columns, span[-1] % columns) if first == last else (0, columns - 1)


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """-low <= row (axis 0) or column (axis 1) of the key minus that of the query <= high."""

    columns: int
    axis: int
    low: int | None
    high: int

    def __call__(self, idx: Idx) -> jax.Array:
        q, k = (x % self.columns if self.axis else x // self.columns for x in (idx.q, idx.k))
        seen = k <= q + self.high
        return seen if self.low is None else seen & (k >= q - self.low)

    def mask(self) -> Mask:
        return MaskMod(self, _Hint(self))


@dataclasses.dataclass(frozen=True)
class _Hint:
    """The state of a tile; a value, unlike a bound method, so that equal masks are equal."""

    of: _Ahead

    def __call__(self, q: range, k: range) -> TileState:
        (q0, q1), (k0, k1) = (_ends(span, self.of.columns, self.of.axis) for span in (q, k))
        least, most = k0 - q1, k1 - q0
        low = -np.inf if self.of.low is None else -self.of.low
        if least > self.of.high or most < low:
            return TileState.SKIP
        return TileState.FULL if most <= self.of.high and least >= low else TileState.PARTIAL


def not_below(grid: Grid) -> Mask:
    """Keys of the query's row and of the rows above."""
    return _Ahead(grid[1], 0, None, 0).mask()


def not_right(grid: Grid) -> Mask:
    """Keys of the query's column and of the columns to its left."""
    return _Ahead(grid[1], 1, None, 0).mask()


def near(grid: Grid, distance: int = 1) -> Mask:
    """Keys at most `distance` rows and columns away."""
    rows, columns = (_Ahead(grid[1], axis, distance, distance).mask() for axis in (0, 1))
    return rows & columns


def full(grid: Grid) -> Mask:
    """Everything."""
    del grid
    return Full()


def raster(grid: Grid) -> Mask:
    """What comes before in reading order, and the position itself."""
    del grid
    return Causal()


def mask_lower_right(grid: Grid) -> Mask:
    """Nothing that lies below or to the right: rows columns / 4 of the grid, on average."""
    return not_below(grid) & not_right(grid)


def unmask_neighborhood(grid: Grid) -> Mask:
    """`mask_lower_right`, and the eight neighbours."""
    return mask_lower_right(grid) | near(grid)


def mask_corner(grid: Grid) -> Mask:
    """All but what lies both below and to the right: two positions may see each other."""
    return not_below(grid) | not_right(grid)


SCANS: dict[str, GridMask] = {
    scan.__name__: scan for scan in (raster, mask_lower_right, unmask_neighborhood, mask_corner)
}


def layer_masks(pattern: str, depth: int, causal: GridMask = mask_corner) -> tuple[GridMask, ...]:
    """One mask per layer from letters, f for full and c for `causal`, repeated up to `depth`.

    Raises:
        ConfigError: other letters, or a pattern whose length does not divide the depth.
    """
    if not pattern or set(pattern) - set("fc"):
        raise ConfigError(f"model.pattern={pattern!r}: must be made of the letters f and c")
    if depth % len(pattern):
        raise ConfigError(
            f"model.pattern={pattern!r}: its length {len(pattern)} must divide model.depth={depth}"
        )
    kinds = {"f": full, "c": causal}
    return tuple(kinds[letter] for letter in pattern * (depth // len(pattern)))


# ----------------------------------------------------------------------------------- positions


def grid_sinusoid(grid: Grid, width: int, base: float = 10000.0) -> np.ndarray:
    """(rows columns, width) float64: half of the channels for the column, half for the row.

    Each half has sines, then cosines, of base^(-4k / width) (Peebles & Xie 2022, arXiv 2212.09748,
    after MAE, arXiv 2111.06377).
    """
    return _sinusoid(*np.divmod(np.arange(grid[0] * grid[1]), grid[1]), width, base)


def _sinusoid(row: np.ndarray, column: np.ndarray, width: int, base: float) -> np.ndarray:
    if width % 4:
        raise ConfigError(f"model.width={width}: positions on a grid need a multiple of 4")
    rates = base ** (-np.arange(width // 4) / (width // 4))
    angles = [at[:, None] * rates for at in (column, row)]
    return np.concatenate([f(x) for x in angles for f in (np.sin, np.cos)], axis=-1)


class GridSinusoid(nn.Module):
    """Adds `grid_sinusoid`. Where `trained` is given, larger grids are squeezed into that one."""

    trained: Grid | None = None
    base: float = 10000.0

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, grid: Grid, *, train: bool = False) -> jax.Array:
        del train
        at = np.stack(np.divmod(np.arange(grid[0] * grid[1]), grid[1])).astype(np.float64)
        if self.trained is not None:  # patch centres of the same picture, in its coordinates
            ratio = np.array(self.trained)[:, None] / np.array(grid)[:, None]
            at = (at + 0.5) * ratio - 0.5
        table = _sinusoid(*at, x_BxLxD.shape[-1], self.base)
        return x_BxLxD + jnp.asarray(table, x_BxLxD.dtype)


class GridTable(nn.Module):
    """Adds a learned table (rows, columns, D) of the grid trained on; other grids interpolate it.

    Interpolation is bicubic between centres, as for ViT (arXiv 2010.11929, section 3.2).
    """

    trained: Grid

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, grid: Grid, *, train: bool = False) -> jax.Array:
        del train
        width = x_BxLxD.shape[-1]
        init = jax.nn.initializers.normal(0.02)
        table = self.param("table", init, (*self.trained, width), jnp.float32)
        if grid != self.trained:
            table = jax.image.resize(table, (*grid, width), "cubic", antialias=False)
        return x_BxLxD + table.reshape(-1, width).astype(x_BxLxD.dtype)


class GridRoPE(Position):
    """Rotary positions on a grid: half of a head turns with the row, half with the column.

    `positions` are `places`, (L, 2). Within a half component i pairs with i + K/4 (Heo et al.
    2024, arXiv 2403.13298, "axial").

    Raises:
        ConfigError: the head size is no multiple of 4.
    """

    frequencies: Any = Frequencies()

    def rotate(self, x_BxLxHxK: jax.Array, positions: jax.Array) -> jax.Array:
        head_size = x_BxLxHxK.shape[-1]
        if head_size % 4:
            raise ConfigError(f"model.head_size={head_size}: rotary grids need a multiple of 4")
        halves = jnp.split(x_BxLxHxK.astype(jnp.float32), 2, axis=-1)
        turned = []
        for axis, half in enumerate(halves):
            angles = self.frequencies.angles(positions[:, axis], head_size // 2)[:, None, :]
            sin, cos = (f(angles) * self.frequencies.gain for f in (jnp.sin, jnp.cos))
            a, b = jnp.split(half, 2, axis=-1)
            turned += [a * cos - b * sin, b * cos + a * sin]
        return jnp.concatenate(turned, -1).astype(x_BxLxHxK.dtype)
