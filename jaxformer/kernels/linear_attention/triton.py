"""Linear attention on GPUs in Triton: a program walks one segment, the state in registers.

The grid is heads x segments x columns of the values. Inputs are read where they lie, (B, L, H, K),
so there are no copies with heads first. Pallas has deprecated its Triton back end (jax 0.11).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from jaxformer.kernels.interpret import pallas
from jaxformer.kernels.linear_attention.sums import Tiles
from jaxformer.kernels.linear_attention.tile import absorb, chunk_step, read

PROGRAMS = 264  # two for each of the 132 processors of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Triton:
    """`Primitives` as Pallas-Triton kernels."""

    def states(self, k: jax.Array, v: jax.Array, tiles: Tiles) -> jax.Array:
        size, n = k.shape[-1], v.shape[-1]
        k, v = _feature_tiles(k), _feature_tiles(v)
        grid = _Grid.of(k, v, tiles)

        def kernel(k_ref: Any, v_ref: Any, state_ref: Any) -> None:
            def step(i: Any, state: jax.Array) -> jax.Array:
                at = pl.ds(i * grid.chunk, grid.chunk)
                return absorb(state, k_ref[at, :], v_ref[at, :])

            state_ref[...] = lax.fori_loop(0, grid.chunks, step, grid.empty())

        state = grid.call(
            kernel, [grid.rows(), grid.rows_of_columns()], grid.state(), grid.state_shape()
        )(k, v)
        return state[..., :size, :n]

    def read(self, q: jax.Array, state: jax.Array, tiles: Tiles, *, dtype: Any) -> jax.Array:
        n = state.shape[-1]
        q, state = _feature_tiles(q), _feature_tiles(state, (-2, -1))
        b, length, h, _ = q.shape
        # Nothing is carried from chunk to chunk: each is a segment of its own.
        tiles = tiles._replace(segments=length // tiles.chunk)
        grid = _Grid.of(q, jax.ShapeDtypeStruct((b, length, h, state.shape[-1]), q.dtype), tiles)

        def kernel(q_ref: Any, state_ref: Any, o_ref: Any) -> None:
            o_ref[...] = read(state_ref[...], q_ref[...]).astype(dtype)

        specs = [grid.rows(), grid.state(shared=True)]
        o = grid.call(kernel, specs, grid.rows_of_columns(), grid.output_shape(dtype))(
            q, state[:, None]
        )
        return o[..., :n]

    def scan(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        before: jax.Array | None,
        tiles: Tiles,
        *,
        reverse: bool,
        dtype: Any,
    ) -> jax.Array:
        n = v.shape[-1]
        q, k, v = (_feature_tiles(x) for x in (q, k, v))
        grid = _Grid.of(k, v, tiles)

        def kernel(q_ref: Any, k_ref: Any, v_ref: Any, *refs: Any) -> None:
            *before_ref, o_ref = refs

            def step(i: Any, state: jax.Array) -> jax.Array:
                i = grid.chunks - 1 - i if reverse else i
                at = pl.ds(i * grid.chunk, grid.chunk)
                state, o = chunk_step(
                    state, q_ref[at, :], k_ref[at, :], v_ref[at, :], reverse=reverse
                )
                o_ref[at, :] = o.astype(dtype)
                return state

            state = before_ref[0][...] if before_ref else grid.empty()
            lax.fori_loop(0, grid.chunks, step, state)

        specs = [grid.rows(), grid.rows(), grid.rows_of_columns()]
        entering = []
        if before is not None:
            specs.append(grid.state())
            entering.append(_feature_tiles(before, (-2, -1)))
        call = grid.call(kernel, specs, grid.rows_of_columns(), grid.output_shape(dtype))
        return call(q, k, v, *entering)[..., :n]


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Programs and what of each array they see: (B, L, H, K), (B, L, H, N), (B, P, H, K, N)."""

    batch: int
    length: int
    heads: int
    size: int
    features: int
    chunk: int
    columns: int
    segments: int

    @classmethod
    def of(cls, k: Any, v: Any, tiles: Tiles) -> _Grid:
        (b, length, h, size), n = k.shape, v.shape[-1]
        return cls(b, length, h, size, n, tiles.chunk, min(tiles.columns or n, n), tiles.segments)

    @property
    def chunks(self) -> int:
        """Chunks of a segment."""
        return self.length // self.segments // self.chunk

    def empty(self) -> jax.Array:
        return jnp.zeros((self.size, self.columns), jnp.float32)

    def rows(self) -> pl.BlockSpec:
        block = (None, self.length // self.segments, None, self.size)
        return pl.BlockSpec(block, lambda i, p, c: (i // self.heads, p, i % self.heads, 0))

    def rows_of_columns(self) -> pl.BlockSpec:
        block = (None, self.length // self.segments, None, self.columns)
        return pl.BlockSpec(block, lambda i, p, c: (i // self.heads, p, i % self.heads, c))

    def state(self, *, shared: bool = False) -> pl.BlockSpec:
        """The state of a segment, or of all of them."""
        block = (None, None, None, self.size, self.columns)
        return pl.BlockSpec(
            block, lambda i, p, c: (i // self.heads, 0 if shared else p, i % self.heads, 0, c)
        )

    def state_shape(self) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.segments, self.heads, self.size, self.features)
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def output_shape(self, dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (self.batch, self.length, self.heads, self.features)
        return jax.ShapeDtypeStruct(shape, dtype)

    def call(self, kernel: Any, in_specs: Any, out_specs: Any, out_shape: Any) -> Any:
        warps = 8 if self.size > 64 else 4
        return pallas(
            kernel,
            grid=(self.batch * self.heads, self.segments, self.features // self.columns),
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            compiler_params=plt.CompilerParams(num_warps=warps, num_stages=2),
        )


def tiles_of(batch: int, length: int, heads: int, size: int, dtype: Any) -> Tiles:
    """Tiles that spill no register on sm_80 and sm_90, and segments for every processor.

    `size` is the larger of the feature sizes: the gradients exchange them.
    """
    if dtype == jnp.float32:
        chunk, columns = 32, 32
    else:
        chunk, columns = 64, 64 if size <= 64 else 32
    chunk, columns = min(chunk, _power_of_two(length)), min(columns, _power_of_two(size))
    wanted = PROGRAMS * columns // (batch * heads * _power_of_two(size))
    longest = length // (4 * chunk)  # of four chunks at least: entering a segment costs one or two
    return Tiles(chunk, columns, 2 ** int(math.log2(max(1, min(wanted, longest)))))


def largest(dtype: Any) -> int:
    """Features that the registers hold: float32 of 256 spills with every tile that was tried."""
    return 128 if dtype == jnp.float32 else 256


def _power_of_two(n: int) -> int:
    """The tile of n features or positions: matrix units take 16 or more, Triton powers of two."""
    return max(16, 2 ** math.ceil(math.log2(n)))


def _feature_tiles(x: jax.Array, axes: tuple[int, ...] = (-1,)) -> jax.Array:
    """Zeros after the features up to a whole tile."""
    grow = [(0, 0)] * x.ndim
    for axis in axes:
        grow[axis] = (0, _power_of_two(x.shape[axis]) - x.shape[axis])
    return jnp.pad(x, grow)
