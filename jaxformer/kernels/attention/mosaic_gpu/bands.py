"""Gradients of Toeplitz operands: sums of tiles along the diagonals of the score matrix.

A launch of its own, in which a thread block owns one diagonal of 64 x 64 tiles and adds their
cotangents in registers; the sums within the tiles are left to XLA. No atomics, so the result is
always the same; two products more per tile, and only where such an operand is learned.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl

from jaxformer.kernels.attention.blocks import BlockList, block_list, inner
from jaxformer.kernels.attention.masks import Grid
from jaxformer.kernels.attention.mosaic_gpu import device
from jaxformer.kernels.attention.mosaic_gpu.backward import Arrays, Pull
from jaxformer.kernels.attention.mosaic_gpu.schedule import ROWS, HeadTables, Ring, Visits
from jaxformer.kernels.attention.mosaic_gpu.terms import Place, Terms, band_tiles
from jaxformer.kernels.attention.request import Request

F32 = jnp.float32


def band_pass(
    request: Request, terms: Terms, saved: Arrays, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    """Cotangents of the named Toeplitz operands, (H, padded L + padded S - 1) each."""
    b, _, h, size = saved.q.shape
    padded = terms.padded
    visits = diagonals(request, padded.l // ROWS, padded.s // ROWS)
    pull = Pull.of(request, terms, visits, lambda x: {name: x.parts[name] for name in names})
    inputs = pull.inputs(saved, visits, (ROWS, ROWS), flipped=False)
    del inputs["visits"]
    inputs["visits"] = jnp.concatenate(
        [jnp.stack([visits.full, visits.count], -1), visits.index], -1
    ).astype(jnp.int32)
    inputs["key_head"] = jnp.asarray(HeadTables.of(request).key_head)
    n = visits.count.shape[1]
    stages = 2 if size <= 128 else 1
    scratch: dict[str, Any] = {}
    for name in ("q", "k", "do", "v"):
        if name in inputs:
            x = inputs[name]
            scratch |= Ring.scratch(f"{name}_ring", (ROWS, x.shape[-1]), x.dtype, stages, readers=1)
    out = device.launch(
        _BandPass(pull, visits, names, b), inputs,
        {f"out.{name}": jax.ShapeDtypeStruct((h, n, ROWS, ROWS), F32) for name in names},
        scratch, name="attention_bands", grid={"diagonal": n, "head": h}, warpgroups=2,
    )  # fmt: skip
    band = jax.ShapeDtypeStruct((h, padded.l + padded.s - 1), F32)
    fold = jax.linear_transpose(lambda x: band_tiles(x, (ROWS, ROWS)), band)
    return {name: fold(out[f"out.{name}"])[0] for name in names}


def diagonals(request: Request, nq: int, nk: int) -> BlockList:
    """Per diagonal of 64 x 64 tiles, numbered as in `bands.number`, the tiles of queries on it."""
    sizes = request.sizes
    grid = Grid.of(sizes, ROWS, ROWS, request.q_pos, request.k_pos)
    states = inner(request.mask.tile_states(grid), sizes.l % ROWS, sizes.s % ROWS)
    xp: Any = np if isinstance(states, np.ndarray) else jnp
    rest = (0, 0), (0, nq - states.shape[1]), (0, nk - states.shape[2])
    states = xp.pad(states, rest)  # what is beyond the lengths is skipped
    i = np.arange(nq)
    j = i - np.arange(nq + nk - 1)[:, None] + nk - 1
    on_it = (j >= 0) & (j < nk)
    return block_list(xp.where(on_it, states[:, i, np.clip(j, 0, nk - 1)], 0))


@dataclasses.dataclass(eq=False)
class _BandPass:
    pull: Pull
    visits: BlockList
    names: tuple[str, ...]
    batch: int

    def __call__(self, refs: dict[str, Any]) -> None:
        h, diagonal, warpgroup = (device.index(x) for x in ("head", "diagonal", "warpgroup"))
        table = refs["visits"]

        def work(b: Any) -> Visits:
            row = b if table.shape[0] > 1 else 0
            full, count = table[row, diagonal, 0], table[row, diagonal, 1]
            return Visits(diagonal, full, count, lambda t: table[row, diagonal, t + 2])

        def first(i: Any) -> tuple[Any, Any]:
            """Query and key where the tile in row i of the diagonal begins."""
            past = self.pull.terms.padded.s // ROWS - 1 - diagonal
            return i * ROWS, (i + past) * ROWS

        @device.when(warpgroup == 0)
        def _() -> None:
            self.compute(refs, work, first, h, diagonal)

        @device.when(warpgroup == 1)
        def _() -> None:
            g = refs["key_head"][h]

            def per_row(b: Any, step: Any) -> Any:
                visits = work(b)

                def fill(t: Any, _: Any) -> None:
                    q, k = first(visits.index(t))
                    for name, start, head in (("q", q, h), ("k", k, g), ("do", q, h), ("v", k, g)):
                        if f"{name}_ring" in refs:
                            source = refs[name].at[b, pl.ds(start, ROWS), head]
                            Ring.of(refs, f"{name}_ring").fill(step + t, source)

                device.loop(0, visits.count, fill, None)
                return step + visits.count

            device.loop(0, self.batch, per_row, jnp.int32(0))

    def compute(self, refs: Any, work: Any, first: Any, h: Any, diagonal: Any) -> None:
        names = [name for name in ("q", "k", "do", "v") if f"{name}_ring" in refs]
        rings = {name: Ring.of(refs, f"{name}_ring") for name in names}

        def per_row(b: Any, carry: Any) -> Any:
            step, sums = carry
            visits = work(b)

            def visit(t: Any, partial: bool, sums: Any) -> Any:
                place = Place(b, h, *first(visits.index(t)), (ROWS, ROWS))
                x = {name: ring.take(step + t) for name, ring in rings.items()}
                factors = {"raw": (x["q"], x["k"])}
                factors |= {"dw": (x["do"], x["v"])} if "do" in x else {}
                pulled = self.pull(refs, place, partial, factors, {})
                for ring in rings.values():
                    ring.give_back(step + t)
                return {name: sums[name] + pulled[name] for name in self.names}

            return step + visits.count, visits.walk(self.visits.kinds, visit, sums)

        sums = {name: device.full((ROWS, ROWS), 0.0, "rc") for name in self.names}
        _, sums = device.loop(0, self.batch, per_row, (jnp.int32(0), sums))
        for name in self.names:
            refs[f"out.{name}"].at[h, diagonal][...] = sums[name]
