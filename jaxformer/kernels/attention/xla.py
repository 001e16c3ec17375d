"""Attention with the whole score matrix in memory: the plainest form, for short sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.attention import operands as ops
from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.layout import Inputs, compare, mix, product_dtype
from jaxformer.kernels.attention.masks import FULL
from jaxformer.kernels.attention.operands import Block
from jaxformer.kernels.attention.request import Request


def xla(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L); differentiable in forward mode too."""
    rules, sizes, sums = request.rules, request.sizes, request.score_dtype
    x = Inputs.of(request).layout(request, sizes, product_dtype(request))
    at = Block.whole(sizes)
    aux = ops.read(x.aux, at)
    partial = request.tile_state(range(sizes.l), range(sizes.s)) is not FULL
    view = tile.Constants.of(request, sizes).view(at, partial=partial)

    s = tile.scores(rules, compare(x.q, x.k, sums) * rules.scale, view, aux)
    m = s.max(-1)
    if x.sink is not None:
        m = jnp.maximum(m, x.sink[:, None])
    m = lax.stop_gradient(jnp.where(m == -jnp.inf, 0.0, m))
    p = jnp.exp(s - m[..., None])
    l = p.sum(-1)
    if x.sink is not None:
        l = l + jnp.exp(x.sink[:, None] - m)
    l, lse = tile.normaliser(m, l)
    if rules.two_pass:
        o = mix(tile.weights(rules, p / l[..., None], view, aux), x.v, sums)
    else:  # dividing the output is cheaper than dividing the scores
        o = mix(tile.weights(rules, p, view, aux), x.v, sums) / l[..., None]
    return o.swapaxes(1, 2).astype(request.q.dtype), lse
