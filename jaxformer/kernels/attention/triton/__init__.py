"""Attention in Pallas Triton: the twin for GPUs before Hopper, and a second opinion on Hopper.

JAX 0.11 deprecates Pallas Triton, so no feature lives here alone. On a CPU the kernels are
interpreted.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.saved import Saved, as_request
from jaxformer.kernels.attention.triton.backward import by_bands, by_keys, by_queries, cotangent
from jaxformer.kernels.attention.triton.call import (
    LEAST,
    Call,
    backward_tiles,
    forward_tiles,
    layout,
    widen,
)
from jaxformer.kernels.attention.triton.forward import forward
from jaxformer.kernels.attention.triton.lowering import refused
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target

TYPES = ("float32", "bfloat16", "float16")


def refuse(request: Request) -> Refusal | None:
    """What stands in the way of `triton`."""
    if request.q.dtype.name not in TYPES:
        return Refusal(f"type {request.q.dtype}", f"its kernels take {', '.join(TYPES)}")
    if target().platform not in ("gpu", "cpu"):
        return Refusal(f"platform {target()}", "its kernels are for GPUs")
    tiles = request.rules.tiles or (LEAST, LEAST)
    if any(n < LEAST or n & (n - 1) for n in tiles):
        return Refusal(f"tiles {tiles}", f"Triton needs powers of two from {LEAST}")
    if found := refused(request):
        return Refusal(f"{', '.join(sorted(found))} in a mod", "Triton has no such instruction")
    return None


@jax.custom_vjp
def triton(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L)."""
    tiles = forward_tiles(request)
    x = layout(Inputs.of(request), request, *tiles)
    o, lse = forward(Call.of(request, x, *tiles))
    length, width = request.sizes.l, request.v.shape[3]
    return o[:, :, :length, :width].swapaxes(1, 2), lse[:, :, :length]


def _forward(request: Request) -> tuple[Any, Any]:
    o, lse = triton(request)
    return (o, lse), (request, o, lse)


def _backward(kept: Any, cotangents: Any) -> tuple[Request]:
    request = kept[0]
    tiles = backward_tiles(request)
    x, pull_layout = jax.vjp(lambda x: layout(x, request, *tiles), Inputs.of(request))
    call = Call.of(request, x, *tiles)
    saved = Saved.of(kept, cotangents, call.padded, request.q.dtype)
    saved = saved._replace(do=widen(saved.do))
    dq, delta, stored = by_queries(call, saved)
    saved = saved._replace(delta=delta)
    dk, dv, more = by_keys(call, saved)
    stored |= more | by_bands(call, saved)
    names = zip(sorted(x.aux), call.reads.learned, strict=True)
    values = {name: cotangent(call, n, stored[n]) for name, n in names}
    aux = {name: dataclasses.replace(o, value=values[name]) for name, o in x.aux.items()}
    d = Inputs(dq, dk, dv, saved.dsink(x.sink), aux)
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    return (as_request(request, d),)


triton.defvjp(_forward, _backward)
