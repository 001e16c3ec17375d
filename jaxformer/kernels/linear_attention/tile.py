"""The arithmetic of one chunk, shared by every implementation.

Chunks are (C, K) and (C, N), states (K, N), with the same leading axes, if any. Products sum in
float32 (float64 for float64 inputs); what one product hands to the next is rounded to the type of
the inputs, so that bfloat16 runs on matrix units throughout.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def product(a: jax.Array, b: jax.Array, over: tuple[int, int] = (1, 0)) -> jax.Array:
    """Matrix product over axis `over[0]` of a and `over[1]` of b; `a b` when absent."""
    batch = tuple(range(a.ndim - 2))
    contracted = ((a.ndim - 2 + over[0],), (b.ndim - 2 + over[1],))
    sums = jnp.promote_types(a.dtype, jnp.float32)
    return lax.dot_general(a, b, (contracted, (batch, batch)), preferred_element_type=sums)


def absorb(state: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The state after a chunk: state + k^T v."""
    return state + product(k, v, (0, 0))


def read(state: jax.Array, q: jax.Array) -> jax.Array:
    """What queries take from a state: q state."""
    return product(q, state.astype(q.dtype))


def chunk_step(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, *, reverse: bool = False
) -> tuple[jax.Array, jax.Array]:
    """A chunk after the `state` of those before it, or after it if `reverse`: (state, output)."""
    c = q.shape[-2]
    row, column = (lax.broadcasted_iota(jnp.int32, (c, c), axis) for axis in (0, 1))
    seen = row <= column if reverse else row >= column
    scores = jnp.where(seen, product(q, k, (1, 1)), 0.0)
    return absorb(state, k, v), product(scores.astype(v.dtype), v) + read(state, q)
