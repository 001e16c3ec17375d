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
from jaxformer.kernels.attention.mosaic_tpu.backward import by_keys, by_queries
from jaxformer.kernels.attention.mosaic_tpu.call import Call, padded_sizes, tile_sizes
from jaxformer.kernels.attention.mosaic_tpu.forward import forward
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.saved import Saved, as_request
from jaxformer.kernels.dispatch import Refusal

TYPES = ("float32", "bfloat16")


def refuse(request: Request) -> Refusal | None:
    """What stands in the way of `mosaic_tpu`."""
    if request.q.dtype.name not in TYPES:
        return Refusal(f"type {request.q.dtype}", f"its kernels take {' and '.join(TYPES)}")
    if jax.default_backend() not in ("tpu", "cpu"):
        return Refusal(f"platform {jax.default_backend()}", "its kernels are for TPUs")
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
    d = Inputs(dq, dk, dv, saved.dsink(x.sink), _operands(call, by_number | more))
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    return (as_request(request, d),)


mosaic_tpu.defvjp(_forward, _backward)


def _operands(call: Call, stored: dict[int, jax.Array]) -> dict[str, Any]:
    """Stored cotangents -> cotangents of the operands in kernel layout, by name."""
    cotangents = {}
    for name, n in zip(sorted(call.x.aux), call.reads.learned, strict=True):
        total = stored[n]
        if call.parts[n].kept_for == "tile":  # blocks without a visit were never written
            seen = jnp.asarray(call.blocks.states) != SKIP
            seen = jnp.repeat(jnp.repeat(seen, call.tq, 1), call.tk, 2)
            total = jnp.where(seen[:, None], total, 0.0)
        operand = call.x.aux[name]
        value = call.parts[n].reduce(total, operand.value)
        cotangents[name] = dataclasses.replace(operand, value=value)
    return cotangents
