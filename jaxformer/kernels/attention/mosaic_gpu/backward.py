"""The backward kernels: dQ by tiles of queries, dK and dV by tiles of keys.

Both recompute scores from q, k and the saved LSE, so nothing is added up by more than one thread
block: two launches and seven products per tile instead of five, but the result is always the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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
    swizzle_of,
    visit_table,
)
from jaxformer.kernels.attention.mosaic_gpu.terms import Place, Terms
from jaxformer.kernels.attention.request import Request

F32 = jnp.float32


class Arrays(NamedTuple):
    """What the backward pass reads: padded q, k, v, dO (B, L, H, K); lse, delta (B, H, L)."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    do: jax.Array
    lse: jax.Array
    delta: jax.Array


@dataclasses.dataclass(eq=False)
class Pull:
    """`tile.pull_back` inside a kernel: the wanted outputs from raw products."""

    request: Request
    terms: Terms
    programs: dict[bool, Program]  # by partial; outputs are a dict by name

    ahead: bool  # load delta while dO v^T is computed: hides the latency, holds 16 registers

    @classmethod
    def of(
        cls, request: Request, terms: Terms, visits: BlockList, wanted: Any, ahead: bool = True
    ) -> Pull:
        """`wanted(tile.Pulled)` is the dict of outputs."""
        programs = {x: terms.pull_back(partial=x).select(wanted) for x in visits.kinds}
        return cls(request, terms, programs, ahead)

    def needs(self, name: str) -> bool:
        """Whether a product or a statistic is read at all."""
        return any(name in program.inputs for program in self.programs.values())

    @property
    def statistics(self) -> tuple[str, ...]:
        """Which statistics are read."""
        found = {name for name in ("lse", "delta") if self.needs(name)}
        found |= {"delta"} if self.needs("dw") and self.terms.dw_less_delta else set()
        return tuple(sorted(found))

    def statistic(self, refs: Mapping[str, Any], name: str, place: Place) -> Part:
        """The "lse" or "delta" of the queries of a tile."""
        at, over = (place.b, place.h, pl.ds(place.q, place.lengths[0])), place.over("l")
        return Part(over, device.load(refs[name].at[at], over))

    def __call__(
        self,
        refs: Any,
        place: Place,
        partial: bool,
        factors: dict[str, tuple[Any, Any]],
        known: dict[str, Part],
    ) -> dict[str, jax.Array]:
        """The wanted tiles, from the factors in shared memory of "raw" and, where needed, "dw".

        Products are computed where they are first needed: a tile in waiting holds 32 registers.
        """
        known = dict(known)
        read = self.terms.reader(refs, place, known)

        def get(name: str) -> Part:
            if name in self.statistics and name not in known:
                known[name] = self.statistic(refs, name, place)
            if name not in factors:
                return read(name)
            a, b = factors[name][0], device.transposed(factors[name][1])
            if name == "dw" and self.terms.dw_less_delta:
                over, delta = get("delta")
                start = full_tile(Part(over, -delta), place.shape)
                return Part("rc", device.add_products((start, a, b))[0])
            if name == "dw" and self.ahead and "delta" in self.statistics:
                get("delta")
            product = device.multiply(a, b)
            return Part("rc", product * (self.request.rules.scale if name == "raw" else 1.0))

        outputs = self.programs[partial](place.shape, get)
        return {name: full_tile(part, place.shape) for name, part in outputs.items()}

    def inputs(self, saved: Arrays, visits: BlockList, shape: Any, flipped: bool) -> dict[str, Any]:
        """The arrays in global memory that every kernel with this program reads."""
        arrays = {name: x for name, x in saved._asdict().items() if name in ("q", "k")}
        if self.needs("dw"):
            arrays |= {"do": saved.do, "v": saved.v}
        arrays |= {name: getattr(saved, name) for name in self.statistics}
        arrays["visits"] = visit_table(visits)
        return arrays | self.terms.arrays(self.programs.values(), shape, flipped)


# ----------------------------------------------------------------------------------- dQ


def query_pass(
    request: Request,
    config: Config,
    terms: Terms,
    saved: Arrays,
    *,
    dq: bool,
    rows: tuple[str, ...] = (),
    tiles: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """One walk over the tiles by queries.

    dq: "dq", (B, L, H, K) in q's type. rows: row sums of the named outputs, (B, H, padded L).
    tiles: the named outputs themselves, (B, H, padded L, padded S); tiles that the mask skips are
    not written. Names are those of float operands, or "p_dp".
    """
    b, _, h, _ = saved.q.shape
    visits = blocks(request, BLOCK, config.dq_keys).by_q

    def wanted(pulled: tile.Pulled) -> dict[str, Any]:
        outputs = {"p_dp": pulled.p_dp, **pulled.parts}
        return {n: outputs[n] for n in (*rows, *tiles)} | ({"dq": pulled.raw} if dq else {})

    pull = Pull.of(request, terms, visits, wanted)
    kernel = _QueryPass(pull, config, visits, dq, rows, tiles)
    inputs = pull.inputs(saved, visits, kernel.shape, flipped=False)
    inputs["key_head"] = jnp.asarray(HeadTables.of(request).key_head)
    outputs: dict[str, Any] = {}
    if dq:
        outputs["out.dq"] = jax.ShapeDtypeStruct(saved.q.shape, saved.q.dtype)
    padded = terms.padded
    outputs |= {f"out.{n}": jax.ShapeDtypeStruct((b, h, padded.l), F32) for n in rows}
    outputs |= {f"out.{n}": jax.ShapeDtypeStruct((b, h, padded.l, padded.s), F32) for n in tiles}
    scratch: dict[str, Any] = {"block_ready": device.Barriers(COMPUTE, len(kernel.pairs))}
    swizzle = swizzle_of(config.dq_keys)
    for own, streamed in (("q", "k"), ("do", "v")):
        if own in inputs:
            x = inputs[own]
            scratch[f"{own}_block"] = device.Shared((COMPUTE, ROWS, x.shape[-1]), x.dtype, swizzle)
            shape = config.dq_keys, x.shape[-1]
            scratch |= Ring.scratch(
                f"{streamed}_ring", shape, x.dtype, config.back_stages, swizzle=swizzle
            )
    out = device.launch(
        kernel, inputs, outputs, scratch, name="attention_dq",
        grid={"turn": visits.count.shape[1], "batch": b, "head": h}, warpgroups=COMPUTE + 1,
    )  # fmt: skip
    return {name.removeprefix("out."): x for name, x in out.items()}


@dataclasses.dataclass(eq=False)
class _QueryPass:
    pull: Pull
    config: Config
    visits: BlockList
    dq: bool
    rows: tuple[str, ...]
    tiles: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return ROWS, self.config.dq_keys

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Rows of queries that stay, and the rows of keys that pass by."""
        return (("q", "k"), ("do", "v")) if self.pull.needs("dw") else (("q", "k"),)

    def __call__(self, refs: dict[str, Any]) -> None:
        b, h, warpgroup = (device.index(x) for x in ("batch", "head", "warpgroup"))
        work = Visits.of(refs["visits"], b, device.index("turn"))

        @device.when(warpgroup < COMPUTE)
        def _() -> None:
            device.registers(240, more=True)
            self.compute(refs, work, b, h, warpgroup)

        @device.when(warpgroup == COMPUTE)
        def _() -> None:
            device.registers(24, more=False)
            g = refs["key_head"][h]

            def fill(t: Any, _: Any) -> None:
                at = b, pl.ds(work.index(t) * self.config.dq_keys, self.config.dq_keys), g
                for _, name in self.pairs:
                    Ring.of(refs, f"{name}_ring").fill(t, refs[name].at[at])

            device.loop(0, work.count, fill, None)

    def compute(self, refs: Any, work: Visits, b: Any, h: Any, wg: Any) -> None:
        first = work.tile * BLOCK + wg * ROWS
        rows, ready = pl.ds(first, ROWS), refs["block_ready"].at[wg]
        for name, _ in self.pairs:
            device.fetch(refs[name].at[b, rows, h], refs[f"{name}_block"].at[wg], ready)
        device.wait(ready)
        rings = [Ring.of(refs, f"{name}_ring") for _, name in self.pairs]
        place = Place(b, h, first, 0, self.shape)
        known = {x: self.pull.statistic(refs, x, place) for x in self.pull.statistics}

        def visit(t: Any, partial: bool, carry: Any) -> Any:
            dq, sums = carry
            at = place._replace(k=work.index(t) * self.config.dq_keys).hidden()
            keys = [ring.take(t) for ring in rings]
            own = [refs[f"{name}_block"].at[device.opaque(wg)] for name, _ in self.pairs]
            factors = dict(zip(("raw", "dw"), zip(own, keys, strict=True), strict=False))
            pulled = self.pull(refs, at, partial, factors, known)
            for name in self.tiles:
                columns = pl.ds(at.k, self.config.dq_keys)
                refs[f"out.{name}"].at[b, h, rows, columns][...] = pulled[name]
            sums = {name: sums[name] + pulled[name].sum(axis=1) for name in self.rows}
            if self.dq:
                (dq,) = device.add_products((dq, pulled["dq"], keys[0]))
            for ring in rings:
                ring.give_back(t)
            return dq, sums

        sums = {name: device.full((ROWS,), 0.0, "r") for name in self.rows}
        dq = device.full((ROWS, refs["q"].shape[-1]), 0.0, "rc") if self.dq else None
        dq, sums = work.walk(self.visits.kinds, visit, (dq, sums))
        for name in self.rows:
            refs[f"out.{name}"].at[b, h, rows][...] = sums[name]
        if self.dq:
            dq = dq * self.pull.request.rules.scale
            device.put(dq, refs["q_block"].at[wg], refs["out.dq"].at[b, rows, h])
            device.finish_puts()


# -------------------------------------------------------------------------------- dK, dV


def key_pass(
    request: Request,
    config: Config,
    terms: Terms,
    saved: Arrays,
    *,
    sums: tuple[str, ...],
    rows: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """One walk over the tiles by keys, through all query heads of a key head.

    sums: of "dk", "dv", in the shapes of k and v. rows: sums over the queries of the named float
    operands, (B, H, padded S).
    """
    b, _, g, _ = saved.k.shape
    visits = blocks(request, config.dkv_queries, BLOCK).by_k

    def wanted(pulled: tile.Pulled) -> dict[str, Any]:
        outputs = {"dk": pulled.raw, "dv": pulled.w, **pulled.parts}
        return {name: outputs[name] for name in (*sums, *rows)}

    crowded = config.split_dkv or any(terms.axes(name) == "ls" for name in terms.operands)
    pull = Pull.of(request, terms, visits, wanted, ahead=not crowded)
    kernel = _KeyPass(pull, config, visits, sums, rows)
    inputs = pull.inputs(saved, visits, kernel.shape, flipped=True)
    inputs |= {} if "do" in inputs else {"do": saved.do} if "dv" in sums else {}
    heads = HeadTables.of(request)
    inputs |= {"first_head": jnp.asarray(heads.first), "heads": jnp.asarray(heads.heads)}
    shapes = {"dk": saved.k, "dv": saved.v}
    outputs = {f"out.{n}": jax.ShapeDtypeStruct(shapes[n].shape, saved.k.dtype) for n in sums}
    per_key = jax.ShapeDtypeStruct((b, request.sizes.h, terms.padded.s), F32)
    outputs |= {f"out.{n}": per_key for n in rows}
    resident = sum(name in inputs for name in ("k", "v"))
    scratch: dict[str, Any] = {"block_ready": device.Barriers(COMPUTE, resident)}
    swizzle = swizzle_of(config.dkv_queries)
    for name in ("k", "v"):
        if name in inputs or f"d{name}" in sums:
            x = getattr(saved, name)
            scratch[f"{name}_block"] = device.Shared((COMPUTE, ROWS, x.shape[-1]), x.dtype, swizzle)
    for name in ("q", "do"):
        if name in inputs:
            shape = config.dkv_queries, inputs[name].shape[-1]
            scratch |= Ring.scratch(
                f"{name}_ring", shape, saved.q.dtype, config.back_stages, swizzle=swizzle
            )
    out = device.launch(
        kernel, inputs, outputs, scratch, name="_".join(("attention", *sums)),
        grid={"turn": visits.count.shape[1], "batch": b, "head": g}, warpgroups=COMPUTE + 1,
    )  # fmt: skip
    return {name.removeprefix("out."): x for name, x in out.items()}


@dataclasses.dataclass(eq=False)
class _KeyPass:
    pull: Pull
    config: Config
    visits: BlockList
    sums: tuple[str, ...]
    rows: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return ROWS, self.config.dkv_queries

    def __call__(self, refs: dict[str, Any]) -> None:
        b, g, warpgroup = (device.index(x) for x in ("batch", "head", "warpgroup"))
        work = Visits.of(refs["visits"], b, device.index("turn"))
        heads = refs["first_head"][g], refs["first_head"][g + 1]

        @device.when(warpgroup < COMPUTE)
        def _() -> None:
            device.registers(240, more=True)
            self.compute(refs, work, heads, b, g, warpgroup)

        @device.when(warpgroup == COMPUTE)
        def _() -> None:
            device.registers(24, more=False)

            def per_head(i: Any, _: Any) -> None:
                def fill(t: Any, _: Any) -> None:
                    queries = self.config.dkv_queries
                    at = b, pl.ds(work.index(t) * queries, queries), refs["heads"][i]
                    step = (i - heads[0]) * work.count + t
                    for name in self.streamed(refs):
                        Ring.of(refs, f"{name}_ring").fill(step, refs[name].at[at])

                device.loop(0, work.count, fill, None)

            device.loop(*heads, per_head, None)

    @staticmethod
    def streamed(refs: Any) -> list[str]:
        return [name for name in ("q", "do") if f"{name}_ring" in refs]

    def compute(self, refs: Any, work: Visits, heads: Any, b: Any, g: Any, wg: Any) -> None:
        first = work.tile * BLOCK + wg * ROWS
        rows, ready = pl.ds(first, ROWS), refs["block_ready"].at[wg]
        resident = [name for name in ("k", "v") if name in refs]
        for name in resident:
            device.fetch(refs[name].at[b, rows, g], refs[f"{name}_block"].at[wg], ready)
        device.wait(ready)
        rings = {name: Ring.of(refs, f"{name}_ring") for name in self.streamed(refs)}

        def per_head(i: Any, totals: Any) -> Any:
            h = refs["heads"][i]

            def visit(t: Any, partial: bool, carry: Any) -> Any:
                totals, sums = carry
                step = (i - heads[0]) * work.count + t
                queries = work.index(t) * self.config.dkv_queries
                at = Place(b, h, queries, first, self.shape, flipped=True).hidden()
                # On its way while the product is computed.
                known = {"lse": self.pull.statistic(refs, "lse", at)}
                taken = {name: ring.take(step) for name, ring in rings.items()}
                own = [refs[f"{name}_block"].at[device.opaque(wg)] for name in resident]
                pairs = zip(own, taken.values(), strict=False)
                factors = dict(zip(("raw", "dw"), pairs, strict=False))
                pulled = self.pull(refs, at, partial, factors, known)
                right = {"dk": "q", "dv": "do"}
                added = device.add_products(
                    *((totals[n], pulled[n], taken[right[n]]) for n in self.sums)
                )
                for ring in rings.values():
                    ring.give_back(step)
                sums = {name: sums[name] + pulled[name].sum(axis=1) for name in self.rows}
                return dict(zip(self.sums, added, strict=True)), sums

            sums = {name: device.full((ROWS,), 0.0, "r") for name in self.rows}
            totals, sums = work.walk(self.visits.kinds, visit, (totals, sums))
            for name in self.rows:
                refs[f"out.{name}"].at[b, h, rows][...] = sums[name]
            return totals

        sizes = {name: refs[f"out.{name}"].shape[-1] for name in self.sums}
        totals = {name: device.full((ROWS, n), 0.0, "rc") for name, n in sizes.items()}
        totals = device.loop(*heads, per_head, totals)
        scale = {"dk": self.pull.request.rules.scale, "dv": 1.0}
        for name in self.sums:
            staging = refs[f"{name[1:]}_block"].at[wg]
            target = refs[f"out.{name}"].at[b, rows, g]
            device.put(totals[name] * scale[name], staging, target)
        device.finish_puts()
