"""Attention by tiles in plain JAX: memory linear in L, forward and backward. The CPU path.

One loop over chunks of queries, and inside it one loop over the key tiles the mask leaves: first
the FULL ones, without mask arithmetic, then the PARTIAL ones; SKIP tiles are not visited. Which
tiles those are is a table computed while tracing (`tiling.py`), so the program has the same size
for every L. The backward pass recomputes tiles from the saved q, k, v, o and LSE; it is written by
hand, so there is one reverse derivative: forward mode and second derivatives need `xla`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.layout import Inputs, collect, compare, mix, product_dtype
from jaxformer.kernels.attention.operands import Block
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.saved import Saved, as_request
from jaxformer.kernels.attention.tiling import Tiling, tiling


@jax.custom_vjp
def chunked(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L)."""
    rules, sizes, sums = request.rules, request.sizes, request.score_dtype
    tiles = tiling(request)
    x = Inputs.of(request).layout(request, tiles.padded, product_dtype(request))
    constants = tile.Constants.of(request, tiles.padded)
    shape = (sizes.b, sizes.h, tiles.tq)

    def chunk(args: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        i, q, *row = args

        def look(j: Any, partial: bool) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
            """The scores of a tile, and what turns its probabilities into outputs."""
            at = tiles.block(i, j)
            view = constants.view(at, partial=partial)
            aux = {name: o.spread(o.load(at), at) for name, o in x.aux.items()}
            raw = compare(q, _at(x.k, at.col, tiles.tk), sums) * rules.scale

            def output(p: jax.Array) -> jax.Array:
                return mix(tile.weights(rules, p, view, aux), _at(x.v, at.col, tiles.tk), sums)

            return tile.scores(rules, raw, view, aux), output

        def one_pass(j: Any, partial: bool, carry: Any) -> Any:
            m, l, o = carry
            s, output = look(j, partial)
            m_new = jnp.maximum(m, s.max(-1))
            base = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # no key seen yet
            p, shrink = jnp.exp(s - base[..., None]), jnp.exp(m - base)
            if not rules.two_pass:
                o = o * shrink[..., None] + output(p)
            return m_new, l * shrink + p.sum(-1), o

        def second_pass(j: Any, partial: bool, o: jax.Array) -> jax.Array:
            s, output = look(j, partial)
            return o + output(tile.probabilities(s, lse[..., None]))

        o = jnp.zeros((*shape, x.v.shape[-1]), sums)
        m, l, o = _walk(tiles, row, one_pass, (*_before(x.sink, shape, sums), o))
        l, lse = tile.normaliser(m, l)
        return _walk(tiles, row, second_pass, o) if rules.two_pass else o / l[..., None], lse

    o, lse = lax.map(chunk, (*_index(tiles), _chunks(x.q, tiles.tq), *tiles.tables))
    return _unchunk(o, sizes.l).swapaxes(1, 2).astype(request.q.dtype), _unchunk(lse, sizes.l)


def _forward(request: Request) -> tuple[Any, Any]:
    o, lse = chunked(request)
    return (o, lse), (request, o, lse)


def _backward(kept: Any, cotangents: Any) -> tuple[Request]:
    request = kept[0]
    rules, sums = request.rules, request.score_dtype
    tiles = tiling(request)
    products = product_dtype(request)
    x, pull_layout = jax.vjp(
        lambda x: x.layout(request, tiles.padded, products), Inputs.of(request)
    )
    constants = tile.Constants.of(request, tiles.padded)
    groups = x.k.shape[1]

    def chunk(totals: Any, args: tuple[Any, ...]) -> Any:
        i, q, do, delta, lse, *row = args

        def pull(j: Any, partial: bool, delta: jax.Array) -> tuple[Block, tile.Pulled]:
            at = tiles.block(i, j)
            raw = compare(q, _at(x.k, at.col, tiles.tk), sums) * rules.scale
            dw = compare(do, _at(x.v, at.col, tiles.tk), sums)
            parts = {name: operand.load(at) for name, operand in x.aux.items()}

            def spread(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
                return {name: x.aux[name].spread(part, at) for name, part in parts.items()}

            view = constants.view(at, partial=partial)
            return at, tile.pull_back(rules, raw, dw, lse, delta, view, parts, spread)

        def find_delta(j: Any, partial: bool, found: jax.Array) -> jax.Array:
            return found + pull(j, partial, jnp.zeros_like(found))[1].p_dp.sum(-1)

        def visit(j: Any, partial: bool, carry: Any) -> Any:
            dq, dk, dv, daux = carry
            at, pulled = pull(j, partial, delta)
            dq = dq + mix(pulled.raw, _at(x.k, at.col, tiles.tk), sums)
            dk = _add_at(dk, collect(pulled.raw, q, groups, sums), at.col)
            dv = _add_at(dv, collect(pulled.w, do, groups, sums), at.col)
            daux = {n: x.aux[n].deposit(daux[n], part, at) for n, part in pulled.parts.items()}
            return dq, dk, dv, daux

        if rules.two_pass:
            delta = _walk(tiles, row, find_delta, delta)
        dq, *totals = _walk(tiles, row, visit, (jnp.zeros(q.shape, sums), *totals))
        return tuple(totals), (dq, delta)

    saved = Saved.of(kept, cotangents, tiles.padded, products)
    per_row = (x.q, saved.do, saved.delta, saved.lse)
    totals = (x.k, x.v, {name: operand.value for name, operand in x.aux.items()})
    totals = jax.tree.map(lambda t: jnp.zeros(t.shape, sums), totals)
    per_chunk = (*_index(tiles), *(_chunks(t, tiles.tq) for t in per_row), *tiles.tables)
    (dk, dv, daux), (dq, delta) = lax.scan(chunk, totals, per_chunk)

    saved = saved._replace(delta=_unchunk(delta, tiles.padded.l))
    dq = _unchunk(dq, tiles.padded.l) * rules.scale
    daux = {name: dataclasses.replace(o, value=daux[name]) for name, o in x.aux.items()}
    d = Inputs(dq, dk * rules.scale, dv, saved.dsink(x.sink), daux)
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    return (as_request(request, d),)


chunked.defvjp(_forward, _backward)


def _walk(tiles: Tiling, row: Any, visit: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """Visit the FULL, then the PARTIAL key tiles of one chunk of queries."""
    index, full, count = row
    for partial in tiles.visits.kinds:

        def step(t: Any, carry: Any, partial: bool = partial) -> Any:
            return visit(index[t], partial, carry)

        ends = (full, count) if partial else (0, full)
        carry = lax.fori_loop(*ends, step, carry)
    return carry


def _before(sink: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Running maximum and sum before the first tile: a sink is a key that is always seen."""
    if sink is None:
        return jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
    m = jnp.broadcast_to(sink[:, None], shape)
    return m, (m > -jnp.inf).astype(dtype)


def _index(tiles: Tiling) -> tuple[np.ndarray]:
    return (np.arange(len(tiles.tables[0]), dtype=np.int32),)


def _chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, H, L, ...) -> (L / size, B, H, size, ...)."""
    b, h, l, *rest = x.shape
    return jnp.moveaxis(x.reshape(b, h, l // size, size, *rest), 2, 0)


def _unchunk(x: jax.Array, length: int) -> jax.Array:
    """(chunks, B, H, size, ...) -> (B, H, length, ...), padding cut off."""
    x = jnp.moveaxis(x, 0, 2)
    b, h, n, size, *rest = x.shape
    return x.reshape(b, h, n * size, *rest)[:, :, :length]


def _at(x: jax.Array, start: Any, size: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, start, size, 2)


def _add_at(x: jax.Array, part: jax.Array, start: Any) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(x, _at(x, start, part.shape[2]) + part, start, 2)
