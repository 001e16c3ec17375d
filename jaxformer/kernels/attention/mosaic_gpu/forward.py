"""The forward kernel: online softmax over the key tiles that the mask leaves.

A thread block takes 128 queries of a head. One warpgroup fetches key and value tiles into two rings
of buffers; two compute, 64 queries each, and take turns: while one multiplies, the other computes
exponentials (the ping-pong of FlashAttention-3, arXiv:2407.08608, section 3.1).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import tile
from jaxformer.kernels.attention.blocks import BlockList, blocks
from jaxformer.kernels.attention.mosaic_gpu import device
from jaxformer.kernels.attention.mosaic_gpu.elementwise import Part, Program, full_tile
from jaxformer.kernels.attention.mosaic_gpu.schedule import (
    BLOCK,
    COMPUTE,
    ROWS,
    Config,
    HeadTables,
    Ring,
    Visits,
    visit_table,
)
from jaxformer.kernels.attention.mosaic_gpu.terms import Place, Terms
from jaxformer.kernels.attention.request import Request

LOG2E = math.log2(math.e)


def forward(
    request: Request, config: Config, terms: Terms, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, H, Kv) and LSE (B, H, padded L) of padded q (B, L, H, K), k and v."""
    b, l, h, _ = q.shape
    visits = blocks(request, BLOCK, config.keys).by_q
    kernel = _Forward(request, config, terms, visits)
    shape = ROWS, config.keys
    programs = [*kernel.scores.values(), *kernel.weights.values()]
    inputs = dict(q=q, k=k, v=v, visits=visit_table(visits))
    inputs["key_head"] = jnp.asarray(HeadTables.of(request).key_head)
    if request.sink is not None:
        inputs["sink"] = request.sink.astype(jnp.float32)
    scratch = {
        "q_block": device.Shared((COMPUTE, ROWS, q.shape[-1]), q.dtype),
        "q_ready": device.Barriers(COMPUTE),
        "turn": device.Barriers(1, COMPUTE),
        **Ring.scratch("k_ring", (config.keys, k.shape[-1]), k.dtype, config.stages),
        **Ring.scratch("v_ring", (config.keys, v.shape[-1]), v.dtype, config.stages),
    }
    if q.shape[-1] != v.shape[-1]:  # otherwise the output leaves by the buffer of the queries
        scratch["o_block"] = device.Shared((COMPUTE, ROWS, v.shape[-1]), q.dtype)
    out = device.launch(
        kernel,
        inputs | terms.arrays(programs, shape, flipped=False),
        {
            "o": jax.ShapeDtypeStruct((b, l, h, v.shape[-1]), q.dtype),
            "lse": jax.ShapeDtypeStruct((b, h, terms.padded.l), jnp.float32),
        },
        scratch,
        name="attention",
        grid={"turn": visits.count.shape[1], "batch": b, "head": h},
        warpgroups=COMPUTE + 1,
    )
    return out["o"], out["lse"]


@dataclasses.dataclass(eq=False)
class _Forward:
    """The kernel: `__call__` is what every warpgroup of a thread block runs."""

    request: Request
    config: Config
    terms: Terms
    visits: BlockList

    def __post_init__(self) -> None:
        kinds = self.visits.kinds
        self.scores = {x: self.terms.scores(partial=x) for x in kinds}
        self.weights = {x: self.terms.weights(partial=x) for x in kinds}

    @property
    def unit(self) -> float:
        """Scores are kept in this multiple of their value: unscaled where nothing modifies them."""
        rules = self.request.rules
        return rules.scale if rules.score_mod is None and rules.scale > 0 else 1.0

    def __call__(self, refs: dict[str, Any]) -> None:
        b, h, warpgroup = (device.index(x) for x in ("batch", "head", "warpgroup"))
        work = Visits.of(refs["visits"], b, device.index("turn"))
        rings = Ring.of(refs, "k_ring"), Ring.of(refs, "v_ring")

        @device.when(warpgroup < COMPUTE)
        def _() -> None:
            device.registers(240, more=True)
            self.compute(refs, work, rings, b, h, warpgroup)

        @device.when(warpgroup == COMPUTE)
        def _() -> None:
            device.registers(24, more=False)
            self.fetch(refs, work, rings, b, refs["key_head"][h])

    def fetch(self, refs: Any, work: Visits, rings: Any, b: Any, g: Any) -> None:
        """Fill the rings; with two passes, the keys go round twice and the values once."""
        k_ring, v_ring = rings

        def rows(t: Any) -> Any:
            return pl.ds(work.index(t) * self.config.keys, self.config.keys)

        def first_pass(t: Any, _: Any) -> None:
            k_ring.fill(t, refs["k"].at[b, rows(t), g])

        def last_pass(t: Any, _: Any) -> None:
            k_ring.fill(t + offset, refs["k"].at[b, rows(t), g])
            v_ring.fill(t, refs["v"].at[b, rows(t), g])

        offset: Any = 0
        if self.request.rules.two_pass:
            device.loop(0, work.count, first_pass, None)
            offset = work.count
        device.loop(0, work.count, last_pass, None)

    # -------------------------------------------------------------------------- compute

    def compute(self, refs: Any, work: Visits, rings: Any, b: Any, h: Any, wg: Any) -> None:
        """The output and the LSE of the 64 queries of a warpgroup."""
        q_block, first = refs["q_block"].at[wg], work.tile * BLOCK + wg * ROWS
        rows = pl.ds(first, ROWS)
        device.fetch(refs["q"].at[b, rows, h], q_block, refs["q_ready"].at[wg])
        device.wait(refs["q_ready"].at[wg])
        head = _Head(self, refs, work, rings, wg, Place(b, h, first, 0, self.shape))
        m, l = self.before(refs, h)
        o = device.full((ROWS, refs["v"].shape[-1]), 0.0, "rc")
        if self.request.rules.two_pass:
            m, l = head.walk(head.first_pass, (m, l))
            l, lse = tile.normaliser(m * self.unit, l)
            o = head.in_turns(head.second_pass(lse), o)
        else:
            o, m, l = head.in_turns(head.one_pass, (o, m, l))
            l, lse = tile.normaliser(m * self.unit, l)
            o = o * device.spread(1.0 / l, o.shape, "r")
        refs["lse"].at[b, h, rows][...] = lse
        staging = refs["o_block"].at[wg] if "o_block" in refs else q_block
        device.put(o, staging, refs["o"].at[b, rows, h])
        device.finish_puts()

    @property
    def shape(self) -> tuple[int, int]:
        return ROWS, self.config.keys

    def before(self, refs: Any, h: Any) -> tuple[Any, Any]:
        """Running maximum and sum before the first tile: a sink is a key that is always seen."""
        nothing = device.full((ROWS,), 0.0, "r")
        if "sink" not in refs:
            return nothing - jnp.inf, nothing
        m = nothing + refs["sink"][h] / self.unit
        return m, jnp.where(m > -jnp.inf, nothing + 1.0, nothing)


@dataclasses.dataclass(eq=False)
class _Head:
    """The tiles of 64 queries of a head: what one warpgroup walks through."""

    kernel: _Forward
    refs: Any
    work: Visits
    rings: tuple[Ring, Ring]
    wg: Any
    place: Place

    def walk(self, visit: Any, carry: Any) -> Any:
        return self.work.walk(self.kernel.visits.kinds, visit, carry)

    def in_turns(self, visit: Any, carry: Any) -> Any:
        """`walk` in ping-pong: each visit meets the other warpgroup twice, half a visit apart."""
        device.when(self.wg == 1)(self.next_turn)
        carry = self.walk(visit, carry)
        device.when(self.wg == 0)(self.next_turn)
        return carry

    def next_turn(self) -> None:
        """Meet the other warpgroup."""
        device.arrive(self.refs["turn"].at[0])
        device.wait(self.refs["turn"].at[0])

    def look(self, t: Any, step: Any, then: Any = None) -> tuple[jax.Array, Place]:
        """Products of the queries with the keys of visit t, the step-th in the ring."""
        k_ring = self.rings[0]
        keys = device.transposed(k_ring.take(step))
        q_block = self.refs["q_block"].at[device.opaque(self.wg)]
        raw = device.multiply(q_block, keys, then)
        k_ring.give_back(step)
        return raw, self.place._replace(k=self.work.index(t) * self.kernel.config.keys).hidden()

    def scores(self, raw: jax.Array, place: Place, partial: bool) -> jax.Array:
        kernel = self.kernel
        if kernel.unit == 1.0:
            raw = raw * kernel.request.rules.scale
        return self.run(kernel.scores[partial], place, raw=raw)

    def weights(self, p: jax.Array, place: Place, partial: bool) -> jax.Array:
        return self.run(self.kernel.weights[partial], place, p=p)

    def run(self, program: Program, place: Place, **computed: jax.Array) -> jax.Array:
        parts = {name: Part("rc", x) for name, x in computed.items()}
        get = self.kernel.terms.reader(self.refs, place, parts)
        return full_tile(program(place.shape, get), place.shape)

    def softmax(self, s: jax.Array, m: jax.Array, l: jax.Array) -> tuple[Any, ...]:
        """exp(s - max), what earlier sums shrink by, and the new running maximum and sum."""
        log2 = self.kernel.unit * LOG2E
        m_new = jnp.maximum(m, s.max(axis=1))
        base = jnp.where(m_new == -jnp.inf, 0.0, m_new) * log2  # no key seen yet
        shrink = jnp.exp2(m * log2 - base)
        p = jnp.exp2(s * log2 - device.spread(base, s.shape, "r"))
        return p, shrink, m_new, l * shrink + p.sum(axis=1)

    def first_pass(self, t: Any, partial: bool, carry: Any) -> Any:
        m, l = carry
        raw, place = self.look(t, t)
        _, _, m, l = self.softmax(self.scores(raw, place, partial), m, l)
        return m, l

    def one_pass(self, t: Any, partial: bool, carry: Any) -> Any:
        o, m, l = carry
        raw, place = self.look(t, t, then=self.next_turn)
        p, shrink, m, l = self.softmax(self.scores(raw, place, partial), m, l)
        w = self.weights(p, place, partial).astype(self.refs["v"].dtype)
        o = o * device.spread(shrink, o.shape, "r")
        return self.add_values(t, o, w, m, l)

    def second_pass(self, lse: jax.Array) -> Any:
        """Visits with known normaliser; the ring of keys has gone round once."""

        def visit(t: Any, partial: bool, o: jax.Array) -> jax.Array:
            raw, place = self.look(t, t + self.work.count, then=self.next_turn)
            s = self.scores(raw, place, partial) * self.kernel.unit
            p = tile.probabilities(s, device.spread(lse, s.shape, "r"))
            w = self.weights(p, place, partial).astype(self.refs["v"].dtype)
            return self.add_values(t, o, w)[0]

        return visit

    def add_values(self, t: Any, o: jax.Array, w: jax.Array, *state: jax.Array) -> Any:
        """O + w v, when it is this warpgroup's turn."""
        v_ring = self.rings[1]
        # The compiler must not move the softmax past the turn: the products have to wait for it.
        o, w, *state = lax.optimization_barrier((o, w, *state))
        device.arrive(self.refs["turn"].at[0])
        v_ring.await_(t)
        device.wait(self.refs["turn"].at[0])
        (o,) = device.add_products((o, w, v_ring.at(t)))
        v_ring.give_back(t)
        return o, *state
