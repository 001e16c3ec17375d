"""Toeplitz operands in kernels: windows of the band, sheared into tiles and back.

The tile at row i, column j reads T = tq + tk - 1 consecutive numbers of the band; their start moves
by multiples of gcd(tq, tk). So the band is cut, outside the kernel, into the few windows that
tiles read, and a window becomes a tile by rotating row a by a places: nothing is gathered.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels.attention.operands import Sizes

LANES = 128


def windows(band: jax.Array, tq: int, tk: int) -> jax.Array:
    """A band in kernel layout (1 or H, L + S - 1) -> (1 or H, windows, 1, width).

    Entry j of a window belongs to the scores whose column less row, counted in the tile, is j
    modulo the width. The width is a multiple of the lanes, at least tq + tk.
    """
    step = math.gcd(tq, tk)
    band = jnp.pad(band, ((0, 0), (0, 1)))
    parts = band.reshape(band.shape[0], -1, step)
    each = (tq + tk) // step
    count = parts.shape[1] - each + 1
    # Slices and their transposes, not a gather and a scatter: deterministic on every back end.
    pieces = [lax.slice_in_dim(parts, r, r + count, axis=1) for r in range(each)]
    window = jnp.concatenate(pieces, -1)  # entry w belongs to row less column w - (tk - 1)
    width = -(-(tq + tk) // LANES) * LANES
    ahead, behind = window[..., :tk], window[..., tk : tk + tq - 1]
    gap = jnp.zeros((*window.shape[:2], width - (tq + tk - 1)), band.dtype)
    return jnp.concatenate([ahead[..., ::-1], gap, behind[..., ::-1]], -1)[:, :, None]


def number(i: Any, j: Any, padded: Sizes, tq: int, tk: int) -> Any:
    """Which window the tile in row i, column j of the grid of tiles reads."""
    step = math.gcd(tq, tk)
    return i * (tq // step) + (padded.s // tk - 1 - j) * (tk // step)


def shear(window: jax.Array, tq: int, tk: int) -> jax.Array:
    """A window (1, width) -> its tile (tq, tk): entry (a, c) is window[c - a mod width]."""
    rows = jnp.broadcast_to(window, (tq, window.shape[1]))
    return pltpu.roll(rows, 0, 1, stride=1, stride_axis=0)[:, :tk]


def unshear(tile: jax.Array, width: int) -> jax.Array:
    """The transpose of `shear`: sums along the diagonals of a tile, (1, width).

    Row a has to move a places to the left; a rotation by a stride only goes to the right, so rows
    move by the powers of two that a is made of.
    """
    tq, tk = tile.shape
    x = jnp.concatenate([tile, jnp.zeros((tq, width - tk), tile.dtype)], 1)
    row = lax.broadcasted_iota(jnp.int32, (tq, 1), 0)
    for bit in range(max(tq - 1, 0).bit_length()):
        moved = pltpu.roll(x, width - 2**bit, 1)
        x = jnp.where(row & 2**bit != 0, moved, x)
    return x.sum(0, keepdims=True)
