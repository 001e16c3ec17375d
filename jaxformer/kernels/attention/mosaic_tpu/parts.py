"""How the kernels load the part of an operand that a tile reads, and store its cotangent.

Rows of numbers lie along lanes, (…, 1, L) and (…, 1, S): a column (L, 1) would be padded to 128
lanes in memory. A number per query becomes a column when it is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import bands
from jaxformer.kernels.attention.mosaic_tpu import shear
from jaxformer.kernels.attention.operands import Operand, Sizes, Toeplitz

Where = Callable[..., tuple[Any, Any, Any, Any]]  # grid indices -> (b, h, i, j) of a tile


@dataclasses.dataclass(frozen=True)
class Part:
    """The access of one operand: which axes of (B, H, L, S) it has, or windows of a band."""

    has: tuple[bool, bool, bool, bool]
    band: bool
    boolean: bool
    padded: Sizes
    tq: int
    tk: int

    @classmethod
    def of(cls, operand: Operand, padded: Sizes, tq: int, tk: int) -> Part:
        """Of an operand in kernel layout."""
        boolean = operand.value.dtype == bool
        if isinstance(operand, Toeplitz):
            has = (False, operand.value.shape[0] > 1, True, True)
        else:
            has = tuple(n > 1 for n in operand.value.shape)
        return cls(has, isinstance(operand, Toeplitz), boolean, padded, tq, tk)

    @property
    def keys_only(self) -> bool:
        """Whether its cotangent is summed over queries and belongs to a tile of keys."""
        return self.has[3] and not self.has[2]

    def array(self, value: jax.Array) -> jax.Array:
        """The value of an operand as the kernels read it; linear for float operands."""
        if self.band:
            return shear.wrapped(value, self.tq, self.tk)
        if self.boolean:  # bytes where there is one per score, else words
            value = value.astype(jnp.int8 if self.has[2] and self.has[3] else jnp.int32)
        return value.swapaxes(2, 3) if self.has[2] and not self.has[3] else value

    def _shape(self) -> tuple[int, int]:
        """Of the part that a tile reads, and of its cotangent, as they lie in memory."""
        if self.band:
            return 1, shear.width(self.tq, self.tk)
        if self.has[2] and not self.has[3]:
            return 1, self.tq
        return self.tq if self.has[2] else 1, self.tk if self.has[3] else 1

    def spec(self, where: Where) -> pl.BlockSpec:
        """The block of `array` that the tile at `where` reads."""

        def index(*grid: Any) -> tuple[Any, ...]:
            b, h, i, j = where(*grid)
            b, h = b if self.has[0] else 0, h if self.has[1] else 0
            if self.band:
                return h, bands.number(i, j, self.padded, self.tq, self.tk), 0, 0
            if self.has[2] and not self.has[3]:
                return b, h, 0, i
            return b, h, i if self.has[2] else 0, j if self.has[3] else 0

        return pl.BlockSpec((1, 1, *self._shape()), index)

    def load(self, ref: Any) -> jax.Array:
        """The part of a tile, broadcastable to (tq, tk)."""
        x = ref[0, 0]
        if self.band:
            return shear.shear(x, self.tq, self.tk)
        if self.boolean:
            x = x.astype(jnp.int32) != 0
        return x.T if self.has[2] and not self.has[3] else x

    # The cotangents of a part are kept for every batch row and head, and summed by `reduce`.

    def cotangent(self, where: Where) -> tuple[pl.BlockSpec, tuple[int, ...]]:
        """Block and shape of the array that receives cotangents."""
        padded = self.padded
        if self.band:  # all windows of a head stay on the chip: 0.5 MB at L = S = 32k
            shape = (padded.b, padded.h, bands.count(padded, self.tq, self.tk), self._shape()[1])
            spec = pl.BlockSpec((1, 1, *shape[2:]), lambda *grid: (*where(*grid)[:2], 0, 0))
            return spec, shape
        across = self.has[2] and not self.has[3]

        def index(*grid: Any) -> tuple[Any, ...]:
            b, h, i, j = where(*grid)
            return (b, h, 0, i) if across else (b, h, i * self.has[2], j * self.has[3])

        l, s = padded.l if self.has[2] else 1, padded.s if self.has[3] else 1
        shape = (padded.b, padded.h, *((1, l) if across else (l, s)))
        return pl.BlockSpec((1, 1, *self._shape()), index), shape

    @property
    def kept_for(self) -> str:
        """Over which tiles its cotangent is summed on the chip: 'tile', 'row', 'head', 'column'."""
        if self.band or not (self.has[2] or self.has[3]):
            return "head"
        return {(True, True): "tile", (True, False): "row", (False, True): "column"}[self.has[2:]]

    @property
    def shared(self) -> bool:
        """Whether several (b, h) read the same number per score."""
        alone = self.has[0] or self.padded.b == 1, self.has[1] or self.padded.h == 1
        return self.kept_for == "tile" and not all(alone)

    def add(self, ref: Any, part: jax.Array, i: Any, j: Any) -> None:
        """Add the cotangent of the part of tile (i, j)."""
        if self.band:
            at = (0, 0, pl.ds(bands.number(i, j, self.padded, self.tq, self.tk), 1))
            ref[at] += shear.unshear(part)
        elif self.kept_for == "tile" and not self.shared:
            ref[0, 0] = part
        else:
            ref[0, 0] += part.T if self.kept_for == "row" else part

    def reduce(self, total: jax.Array, value: jax.Array) -> jax.Array:
        """What was stored -> the cotangent of the prepared value."""
        array, pull = jax.vjp(self.array, value)
        if self.band:
            total = total.sum(0)[:, :, None]
            return pull(total if self.has[1] else total.sum(0, keepdims=True))[0]
        axes = tuple(axis for axis in (0, 1) if array.shape[axis] < total.shape[axis])
        return pull(total.sum(axes, keepdims=True))[0]
