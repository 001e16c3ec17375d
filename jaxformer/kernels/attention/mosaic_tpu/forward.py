"""The forward kernel: one tile of queries against the key tiles its list names.

Grid (B, H, tiles of queries, passes, visits). Running maximum, sum and output stay on the chip
while the visits pass. A nonlinear prob_mod needs the normaliser first, so its visits pass twice:
scores only, then outputs; values are loaded in the second pass alone.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.mosaic_tpu.call import Call, Visits, dot, run
from jaxformer.kernels.attention.reads import take


def forward(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output (B, H, L, Kv) and LSE (B, H, L), with padding."""
    x, tq, tk, group = call.x, call.tq, call.tk, call.group
    visits = Visits(call.blocks.by_q)
    passes = 2 if call.rules.two_pass else 1

    def where(b: Any, h: Any, i: Any, _: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return b, h, i, visits.tile(refs, b, i, t)

    def key(b: Any, h: Any, i: Any, _: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return b, lax.div(h, jnp.int32(group)), visits.tile(refs, b, i, t), 0

    def value(b: Any, h: Any, i: Any, n: Any, t: Any, *refs: Any) -> tuple[Any, ...]:
        return key(b, h, i, n, t if passes == 1 else t * n, *refs)

    def query(b: Any, h: Any, i: Any, *_: Any) -> tuple[Any, ...]:
        return b, h, i, 0

    inputs = [
        (pl.BlockSpec((1, 1, tq, x.q.shape[3]), query), x.q),
        (pl.BlockSpec((1, 1, tk, x.k.shape[3]), key), x.k),
        (pl.BlockSpec((1, 1, tk, x.v.shape[3]), value), x.v),
        *call.operands(where),
    ]
    if x.sink is not None:
        inputs.append((pl.BlockSpec((1, 1, 1, 1), lambda b, h, *_: (0, h, 0, 0)), call.sink()))
    b, h, l, _ = x.q.shape
    out = (pl.BlockSpec((1, 1, tq, x.v.shape[3]), query), (b, h, l, x.v.shape[3]), x.q.dtype)
    norm = (pl.BlockSpec((1, 1, 1, tq), lambda b, h, i, *_: (b, h, 0, i)), (b, h, 1, l), "float32")
    o, lse = run(
        _kernel(call, visits),
        grid=(b, h, l // tq, passes, visits.longest),
        scalars=[*visits.arrays, *call.reads.scalars],
        inputs=inputs,
        outputs=[(spec, jax.ShapeDtypeStruct(*shape)) for spec, *shape in (out, norm)],
        scratch=[(tq, 1), (tq, 1), (tq, x.v.shape[3])],
        sequential=2,
    )
    return o, lse[:, :, 0]


def _kernel(call: Call, visits: Visits) -> Any:
    rules = call.rules
    counts = (
        len(visits.arrays),
        len(call.reads.scalars),
        3,
        len(call.parts),
        int(call.x.sink is not None),
    )

    def kernel(*refs: Any) -> None:
        lists, scalars, (q, k, v), operands, sink, (o, lse, m, l, acc) = take(refs, *counts)
        b, h, i, n, t = map(pl.program_id, range(5))
        last = (n == pl.num_programs(3) - 1) & (t == pl.num_programs(4) - 1)

        @pl.when((n == 0) & (t == 0))
        def _() -> None:
            acc[...] = jnp.zeros_like(acc)
            m[...] = jnp.full_like(m, -jnp.inf)
            l[...] = jnp.zeros_like(l)
            if sink:  # a key that is always seen
                m[...] = jnp.broadcast_to(sink[0][0, 0], m.shape)
                l[...] = (m[...] > -jnp.inf).astype(jnp.float32)

        def look(partial: bool) -> tuple[jax.Array, Any]:
            """The scores of the tile, and what turns its probabilities into outputs."""
            place = b, h, i, visits.tile(lists, b, i, t)
            view, aux = call.look(operands, scalars, place, partial)
            s = tile.scores(rules, dot(q[0, 0], k[0, 0], (1, 1)) * rules.scale, view, aux)
            return s, lambda p: dot(tile.weights(rules, p, view, aux), v[0, 0], (1, 0))

        def one_pass(partial: bool) -> None:
            s, output = look(partial)
            m_new = jnp.maximum(m[...], s.max(1, keepdims=True))
            base = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # no key seen yet
            p, shrink = jnp.exp(s - base), jnp.exp(m[...] - base)
            m[...] = m_new
            l[...] = l[...] * shrink + p.sum(1, keepdims=True)
            if not rules.two_pass:
                acc[...] = acc[...] * shrink + output(p)

        def second_pass(partial: bool) -> None:
            s, output = look(partial)
            acc[...] += output(tile.probabilities(s, m[...]))

        if not rules.two_pass:
            visits.visit(lists, b, i, t, one_pass)
        else:
            pl.when(n == 0)(lambda: visits.visit(lists, b, i, t, one_pass))

            @pl.when((n == 1) & (t == 0))
            def _() -> None:
                m[...] = tile.normaliser(m[...], l[...])[1]

            pl.when(n == 1)(lambda: visits.visit(lists, b, i, t, second_pass))

        @pl.when(last)
        def _() -> None:
            if rules.two_pass:
                o[0, 0], lse[0, 0] = acc[...].astype(o.dtype), m[...].T
            else:
                divisor, found = tile.normaliser(m[...], l[...])
                o[0, 0], lse[0, 0] = (acc[...] / divisor).astype(o.dtype), found.T

    return kernel
