"""A window of a Toeplitz band becomes a tile by rotating row a by a lanes: nothing is gathered."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels.attention import bands

LANES = 128


def width(tq: int, tk: int) -> int:
    """Of a wrapped window: whole lanes, at least tq + tk."""
    return -(-(tq + tk) // LANES) * LANES


def wrapped(band: jax.Array, tq: int, tk: int) -> jax.Array:
    """A band in kernel layout (1 or H, L + S - 1) -> its windows (1 or H, windows, 1, width).

    Entry n belongs to the scores whose column less row, counted in the tile, is n modulo the width.
    """
    window = bands.windows(band, tq, tk)
    gap = jnp.zeros((*window.shape[:2], width(tq, tk) - window.shape[2]), band.dtype)
    above, below = window[..., tk - 1 :: -1], window[..., : tk - 1 : -1]
    return jnp.concatenate([above, gap, below], -1)[:, :, None]


def shear(window: jax.Array, tq: int, tk: int) -> jax.Array:
    """A wrapped window (1, width) -> its tile (tq, tk)."""
    rows = jnp.broadcast_to(window, (tq, window.shape[1]))
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :tk]


def unshear(tile: jax.Array) -> jax.Array:
    """The transpose of `shear`: sums along the diagonals of a tile, (1, width).

    Row a has to move a lanes to the left; a rotation by a stride only goes to the right, so rows
    move by the powers of two that a is made of.
    """
    (tq, tk), n = tile.shape, width(*tile.shape)
    x = jnp.concatenate([tile, jnp.zeros((tq, n - tk), tile.dtype)], 1)
    row = lax.broadcasted_iota(jnp.int32, (tq, 1), 0)
    for bit in range(max(tq - 1, 0).bit_length()):
        x = jnp.where(row & 2**bit != 0, pltpu.roll(x, n - 2**bit, 1), x)
    return x.sum(0, keepdims=True)
