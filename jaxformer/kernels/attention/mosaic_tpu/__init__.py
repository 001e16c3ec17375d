"""Attention on TPUs in Pallas, forward and backward; on a CPU the same kernels are interpreted.

`forward.py` and `backward.py` are the kernels, around the arithmetic of `tile.py`. Lists of tiles
to visit are scalars that arrive before the kernel, so that tiles nobody sees are neither loaded
nor computed; `parts.py` says how operands are loaded and their cotangents stored, `shear.py` how a
Toeplitz band becomes a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.masks import SKIP
from jaxformer.kernels.attention.mosaic_tpu.backward import by_keys, by_queries, by_tiles
from jaxformer.kernels.attention.mosaic_tpu.call import LANES, Call, padded_sizes, tile_sizes
from jaxformer.kernels.attention.mosaic_tpu.forward import forward
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.saved import Saved, as_request
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target

TYPES = ("float32", "bfloat16")


def refuse(request: Request) -> Refusal | None:
    """What stands in the way of `mosaic_tpu`."""
    if request.q.dtype.name not in TYPES:
        return Refusal(f"type {request.q.dtype}", f"its kernels take {' and '.join(TYPES)}")
    if target().platform not in ("tpu", "cpu"):
        return Refusal(f"platform {target()}", "its kernels are for TPUs")
    if target().platform == "tpu":
        for tile, length in zip(tile_sizes(request), request.sizes[2:], strict=True):
            if tile % LANES and tile < length:
                why = f"on a TPU they are multiples of {LANES}, or the whole length"
                return Refusal(f"tiles {request.rules.tiles}", why)
    return None


@jax.custom_vjp
def mosaic_tpu(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L)."""
    tq, tk = tile_sizes(request)
    padded = padded_sizes(request, tq, tk)
    x = Inputs.of(request).layout(request, padded, request.q.dtype)
    o, lse = forward(Call.of(request, x, padded, tq, tk))
    length = request.sizes.l
    return o[:, :, :length].swapaxes(1, 2), lse[:, :, :length]


def _forward(request: Request) -> tuple[Any, Any]:
    o, lse = mosaic_tpu(request)
    return (o, lse), (request, o, lse)


def _backward(kept: Any, cotangents: Any) -> tuple[Request]:
    request = kept[0]
    tq, tk = tile_sizes(request)
    padded = padded_sizes(request, tq, tk)
    x, pull_layout = jax.vjp(
        lambda x: x.layout(request, padded, request.q.dtype), Inputs.of(request)
    )
    call = Call.of(request, x, padded, tq, tk)
    saved = Saved.of(kept, cotangents, padded, request.q.dtype)
    dq, delta, by_number = by_queries(call, saved)
    saved = saved._replace(delta=delta)
    dk, dv, more = by_keys(call, saved)
    more |= {n: by_tiles(call, saved, n) for n in call.reads.learned if call.parts[n].shared}
    d = Inputs(dq, dk, dv, saved.dsink(x.sink), _operands(call, by_number | more))
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    return (as_request(request, d),)


mosaic_tpu.defvjp(_forward, _backward)


def _operands(call: Call, stored: dict[int, jax.Array]) -> dict[str, Any]:
    """Stored cotangents -> cotangents of the operands in kernel layout, by name."""
    cotangents = {}
    for name, n in zip(sorted(call.x.aux), call.reads.learned, strict=True):
        total = stored[n]
        part = call.parts[n]
        if part.kept_for == "tile" and not part.shared:  # blocks without a visit were never written
            seen = jnp.asarray(call.blocks.states) != SKIP
            seen = jnp.repeat(jnp.repeat(seen, call.tq, 1), call.tk, 2)
            total = jnp.where(seen[:, None], total, 0.0)
        operand = call.x.aux[name]
        value = part.reduce(total, operand.value)
        cotangents[name] = dataclasses.replace(operand, value=value)
    return cotangents
