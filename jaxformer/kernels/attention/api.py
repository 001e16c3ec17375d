"""`attention`: one operation for every softmax attention in the repository.

Axes: B batch, L query length, S key length, H query heads, G key heads, K head size, Kv value head
size. Scores are `score_mod(scale * q k^T)`, masked; weights are `prob_mod(softmax(scores))` with
dropout; the output is `weights @ v`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.attention import mosaic_gpu, mosaic_tpu
from jaxformer.kernels.attention.chunked import chunked
from jaxformer.kernels.attention.masks import Full, Mask
from jaxformer.kernels.attention.mods import ProbMod, ScoreMod, seed_of
from jaxformer.kernels.attention.operands import Operand
from jaxformer.kernels.attention.request import Request, Rules
from jaxformer.kernels.attention.tiling import tiling, visible_scores
from jaxformer.kernels.attention.xla import xla
from jaxformer.kernels.dispatch import Implementation, KernelUnsupported, Plan, Refusal, choose

QUADRATIC_BYTES = 2 * 2**30  # the largest score matrix that `xla` makes without being told to
SMALL = 384 * 384  # L * S below which `xla` is the faster on a CPU; at 512 it is twice as slow


class AttentionUnsupported(KernelUnsupported):
    """An attention implementation was asked for something that it cannot do."""


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

    Raises ValueError on shapes that do not fit, AttentionUnsupported where `impl` cannot.
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
    )
    chosen, _ = _choose(request, impl)
    o, lse = chosen.run(request)
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
    call.pop("return_lse", None)
    request = _request(q_BxLxHxK, k_BxSxGxK, v_BxSxGxKv, **call)
    chosen, why = _choose(request, impl)
    b, h, l, s = request.sizes
    gemm = 2 * b * h * (request.q.shape[-1] + request.v.shape[-1])
    flops = round(gemm * visible_scores(request))
    item = request.q.dtype.itemsize
    keys = (request.k.size + request.v.size) * item
    moved = keys + b * h * l * (request.q.shape[-1] + request.v.shape[-1]) * item
    if chosen.name == "xla":
        # Scores are written and read by the softmax, weights by the product with v.
        return Plan("xla", None, flops, moved + 4 * 4 * b * h * l * s, why)
    tiles = tiling(request)
    reread = tiles.scores / (tiles.tq * s) - 1  # the keys pass once per chunk of queries
    moved += round(max(reread, 0) * keys)
    return Plan(chosen.name, (tiles.tq, tiles.tk), flops, moved, why)


def explain(*arrays: jax.typing.ArrayLike, **call: Any) -> str:
    """`plan` in one line."""
    return str(plan(*arrays, **call))


def merge(parts: Sequence[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Attention over a union of disjoint key sets from (output, LSE) over each; differentiable.

    Outputs (B, L, H, Kv), LSEs (B, H, L). A query that saw nothing anywhere stays 0, LSE -inf.
    """
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
) -> Request:
    """Check a call and make it a value; plain ShapeDtypeStructs will do for `plan`."""
    heads = _check_shapes(q, k, v, head_map, sink)
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: needs a Mask (for an array: DenseMask), got {type(mask).__name__}")
    if prob_mod is not None and not isinstance(prob_mod, ProbMod):
        raise ValueError("prob_mod: needs ProbMod(fn, linear=True or False)")
    for name, operand in (aux or {}).items():
        if not isinstance(operand, Operand):
            raise ValueError(
                f"aux[{name!r}]: declare how tiles read it (Scalar, PerHead, PerQ, PerK, Tile, "
                f"Toeplitz), got {type(operand).__name__}"
            )
    rate, key = dropout or (0.0, None)
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout: rate must be in [0, 1), got {rate}")
    if tiles is not None and (len(tiles) != 2 or min(tiles) < 1):
        raise ValueError(f"tiles: needs two positive sizes, got {tiles}")
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
            scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
            score_mod=score_mod,
            prob_mod=prob_mod,
            dropout_rate=float(rate),
            head_map=heads,
            tiles=None if tiles is None else (int(tiles[0]), int(tiles[1])),
            allow_quadratic=allow_quadratic,
        ),
    )


def _check_shapes(
    q: Any, k: Any, v: Any, head_map: Sequence[int] | None, sink: Any
) -> tuple[int, ...] | None:
    """Raise ValueError where shapes do not fit; the head map as a tuple, None if it is uniform."""
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not len(q.shape) == len(k.shape) == len(v.shape) == 4:
        raise ValueError(f"attention: needs (batch, length, heads, head size) arrays, got {shapes}")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3]):
        raise ValueError(f"attention: batch, key length or key heads differ: {shapes}")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"attention: head sizes of q and k differ: {shapes}")
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"attention: every axis needs at least one element, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: types differ: {q.dtype}, {k.dtype}, {v.dtype}")
    h, g = q.shape[2], k.shape[2]
    if sink is not None and sink.shape != (h,):
        raise ValueError(f"sink: needs one number per query head, ({h},), got {sink.shape}")
    if head_map is None:
        if h % g:
            raise ValueError(f"attention: {h} query heads over {g} key heads needs a head_map")
        return None
    heads = tuple(int(x) for x in head_map)
    if len(heads) != h or not all(0 <= x < g for x in heads):
        raise ValueError(f"head_map: needs {h} key heads in [0, {g}), got {heads}")
    uniform = h % g == 0 and heads == tuple(i // (h // g) for i in range(h))
    return None if uniform else heads


# ----------------------------------------------------------------------------- the choice


def _choose(request: Request, impl: str) -> tuple[Implementation, str]:
    why = "asked for"
    if impl == "auto":
        impl, why = _auto(request)
    return choose(IMPLEMENTATIONS, request, impl, AttentionUnsupported), why


def _auto(request: Request) -> tuple[str, str]:
    platform = jax.default_backend()
    if platform != "cpu":
        return "chunked", f"no kernel for {platform} yet"
    if request.sizes.l * request.sizes.s <= SMALL:
        return "xla", f"L * S <= {SMALL} on a CPU"
    return "chunked", f"L * S > {SMALL} on a CPU"


def _too_large(request: Request) -> Refusal | None:
    size = math.prod(request.sizes) * 4
    if request.rules.allow_quadratic or size <= QUADRATIC_BYTES:
        return None
    why = f"the scores take {size / 2**30:.1f} GiB; allow_quadratic=True allows it"
    return Refusal("this length", why)


def _not_built(request: Request) -> Refusal:
    return Refusal("any call", "it is not built yet")


IMPLEMENTATIONS = (
    Implementation("chunked", lambda request: None, jax.jit(chunked)),
    Implementation("xla", _too_large, jax.jit(xla)),
    Implementation("mosaic_gpu", mosaic_gpu.refuse, jax.jit(mosaic_gpu.mosaic_gpu)),
    Implementation("mosaic_tpu", mosaic_tpu.refuse, jax.jit(mosaic_tpu.mosaic_tpu)),
    *(Implementation(name, _not_built, _not_built) for name in ("cudnn", "triton", "splash")),
)
