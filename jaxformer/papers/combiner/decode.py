"""Combiner-Fixed on a sequence that arrives in parts: c + S scores per token, whatever came before.

A region is seen once its segment is over, so that its key and value are made then and kept. Until
then the segment's keys and values are there for its own positions, and of its queries the maximum.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention import Causal, Segments, attention, merge
from jaxformer.nn.cache import KVCache, count_positions
from jaxformer.nn.regions import expected


class ReadOn(nn.Module):
    """Outputs (B, L, H, K) of positions that continue those read before."""

    segment: int

    @nn.compact
    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        c, (batch, length, heads, size) = self.segment, q.shape
        at_BxL = count_positions(self, batch, length)
        if self.is_initializing():  # the cache holds whole segments
            k, v = (jnp.pad(x, ((0, 0), (0, -length % c), (0, 0), (0, 0))) for x in (k, v))
        k_all, v_all = KVCache(name="kv_cache")(k, v, at_BxL)
        segments = k_all.shape[1] // c
        shape = (batch, segments, heads, size)
        most = self.variable("cache", "query", jnp.full, shape, -jnp.inf, q.dtype)
        region_k = self.variable("cache", "region_key", jnp.zeros, shape, k.dtype)
        region_v = self.variable("cache", "region_value", jnp.zeros, shape, v.dtype)

        # The segments that these positions lie in, as many as they can be.
        count = min((length + c - 2) // c + 1, segments)
        first_B = jnp.minimum(at_BxL[:, 0] // c, segments - count)
        near_k, near_v = (_cut(x, first_B * c, count * c) for x in (k_all, v_all))
        near_at = first_B[:, None] * c + jnp.arange(count * c)
        rows = jnp.arange(batch)[:, None]
        query = most.value.at[rows, at_BxL // c].max(q)
        if not self.is_initializing():
            most.value = query
            in_rows = (x.reshape(batch, count, c, heads, size) for x in (near_k, near_v))
            written = (near_at <= at_BxL[:, -1:]).reshape(batch, count, c)
            key, value = in_rows
            asked = _cut(query, first_B, count)
            asked = jnp.where(jnp.isfinite(asked), asked, 0)  # of a segment not begun
            made = expected(asked, key, value, written)
            key = jnp.where(written[..., None, None], key, -jnp.inf).max(2)
            region_k.value = _put(region_k.value, jnp.where(jnp.isfinite(key), key, 0), first_B)
            region_v.value = _put(region_v.value, made, first_B)

        own = Segments(at_BxL // c, near_at // c)
        near = attention(
            q, near_k, near_v, mask=Causal() & own, q_pos=at_BxL, k_pos=near_at, return_lse=True
        )
        over = (jnp.arange(segments) + 1) * c  # where a segment is over
        far = attention(
            q,
            region_k.value,
            region_v.value,
            mask=Causal(),
            q_pos=at_BxL,
            k_pos=over,
            return_lse=True,
        )
        return merge([near, far])[0]


def _cut(x: jax.Array, start_B: jax.Array, size: int) -> jax.Array:
    return jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, size))(x, start_B)


def _put(x: jax.Array, part: jax.Array, start_B: jax.Array) -> jax.Array:
    def one(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(x, part, start, 0)

    return jax.vmap(one)(x, part.astype(x.dtype), start_B)
