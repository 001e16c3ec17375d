"""Attention by tiles in plain JAX: memory linear in L, forward and backward. The CPU path.

One loop over chunks of queries, and inside it one loop over the key tiles the mask leaves: first
the FULL ones, without mask arithmetic, then the PARTIAL ones; SKIP tiles are not visited. Which
tiles those are is a table computed while tracing, so the program has the same size for every L.
The backward pass recomputes tiles from the saved q, k, v, o and LSE.

Layout inside: (B, H, L, K), and (B, G, S, K) for the G key heads, of which each serves H / G
consecutive query heads.
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
from jaxformer.kernels.attention.operands import Block, Operand, Sizes
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.tiling import tiling

# --------------------------------------------------------------------------------- layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What has gradients. As the caller gave it, or in kernel layout."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sink: jax.Array | None
    aux: dict[str, Operand]

    @classmethod
    def of(cls, request: Request) -> Inputs:
        aux = {name: x for name, x in request.aux.items() if x.differentiable}
        return cls(request.q, request.k, request.v, request.sink, aux)

    def layout(self, request: Request, padded: Sizes) -> Inputs:
        """Heads before lengths, lengths padded, key heads picked, products in compute type."""
        k, v = self.k, self.v
        if request.rules.head_map is not None:
            heads = np.array(request.rules.head_map)
            k, v = k[:, :, heads], v[:, :, heads]
        sums = request.score_dtype
        sink = None if self.sink is None else self.sink.astype(sums)
        aux = {
            name: dataclasses.replace(x, value=x.value.astype(sums)).prepare(request.sizes, padded)
            for name, x in self.aux.items()
        }
        return Inputs(
            _rows(self.q, padded.l, request), _rows(k, padded.s, request),
            _rows(v, padded.s, request), sink, aux,
        )  # fmt: skip


def _rows(x_BxLxHxK: jax.Array, length: int, request: Request) -> jax.Array:
    """(B, L, H, K) -> (B, H, length, K)."""
    # CPUs have no bfloat16 products: XLA would convert each tile anew, L / tq times.
    cpu = jax.default_backend() == "cpu"
    x = x_BxLxHxK.astype(request.score_dtype if cpu else x_BxLxHxK.dtype).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


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


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int], dtype: Any) -> jax.Array:
    """Product over one axis of each, batched over batch and head."""
    dims = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=dtype)


def _group(x_BxHxtxN: jax.Array, groups: int) -> jax.Array:
    """(B, H, t, n) -> (B, G, H / G * t, n): query heads of a key head, one under another."""
    b, _, _, n = x_BxHxtxN.shape
    return x_BxHxtxN.reshape(b, groups, -1, n)


# --------------------------------------------------------------------------------- the op


def _walk(row: tuple[Any, ...], visit: Callable[[Any, bool, Any], Any], carry: Any) -> Any:
    """Visit the FULL, then the PARTIAL key tiles of one chunk of queries."""
    full, n_full, partial, n_partial = row
    for table, count, is_partial in ((full, n_full, False), (partial, n_partial, True)):
        if table.shape[0]:

            def step(t: Any, carry: Any, table: Any = table, is_partial: bool = is_partial) -> Any:
                return visit(table[t], is_partial, carry)

            carry = lax.fori_loop(0, count, step, carry)
    return carry


@jax.custom_vjp
def chunked(request: Request) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and log-sum-exp (B, H, L)."""
    rules, sizes, sums = request.rules, request.sizes, request.score_dtype
    plan = tiling(request)
    x = Inputs.of(request).layout(request, plan.padded)
    constants = tile.Constants.of(request, plan.padded)
    groups = x.k.shape[1]

    def chunk(args: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        i, q, *row = args
        q = _group(q, groups)
        shape = (sizes.b, sizes.h, plan.tq)

        def look(j: Any, partial: bool) -> tuple[jax.Array, tile.View, dict[str, jax.Array]]:
            at = plan.block(i, j)
            view = constants.view(at, partial=partial)
            aux = {name: o.spread(o.load(at), at) for name, o in x.aux.items()}
            raw = _dot(q, _at(x.k, at.col, plan.tk), (3, 3), sums) * rules.scale
            return tile.scores(rules, raw.reshape(*shape, plan.tk), view, aux), view, aux

        def mix(w: jax.Array, j: Any) -> jax.Array:
            v = _at(x.v, j * plan.tk, plan.tk)
            return _dot(_group(w, groups).astype(v.dtype), v, (3, 2), sums).reshape(*shape, -1)

        def one_pass(j: Any, partial: bool, carry: Any) -> Any:
            m, l, o = carry
            s, view, aux = look(j, partial)
            m_new = jnp.maximum(m, s.max(-1))
            base = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # no key seen yet
            p, shrink = jnp.exp(s - base[..., None]), jnp.exp(m - base)
            l = l * shrink + p.sum(-1)
            if not rules.two_pass:
                w = tile.weights(rules, p, view, aux)
                o = o * shrink[..., None] + mix(w, j)
            return m_new, l, o

        def second_pass(j: Any, partial: bool, o: jax.Array) -> jax.Array:
            s, view, aux = look(j, partial)
            p = tile.probabilities(s, lse[..., None])
            return o + mix(tile.weights(rules, p, view, aux), j)

        o = jnp.zeros((*shape, x.v.shape[-1]), sums)
        m, l, o = _walk(row, one_pass, (*_start(x.sink, shape, sums), o))
        seen = l > 0
        l = jnp.where(seen, l, 1.0)
        lse = jnp.where(seen, jnp.where(seen, m, 0.0) + jnp.log(l), -jnp.inf)
        o = _walk(row, second_pass, o) if rules.two_pass else o / l[..., None]
        return o, lse

    rows = (np.arange(len(plan.n_full)), _chunks(x.q, plan.tq), *plan.tables)
    o, lse = lax.map(chunk, rows)
    return _unchunk(o, sizes.l).swapaxes(1, 2).astype(request.q.dtype), _unchunk(lse, sizes.l)


def _start(sink: jax.Array | None, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Running maximum and sum before the first tile: a sink is a key that is always seen."""
    if sink is None:
        return jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype)
    m = jnp.broadcast_to(sink[:, None], shape)
    return m, (m > -jnp.inf).astype(dtype)


def _forward(request: Request) -> tuple[Any, Any]:
    o, lse = chunked(request)
    return (o, lse), (request, o, lse)


def _backward(saved: Any, cotangents: Any) -> tuple[Request]:
    request, o, lse = saved
    do, dlse = cotangents
    rules, sizes, sums = request.rules, request.sizes, request.score_dtype
    plan = tiling(request)
    x, pull_layout = jax.vjp(lambda x: x.layout(request, plan.padded), Inputs.of(request))
    constants = tile.Constants.of(request, plan.padded)
    groups = x.k.shape[1]

    dlse = jnp.where(lse == -jnp.inf, 0.0, dlse)  # a row that sees nothing is constant
    pad_rows = ((0, 0), (0, 0), (0, plan.padded.l - sizes.l))
    # A nonlinear prob_mod breaks sum_j p_j dp_j = dO . O: its delta is a pass of its own.
    delta = 0.0 if rules.two_pass else jnp.einsum("blhk,blhk->bhl", do.astype(sums), o.astype(sums))
    delta, lse = jnp.pad(delta - dlse, pad_rows), jnp.pad(lse, pad_rows)
    do = _rows(do, plan.padded.l, request)

    def chunk(carry: Any, args: tuple[Any, ...]) -> Any:
        i, q, do, delta, lse, *row = args
        q, do = _group(q, groups), _group(do, groups)
        shape = (sizes.b, sizes.h, plan.tq, plan.tk)

        def pull(j: Any, partial: bool, delta: jax.Array) -> tuple[Block, tile.Pulled]:
            at = plan.block(i, j)
            raw = _dot(q, _at(x.k, at.col, plan.tk), (3, 3), sums).reshape(shape) * rules.scale
            dw = _dot(do, _at(x.v, at.col, plan.tk), (3, 3), sums).reshape(shape)
            parts = {name: operand.load(at) for name, operand in x.aux.items()}
            view = constants.view(at, partial=partial)

            def spread(parts: dict[str, jax.Array]) -> dict[str, jax.Array]:
                return {name: x.aux[name].spread(part, at) for name, part in parts.items()}

            return at, tile.pull_back(rules, raw, dw, lse, delta, view, parts, spread)

        def find_delta(j: Any, partial: bool, found: jax.Array) -> jax.Array:
            return found + pull(j, partial, jnp.zeros_like(found))[1].p_dp.sum(-1)

        if rules.two_pass:
            delta = _walk(row, find_delta, delta)

        def visit(j: Any, partial: bool, carry: Any) -> Any:
            dq, dk, dv, daux = carry
            at, pulled = pull(j, partial, delta)
            k = _at(x.k, at.col, plan.tk)
            w, draw = (_group(t, groups).astype(k.dtype) for t in (pulled.w, pulled.raw))
            dq = dq + _dot(draw, k, (3, 2), sums)
            dk = _add_at(dk, _dot(draw, q, (2, 2), sums), at.col)
            dv = _add_at(dv, _dot(w, do, (2, 2), sums), at.col)
            daux = {n: x.aux[n].deposit(daux[n], part, at) for n, part in pulled.parts.items()}
            return dq, dk, dv, daux

        dq, *rest = _walk(row, visit, (jnp.zeros(q.shape, sums), *carry))
        return tuple(rest), (dq.reshape(*shape[:3], -1), delta)

    totals = (x.k, x.v, {name: operand.value for name, operand in x.aux.items()})
    totals = jax.tree.map(lambda t: jnp.zeros(t.shape, sums), totals)
    per_chunk = [_chunks(t, plan.tq) for t in (x.q, do, delta, lse)]
    rows = (np.arange(len(plan.n_full)), *per_chunk, *plan.tables)
    (dk, dv, daux), (dq, delta) = lax.scan(chunk, totals, rows)

    dsink = None
    if x.sink is not None:
        p = tile.probabilities(x.sink[:, None], lse)
        dsink = -(p * _unchunk(delta, plan.padded.l)).sum((0, 2))
    dq = _unchunk(dq, plan.padded.l) * rules.scale
    daux = {name: dataclasses.replace(o, value=daux[name]) for name, o in x.aux.items()}
    d = Inputs(dq, dk * rules.scale, dv, dsink, daux)
    (d,) = pull_layout(jax.tree.map(lambda dx, x: dx.astype(x.dtype), d, x))
    nothing = dict(mask=None, q_pos=None, k_pos=None, seed=None)
    aux = {n: d.aux.get(n) for n in request.aux}
    return (dataclasses.replace(request, q=d.q, k=d.k, v=d.v, sink=d.sink, aux=aux, **nothing),)


chunked.defvjp(_forward, _backward)
