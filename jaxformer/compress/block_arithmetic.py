"""Integer arithmetic on blocks: products, sums and tables in int32, rescaled by shifts alone.

A `Fixed` has an int32 for every value and its shift e beside it, value = n 2^-e. What is added is
brought to the coarser shift of the two by a right shift that rounds half to even. Operations are
jitted one by one: a program that calls them without `jit` compiles each of them once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.compress.blocks import Blocks, BlockSpec, _tile, _untile, power
from jaxformer.errors import ConfigError

FINE = 1000  # the shift of zeros, finer than any: they are right on every grid
ROOM = 16  # bits by which codes may go to the left in int32 before they are added
BIAS_ROOM = 22  # the same beside sums that fill int32


class Fixed(NamedTuple):
    """Integers (int32) and their shifts, of one shape or to be broadcast to it."""

    n: jax.Array
    e: jax.Array

    @property
    def value(self) -> jax.Array:
        """In float32: exact while integers are below 2^24."""
        return self.n.astype(jnp.float32) * power(jnp.clip(-self.e, -126, 126))


def right_shift(n: jax.Array, by: jax.Array) -> jax.Array:
    """round(n / 2^by), half to even, by >= 0; `>>` alone rounds towards minus infinity."""
    short = jnp.minimum(by, 31)
    floor = n >> short
    rest = n - jnp.left_shift(floor, short)
    half = jnp.left_shift(1, jnp.maximum(short - 1, 0))
    up = (rest > half) | ((rest == half) & (floor & 1 == 1))
    return jnp.where(by == 0, n, jnp.where(by > 31, 0, floor + up))


def check_integer(*specs: BlockSpec) -> None:
    """Refuse what has no integer arithmetic.

    Raises:
        ConfigError: codes that are not integers of 4 or 8 bits.
    """
    for spec in specs:
        if spec.bits not in (4, 8) or spec.number == "e4m3":
            raise ConfigError(
                f"BlockSpec.bits={spec.bits}, number={spec.number!r}: integer arithmetic has "
                "integers of 4 and 8 bits"
            )


def fixed(blocks: Blocks, spec: BlockSpec) -> Fixed:
    """Compressed values as int32 with a shift for each."""
    return Fixed(blocks.codes.astype(jnp.int32), spread(blocks.shifts, blocks.codes.shape, spec))


def spread(shifts: jax.Array, shape: tuple[int, ...], spec: BlockSpec) -> jax.Array:
    """Shifts of blocks as shifts of values (int32)."""
    tiles = jax.eval_shape(lambda: _tile(jnp.zeros(shape, jnp.int32), spec))
    e = jnp.broadcast_to(shifts.astype(jnp.int32)[:, None, :, None], tiles.shape)
    return _untile(e, shape)


def coarsest(x: Fixed, axis: int | tuple[int, ...]) -> jax.Array:
    """The least shift along axes, of what is not zero; kept dimensions."""
    e = jnp.where(x.n == 0, FINE, x.e).min(axis, keepdims=True)
    return jnp.where(e == FINE, 0, e)


def align(x: Fixed, e: jax.Array) -> Fixed:
    """The same values at shifts `e` that are not finer, rounded; zeros are so at any."""
    n = right_shift(x.n, jnp.maximum(x.e - e, 0))
    return Fixed(jnp.where(x.n == 0, 0, n), jnp.broadcast_to(e, n.shape))


def meet(a: Fixed, b: Fixed, room: int) -> tuple[Fixed, Fixed]:
    """Both at one shift for each value: the coarser of the two, finer by as much as there is room.

    What is coarser goes to the left by at most `room` bits, and only what is finer still is
    rounded; with room 0 that is alignment to the coarser shift.
    """
    e_a, e_b = (jnp.where(x.n == 0, FINE, x.e) for x in (a, b))
    e = jnp.minimum(jnp.maximum(e_a, e_b), jnp.minimum(e_a, e_b) + room)
    e = jnp.where(e >= FINE // 2, 0, e)
    return move(a, e), move(b, e)


def move(x: Fixed, e: jax.Array) -> Fixed:
    """The same values at other shifts: to the left without loss, to the right rounded."""
    left = jnp.left_shift(x.n, jnp.clip(e - x.e, 0, 30))
    n = jnp.where(e >= x.e, left, right_shift(x.n, jnp.maximum(x.e - e, 0)))
    return Fixed(jnp.where(x.n == 0, 0, n), jnp.broadcast_to(e, n.shape))


@functools.partial(jax.jit, static_argnames=("room",))
def add(a: Fixed, b: Fixed, room: int = ROOM) -> Fixed:
    """The sum of two arrays of one shape, of codes by default: what fits 31 - `room` bits."""
    a, b = meet(a, b, room)
    return Fixed(a.n + b.n, a.e)


def add_bias(x: Fixed, bias: Fixed) -> Fixed:
    """Sums of at most 30 bits and codes, of one shape: codes go to the left as far as they may."""
    e = jnp.minimum(jnp.where(x.n == 0, FINE, x.e), bias.e + BIAS_ROOM)
    return Fixed(move(x, e).n + move(bias, e).n, e)


@functools.partial(jax.jit, static_argnames=("spec",))
def compress_fixed(x: Fixed, spec: BlockSpec) -> Blocks:
    """Integers as codes: every block at the finest shift at which none overflows."""
    check_integer(spec)
    shape, largest = x.n.shape, int(spec.largest)
    n, e = _tile(x.n, spec), _tile(jnp.broadcast_to(x.e, shape), spec)
    start = coarsest(Fixed(n, e), (1, 3))
    n = align(Fixed(n, e), start).n
    a = jnp.abs(n).max((1, 3), keepdims=True)
    top = 31 - jax.lax.clz(jnp.maximum(a, 1))  # 2^top <= a < 2^(top + 1)
    length = largest.bit_length()
    by = length - 1 - top
    by = by - ((by <= 0) & (a > jnp.left_shift(largest, jnp.maximum(-by, 0))))
    by = jnp.where(a == 0, 0, by)
    low, high = spec.shift_range
    by = jnp.clip(start + by, low, high) - start
    left = jnp.left_shift(n, jnp.clip(by, 0, 30))
    codes = jnp.where(by >= 0, left, right_shift(n, jnp.maximum(-by, 0)))
    shifts = jnp.where(a == 0, 0, start + by)[:, 0, :, 0]
    return Blocks(_untile(codes, shape).astype(spec.dtype), shifts.astype(jnp.int8))


def check_sums(size: int, x: BlockSpec, w: BlockSpec) -> None:
    """Refuse sums of `size` products of codes that int32 may not hold.

    Raises:
        ConfigError: they may overflow, or the codes are no integers.
    """
    check_integer(x, w)
    if size * x.largest * w.largest >= 2**31:
        raise ConfigError(
            f"BlockSpec.columns: sums of {size} products of {x.bits} and {w.bits} bits may "
            "overflow int32; give fewer columns or bits"
        )


def headroom(size: int, x: BlockSpec, w: BlockSpec) -> int:
    """Bits of int32 that a sum of `size` products of codes leaves free."""
    check_sums(size, x, w)
    return 30 - math.ceil(math.log2(size * x.largest * w.largest))


@functools.partial(jax.jit, static_argnames=("width", "room", "inner"))
def matmul(x: Fixed, w: Fixed, width: int | None, room: int = 0, inner: int = 0) -> Fixed:
    """Products of x (..., M, K) with the transpose of w (..., N, K); leading axes are in common.

    Products are summed in int32 in blocks of `width` along K, in which x and w have one shift for
    each of their rows. The sums of blocks have the shifts of both, and are brought to the coarsest
    of them plus `room`: what is coarser than that goes to the left, and only what is finer is
    rounded. Rows whose shift is not one for a block are made so before, with `inner` bits of room.
    """
    width = width or x.n.shape[-1]
    (n_x, e_x), (n_w, e_w) = _cut(x, width, 0), _cut(w, width, inner)
    n = jnp.einsum("...mbk,...nbk->...bmn", n_x, n_w, preferred_element_type=jnp.int32)
    e = jnp.moveaxis(e_x, -1, -2)[..., :, None] + jnp.moveaxis(e_w, -1, -2)[..., None, :]
    e = jnp.broadcast_to(e, n.shape)
    shared = _coarsest(e, -3) + room
    return Fixed(move(Fixed(n, e), shared).n.sum(-3), shared[..., 0, :, :])


def _coarsest(e: jax.Array, axis: int) -> jax.Array:
    """The least shift along an axis; zeros, whose shift is `FINE`, have no say."""
    least = jnp.where(e < FINE // 2, e, FINE).min(axis, keepdims=True)
    return jnp.where(least == FINE, 0, least)


def _cut(x: Fixed, width: int, room: int) -> tuple[jax.Array, jax.Array]:
    """Integers (..., M, blocks, width), and the shifts (..., M, blocks) of blocks.

    Blocks of zeros have a shift finer than any.
    """
    *lead, size = x.n.shape
    blocks = -(-size // width)
    pad = [(0, 0)] * len(lead) + [(0, blocks * width - size)]
    n, e = (jnp.pad(a, pad).reshape(*lead, blocks, width) for a in (x.n, x.e))
    most = jnp.where(n == 0, -FINE, e).max(-1, keepdims=True)
    shared = jnp.minimum(_coarsest(jnp.where(n == 0, FINE, e), -1) + room, jnp.maximum(most, -126))
    n = move(Fixed(n, e), shared).n
    return n, jnp.where((n == 0).all(-1), FINE, shared[..., 0])


# ----------------------------------------------------------------------------------------- tables


@functools.cache
def table(function: Callable[[jax.Array], jax.Array], bits: int = 8) -> np.ndarray:
    """(253, 2^bits) float32: function(code 2^-e) for shifts e from -126 and codes from -2^(bits-1).

    Shifts of blocks take few values, so that a device holds one table for all of them.
    """
    with jax.ensure_compile_time_eval():
        e = jnp.arange(-126, 127)[:, None]
        codes = jnp.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=jnp.float32)
        return np.asarray(function(codes * power(-e)))


def look_up(
    function: Callable[[jax.Array], jax.Array], blocks: Blocks, spec: BlockSpec
) -> jax.Array:
    """function(x^), read from the table of each value's shift; float32, to be compressed."""
    check_integer(spec)
    values = jnp.asarray(table(function, spec.bits))
    x = fixed(blocks, spec)
    return values[x.e + 126, x.n + 2 ** (spec.bits - 1)]


@functools.cache
def exp_table(bits: int = 8) -> np.ndarray:
    """(253, 2^(bits+1)) int32: exp(-d 2^-e) 2^15 for differences d of two codes."""
    e = np.arange(-126, 127, dtype=np.float64)[:, None]
    d = np.arange(2 ** (bits + 1), dtype=np.float64)
    return np.round(np.exp(-np.minimum(d * 2.0**-e, 700.0)) * 2**15).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("bits",))
def softmax(x: Fixed, visible: jax.Array, bits: int = 8) -> Fixed:
    """Rows of codes to probabilities with shift 15: exp by table, an int32 sum, a division.

    Of a row without any visible entry all are 0. Codes of a row are first brought to one shift.

    Raises:
        ConfigError: rows so long that the sum may overflow.
    """
    if x.n.shape[-1] >= 2**16:
        raise ConfigError(f"softmax: rows of {x.n.shape[-1]} entries may overflow int32")
    x = Fixed(jnp.where(visible, x.n, 0), x.e)
    row = coarsest(x, -1)
    n = align(x, row).n
    most = jnp.where(visible, n, -(2**bits)).max(-1, keepdims=True)
    difference = jnp.clip(most - n, 0, 2 ** (bits + 1) - 1)
    exp = jnp.asarray(exp_table(bits))[jnp.clip(row, -126, 126) + 126, difference]
    exp = jnp.where(visible, exp, 0)
    total = jnp.maximum(exp.sum(-1, keepdims=True), 1)
    half = total // 2
    # exp is at most 2^15 and its largest is that, so that exp 2^15 + total / 2 is below 2^31.
    return Fixed((exp * 2**15 + half) // total, jnp.full(n.shape, 15))


@jax.jit
def moments(x: Fixed) -> tuple[Fixed, jax.Array, jax.Array]:
    """Rows at one shift, and the mean and variance of their codes, of int32 sums."""
    x = align(x, coarsest(x, -1))
    size = x.n.shape[-1]
    if size * 2**14 >= 2**31:
        raise ConfigError(f"moments: rows of {size} codes may overflow int32")
    mean = x.n.sum(-1, keepdims=True).astype(jnp.float32) / size
    square = jnp.square(x.n).sum(-1, keepdims=True).astype(jnp.float32) / size
    return x, mean, jnp.maximum(square - jnp.square(mean), 0.0)


def is_power_of_four(n: int) -> bool:
    """Whether 1 / sqrt(n) is a shift."""
    root = math.isqrt(n)
    return root * root == n and root & (root - 1) == 0
