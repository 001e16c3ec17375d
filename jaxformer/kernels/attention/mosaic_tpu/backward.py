"""The backward kernels: by tile of queries for dQ, by tile of keys for dK and dV.

Both recompute their scores, so there are no atomic additions and no order that varies: seven
products instead of five. The first also gathers the cotangents of operands that lie over queries
or over whole heads, the second those that lie over keys. Padded scores are masked in PARTIAL tiles.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.masks import FULL, PARTIAL
from jaxformer.kernels.attention.mosaic_tpu.call import Call, Visits, dot, run
from jaxformer.kernels.attention.mosaic_tpu.parts import Part, Where
from jaxformer.kernels.attention.reads import take
from jaxformer.kernels.attention.saved import Saved


def by_queries(call: Call, saved: Saved) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
    """dQ, the whole delta, and the stored cotangents of operands, by number."""
    x, tq, group = call.x, call.tq, call.group
    visits = Visits(call.blocks.by_q)
    passes = 2 if call.rules.two_pass else 1

    def where(b: Any, h: Any, i: Any, _: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return b, h, i, visits.tile(refs, b, i, t)

    def written(b: Any, h: Any, i: Any, n: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return where(b, h, i, n, t if passes == 1 else t * n, *refs)

    def query(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    def key(*grid: Any) -> tuple[Any, ...]:
        b, h, _, j = where(*grid)
        return b, lax.div(h, jnp.int32(group)), j, 0

    row = pl.BlockSpec((1, 1, 1, tq), lambda b, h, i, *_: (b, h, 0, i))
    parts = call.parts
    kept = [n for n in call.reads.learned if not (parts[n].keys_only or parts[n].shared)]
    outputs = [
        (pl.BlockSpec((1, 1, tq, x.q.shape[3]), query), _like(x.q)),
        *_cotangents(call, kept, written),
    ]
    if passes == 2:
        outputs.append((row, jax.ShapeDtypeStruct(_row(saved.delta).shape, jnp.float32)))
    b, h, l, _ = x.q.shape
    dq, *rest = run(
        _query_kernel(call, visits, kept),
        grid=(b, h, l // tq, passes, visits.longest),
        scalars=[*visits.arrays, *call.reads.scalars],
        inputs=_inputs(call, saved, query, key, row, where),
        outputs=outputs,
        scratch=[(tq, x.q.shape[3]), (tq, 1)],
        sequential=3,
    )
    delta = rest.pop()[:, :, 0] if passes == 2 else saved.delta
    return dq, delta, dict(zip(kept, rest, strict=True))


def by_keys(call: Call, saved: Saved) -> tuple[jax.Array, jax.Array, dict[int, jax.Array]]:
    """dK, dV, and the stored cotangents of operands that lie over keys, by number."""
    x, tq, tk, group = call.x, call.tq, call.tk, call.group
    visits = Visits(call.blocks.by_k)

    def where(b: Any, g: Any, j: Any, n: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return b, g * group + n, visits.tile(refs, b, j, t), j

    def query(*grid: Any) -> tuple[Any, ...]:
        b, h, i, _ = where(*grid)
        return b, h, i, 0

    def key(b: Any, g: Any, j: Any, *_: Any) -> tuple[Any, ...]:
        return b, g, j, 0

    def across(*grid: Any) -> tuple[Any, ...]:
        b, h, i, _ = where(*grid)
        return b, h, 0, i

    kept = [n for n in call.reads.learned if call.parts[n].keys_only]
    b, groups, s, _ = x.k.shape
    dk, dv, *rest = run(
        _key_kernel(call, visits, kept),
        grid=(b, groups, s // tk, group, visits.longest),
        scalars=[*visits.arrays, *call.reads.scalars],
        inputs=_inputs(call, saved, query, key, pl.BlockSpec((1, 1, 1, tq), across), where),
        outputs=[
            *((pl.BlockSpec((1, 1, tk, y.shape[3]), key), _like(y)) for y in (x.k, x.v)),
            *_cotangents(call, kept, where),
        ],
        scratch=[(tk, x.k.shape[3]), (tk, x.v.shape[3])],
        sequential=2,
    )
    return dk, dv, dict(zip(kept, rest, strict=True))


def by_tiles(call: Call, saved: Saved, n: int) -> jax.Array:
    """The cotangent of operand n, a number per score that batch rows or heads share.

    The grid runs over the tiles of the operand, and within each over those that share it: what
    would be B * H matrices of scores is summed before it is written.
    """
    part, (b, h, *_) = call.parts[n], call.x.q.shape
    tq, tk, states = call.tq, call.tk, call.blocks.states
    nq, nk = states.shape[1:]
    own = b if part.has[0] else 1, h if part.has[1] else 1

    def where(b: Any, h: Any, i: Any, j: Any, more_b: Any, more_h: Any, *_: Any) -> tuple[Any, ...]:
        return b + more_b, h + more_h, i, j

    def query(*grid: Any) -> tuple[Any, ...]:
        b, h, i, _ = where(*grid)
        return b, h, i, 0

    def key(*grid: Any) -> tuple[Any, ...]:
        b, h, _, j = where(*grid)
        return b, lax.div(h, jnp.int32(call.group)), j, 0

    def across(*grid: Any) -> tuple[Any, ...]:
        b, h, i, _ = where(*grid)
        return b, h, 0, i

    def kernel(*refs: Any) -> None:
        (state,), scalars, inputs, operands, (out,) = take(
            refs, 1, len(call.reads.scalars), INPUTS, len(call.parts)
        )
        grid = [pl.program_id(axis) for axis in range(6)]
        b, h, i, j = where(*grid)
        pl.when((grid[4] == 0) & (grid[5] == 0))(lambda: _clear([(part, out)], "tile"))
        found = state[((b if states.shape[0] > 1 else 0) * nq + i) * nk + j]

        def visit(partial: bool) -> None:
            delta = inputs[5][0, 0, 0]
            pulled = _pull(call, inputs, operands, scalars, (b, h, i, j), delta, partial)
            part.add(out, _chosen(call, pulled, [n])[0], i, j)

        for partial in call.blocks.by_q.kinds:
            pl.when(found == (PARTIAL if partial else FULL))(functools.partial(visit, partial))

    tile_of = pl.BlockSpec((1, 1, tq, tk), lambda b, h, i, j, *_: (b, h, i, j))
    shape = jax.ShapeDtypeStruct((*own, nq * tq, nk * tk), jnp.float32)
    (stored,) = run(
        kernel,
        grid=(*own, nq, nk, b // own[0], h // own[1]),
        scalars=[states, *call.reads.scalars],
        inputs=_inputs(call, saved, query, key, pl.BlockSpec((1, 1, 1, tq), across), where),
        outputs=[(tile_of, shape)],
        scratch=[],
        sequential=2,
    )
    return stored


def _inputs(
    call: Call, saved: Saved, query: Any, key: Any, row: pl.BlockSpec, where: Where
) -> list[tuple[pl.BlockSpec, jax.Array]]:
    x, tq, tk = call.x, call.tq, call.tk
    by_q = [(pl.BlockSpec((1, 1, tq, y.shape[3]), query), y) for y in (x.q, saved.do)]
    by_k = [(pl.BlockSpec((1, 1, tk, y.shape[3]), key), y) for y in (x.k, x.v)]
    rows = [(row, _row(y)) for y in (saved.lse, saved.delta)]
    return [*by_q, *by_k, *rows, *call.operands(where)]


INPUTS = 6  # q, dO, k, v, LSE, delta


def _query_kernel(call: Call, visits: Visits, kept: list[int]) -> Any:
    counts = len(visits.arrays), len(call.reads.scalars), INPUTS, len(call.parts), 1, len(kept)
    rules = call.rules

    def kernel(*refs: Any) -> None:
        lists, scalars, inputs, operands, (dq,), stored, rest = take(refs, *counts)
        acc, delta = rest[-2:]
        b, h, i, n, t = map(pl.program_id, range(5))
        j = visits.tile(lists, b, i, t)
        stores = [(call.parts[x], ref) for x, ref in zip(kept, stored, strict=True)]

        @pl.when((n == 0) & (t == 0))
        def _() -> None:
            acc[...] = jnp.zeros_like(acc)
            delta[...] = inputs[5][0, 0].T
            # A tile's cotangent is written whole by its visit; without one this stays.
            _clear(stores, "tile", "row")
            pl.when(i == 0)(lambda: _clear(stores, "head"))

        def pull(partial: bool) -> tile.Pulled:
            return _pull(call, inputs, operands, scalars, (b, h, i, j), delta[...][:, 0], partial)

        def find_delta(partial: bool) -> None:
            delta[...] += pull(partial).p_dp.sum(1, keepdims=True)

        def visit(partial: bool) -> None:
            pulled = pull(partial)
            acc[...] += dot(pulled.raw, inputs[2][0, 0], (1, 0))
            for (part, ref), cotangent in zip(stores, _chosen(call, pulled, kept), strict=True):
                part.add(ref, cotangent, i, j)

        if not rules.two_pass:
            visits.visit(lists, b, i, t, visit)
        else:
            # Every visit of the first pass needs the delta it began with.
            pl.when(n == 0)(lambda: visits.visit(lists, b, i, t, find_delta))
            pl.when(n == 1)(lambda: visits.visit(lists, b, i, t, visit))

        @pl.when((n == pl.num_programs(3) - 1) & (t == pl.num_programs(4) - 1))
        def _() -> None:
            dq[0, 0] = (acc[...] * rules.scale).astype(dq.dtype)
            if rules.two_pass:
                rest[0][0, 0] = delta[...].T

    return kernel


def _key_kernel(call: Call, visits: Visits, kept: list[int]) -> Any:
    counts = len(visits.arrays), len(call.reads.scalars), INPUTS, len(call.parts), 2, len(kept)

    def kernel(*refs: Any) -> None:
        lists, scalars, inputs, operands, (dk, dv), stored, (k_acc, v_acc) = take(refs, *counts)
        b, g, j, n, t = map(pl.program_id, range(5))
        h, i = g * call.group + n, visits.tile(lists, b, j, t)
        stores = [(call.parts[x], ref) for x, ref in zip(kept, stored, strict=True)]

        @pl.when((n == 0) & (t == 0))
        def _() -> None:
            k_acc[...], v_acc[...] = jnp.zeros_like(k_acc), jnp.zeros_like(v_acc)

        pl.when(t == 0)(lambda: _clear(stores, "column"))

        def visit(partial: bool) -> None:
            delta = inputs[5][0, 0, 0]
            pulled = _pull(call, inputs, operands, scalars, (b, h, i, j), delta, partial)
            k_acc[...] += dot(pulled.raw, inputs[0][0, 0], (0, 0))
            v_acc[...] += dot(pulled.w, inputs[1][0, 0], (0, 0))
            for (part, ref), cotangent in zip(stores, _chosen(call, pulled, kept), strict=True):
                part.add(ref, cotangent, i, j)

        visits.visit(lists, b, j, t, visit)

        @pl.when((n == pl.num_programs(3) - 1) & (t == pl.num_programs(4) - 1))
        def _() -> None:
            dk[0, 0] = (k_acc[...] * call.rules.scale).astype(dk.dtype)
            dv[0, 0] = v_acc[...].astype(dv.dtype)

    return kernel


def _pull(
    call: Call,
    inputs: list[Any],
    operands: list[Any],
    scalars: list[Any],
    place: tuple[Any, Any, Any, Any],
    delta: jax.Array,
    partial: bool,
) -> tile.Pulled:
    q, do, k, v, lse, _ = inputs
    view, aux = call.look(operands, scalars, place, partial)
    raw = dot(q[0, 0], k[0, 0], (1, 1)) * call.rules.scale
    dw = dot(do[0, 0], v[0, 0], (1, 1))
    return tile.pull_back(call.rules, raw, dw, lse[0, 0, 0], delta, view, aux, lambda x: x)


def _chosen(call: Call, pulled: tile.Pulled, kept: list[int]) -> list[jax.Array]:
    """The cotangents of the kept operands; `pulled.parts` is in the order of `learned`."""
    by_number = dict(zip(call.reads.learned, jax.tree.leaves(pulled.parts), strict=True))
    return [by_number[n] for n in kept]


def _cotangents(
    call: Call, kept: list[int], where: Where
) -> list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]]:
    found = []
    for n in kept:
        spec, shape = call.parts[n].cotangent(where)
        found.append((spec, jax.ShapeDtypeStruct(shape, jnp.float32)))
    return found


def _clear(stores: list[tuple[Part, Any]], *kinds: str) -> None:
    for part, ref in stores:
        if part.kept_for in kinds:
            ref[...] = jnp.zeros_like(ref)


def _row(x_BxHxL: jax.Array) -> jax.Array:
    """(B, H, 1, L): along lanes, as operands are."""
    return x_BxHxL[:, :, None]


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
