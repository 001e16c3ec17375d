"""Linear attention in plain JAX: one scan over chunks. The CPU path, and of short lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.linear_attention.sums import Tiles, causal, sum_type
from jaxformer.kernels.linear_attention.tile import chunk_step


@dataclasses.dataclass(frozen=True)
class Chunked:
    """`Primitives` as products and a `lax.scan`."""

    def states(self, k: jax.Array, v: jax.Array, tiles: Tiles) -> jax.Array:
        k, v = (x.reshape(x.shape[0], tiles.segments, -1, *x.shape[2:]) for x in (k, v))
        return jnp.einsum("bpshk,bpshn->bphkn", k, v, preferred_element_type=sum_type(v))

    def read(self, q: jax.Array, state: jax.Array, tiles: Tiles, *, dtype: Any) -> jax.Array:
        del tiles
        state, sums = state.astype(q.dtype), sum_type(q)
        o = jnp.einsum("blhk,bhkn->blhn", q, state, preferred_element_type=sums)
        return o.astype(dtype)

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
        b, length, h, _ = q.shape
        parts = (b, tiles.segments, -1, tiles.chunk, h)

        def chunks(x: jax.Array) -> jax.Array:  # (B, L, H, K) -> (chunks, B, P, H, C, K)
            return x.reshape(*parts, x.shape[-1]).transpose(2, 0, 1, 4, 3, 5)

        if before is None:
            before = jnp.zeros((b, 1, h, k.shape[-1], v.shape[-1]), sum_type(v))

        def step(state: jax.Array, x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            state, o = chunk_step(state, *x, reverse=reverse)
            return state, o.astype(dtype)

        _, o = lax.scan(step, before, (chunks(q), chunks(k), chunks(v)), reverse=reverse)
        return o.transpose(1, 2, 0, 4, 3, 5).reshape(b, length, h, -1)


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, *, is_causal: bool, tiles: Tiles
) -> jax.Array:
    """Products of everything in the type of the sums: CPUs have no bfloat16 products."""
    q, k, v = (x.astype(sum_type(x)) for x in (q, k, v))
    kernels = Chunked()
    if is_causal:
        return causal(kernels, tiles, q, k, v)
    # Without a rule of its own, JAX differentiates it in any mode and as often as it likes.
    (state,) = jnp.moveaxis(kernels.states(k, v, tiles._replace(segments=1)), 1, 0)
    return kernels.read(q, state, tiles, dtype=sum_type(q))
