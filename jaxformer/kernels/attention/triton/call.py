"""One attention call as the Triton kernels see it: tiles, block lists, operands.

A program reads whole rows of its batch row and heads through pointers and cuts the tiles itself, so
operands lie in memory as `Operand.prepare` leaves them, and a Toeplitz band is read through a tile
of addresses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxformer.kernels.attention.blocks import BlockList, Blocks, blocks
from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.operands import Operand, Sizes, Tile, Toeplitz
from jaxformer.kernels.attention.reads import Reads
from jaxformer.kernels.attention.request import Request, Rules
from jaxformer.kernels.attention.tile import View
from jaxformer.kernels.attention.triton.lowering import lowered_rules

LEAST = 16  # of every axis of a matrix product
WARPS = 8  # with four, most tiles spill registers on sm_80


class Lists:
    """Block lists as arrays, and the references to one of them."""

    def __init__(self, visits: BlockList) -> None:
        self.visits = visits

    def inputs(self, where: Callable[..., tuple[Any, Any]]) -> list[Any]:
        """Blocks and arrays; `where` gives (b, list) from grid indices."""
        index, full, count = self.visits
        arrays = index, full[..., None], count[..., None]
        return [(self._spec(x, where), jnp.asarray(x)) for x in arrays]

    def _spec(self, x: Any, where: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
        def at(*grid: Any) -> tuple[Any, ...]:
            b, n = where(*grid)
            return (b if x.shape[0] > 1 else 0), n, 0

        return pl.BlockSpec((None, None, x.shape[2]), at)

    def walk(self, refs: Any, visit: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
        """Visit the FULL, then the PARTIAL tiles of the list that the references hold."""
        index, full, count = refs
        for partial in self.visits.kinds:

            def step(t: Any, carry: Any, partial: bool = partial) -> Any:
                return visit(index[t], partial, carry)

            ends = (full[0], count[0]) if partial else (0, full[0])
            carry = lax.fori_loop(*ends, step, carry)
        return carry


@dataclasses.dataclass(frozen=True)
class Call:
    """A request in kernel layout."""

    request: Request
    x: Inputs
    padded: Sizes
    tq: int
    tk: int
    blocks: Blocks
    reads: Reads

    @classmethod
    def of(cls, request: Request, x: Inputs, tq: int, tk: int) -> Call:
        """`x` in the layout of these tiles."""
        padded = padded_sizes(request, tq, tk)
        found = blocks(request, tq, tk)
        reads = Reads.of(request, x, padded, masked=True in found.by_q.kinds)
        return cls(request, x, padded, tq, tk, found, reads)

    @property
    def rules(self) -> Rules:
        return lowered_rules(self.request.rules)

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.x.q.shape[1] // self.x.k.shape[1]

    def scalars(self) -> list[Any]:
        """Blocks and arrays of the scalars."""
        return [(pl.BlockSpec(x.shape, lambda *_: (0,)), x) for x in self.reads.scalars]

    def operands(self, heads: int, where: Callable[..., tuple[Any, Any]]) -> list[Any]:
        """Blocks of the operands for programs of `heads` heads; `where` gives (b, block)."""
        return [(rows(value, heads, where), value) for value in map(_value, self.reads.operands)]

    def look(
        self,
        refs: Any,
        scalars: Any,
        place: tuple[Any, Any, Any, Any],
        head: Any,
        partial: bool,
    ) -> tuple[View, dict[str, jax.Array]]:
        """The view of tile (b, h, i, j), `head` counted in the block, and its learned parts."""
        b, h, i, j = place
        at = i * self.tq, j * self.tk
        parts = [
            self._load(operand, ref, head, *at)
            for operand, ref in zip(self.reads.operands, refs, strict=True)
        ]
        return self.reads.view(parts, scalars, (b, h, *at), (self.tq, self.tk), partial)

    def _load(self, operand: Operand, ref: Any, head: Any, row: Any, col: Any) -> jax.Array:
        head = head if ref.shape[0] > 1 else 0
        if isinstance(operand, Toeplitz):
            a = lax.broadcasted_iota(jnp.int32, (self.tq, self.tk), 0)
            c = lax.broadcasted_iota(jnp.int32, (self.tq, self.tk), 1)
            return ref[head, 0, a - c + (row - col + self.padded.s - 1)]
        rows = pl.ds(row, self.tq) if ref.shape[1] > 1 else pl.ds(0, 1)
        cols = pl.ds(col, self.tk) if ref.shape[2] > 1 else pl.ds(0, 1)
        part = ref[head, rows, cols]
        return part.astype(jnp.int32) != 0 if operand.value.dtype == bool else part


def _value(operand: Operand) -> jax.Array:
    """(1 or B, 1 or H, 1 or L, 1 or S); a band (1, 1 or H, 1, L + S - 1); bytes for booleans."""
    x = operand.value
    if isinstance(operand, Toeplitz):
        return x[None, :, None]
    return x.astype(jnp.int8) if x.dtype == bool else x


def rows(x: jax.Array, heads: int, where: Callable[..., tuple[Any, Any]]) -> pl.BlockSpec:
    """Everything that (1 or B, 1 or H, ...) holds for a batch row and a block of heads."""
    heads = heads if x.shape[1] > 1 else 1

    def at(*grid: Any) -> tuple[Any, ...]:
        b, g = where(*grid)
        own = b if x.shape[0] > 1 else 0, g if x.shape[1] > 1 else 0
        return (*own, *(0,) * (x.ndim - 2))

    return pl.BlockSpec((None, heads, *x.shape[2:]), at)


def forward_tiles(request: Request) -> tuple[int, int]:
    """(queries, keys) of a tile, the largest of 32, 64, 128 whose registers do not spill."""
    if request.rules.tiles is not None:
        return request.rules.tiles
    if request.q.dtype == jnp.float32:
        return 32, 32
    width = max(request.q.shape[3], request.v.shape[3])
    tq, tk = (64, 32) if width > 128 else (64, 64) if request.aux else (128, 64)
    return min(tq, max(LEAST, pl.next_power_of_2(request.sizes.l))), tk


def backward_tiles(request: Request) -> tuple[int, int]:
    """Tiles of the backward pass, chosen likewise.

    Square where a band is learned, for then tiles on a diagonal share a window.
    """
    square = any(isinstance(x, Toeplitz) and x.differentiable for x in request.aux.values())
    if request.rules.tiles is not None:
        tq, tk = request.rules.tiles
        return (min(tq, tk),) * 2 if square else (tq, tk)
    width, rules = max(request.q.shape[3], request.v.shape[3]), request.rules
    if width > 128:
        return (16, 16) if square else (16, 64)
    small = square or rules.two_pass or request.q.dtype == jnp.float32
    # Wide heads leave no registers for draws or for a number per score (48 bytes spilt on sm_90).
    per_score = rules.dropout_rate > 0 or any(isinstance(x, Tile) for x in request.aux.values())
    small = small or (per_score and width > 64)
    return (32, 32) if small else (64, 32)


def padded_sizes(request: Request, tq: int, tk: int) -> Sizes:
    b, h, l, s = request.sizes
    return Sizes(b, h, -(-l // tq) * tq, -(-s // tk) * tk)


def layout(x: Inputs, request: Request, tq: int, tk: int) -> Inputs:
    """In kernel layout, head sizes padded to powers of two."""
    x = x.layout(request, padded_sizes(request, tq, tk), request.q.dtype)
    q, k, v = (widen(y) for y in (x.q, x.k, x.v))
    return dataclasses.replace(x, q=q, k=k, v=v)


def widen(x_BxHxLxK: jax.Array) -> jax.Array:
    """The head size padded to a power of two that the products take."""
    k = x_BxHxLxK.shape[3]
    return jnp.pad(x_BxHxLxK, ((0, 0), (0, 0), (0, 0), (0, max(LEAST, pl.next_power_of_2(k)) - k)))


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A product in the type of `b`, summed in float32; float32 is not cut to TF32."""
    exact = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    a = a.astype(b.dtype)
    a, b = a.T if over[0] == 0 else a, b.T if over[1] == 1 else b
    return jnp.dot(a, b, precision=exact, preferred_element_type=jnp.float32)


def run(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    inputs: list[tuple[pl.BlockSpec, jax.Array]],
    outputs: list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
) -> list[jax.Array]:
    """Call a kernel; interpreted on a CPU."""

    def call(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            grid=grid,
            in_specs=[spec for spec, _ in inputs],
            out_specs=[spec for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
            interpret=interpret,
        )

    arrays = [x for _, x in inputs]
    return lax.platform_dependent(*arrays, cpu=call(True), default=call(False))
