"""Attention within the windows of a grid (Liu et al. 2021, Swin, arXiv 2103.14030)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Full, Mask, Segments, Tile
from jaxformer.nn.make import Make
from jaxformer.nn.patch import to_map
from jaxformer.nn.position import At, Mods, Position

FULL = Full()


def split_windows(x: jax.Array, window: int) -> jax.Array:
    """A grid (B, height, width, D) as windows (B n, window^2, D), rows of windows first."""
    batch, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(batch, rows, window, columns, window, channels).swapaxes(2, 3)
    return x.reshape(batch * rows * columns, window * window, channels)


def join_windows(x: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `split_windows`."""
    window = int(x.shape[1] ** 0.5)
    rows, columns = height // window, width // window
    x = x.reshape(-1, rows, columns, window, window, x.shape[-1]).swapaxes(2, 3)
    return x.reshape(-1, height, width, x.shape[-1])


class Windowed(nn.Module):
    """A mixer applied to each window of a grid (height, width) by itself; (B, height width, D).

    `shift` moves the windows by so many rows and columns, around the border: positions that only
    the wrap brought together do not see each other. A grid that the window does not divide is
    padded with zeros at its end, which are seen.

    Raises:
        ConfigError: the sequence is not the grid.
    """

    mixer: Make
    grid: tuple[int, int]
    window: int
    shift: int = 0

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask = FULL,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        if kv_BxSxD is not None or mask != FULL or positions is not None or decode:
            raise ConfigError("Windowed: takes a whole grid and no mask, positions or cache")
        if self.window < 1:
            raise ConfigError(f"model.window={self.window}: must be at least 1")
        (rows, columns), batch = self.grid, len(x_BxLxD)
        x = to_map(x_BxLxD, self.grid, "Windowed")
        below, right = -rows % self.window, -columns % self.window
        x = jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0)))
        if self.shift:
            x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2))
            region = self._regions(rows + below, columns + right)
            region = jnp.tile(jnp.asarray(region), (batch, 1))
            mask = Segments(region, region)
        x = split_windows(x, self.window)
        x = self.mixer(name="mixer")(x, mask=mask, train=train)
        x = join_windows(x, rows + below, columns + right)
        if self.shift:
            x = jnp.roll(x, (self.shift, self.shift), axis=(1, 2))
        return x[:, :rows, :columns].reshape(x_BxLxD.shape)

    def _regions(self, height: int, width: int) -> np.ndarray:
        """(n, window^2) int32: positions of a window that were neighbours share a number."""

        def part(n: int) -> np.ndarray:
            at = np.arange(n)
            return (at >= n - self.window).astype(np.int32) + (at >= n - self.shift)

        region = 3 * part(height)[:, None] + part(width)
        rows, columns = height // self.window, width // self.window
        region = region.reshape(rows, self.window, columns, self.window).swapaxes(1, 2)
        return region.reshape(rows * columns, self.window**2)


class WindowBias(Position):
    """A learned bias per head for every offset of two positions in a window: eq. 4.

    The table has (2 window - 1)^2 rows, by row offset, then column offset, from -(window - 1) on.
    """

    window: int

    @nn.compact
    def mods(self, heads: int, at: At) -> Mods:
        del at
        side = 2 * self.window - 1
        init = jax.nn.initializers.truncated_normal(0.02)
        table = self.param("table", init, (side * side, heads), jnp.float32)
        bias = jnp.moveaxis(table[self._rows()], -1, 0)
        return Mods(_add_bias, aux={"bias": Tile(bias)})

    def _rows(self) -> np.ndarray:
        """(window^2, window^2): the row of the table for each query and key."""
        at = np.stack(np.divmod(np.arange(self.window**2), self.window))
        offset = at[:, :, None] - at[:, None, :] + self.window - 1
        return offset[0] * (2 * self.window - 1) + offset[1]


def _add_bias(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score + aux["bias"]
