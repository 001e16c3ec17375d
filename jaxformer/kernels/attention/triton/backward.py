"""The backward kernels: by tile of queries, by tile of keys, and by window of Toeplitz bands.

Nothing is added atomically: every number is summed by one program in the order of its list. The
kernel by windows recomputes the scores once more, and runs only where a band is learned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import bands, tile
from jaxformer.kernels.attention.blocks import block_list
from jaxformer.kernels.attention.masks import SKIP
from jaxformer.kernels.attention.operands import Block, Operand, Toeplitz
from jaxformer.kernels.attention.reads import take
from jaxformer.kernels.attention.saved import Saved
from jaxformer.kernels.attention.triton.call import Call, Lists, dot, rows, run

Stored = dict[int, jax.Array]  # cotangents by the number of the operand, for every (b, h)
Where = Callable[..., tuple[Any, Any]]


def kind(operand: Operand) -> str:
    """Which kernel sums its cotangent: by 'row' or 'head', 'tile', 'column', or 'band'."""
    if isinstance(operand, Toeplitz):
        return "band"
    over = operand.value.shape[2] > 1, operand.value.shape[3] > 1
    return {(0, 0): "head", (1, 0): "row", (0, 1): "column", (1, 1): "tile"}[over]


def _learned(call: Call, *kinds: str) -> list[int]:
    return [n for n in call.reads.learned if kind(call.reads.operands[n]) in kinds]


def _inputs(
    call: Call, saved: Saved, lists: Lists, own: Any, shared: Any, at: Where, n: int
) -> Any:
    """Inputs of a program for `n` query heads; `at` gives (b, list), the others (b, head block)."""
    x = call.x
    return [
        *lists.inputs(at),
        *call.scalars(),
        *((rows(y, n, own), y) for y in (x.q, saved.do, saved.lse, saved.delta)),
        *((rows(y, 1, shared), y) for y in (x.k, x.v)),
        *call.operands(n, own),
    ]


def _split(call: Call, refs: Any) -> list[Any]:
    """Lists, scalars, (q, dO, LSE, delta, k, v), operands; then outputs."""
    return take(refs, 3, len(call.reads.scalars), 6, len(call.reads.operands))


def _pull(
    call: Call, refs: Any, place: Any, head: Any, partial: bool, delta: jax.Array
) -> tile.Pulled:
    """The backward pass of tile (b, h, i, j); `head` is h counted in the block of heads."""
    scalars, (q, do, lse, _, k, v), operands = refs
    _, _, i, j = place
    queries, keys = pl.ds(i * call.tq, call.tq), pl.ds(j * call.tk, call.tk)
    view, aux = call.look(operands, scalars, place, head, partial)
    raw = dot(q[head, queries, :], k[0, keys, :], (1, 1)) * call.rules.scale
    dw = dot(do[head, queries, :], v[0, keys, :], (1, 1))
    norm = lse[head, queries]
    return tile.pull_back(call.rules, raw, dw, norm, delta, view, aux, lambda x: x)


def _chosen(call: Call, pulled: tile.Pulled, numbers: list[int]) -> list[jax.Array]:
    by_number = dict(zip(call.reads.learned, jax.tree.leaves(pulled.parts), strict=True))
    return [by_number[n] for n in numbers]


def by_queries(call: Call, saved: Saved) -> tuple[jax.Array, jax.Array, Stored]:
    """dQ, the whole delta, and cotangents over rows, heads and tiles."""
    x, tq, tk = call.x, call.tq, call.tk
    b, h, l, width = x.q.shape
    lists = Lists(call.blocks.by_q)
    summed, written = _learned(call, "row", "head"), _learned(call, "tile")
    tall = [tq if kind(call.reads.operands[n]) == "row" else 1 for n in summed]

    def kernel(*refs: Any) -> None:
        visits, *read, outputs = _split(call, refs)
        inputs = read[1]
        (dq, delta_out), sums, tiles = take(outputs, 2, len(summed))
        i, h, b = map(pl.program_id, range(3))
        k, queries = inputs[4], pl.ds(i * tq, tq)
        delta = inputs[3][0, queries]

        def pull(j: Any, partial: bool, delta: jax.Array) -> tile.Pulled:
            return _pull(call, read, (b, h, i, j), 0, partial, delta)

        def find_delta(j: Any, partial: bool, found: jax.Array) -> jax.Array:
            return found + pull(j, partial, jnp.zeros_like(delta)).p_dp.sum(1)

        if call.rules.two_pass:
            delta = lists.walk(visits, find_delta, delta)

        def visit(j: Any, partial: bool, carry: Any) -> Any:
            acc, totals = carry
            pulled = pull(j, partial, delta)
            acc = acc + dot(pulled.raw, k[0, pl.ds(j * tk, tk), :], (1, 0))
            for ref, part in zip(tiles, _chosen(call, pulled, written), strict=True):
                ref[:, pl.ds(j * tk, tk)] = part
            parts = _chosen(call, pulled, summed)
            return acc, [a + part for a, part in zip(totals, parts, strict=True)]

        start = jnp.zeros((tq, width), jnp.float32), [jnp.zeros((n, 1), jnp.float32) for n in tall]
        acc, totals = lists.walk(visits, visit, start)
        dq[...], delta_out[...] = (acc * call.rules.scale).astype(dq.dtype), delta
        for ref, total in zip(sums, totals, strict=True):
            ref[...] = total

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, *shape), lambda i, h, b: (b, h, i, 0)[: 2 + len(shape)])

    def float32(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((b, h, *shape), jnp.float32)

    dq, delta, *stored = run(
        kernel,
        grid=(l // tq, h, b),
        inputs=_inputs(
            call,
            saved,
            lists,
            lambda i, h, b: (b, h),
            lambda i, h, b: (b, h // call.group),
            lambda i, h, b: (b, i),
            1,
        ),
        outputs=[
            (block(tq, width), jax.ShapeDtypeStruct(x.q.shape, x.q.dtype)),
            (block(tq), float32(l)),
            *((block(n, 1), float32(l // tq * n, 1)) for n in tall),
            *((block(tq, call.padded.s), float32(l, call.padded.s)) for _ in written),
        ],
    )
    return dq, delta, dict(zip([*summed, *written], stored, strict=True))


def by_keys(call: Call, saved: Saved) -> tuple[jax.Array, jax.Array, Stored]:
    """dK, dV, and cotangents over columns; a program sums over the query heads of a key head."""
    x, tq, tk, group = call.x, call.tq, call.tk, call.group
    b, groups, s, _ = x.k.shape
    lists = Lists(call.blocks.by_k)
    summed = _learned(call, "column")

    def kernel(*refs: Any) -> None:
        visits, *read, outputs = _split(call, refs)
        inputs = read[1]
        (dk, dv), sums = take(outputs, 2)
        j, g, b = map(pl.program_id, range(3))

        def head(n: Any, carry: Any) -> Any:
            def visit(i: Any, partial: bool, carry: Any) -> Any:
                k_acc, v_acc, totals = carry
                queries = pl.ds(i * tq, tq)
                place = b, g * group + n, i, j
                delta = inputs[3][n, queries]
                pulled = _pull(call, read, place, n, partial, delta)
                k_acc = k_acc + dot(pulled.raw, inputs[0][n, queries, :], (0, 0))
                v_acc = v_acc + dot(pulled.w, inputs[1][n, queries, :], (0, 0))
                parts = _chosen(call, pulled, summed)
                return k_acc, v_acc, [a + part for a, part in zip(totals, parts, strict=True)]

            zeros = [jnp.zeros((1, tk), jnp.float32) for _ in summed]
            *carry, totals = lists.walk(visits, visit, (*carry, zeros))
            for ref, total in zip(sums, totals, strict=True):
                ref[pl.ds(n, 1), :] = total
            return tuple(carry)

        start = tuple(jnp.zeros((tk, y.shape[3]), jnp.float32) for y in (x.k, x.v))
        k_acc, v_acc = lax.fori_loop(0, group, head, start)
        dk[...] = (k_acc * call.rules.scale).astype(dk.dtype)
        dv[...] = v_acc.astype(dv.dtype)

    def key(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tk, width), lambda j, g, b: (b, g, j, 0))

    column = pl.BlockSpec((None, group, tk), lambda j, g, b: (b, g, j))
    columns = jax.ShapeDtypeStruct((b, x.q.shape[1], s), jnp.float32)

    def own(j: Any, g: Any, b: Any) -> tuple[Any, Any]:
        return b, g

    dk, dv, *stored = run(
        kernel,
        grid=(s // tk, groups, b),
        inputs=_inputs(call, saved, lists, own, own, lambda j, g, b: (b, j), group),
        outputs=[
            *((key(y.shape[3]), jax.ShapeDtypeStruct(y.shape, y.dtype)) for y in (x.k, x.v)),
            *((column, columns) for _ in summed),
        ],
    )
    return dk, dv, {n: total[:, :, None] for n, total in zip(summed, stored, strict=True)}


def by_bands(call: Call, saved: Saved) -> Stored:
    """Cotangents of bands as tiles, summed over batch rows: (H, windows, t, t)."""
    summed, t = _learned(call, "band"), call.tq
    if not summed:
        return {}
    b, h, *_ = call.x.q.shape
    count, last = bands.count(call.padded, t, t), call.padded.s // t - 1
    lists = Lists(block_list(_diagonals(call.blocks.states, count, last)))

    def kernel(*refs: Any) -> None:
        visits, *read, outputs = _split(call, refs)
        inputs = read[1]
        n, h, b = map(pl.program_id, range(3))

        def visit(i: Any, partial: bool, totals: Any) -> Any:
            place = b, h, i, i + last - n
            delta = inputs[3][0, pl.ds(i * t, t)]
            pulled = _pull(call, read, place, 0, partial, delta)
            parts = _chosen(call, pulled, summed)
            return [a + part for a, part in zip(totals, parts, strict=True)]

        zeros = [jnp.zeros((t, t), jnp.float32) for _ in summed]
        for ref, total in zip(outputs, lists.walk(visits, visit, zeros), strict=True):
            ref[...] = total

    tiles = pl.BlockSpec((None, None, None, t, t), lambda n, h, b: (b, h, n, 0, 0))
    shape = jax.ShapeDtypeStruct((b, h, count, t, t), jnp.float32)
    stored = run(
        kernel,
        grid=(count, h, b),
        inputs=_inputs(
            call,
            saved,
            lists,
            lambda n, h, b: (b, h),
            lambda n, h, b: (b, h // call.group),
            lambda n, h, b: (b, n),
            1,
        ),
        outputs=[(tiles, shape)] * len(summed),
    )
    return {n: x.sum(0) for n, x in zip(summed, stored, strict=True)}


def _diagonals(states: Any, count: int, last: int) -> Any:
    """States (1 or B, nq, nk) by window and row: (1 or B, windows, nq)."""
    rows = np.arange(states.shape[1])[None]
    cols = rows + last - np.arange(count)[:, None]
    inside = (cols >= 0) & (cols <= last)
    found = states[:, np.broadcast_to(rows, cols.shape), np.where(inside, cols, 0)]
    xp: Any = np if isinstance(states, np.ndarray) else jnp
    return xp.where(inside, found, np.int32(SKIP))


def cotangent(call: Call, n: int, stored: jax.Array) -> jax.Array:
    """What a kernel stored for operand n -> the cotangent of its prepared value."""
    operand = call.reads.operands[n]
    if kind(operand) == "band":
        return _along_diagonals(operand.value, stored)
    if kind(operand) == "head":
        stored = stored.sum(2, keepdims=True)
    if kind(operand) == "tile":  # blocks without a visit were never written
        seen = jnp.asarray(call.blocks.states) != SKIP
        seen = jnp.repeat(jnp.repeat(seen, call.tq, 1), call.tk, 2)
        stored = jnp.where(seen[:, None], stored, 0.0)
    axes = tuple(axis for axis in (0, 1) if operand.value.shape[axis] < stored.shape[axis])
    return stored.sum(axes, keepdims=True)


def _along_diagonals(band: jax.Array, tiles_HxNxTxT: jax.Array) -> jax.Array:
    """Sums along the diagonals of tiles, put back where their windows lie in the band."""
    heads, count, t, _ = tiles_HxNxTxT.shape
    at = Block(0, 0, t, t, t)

    def spread(band: jax.Array) -> jax.Array:
        window = jnp.broadcast_to(band, (heads, band.shape[1]))
        flat = bands.windows(window, t, t).reshape(heads * count, 2 * t - 1)
        return Toeplitz(flat).spread(flat, at).reshape(heads, count, t, t)

    return jax.vjp(spread, band)[1](tiles_HxNxTxT)[0]
