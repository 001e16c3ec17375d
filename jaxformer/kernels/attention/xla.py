"""Attention with the whole score matrix in memory: the plainest form, for short sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.operands import Block
from jaxformer.kernels.attention.request import Request


def xla(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L); differentiated by JAX, also forwards."""
    rules, sizes, sums = request.rules, request.sizes, request.score_dtype
    k, v = request.k, request.v
    if rules.head_map is not None:
        heads = np.array(rules.head_map)
        k, v = k[:, :, heads], v[:, :, heads]
    groups = k.shape[2]
    q = request.q.reshape(sizes.b, sizes.l, groups, -1, k.shape[-1])
    at = Block.whole(sizes)
    aux = {n: x for n, x in request.aux.items() if x.differentiable}
    aux = ops.read(ops.prepare(aux, sizes, sizes), at)
    view = tile.Constants.of(request, sizes).view(at, partial=True)

    raw = jnp.einsum("blgrk,bsgk->bgrls", q, k, preferred_element_type=sums) * rules.scale
    s = tile.scores(rules, raw.reshape(sizes), view, aux)
    m = s.max(-1)
    if request.sink is not None:
        sink = request.sink.astype(sums)[:, None]
        m = jnp.maximum(m, sink)
    m = lax.stop_gradient(jnp.where(m == -jnp.inf, 0.0, m))
    e = jnp.exp(s - m[..., None])
    l = e.sum(-1)
    if request.sink is not None:
        l = l + jnp.exp(sink - m)
    seen = l > 0
    l = jnp.where(seen, l, 1.0)
    lse = jnp.where(seen, m + jnp.log(l), -jnp.inf)
    w = tile.weights(rules, e / l[..., None], view, aux)
    w = w.reshape(sizes.b, groups, -1, sizes.l, sizes.s).astype(v.dtype)
    o = jnp.einsum("bgrls,bsgk->blgrk", w, v, preferred_element_type=sums)
    return o.reshape(sizes.b, sizes.l, sizes.h, -1).astype(request.q.dtype), lse
