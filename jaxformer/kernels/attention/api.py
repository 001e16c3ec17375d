"""`attention`: one operation for every softmax attention in the repository.

Axes: B batch, L query length, S key length, H query heads, G key heads, K head size, Kv value head
size. Scores are `score_mod(scale * q k^T)`, masked; weights are `prob_mod(softmax(scores))` with
dropout; the output is `weights @ v`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.attention.blocks import static_states
from jaxformer.kernels.attention.checks import (
    check_arrays,
    check_dropout,
    check_heads,
    check_mask,
    check_mods,
    check_parts,
    check_positions,
    check_scale,
    check_tiles,
)
from jaxformer.kernels.attention.choice import implementation
from jaxformer.kernels.attention.masks import SKIP, Full, Mask
from jaxformer.kernels.attention.mods import ProbMod, ScoreMod, seed_of
from jaxformer.kernels.attention.operands import Operand, Sizes
from jaxformer.kernels.attention.request import Request, Rules
from jaxformer.kernels.attention.shards import over_mesh
from jaxformer.kernels.attention.tiling import visible_scores
from jaxformer.kernels.dispatch import Implementation, Plan

log = logging.getLogger(__name__)


def attention(
    q_BxLxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxKv: jax.Array,
    *,
    scale: float | None = None,
    mask: Mask = Full(),
    score_mod: ScoreMod | None = None,
    prob_mod: ProbMod | None = None,
    aux: Mapping[str, Operand] | None = None,
    head_map: Sequence[int] | None = None,
    q_pos: jax.Array | None = None,
    k_pos: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    tiles: tuple[int, int] | None = None,
    allow_quadratic: bool = False,
) -> Any:
    """Softmax attention: (B, L, H, Kv) in q's type; with `return_lse` also the LSE (B, H, L).

    scale: of the scores, K ** -0.5 when absent.
    mask: see `masks`. A query that sees nothing gives 0, LSE -inf and no gradients.
    score_mod, prob_mod, aux: see `mods` and `operands`; float operands are differentiated.
    head_map: the key head of each query head; consecutive groups of H / G when absent.
    q_pos, k_pos: int positions (length,) or (B, length), which masks, mods and dropout see; row and
        column numbers when absent.
    sink: (H,) scores of a key without value that every query sees; part of the LSE.
    dropout: (rate, key), of the weights; the draws depend on the key and the positions alone.
    return_lse: the natural logarithm of the normaliser, float32, differentiable.
    impl: an implementation by name, never replaced by another; "auto" chooses, `explain` says why.
        "xla" alone has forward-mode and second derivatives.
    tiles: (queries, keys) of a tile; the implementation chooses when absent.
    allow_quadratic: let `xla` make a score matrix above 2 GiB.

    Raises ConfigError where arguments do not fit, AttentionUnsupported where `impl` cannot.
    """
    request = _request(
        q_BxLxHxK,
        k_BxSxGxK,
        v_BxSxGxKv,
        scale=scale,
        mask=mask,
        score_mod=score_mod,
        prob_mod=prob_mod,
        aux=aux,
        head_map=head_map,
        q_pos=q_pos,
        k_pos=k_pos,
        sink=sink,
        dropout=dropout,
        tiles=tiles,
        allow_quadratic=allow_quadratic,
        return_lse=return_lse,
    )
    chosen, why = implementation(request, impl)
    if log.isEnabledFor(logging.INFO):
        plan = _plan(request, chosen, why)
        log.info("attention of %s queries to %s keys: %s", request.q.shape, request.k.shape, plan)
    o, lse = over_mesh(chosen.run, request)
    return (o, lse) if return_lse else o


def plan(
    q_BxLxHxK: jax.typing.ArrayLike,
    k_BxSxGxK: jax.typing.ArrayLike,
    v_BxSxGxKv: jax.typing.ArrayLike,
    *,
    impl: str = "auto",
    **call: Any,
) -> Plan:
    """What `attention` would run for the same arguments, and the cost of its forward pass.

    `flops` counts the scores the mask leaves (a mask that carries arrays counts as open where its
    static part does not close it); `hbm_bytes` what has to move between memory and the caches.
    """
    planned = []

    def trace(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
        request = _request(q, k, v, **call)
        chosen, why = implementation(request, impl)
        planned.append(_plan(request, chosen, why))

    jax.eval_shape(trace, q_BxLxHxK, k_BxSxGxK, v_BxSxGxKv)  # nothing is computed
    return planned[0]


def _plan(request: Request, chosen: Implementation, why: str) -> Plan:
    b, h, l, s = request.sizes
    gemm = 2 * b * h * (request.q.shape[-1] + request.v.shape[-1])
    flops = round(gemm * visible_scores(request))
    item = request.q.dtype.itemsize
    keys = (request.k.size + request.v.size) * item
    moved = keys + b * h * l * (request.q.shape[-1] + request.v.shape[-1]) * item
    if chosen.name == "xla":
        # Scores are written and read by the softmax, weights by the product with v.
        return Plan("xla", None, flops, moved + 4 * 4 * b * h * l * s, why)
    tiles = chosen.tiles(request)
    if tiles is not None:  # the keys pass once per tile of queries
        tq, tk = tiles
        visited = int((static_states(request, tq, tk) != SKIP).sum())
        moved += round(max(visited * tk / s - 1, 0) * keys)
    return Plan(chosen.name, tiles, flops, moved, why)


def explain(*arrays: jax.typing.ArrayLike, **call: Any) -> str:
    """`plan` in one line."""
    return str(plan(*arrays, **call))


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over a union of disjoint key sets from (output, LSE) over each; differentiable.

    Outputs (B, L, H, Kv), LSEs (B, H, L). A query that saw nothing anywhere stays 0, LSE -inf.

    Raises ConfigError on no parts, or parts that differ in shape.
    """
    check_parts(parts)
    lse = jnp.stack([lse for _, lse in parts])
    m = lse.max(0)
    m = lax.stop_gradient(jnp.where(m == -jnp.inf, 0.0, m))
    share = jnp.exp(lse - m)
    total = share.sum(0)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    share = jnp.swapaxes(share / total, 2, 3)[..., None]
    o = sum(o.astype(lse.dtype) * w for (o, _), w in zip(parts, share, strict=True))
    return o.astype(parts[0][0].dtype), jnp.where(seen, m + jnp.log(total), -jnp.inf)


# ----------------------------------------------------------------------------- the request


def _request(
    q: jax.typing.ArrayLike,
    k: jax.typing.ArrayLike,
    v: jax.typing.ArrayLike,
    *,
    scale: float | None = None,
    mask: Mask = Full(),
    score_mod: ScoreMod | None = None,
    prob_mod: ProbMod | None = None,
    aux: Mapping[str, Operand] | None = None,
    head_map: Sequence[int] | None = None,
    q_pos: jax.Array | None = None,
    k_pos: jax.Array | None = None,
    sink: jax.Array | None = None,
    dropout: tuple[float, jax.Array] | None = None,
    tiles: tuple[int, int] | None = None,
    allow_quadratic: bool = False,
    return_lse: bool = False,
) -> Request:
    """Check a call and make it a value; plain ShapeDtypeStructs will do for `plan`."""
    check_arrays(q, k, v)
    sizes = Sizes(*q.shape[:3:2], q.shape[1], k.shape[1])
    heads = check_heads(sizes, k.shape[2], head_map, sink)
    check_mask(mask, sizes)
    check_positions(q_pos, k_pos, sizes)
    check_mods(score_mod, prob_mod, aux or {}, sizes)
    scale = q.shape[-1] ** -0.5 if scale is None else check_scale(scale)
    rate, key = check_dropout(dropout)
    return Request(
        q,
        k,
        v,
        mask,
        dict(aux or {}),
        sink,
        q_pos,
        k_pos,
        seed_of(key) if rate else None,
        Rules(
            scale=scale,
            score_mod=score_mod,
            prob_mod=prob_mod,
            dropout_rate=rate,
            head_map=heads,
            tiles=check_tiles(tiles),
            allow_quadratic=allow_quadratic,
            lse=return_lse,
        ),
    )
