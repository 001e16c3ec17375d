"""Linear attention on Hopper in Pallas Mosaic GPU.

A thread block takes one segment of one head and walks over its chunks of 64 positions. One
warpgroup fetches; each of the others owns 64 columns of the values and with them of the state, so
they share what is fetched and never meet. The float32 state stays in registers, the accumulator of
a tensor core product; a rounded copy in shared memory is what the queries are multiplied with.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxformer.kernels.attention.mosaic_gpu import device
from jaxformer.kernels.attention.mosaic_gpu.schedule import Ring
from jaxformer.kernels.linear_attention.sums import Tiles

CHUNK = 64  # rows of a tensor core product
COLUMNS = 64  # of a warpgroup
PROCESSORS = 132  # of an H100 or H200
SHARED = 200 * 1024  # bytes for the rings and the state; 227 KiB there are


@dataclasses.dataclass(frozen=True)
class MosaicGPU:
    """`Primitives` as one kernel: with keys it keeps a state, with queries it reads it."""

    def states(self, k: jax.Array, v: jax.Array, tiles: Tiles) -> jax.Array:
        return _launch(None, k, v, None, tiles, reverse=False, dtype=jnp.float32)

    def read(self, q: jax.Array, state: jax.Array, tiles: Tiles, *, dtype: Any) -> jax.Array:
        segments = math.gcd(q.shape[1] // CHUNK, tiles.segments)
        tiles = tiles._replace(segments=segments)
        return _launch(q, None, None, state[:, None], tiles, reverse=False, dtype=dtype)

    def scan(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        before: jax.Array | None,
        tiles: Tiles,
        *,
        reverse: bool,
        dtype: Any,
    ) -> jax.Array:
        return _launch(q, k, v, before, tiles, reverse=reverse, dtype=dtype)


def tiles_of(batch: int, length: int, heads: int, features: int) -> Tiles:
    """Segments enough for every processor, of four chunks at least: entering one costs one more."""
    columns = -(-features // COLUMNS)
    blocks = batch * heads * -(-columns // _warpgroups(columns))
    most = min(PROCESSORS // blocks, length // (4 * CHUNK))
    return Tiles(CHUNK, COLUMNS, 2 ** (max(most, 1).bit_length() - 1))


def _launch(
    q: jax.Array | None,
    k: jax.Array | None,
    v: jax.Array | None,
    before: jax.Array | None,
    tiles: Tiles,
    *,
    reverse: bool,
    dtype: Any,
) -> jax.Array:
    """Outputs (B, L, H, N) if there are queries, else states (B, P, H, K, N)."""
    (b, length, h, size), n = (k if q is None else q).shape, (before if v is None else v).shape[-1]
    columns = -(-n // COLUMNS)
    inputs = {name: _whole(x, -1) for name, x in (("q", q), ("k", k)) if x is not None}
    if v is not None:
        inputs["v"] = _by_columns(v)
    if before is not None:
        inputs["before"] = _by_columns(_whole(before, -2)).swapaxes(-3, -2)
    if q is None:
        shape = b, tiles.segments, h, columns, inputs["k"].shape[-1], COLUMNS
    else:
        shape = b, length, h, columns, COLUMNS
    kernel = _Kernel(_warpgroups(columns), tiles.segments, reverse)
    blocks = columns // kernel.columns
    (found,) = device.launch(
        kernel,
        inputs,
        {"state" if q is None else "o": jax.ShapeDtypeStruct(shape, dtype)},
        kernel.scratch(inputs),
        name="linear_attention",
        grid={"batch": b, "head": h, "segment": tiles.segments, "column": blocks},
        warpgroups=kernel.columns + 1,
    ).values()
    if q is None:
        found = found.swapaxes(-3, -2)[..., :size, :, :]
    return found.reshape(*found.shape[:-2], -1)[..., :n]


def _warpgroups(columns: int) -> int:
    """How many share a thread block: two, if that leaves no block with one."""
    return 1 if columns % 2 else 2


def _whole(x: jax.Array, axis: int) -> jax.Array:
    """Zeros after the features, up to whole rows of the tensor cores."""
    grow = [(0, 0)] * x.ndim
    grow[axis] = (0, -x.shape[axis] % COLUMNS)
    return jnp.pad(x, grow)


def _by_columns(x: jax.Array) -> jax.Array:
    """(..., N) -> (..., columns, 64)."""
    x = _whole(x, -1)
    return x.reshape(*x.shape[:-1], -1, COLUMNS)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What every warpgroup of a thread block runs; which parts, the references decide."""

    columns: int  # warpgroups that compute
    segments: int
    reverse: bool

    def scratch(self, inputs: dict[str, jax.Array]) -> dict[str, Any]:
        """Rings of q, k and each warpgroup's v; the state as the queries see it."""
        size = inputs["q" if "q" in inputs else "k"].shape[-1]
        rings = {name: (size, self.columns) for name in ("q", "k") if name in inputs}
        if "v" in inputs:
            rings |= {f"v{c}": (COLUMNS, 1) for c in range(self.columns)}
        rounded = device.Shared((self.columns, size, COLUMNS), jnp.bfloat16)
        stage = sum(2 * CHUNK * width for width, _ in rings.values())
        stages = max(2, min(4, (SHARED - rounded.bytes) // stage))
        found: dict[str, Any] = {"rounded": rounded} if "q" in inputs else {}
        for name, (width, readers) in rings.items():
            found |= Ring.scratch(f"{name}_ring", (CHUNK, width), jnp.bfloat16, stages, readers)
        return found

    def __call__(self, refs: dict[str, Any]) -> None:
        warpgroup = device.index("warpgroup")
        names = [name.removesuffix("_ring") for name in refs if name.endswith("_ring")]
        rings = {name: Ring.of(refs, f"{name}_ring") for name in names}
        for c in range(self.columns):
            seen = {"q": "q", "k": "k", "v": f"v{c}"}
            own = {name: rings[ring] for name, ring in seen.items() if ring in rings}

            @device.when(warpgroup == c)
            def _(own: dict[str, Ring] = own, c: int = c) -> None:
                device.registers(240, more=True)
                self.compute(refs, own, c)

        @device.when(warpgroup == self.columns)
        def _() -> None:
            device.registers(24, more=False)
            self.fetch(refs, rings)

    def rows(self, refs: Any, t: Any) -> Any:
        """The positions of the t-th chunk that this segment takes."""
        chunks = self.chunks(refs)
        t = chunks - 1 - t if self.reverse else t
        return pl.ds((device.index("segment") * chunks + t) * CHUNK, CHUNK)

    def chunks(self, refs: Any) -> int:
        """Chunks of a segment."""
        return refs["q" if "q" in refs else "k"].shape[1] // (CHUNK * self.segments)

    def column(self, c: int) -> Any:
        return device.index("column") * self.columns + c

    def fetch(self, refs: Any, rings: dict[str, Ring]) -> None:
        b, h = device.index("batch"), device.index("head")

        def step(t: Any, _: Any) -> None:
            rows = self.rows(refs, t)
            for name, ring in rings.items():
                column = (self.column(int(name[1:])),) if name.startswith("v") else ()
                ring.fill(t, refs[name[0]].at[(b, rows, h, *column)])

        device.loop(0, self.chunks(refs), step, None)

    def compute(self, refs: Any, rings: dict[str, Ring], c: int) -> None:
        """The outputs, or the state, of 64 columns of the values."""
        b, h, segment = (device.index(x) for x in ("batch", "head", "segment"))
        rounded = refs["rounded"].at[c] if "q" in refs else None
        if "before" in refs:
            entered = segment if refs["before"].shape[1] > 1 else 0  # `read` has one for all
            state = device.load(refs["before"].at[b, entered, h, self.column(c)], "rc")
        else:
            state = device.full((refs["k"].shape[-1], COLUMNS), 0.0, "rc")
        if rounded is not None:
            device.keep(state, rounded)

        def step(t: Any, state: Any) -> Any:
            blocks = {name: ring.take(t) for name, ring in rings.items()}
            if rounded is not None:
                # Opaque, or its addresses wait in registers through the loop, and one too many.
                o = self.output(blocks, refs["rounded"].at[device.opaque(jnp.int32(c))])
                target = refs["o"].at[b, self.rows(refs, t), h, self.column(c)]
                target[...] = o.astype(target.dtype)
            if "k" in blocks:
                (state,) = device.add_products((state, device.transposed(blocks["k"]), blocks["v"]))
                if rounded is not None:
                    device.keep(state, rounded)
            for ring in rings.values():
                ring.give_back(t)
            return state

        state = device.loop(0, self.chunks(refs), step, state)
        if "state" in refs:
            refs["state"].at[b, segment, h, self.column(c)][...] = state

    def output(self, blocks: dict[str, Any], rounded: Any) -> jax.Array:
        """Q state, and with keys what the chunk adds itself: `tile.chunk_step` on tensor cores."""
        o = device.multiply(blocks["q"], rounded)
        if "k" not in blocks:
            return o
        scores = device.multiply(blocks["q"], device.transposed(blocks["k"]))
        row, column = (
            device.spread(device.count(CHUNK, over), scores.shape, over) for over in ("r", "c")
        )
        seen = row <= column if self.reverse else row >= column
        scores = jnp.where(seen, scores, 0.0)
        return device.add_products((o, scores, blocks["v"]))[0]
