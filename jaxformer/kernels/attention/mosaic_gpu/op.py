"""The differentiable op: layouts before and after the kernels, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.masks import SKIP, Grid
from jaxformer.kernels.attention.mosaic_gpu.backward import Arrays, key_pass, query_pass
from jaxformer.kernels.attention.mosaic_gpu.bands import band_pass
from jaxformer.kernels.attention.mosaic_gpu.elementwise import NotElementwise
from jaxformer.kernels.attention.mosaic_gpu.forward import forward
from jaxformer.kernels.attention.mosaic_gpu.schedule import (
    BLOCK,
    CONFIGS,
    Config,
    allowed_tiles,
    config_of,
    head_size,
    padded_size,
)
from jaxformer.kernels.attention.mosaic_gpu.terms import Terms
from jaxformer.kernels.attention.operands import Operand, Toeplitz
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.saved import Saved, as_request
from jaxformer.kernels.dispatch import Refusal
from jaxformer.kernels.target import target


def refuse(request: Request) -> Refusal | None:
    """What is in the way of these kernels; None when nothing is."""
    if request.q.dtype not in (jnp.bfloat16, jnp.float16):
        return Refusal(f"{request.q.dtype} inputs", "tensor cores multiply bfloat16 or float16")
    if head_size(request) not in CONFIGS:
        return Refusal(f"head size {head_size(request)}", f"at most {max(CONFIGS)}")
    tiles = request.rules.tiles
    if tiles is not None and tiles not in allowed_tiles(request):
        return Refusal(
            f"tiles {tiles}",
            f"head size {head_size(request)} can have one of {allowed_tiles(request)}",
        )
    try:
        jax.eval_shape(_trace, request)
    except NotElementwise as error:
        return Refusal("this mask or mod", str(error))
    if not target().hopper:
        return Refusal(f"platform {target()}", "its kernels are for Hopper GPUs, sm_90a")
    return None


def _trace(request: Request) -> None:
    """Trace every program; raises NotElementwise."""
    terms = Terms.of(request, config_of(request).padded(request.sizes))
    for program in (terms.scores, terms.weights, terms.pull_back):
        program(partial=True)


@jax.custom_vjp
def mosaic_gpu(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L)."""
    return _forward(request)[0]


def _forward(request: Request) -> tuple[Any, Any]:
    config = config_of(request)
    terms = Terms.of(request, config.padded(request.sizes))
    o, lse = forward(request, config, terms, *map(_rows, (request.q, request.k, request.v)))
    o = o[:, : request.sizes.l, :, : request.v.shape[-1]]
    lse = lse[:, :, : request.sizes.l]
    return (o, lse), (request, o, lse)


def _backward(residuals: Any, cotangents: Any) -> tuple[Request]:
    request, do = residuals[0], cotangents[0].astype(residuals[0].q.dtype)
    config = config_of(request)
    terms = Terms.of(request, config.padded(request.sizes))
    saved = Saved.of(residuals, cotangents, terms.padded, request.q.dtype)
    x = Arrays(*map(_rows, (request.q, request.k, request.v, do)), saved.lse, saved.delta)
    if request.rules.two_pass:
        inner = query_pass(request, config, terms, x, dq=False, rows=("p_dp",))["p_dp"]
        saved = saved._replace(delta=saved.delta + inner)
        x = x._replace(delta=saved.delta)
    d, daux = _pull(request, config, terms, x)
    dq, dk, dv = (
        dx[:, : like.shape[1], :, : like.shape[3]]
        for dx, like in zip(d, (request.q, request.k, request.v), strict=True)
    )
    dsink = None if request.sink is None else saved.dsink(request.sink.astype(jnp.float32))
    return (as_request(request, Inputs(dq, dk, dv, dsink, daux)),)


mosaic_gpu.defvjp(_forward, _backward)


def _pull(
    request: Request, config: Config, terms: Terms, x: Arrays
) -> tuple[tuple[jax.Array, ...], dict[str, Operand]]:
    """Cotangents of the padded q, k and v, and of the differentiable operands."""
    learned = Inputs.of(request).aux
    axes = {name: terms.axes(f"aux.{name}") for name in learned}
    bands = tuple(n for n, x in learned.items() if isinstance(x, Toeplitz))
    tiles = tuple(n for n, a in axes.items() if a == "ls" and n not in bands)
    by_q = tuple(n for n, a in axes.items() if a in ("", "l"))
    by_k = tuple(n for n, a in axes.items() if a == "s")
    got = query_pass(request, config, terms, x, dq=True, rows=by_q, tiles=tiles)
    launches = (("dk",), ("dv",)) if config.split_dkv else (("dk", "dv"),)
    for sums in launches:
        rows = by_k if "dk" in sums else ()
        got |= key_pass(request, config, terms, x, sums=sums, rows=rows)
    got |= band_pass(request, terms, x, bands) if bands else {}
    visited = _visited(request, config, terms) if tiles else None

    def cotangent(name: str, operand: Operand) -> Operand:
        """From sums over whole axes to the operand's own axes."""
        d = got[name]
        if name in bands:
            d = d if operand.value.shape[0] > 1 else d.sum(0, keepdims=True)
        else:
            d = d if name not in tiles else jnp.where(visited, d, 0.0)
            d = d[:, :, None] if name in by_k else d if name in tiles else d[..., None]
            smaller = [i for i, n in enumerate(operand.value.shape) if n == 1]
            d = d.sum(tuple(smaller), keepdims=True)
        return dataclasses.replace(operand, value=d.astype(operand.value.dtype))

    def prepare(aux: dict[str, Operand]) -> dict[str, Operand]:
        return {name: x.prepare(request.sizes, terms.padded) for name, x in aux.items()}

    prepared, unprepare = jax.vjp(prepare, learned)
    (daux,) = unprepare({name: cotangent(name, x) for name, x in prepared.items()})
    return (got["dq"], got["dk"], got["dv"]), daux


def _visited(request: Request, config: Config, terms: Terms) -> jax.Array:
    """Which scores lie in a tile that the dQ kernel visits, (1 or B, 1, padded L, padded S)."""
    grid = Grid.of(request.sizes, BLOCK, config.dq_keys, request.q_pos, request.k_pos)
    seen = jnp.asarray(request.mask.tile_states(grid) != SKIP)
    seen = seen.repeat(BLOCK, 1).repeat(config.dq_keys, 2)
    _, _, l, s = terms.padded
    return jnp.pad(seen, ((0, 0), (0, l - seen.shape[1]), (0, s - seen.shape[2])))[:, None]


def _rows(x_BxLxHxK: jax.Array) -> jax.Array:
    """Lengths in whole swizzled rows of 8, head sizes in whole ones of 64 numbers.

    What a tile reads beyond that is filled with zeros by the copy itself.
    """
    _, l, _, k = x_BxLxHxK.shape
    return jnp.pad(x_BxLxHxK, ((0, 0), (0, -l % 8), (0, 0), (0, padded_size(k) - k)))
