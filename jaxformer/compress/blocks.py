"""Blocks of a matrix as small integers with a power-of-two scale each (BCT, arXiv 2304.01483).

An array (..., C) is a matrix of rows and columns, tiled by blocks; what is ragged at its edges is
a smaller block. Of a block with largest value a the shift is e = floor(log2(qmax / a)), the codes
are round(x 2^e), half to even, and x^ = code 2^-e: no value is clipped, and the grids of smaller
blocks contain those of larger ones. Rescaling is shifting.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.compress.straight_through import straight_through
from jaxformer.errors import ConfigError

E4M3_MAX = 448.0
OFF = 32  # bits of what is not compressed


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Blocks of so many `rows` and `columns`, None for all there are, in codes of `bits`.

    `number` is "int" (symmetric), "unsigned" (of values that are never negative) or "e4m3" (an
    8-bit float with a shift). 32 bits leave everything as it is.

    Raises:
        ConfigError: a field has a value that is not allowed.
    """

    rows: int | None = 64
    columns: int | None = 64
    bits: int = 8
    shift_bits: int = 8  # of a stored shift
    number: str = "int"

    def __post_init__(self) -> None:
        for field in ("rows", "columns"):
            size = getattr(self, field)
            if size is not None and size < 1:
                raise ConfigError(f"BlockSpec.{field}={size}: must be at least 1, or None for all")
        if self.bits != OFF and not 2 <= self.bits <= 8:
            raise ConfigError(f"BlockSpec.bits={self.bits}: must be from 2 to 8, or 32 for none")
        if not 2 <= self.shift_bits <= 8:
            raise ConfigError(f"BlockSpec.shift_bits={self.shift_bits}: must be from 2 to 8")
        if self.number not in ("int", "unsigned", "e4m3"):
            raise ConfigError(f"BlockSpec.number={self.number!r}: must be int, unsigned or e4m3")
        if self.number == "e4m3" and self.bits not in (8, OFF):
            raise ConfigError(f"BlockSpec.bits={self.bits}: e4m3 has 8")

    @property
    def largest(self) -> float:
        """The largest code, qmax."""
        if self.number == "e4m3":
            return E4M3_MAX
        return float(2**self.bits - 1 if self.number == "unsigned" else 2 ** (self.bits - 1) - 1)

    @property
    def dtype(self) -> jnp.dtype:
        """Of codes."""
        names = {"int": "int8", "unsigned": "uint8", "e4m3": "float8_e4m3fn"}
        return jnp.dtype(names[self.number])

    @property
    def shift_range(self) -> tuple[int, int]:
        """The stored shifts; of 8 bits two less, so that 2^e and 2^-e are normal floats."""
        half = 2 ** (self.shift_bits - 1)
        return max(-half, -126), min(half - 1, 126)

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """How many blocks an array has: down and across."""
        rows, columns = matrix_shape(shape)
        return (
            -(-rows // min(self.rows or rows, rows)),
            -(-columns // min(self.columns or columns, columns)),
        )


PAPER_RATIO = BlockSpec(32, 32, bits=4, shift_bits=6)  # 7.988 times smaller than float32


class Blocks(NamedTuple):
    """A compressed array: codes in its own shape, and a shift (int8) for each block."""

    codes: jax.Array
    shifts: jax.Array


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns): the last axis is across."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def _tile(x: jax.Array, spec: BlockSpec) -> jax.Array:
    """(blocks down, rows, blocks across, columns) of an array, filled up with zeros."""
    rows, columns = matrix_shape(x.shape)
    down, across = spec.grid(x.shape)
    height, width = min(spec.rows or rows, rows), min(spec.columns or columns, columns)
    x = x.reshape(rows, columns)
    x = jnp.pad(x, ((0, down * height - rows), (0, across * width - columns)))
    return x.reshape(down, height, across, width)


def _untile(tiles: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    down, height, across, width = tiles.shape
    rows, columns = matrix_shape(shape)
    return tiles.reshape(down * height, across * width)[:rows, :columns].reshape(shape)


def power(e: jax.Array) -> jax.Array:
    """2^e in float32, exactly, for integers from -126 to 127."""
    return jax.lax.bitcast_convert_type((e.astype(jnp.int32) + 127) << 23, jnp.float32)


def shift_of(a: jax.Array, largest: float) -> jax.Array:
    """floor(log2(largest / a)), 0 where a is 0, by exponent and fraction: no logarithm is taken."""
    bits = jax.lax.bitcast_convert_type(a.astype(jnp.float32), jnp.int32)
    exponent = ((bits >> 23) & 255) - 126
    fraction = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | (126 << 23), jnp.float32)
    top, of_top = math.frexp(largest)
    return jnp.where(a == 0, 0, of_top - exponent - (fraction > top))


def _scaled(
    tiles: jax.Array, spec: BlockSpec, a: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Codes as floats, before they are stored, and shifts (down, across), or (1, across) of `a`."""
    a = jnp.abs(tiles).max((1, 3)) if a is None else a[None]
    e = jnp.clip(shift_of(a, spec.largest), *spec.shift_range)
    # What is not finite makes its block NaN, so that it is seen; a maximum may pass NaN over.
    finite = jnp.isfinite(tiles).all((1, 3))
    scale = jnp.where(finite, power(e), jnp.nan)[:, None, :, None]
    y = tiles * scale
    low = 0.0 if spec.number == "unsigned" else -spec.largest
    # Only where the range of shifts has ended, or a value is larger than `a` said.
    y = jnp.clip(y, low, spec.largest)
    y = y.astype(spec.dtype).astype(jnp.float32) if spec.number == "e4m3" else jnp.round(y)
    return y, e


def compress(x: jax.Array, spec: BlockSpec) -> Blocks:
    """Codes and shifts of an array.

    Raises:
        ConfigError: no codes of 32 bits; and, of an array that is at hand and not traced, values
            that are not finite, negative ones of an unsigned spec, or ones beyond its shifts.
    """
    if spec.bits == OFF:
        raise ConfigError("BlockSpec.bits=32: is not compressed and has no codes")
    x = jnp.asarray(x, jnp.float32)
    if not isinstance(x, jax.core.Tracer):
        _check_values(np.asarray(x), spec)
    codes, e = _scaled(_tile(x, spec), spec)
    return Blocks(_untile(codes, x.shape).astype(spec.dtype), e.astype(jnp.int8))


def _check_values(x: np.ndarray, spec: BlockSpec) -> None:
    if not np.isfinite(x).all():
        raise ConfigError("compress: the array has values that are not finite")
    if spec.number == "unsigned" and (x < 0).any():
        raise ConfigError("BlockSpec.number='unsigned': the array has negative values")
    most, limit = float(np.abs(x).max(initial=0)), spec.largest * 2.0 ** -spec.shift_range[0]
    if most > limit:
        raise ConfigError(
            f"BlockSpec.shift_bits={spec.shift_bits}: the largest value {most:.3g} is over "
            f"{limit:.3g}; give more bits"
        )


def decompress(blocks: Blocks, spec: BlockSpec) -> jax.Array:
    """The array x^ in float32, exactly code 2^-e."""
    tiles = _tile(blocks.codes.astype(jnp.float32), spec)
    return _untile(
        tiles * power(-blocks.shifts.astype(jnp.int32))[:, None, :, None], blocks.codes.shape
    )


def quantise(x: jax.Array, spec: BlockSpec | None, largest: jax.Array | None = None) -> jax.Array:
    """decompress(compress(x)) in the dtype of x, with the derivative of x.

    With `largest` (blocks across,) shifts are those of these values instead of the blocks' own, the
    same for all blocks above each other, and what is larger is clipped.
    """
    if spec is None or spec.bits == OFF:
        return x
    codes, e = _scaled(_tile(x.astype(jnp.float32), spec), spec, largest)
    value = _untile(codes * power(-e)[:, None, :, None], x.shape).astype(x.dtype)
    return straight_through(value, x)


def largest_across(x: jax.Array, spec: BlockSpec) -> jax.Array:
    """The largest |x| (blocks across,) of all blocks above each other.

    Its shift is the least of theirs, those of zeros left out.
    """
    return jnp.abs(_tile(x.astype(jnp.float32), spec)).max((0, 1, 3))


# ---------------------------------------------------------------------------------------- storage


def side_bits(shape: tuple[int, ...], spec: BlockSpec) -> int:
    """Bits of all shifts of an array."""
    down, across = spec.grid(shape)
    return down * across * spec.shift_bits


def packed_bytes(shape: tuple[int, ...], spec: BlockSpec) -> int:
    """Bytes that `pack` takes."""
    if spec.bits == OFF:
        return 4 * math.prod(shape)
    return -(-math.prod(shape) * spec.bits // 8) + -(-side_bits(shape, spec) // 8)


def ratio(shape: tuple[int, ...], spec: BlockSpec) -> float:
    """How many times smaller than in float32: 32 / (k + b_e / (bm bn)) where nothing is ragged."""
    return 4 * math.prod(shape) / packed_bytes(shape, spec)


def pack(blocks: Blocks, spec: BlockSpec) -> dict[str, np.ndarray]:
    """{"codes", "shifts"}: bytes with nothing between the codes and nothing between the shifts."""
    codes = np.asarray(jax.lax.bitcast_convert_type(blocks.codes, jnp.uint8))
    shifts = np.asarray(blocks.shifts).view(np.uint8)
    return {"codes": _squeeze(codes, spec.bits), "shifts": _squeeze(shifts, spec.shift_bits)}


def unpack(packed: Mapping[str, np.ndarray], shape: tuple[int, ...], spec: BlockSpec) -> Blocks:
    """The inverse of `pack`.

    Raises:
        ConfigError: the bytes are not of such an array.
    """
    grid = spec.grid(shape)
    signed = spec.number == "int"
    codes = _spread(packed["codes"], spec.bits, math.prod(shape), signed).reshape(shape)
    shifts = _spread(packed["shifts"], spec.shift_bits, math.prod(grid), True).reshape(grid)
    codes = jax.lax.bitcast_convert_type(jnp.asarray(codes), spec.dtype)
    return Blocks(codes, jnp.asarray(shifts.view(np.int8)))


def _squeeze(values: np.ndarray, bits: int) -> np.ndarray:
    """The lowest `bits` of bytes, one after another, as bytes."""
    each = np.unpackbits(values.reshape(-1, 1), axis=1)[:, 8 - bits :]
    return np.packbits(each)


def _spread(packed: np.ndarray, bits: int, count: int, signed: bool) -> np.ndarray:
    """The inverse of `_squeeze`: `count` bytes (uint8), negative ones extended by their sign."""
    if len(packed) != -(-count * bits // 8):
        raise ConfigError(f"unpack: {len(packed)} bytes do not hold {count} values of {bits} bits")
    each = np.unpackbits(np.asarray(packed), count=count * bits).reshape(count, bits)
    fill = np.repeat(each[:, :1] * np.uint8(signed), 8 - bits, axis=1)
    return np.packbits(np.concatenate([fill, each], axis=1), axis=1)[:, 0]
