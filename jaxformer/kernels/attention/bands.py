"""Windows of a Toeplitz band: what tiles of it read.

The tile at row i, column j of the grid of tiles reads tq + tk - 1 consecutive numbers; their start
moves by multiples of gcd(tq, tk). So all tiles together read few windows, and a kernel needs no
table of L * S numbers.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.attention.operands import Sizes


def windows(band: jax.Array, tq: int, tk: int) -> jax.Array:
    """A band in kernel layout (1 or H, L + S - 1) -> (1 or H, windows, tq + tk - 1).

    Entry w of a window belongs to the scores whose row less column, counted in the tile, is
    w - (tk - 1).
    """
    step = math.gcd(tq, tk)
    parts = jnp.pad(band, ((0, 0), (0, 1))).reshape(band.shape[0], -1, step)
    each = (tq + tk) // step
    count = parts.shape[1] - each + 1
    # Slices and their transposes, not a gather and a scatter: the same sum on every run.
    pieces = [lax.slice_in_dim(parts, r, r + count, axis=1) for r in range(each)]
    return jnp.concatenate(pieces, -1)[..., :-1]


def number(i: Any, j: Any, padded: Sizes, tq: int, tk: int) -> Any:
    """Which window tile (i, j) reads."""
    step = math.gcd(tq, tk)
    return i * (tq // step) + (padded.s // tk - 1 - j) * (tk // step)


def count(padded: Sizes, tq: int, tk: int) -> int:
    """How many windows there are."""
    return number(padded.l // tq - 1, 0, padded, tq, tk) + 1
