"""The forward kernel: a program per tile of queries, a loop over the key tiles of its list."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.operands import PerHead
from jaxformer.kernels.attention.reads import take
from jaxformer.kernels.attention.triton.call import Call, Lists, dot, rows, run


def forward(call: Call) -> tuple[jax.Array, jax.Array]:
    """Output (B, H, L, Kv) and LSE (B, H, L), with padding. Grid (tiles of queries, H, B)."""
    x, tq = call.x, call.tq
    b, h, l, _ = x.q.shape
    lists = Lists(call.blocks.by_q)

    def own(i: Any, h: Any, b: Any) -> tuple[Any, Any]:
        return b, h

    def shared(i: Any, h: Any, b: Any) -> tuple[Any, Any]:
        return b, h // call.group

    def query(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, tq, width), lambda i, h, b: (b, h, i, 0))

    inputs = [
        *lists.inputs(lambda i, h, b: (b, i)),
        *call.scalars(),
        (query(x.q.shape[3]), x.q),
        *((rows(y, 1, shared), y) for y in (x.k, x.v)),
        *call.operands(1, own),
    ]
    if x.sink is not None:
        sink = PerHead(x.sink).prepare(call.padded, call.padded).value
        inputs.append((rows(sink, 1, own), sink))
    norm = pl.BlockSpec((None, None, tq), lambda i, h, b: (b, h, i))
    o, lse = run(
        _kernel(call, lists),
        grid=(l // tq, h, b),
        inputs=inputs,
        outputs=[
            (query(x.v.shape[3]), jax.ShapeDtypeStruct((b, h, l, x.v.shape[3]), x.q.dtype)),
            (norm, jax.ShapeDtypeStruct((b, h, l), jnp.float32)),
        ],
    )
    return o, lse


def _kernel(call: Call, lists: Lists) -> Any:
    rules, tk = call.rules, call.tk
    shape = call.tq, call.x.v.shape[3]
    operands = len(call.reads.operands)
    counts = 3, len(call.reads.scalars), 3, operands, int(call.x.sink is not None)

    def kernel(*refs: Any) -> None:
        visits, scalars, (q, k, v), operands, sink, (o, lse) = take(refs, *counts)
        i, h, b = map(pl.program_id, range(3))

        def look(j: Any, partial: bool) -> tuple[jax.Array, Any]:
            """The scores of a tile, and what turns its probabilities into outputs."""
            view, aux = call.look(operands, scalars, (b, h, i, j), 0, partial)
            keys = pl.ds(j * tk, tk)
            s = tile.scores(rules, dot(q[...], k[0, keys, :], (1, 1)) * rules.scale, view, aux)
            return s, lambda p: dot(tile.weights(rules, p, view, aux), v[0, keys, :], (1, 0))

        def one_pass(j: Any, partial: bool, carry: Any) -> Any:
            m, l, acc = carry
            s, output = look(j, partial)
            m_new = jnp.maximum(m, s.max(1))
            base = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # no key seen yet
            p, shrink = jnp.exp(s - base[:, None]), jnp.exp(m - base)
            if not rules.two_pass:
                acc = acc * shrink[:, None] + output(p)
            return m_new, l * shrink + p.sum(1), acc

        m, l = jnp.full((call.tq,), -jnp.inf, jnp.float32), jnp.zeros((call.tq,), jnp.float32)
        if sink:  # a key that is always seen
            m = jnp.broadcast_to(sink[0][0, 0, 0], (call.tq,))
            l = jnp.where(m > -jnp.inf, 1.0, 0.0)
        m, l, acc = lists.walk(visits, one_pass, (m, l, jnp.zeros(shape, jnp.float32)))
        l, norm = tile.normaliser(m, l)
        if rules.two_pass:

            def second_pass(j: Any, partial: bool, acc: jax.Array) -> jax.Array:
                s, output = look(j, partial)
                return acc + output(tile.probabilities(s, norm[:, None]))

            acc = lists.walk(visits, second_pass, jnp.zeros(shape, jnp.float32))
        else:
            acc = acc / l[:, None]
        o[...], lse[...] = acc.astype(o.dtype), norm

    return kernel
