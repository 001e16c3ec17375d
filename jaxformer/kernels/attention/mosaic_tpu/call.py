"""One attention call as the kernels see it: tiles, lists of visits, operands, scalars."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxformer.kernels.attention.blocks import BlockList, Blocks, blocks
from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.mosaic_tpu.parts import Part, Where
from jaxformer.kernels.attention.operands import PerHead, Sizes
from jaxformer.kernels.attention.reads import Reads
from jaxformer.kernels.attention.request import Request, Rules
from jaxformer.kernels.attention.tile import View

TILE = 512  # queries and keys of a tile, at most: four float32 tiles of scores take 4 MiB of VMEM
LANES = 128


@dataclasses.dataclass(frozen=True)
class Visits:
    """A block list as arrays for scalar prefetch: only those that the lists differ by."""

    visits: BlockList

    @property
    def longest(self) -> int:
        return self.visits.index.shape[2]

    @property
    def arrays(self) -> list[Any]:
        """Tiles to visit; how many; how many of them are FULL."""
        index, full, count = self.visits
        chosen = [index, count] if self._some_end_early else [index]
        return [*chosen, full] if len(self.visits.kinds) == 2 else chosen

    @property
    def _some_end_early(self) -> bool:
        return not self.visits.static or bool((self.visits.count < self.longest).any())

    def tile(self, refs: Any, b: Any, i: Any, t: Any) -> Any:
        """The tile that visit t of list i goes to."""
        return refs[0][self._list(b, i) * self.longest + t]

    def _list(self, b: Any, i: Any) -> Any:
        batch, n, _ = self.visits.index.shape
        return i if batch == 1 else b * n + i

    def visit(self, refs: Any, b: Any, i: Any, t: Any, body: Callable[[bool], None]) -> None:
        """Run `body(partial)` if visit t is within the list."""
        at = self._list(b, i)
        live = t < refs[1][at] if self._some_end_early else None
        for partial in self.visits.kinds:
            conditions = [] if live is None else [live]
            if len(self.visits.kinds) == 2:
                full = refs[len(self.arrays) - 1][at]
                conditions.append(t >= full if partial else t < full)
            if conditions:
                pl.when(conditions[0] & conditions[-1])(lambda partial=partial: body(partial))
            else:
                body(partial)


@dataclasses.dataclass(frozen=True)
class Call:
    """A request in kernel layout."""

    request: Request
    x: Inputs
    padded: Sizes
    tq: int
    tk: int
    blocks: Blocks
    reads: Reads
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, request: Request, x: Inputs, padded: Sizes, tq: int, tk: int) -> Call:
        """`x` in the layout of `padded`."""
        found = blocks(request, tq, tk)
        masked = True in found.by_q.kinds
        reads = Reads.of(request, x, padded, masked=masked)
        parts = tuple(Part.of(operand, padded, tq, tk) for operand in reads.operands)
        return cls(request, x, padded, tq, tk, found, reads, parts)

    @property
    def rules(self) -> Rules:
        return self.request.rules

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.x.q.shape[1] // self.x.k.shape[1]

    def operands(self, where: Where) -> list[tuple[pl.BlockSpec, jax.Array]]:
        """Blocks and arrays of the operands."""
        pairs = zip(self.parts, self.reads.operands, strict=True)
        return [(part.spec(where), part.array(operand.value)) for part, operand in pairs]

    def look(
        self, refs: Any, scalars: Any, place: tuple[Any, Any, Any, Any], partial: bool
    ) -> tuple[View, dict[str, jax.Array]]:
        """The view of tile (b, h, i, j) and its differentiated parts."""
        b, h, i, j = place
        loaded = [part.load(ref) for part, ref in zip(self.parts, refs, strict=True)]
        at = (b, h, i * self.tq, j * self.tk)
        return self.reads.view(loaded, scalars, at, (self.tq, self.tk), partial)

    def sink(self) -> jax.Array:
        """(1, H, 1, 1)."""
        return PerHead(self.x.sink).prepare(self.padded, self.padded).value


def tile_sizes(request: Request) -> tuple[int, int]:
    """(queries, keys) of a tile: equal parts of the lengths, whole lanes where they are several."""
    if request.rules.tiles is not None:
        sizes = zip(request.rules.tiles, request.sizes[2:], strict=True)
        return tuple(min(tile, n) for tile, n in sizes)
    return tuple(_even(n) for n in request.sizes[2:])


def _even(length: int) -> int:
    unit = 16 if length <= LANES else LANES
    return -(-length // (-(-length // TILE) * unit)) * unit


def padded_sizes(request: Request, tq: int, tk: int) -> Sizes:
    b, h, l, s = request.sizes
    return Sizes(b, h, -(-l // tq) * tq, -(-s // tk) * tk)


def dot(a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A product in the type of `b`, summed in float32; float32 is not cut to bfloat16."""
    exact = lax.Precision.HIGHEST if b.dtype == jnp.float32 else None
    dims = (((over[0],), (over[1],)), ((), ()))
    a = a.astype(b.dtype)
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def run(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    scalars: list[Any],
    inputs: list[tuple[pl.BlockSpec, jax.Array]],
    outputs: list[tuple[pl.BlockSpec, jax.ShapeDtypeStruct]],
    scratch: list[tuple[int, ...]],
    sequential: int,
) -> list[jax.Array]:
    """Call a kernel; interpreted on a CPU. The last `sequential` axes of the grid run in order."""
    scalars = [jnp.asarray(x).reshape(-1) for x in scalars]
    order = ["parallel"] * (len(grid) - sequential) + ["arbitrary"] * sequential

    def call(interpret: bool) -> Callable[..., Any]:
        return pl.pallas_call(
            kernel,
            out_shape=[shape for _, shape in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid,
                in_specs=[spec for spec, _ in inputs],
                out_specs=[spec for spec, _ in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(order)),
            interpret=interpret,
        )

    arrays = [*scalars, *(x for _, x in inputs)]
    return lax.platform_dependent(*arrays, cpu=call(True), default=call(False))
