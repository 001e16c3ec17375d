"""Attention on TPUs in Pallas, forward and backward; on a CPU the same kernels are interpreted.

`forward.py` and `backward.py` are the kernels, around the arithmetic of `tile.py`. Lists of tiles
to visit are scalars that arrive before the kernel, so that tiles nobody sees are neither loaded
nor computed; `parts.py` says how operands are loaded and their cotangents stored, `bands.py` how a
Toeplitz band becomes a tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.layout import Inputs, rows
from jaxformer.kernels.attention.masks import SKIP
from jaxformer.kernels.attention.mosaic_tpu.backward import Saved, by_keys, by_queries
from jaxformer.kernels.attention.mosaic_tpu.call import Call, padded_sizes, tile_sizes
from jaxformer.kernels.attention.mosaic_tpu.forward import forward
from jaxformer.kernels.attention.operands import Sizes
from jaxformer.kernels.attention.request import Request
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


def _backward(saved: Any, cotangents: Any) -> tuple[Request]:
    request, o, lse = saved
    do, dlse = cotangents
    tq, tk = tile_sizes(request)
    padded = padded_sizes(request, tq, tk)
    x, pull_layout = jax.vjp(
        lambda x: x.layout(request, padded, request.q.dtype), Inputs.of(request)
    )
    call = Call.of(request, x, padded, tq, tk)
    given = _saved(request, padded, o, lse, do, dlse)

    dq, delta, by_number = by_queries(call, given)
    dk, dv, more = by_keys(call, given._replace(delta=delta))
    daux = _operands(call, by_number | more)
    dsink = None
    if x.sink is not None:
        dsink = -(tile.probabilities(x.sink[:, None], given.lse) * delta).sum((0, 2))
    d = Inputs(dq, dk, dv, dsink, daux)
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    nothing = dict(mask=None, q_pos=None, k_pos=None, seed=None)
    aux = {name: d.aux.get(name) for name in request.aux}
    return (dataclasses.replace(request, q=d.q, k=d.k, v=d.v, sink=d.sink, aux=aux, **nothing),)


mosaic_tpu.defvjp(_forward, _backward)


def _saved(request: Request, padded: Sizes, o: Any, lse: Any, do: Any, dlse: Any) -> Saved:
    """What the kernels need of the outputs and their cotangents, in kernel layout."""
    dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)  # a row that sees nothing is constant
    # sum_j p_j dp_j = dO . O, except under a nonlinear prob_mod: there the kernel sums it.
    products = 0.0
    if not request.rules.two_pass:
        products = (do.astype(jnp.float32) * o.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    pad = ((0, 0), (0, 0), (0, padded.l - request.sizes.l))
    do = rows(do, padded.l, request.q.dtype)
    return Saved(do, jnp.pad(lse, pad), jnp.pad(products - dlse, pad))


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
