"""Linear attention on TPUs: a sequential grid over rows, the state in VMEM.

One grid step takes `ROWS` positions, many chunks of them: at head size 128 a chunk of 128 is
0.1 us of products on a v5e, less than what a grid step costs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels.interpret import pallas
from jaxformer.kernels.linear_attention.sums import Tiles
from jaxformer.kernels.linear_attention.tile import absorb, chunk_step, read

ROWS = 512


@dataclasses.dataclass(frozen=True)
class MosaicTPU:
    """`Primitives` as Pallas TPU kernels; one segment, since a core does one thing at a time."""

    def states(self, k: jax.Array, v: jax.Array, tiles: Tiles) -> jax.Array:
        k, v = _heads_first(k), _heads_first(v)
        b, h, length, size = k.shape
        rows = _rows(length, tiles.chunk)

        def kernel(k_ref: Any, v_ref: Any, state_ref: Any) -> None:
            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                state_ref[...] = jnp.zeros_like(state_ref)

            state_ref[...] = absorb(state_ref[...], k_ref[...], v_ref[...])

        state = pallas(
            kernel,
            grid=(b, h, length // rows),
            in_specs=[_by_row(rows, size), _by_row(rows, v.shape[-1])],
            out_specs=_state(size, v.shape[-1]),
            out_shape=jax.ShapeDtypeStruct((b, h, size, v.shape[-1]), jnp.float32),
            compiler_params=_sequential(),
        )(k, v)
        return state[:, None]

    def read(self, q: jax.Array, state: jax.Array, tiles: Tiles, *, dtype: Any) -> jax.Array:
        q = _heads_first(q)
        b, h, length, size = q.shape
        rows, n = _rows(length, tiles.chunk), state.shape[-1]

        def kernel(q_ref: Any, state_ref: Any, o_ref: Any) -> None:
            o_ref[...] = read(state_ref[...], q_ref[...]).astype(dtype)

        o = pallas(
            kernel,
            grid=(b, h, length // rows),
            in_specs=[_by_row(rows, size), _state(size, n)],
            out_specs=_by_row(rows, n),
            out_shape=jax.ShapeDtypeStruct((b, h, length, n), dtype),
            compiler_params=_sequential(),
        )(q, state)
        return _heads_first(o)

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
        assert before is None, "one segment"
        q, k, v = (_heads_first(x) for x in (q, k, v))
        b, h, length, size = q.shape
        n, chunk, rows = v.shape[-1], tiles.chunk, _rows(length, tiles.chunk)
        steps = length // rows
        order = range(0, rows, chunk)

        def kernel(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, state_ref: Any) -> None:
            @pl.when(pl.program_id(2) == 0)
            def _() -> None:
                state_ref[...] = jnp.zeros_like(state_ref)

            state = state_ref[...]
            for start in reversed(order) if reverse else order:
                at = pl.ds(start, chunk)
                state, o = chunk_step(
                    state, q_ref[at, :], k_ref[at, :], v_ref[at, :], reverse=reverse
                )
                o_ref[at, :] = o.astype(dtype)
            state_ref[...] = state

        last = steps - 1 if reverse else None
        o = pallas(
            kernel,
            grid=(b, h, steps),
            in_specs=[_by_row(rows, size, last)] * 2 + [_by_row(rows, n, last)],
            out_specs=_by_row(rows, n, last),
            out_shape=jax.ShapeDtypeStruct((b, h, length, n), dtype),
            scratch_shapes=[pltpu.VMEM((size, n), jnp.float32)],
            compiler_params=_sequential(),
        )(q, k, v)
        return _heads_first(o)


def tiles_of(length: int) -> Tiles:
    """Chunks of 128, or fewer for a short length; the registers hold 16 rows of bfloat16."""
    return Tiles(min(128, -(-length // 16) * 16))


def _heads_first(x: jax.Array) -> jax.Array:
    """(B, L, H, K) <-> (B, H, L, K): a block of a TPU is rows times all features."""
    return x.swapaxes(1, 2)


def _rows(length: int, chunk: int) -> int:
    """The most whole chunks within ROWS that divide the length."""
    chunks = length // chunk
    return chunk * max(n for n in range(1, max(ROWS // chunk, 1) + 1) if chunks % n == 0)


def _by_row(rows: int, features: int, last: int | None = None) -> pl.BlockSpec:
    """Rows in order, or from the `last` block to the first."""

    def index(b: Any, h: Any, i: Any) -> tuple[Any, ...]:
        return b, h, i if last is None else last - i, 0

    return pl.BlockSpec((None, None, rows, features), index)


def _state(size: int, features: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, size, features), lambda b, h, i: (b, h, 0, 0))


def _sequential() -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))
