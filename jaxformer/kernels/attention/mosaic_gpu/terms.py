"""What a tile reads besides q, k and v: positions, masks and the operands of mods.

All of it stays in global memory and is read from there straight into registers, in the layout in
which the tile computes; a Toeplitz band is laid out as whole tiles beforehand, one per offset
between the tile's first query and first key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxformer.kernels.attention import bands, tile
from jaxformer.kernels.attention.array_masks import DenseMask
from jaxformer.kernels.attention.masks import And, BlockSparse, Mask, Or, dense, positions_operand
from jaxformer.kernels.attention.mosaic_gpu import device
from jaxformer.kernels.attention.mosaic_gpu.elementwise import Part, Program, trace
from jaxformer.kernels.attention.operands import Block, Idx, Operand, PerK, PerQ, Sizes, Toeplitz
from jaxformer.kernels.attention.request import Request


class Place(NamedTuple):
    """A tile of scores: batch row, query head, first query and key, and its shape.

    The rows of the tile are queries; with `flipped` they are keys.
    """

    b: Any
    h: Any
    q: Any
    k: Any
    shape: tuple[int, int]
    flipped: bool = False

    @property
    def lengths(self) -> tuple[int, int]:
        """(queries, keys) of the tile."""
        return self.shape[::-1] if self.flipped else self.shape

    def hidden(self) -> Place:
        """The same place, from which nothing can be computed ahead of the loop."""
        b, h, q, k = (device.opaque(x) for x in self[:4])
        return self._replace(b=b, h=h, q=q, k=k)

    def over(self, axes: str) -> str:
        """The tile axes of score axes: "l" queries, "s" keys."""
        names = {"l": "c", "s": "r"} if self.flipped else {"l": "r", "s": "c"}
        return "".join(sorted((names[a] for a in axes), reverse=True))


@dataclasses.dataclass(frozen=True, eq=False)
class Terms:
    """The prepared operands of a call by name, and the functions of `tile.py` as programs.

    Names are "aux.<name>" for operands of mods, "mask.<i>" for those of the mask, "q_pos", "k_pos",
    "seed", "origin.b", "origin.h"; programs further read "b", "h", "row", "col" and what the kernel
    computes.
    """

    request: Request
    padded: Sizes
    mask: Mask
    mask_tree: Any  # how `Mask.operands` nests
    operands: dict[str, Operand]

    @classmethod
    def of(cls, request: Request, padded: Sizes) -> Terms:
        sizes = request.sizes
        mask = _tabulated(request.mask, request)
        leaves, tree = jax.tree.flatten(mask.operands(sizes), is_leaf=_is_operand)
        raw = {f"mask.{i}": x for i, x in enumerate(leaves)}
        raw |= {f"aux.{name}": x for name, x in request.aux.items()}
        operands = {name: x.prepare(sizes, padded) for name, x in raw.items()}
        for name, pos, kind in (("q_pos", request.q_pos, PerQ), ("k_pos", request.k_pos, PerK)):
            operand = positions_operand(pos, kind, sizes, padded)
            operands |= {} if operand is None else {name: operand}
        if request.seed is not None:
            operands["seed"] = PerQ(request.seed.reshape(1, 1, 1, 1))
        if request.origin is not None:
            for i, name in enumerate(("origin.b", "origin.h")):
                operands[name] = PerQ(request.origin[i].reshape(1, 1, 1, 1))
        return cls(request, padded, mask, tree, operands)

    # ----------------------------------------------------------------------- programs

    def scores(self, *, partial: bool) -> Program:
        """`tile.scores`: "raw" scaled products -> scores."""
        rules = self.request.rules
        return self._trace(
            lambda x: tile.scores(rules, x["raw"], self._view(x, partial), self._parts(x)), "raw"
        )

    def weights(self, *, partial: bool) -> Program:
        """`tile.weights`: "p" probabilities -> weights of the values."""
        rules = self.request.rules
        return self._trace(
            lambda x: tile.weights(rules, x["p"], self._view(x, partial), self._parts(x)), "p"
        )

    @property
    def dw_less_delta(self) -> bool:
        """Whether "dw" comes with "delta" subtracted, as it can where weights are probabilities.

        The product then starts from -delta: 32 subtractions less, and the statistics do not wait
        in 16 registers for it to end.
        """
        rules = self.request.rules
        return rules.prob_mod is None and not rules.dropout_rate

    def pull_back(self, *, partial: bool) -> Program:
        """`tile.pull_back`: "raw", "dw", "lse", "delta" -> `tile.Pulled`."""

        def fn(x: dict[str, jax.Array]) -> tile.Pulled:
            delta = jnp.zeros_like(x["lse"]) if self.dw_less_delta else x["delta"]
            return tile.pull_back(
                self.request.rules, x["raw"], x["dw"], x["lse"][..., 0], delta[..., 0],
                self._view(x, partial), self._parts(x), lambda parts: parts,
            )  # fmt: skip

        return self._trace(fn, "raw", "dw", "lse", "delta")

    def _trace(self, fn: Callable[[dict[str, jax.Array]], Any], *computed: str) -> Program:
        inputs: dict[str, Any] = {name: _dtype(x.value) for name, x in self.operands.items()}
        inputs |= dict.fromkeys(computed, jnp.float32)
        return trace(fn, inputs | dict.fromkeys(("b", "h", "row", "col"), jnp.int32))

    def _parts(self, x: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {n: x[f"aux.{n}"] for n, o in self.request.aux.items() if o.differentiable}

    def _view(self, x: dict[str, jax.Array], partial: bool) -> tile.View:
        sizes, padded = self.request.sizes, self.padded
        b, h = (x[n] + x[f"origin.{n}"] if f"origin.{n}" in x else x[n] for n in ("b", "h"))
        idx = Idx(b, h, x.get("q_pos", x["row"]), x.get("k_pos", x["col"]))
        keep = None
        if partial:
            leaves = [x[f"mask.{i}"] for i in range(self.mask_tree.num_leaves)]
            keep = self.mask.elem(idx, jax.tree.unflatten(self.mask_tree, leaves))
            if padded.l > sizes.l:
                keep = keep & (x["row"] < sizes.l)
            if padded.s > sizes.s:
                keep = keep & (x["col"] < sizes.s)
        constant = {n: x[f"aux.{n}"] for n, o in self.request.aux.items() if not o.differentiable}
        return tile.View(idx, keep, constant, x.get("seed"))

    # ------------------------------------------------------------------------- memory

    def arrays(self, programs: Iterable[Program], shape: tuple[int, int], flipped: bool) -> Any:
        """What tiles of this shape read from global memory for these programs, by name."""
        names = sorted({name for program in programs for name in program.inputs})
        place = Place(0, 0, 0, 0, shape, flipped)
        return {n: self._array(self.operands[n], place) for n in names if n in self.operands}

    def _array(self, operand: Operand, place: Place) -> jax.Array:
        x = operand.value
        if isinstance(operand, Toeplitz):
            tiles = band_tiles(x.astype(jnp.float32), place.lengths)
            return tiles.swapaxes(2, 3) if place.flipped else tiles
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.int8 if x.shape[2] > 1 and x.shape[3] > 1 else jnp.int32)
        if x.shape[2] == 1 or x.shape[3] == 1:
            return x.reshape(*x.shape[:2], *(n for n in x.shape[2:] if n > 1))
        return x.swapaxes(2, 3) if place.flipped else x

    def axes(self, name: str) -> str:
        """The score axes among "ls" along which an operand varies."""
        operand = self.operands[name]
        if isinstance(operand, Toeplitz):
            return "ls"
        lengths = zip("ls", operand.value.shape[2:], strict=True)
        return "".join(axis for axis, n in lengths if n > 1)

    def reader(
        self, refs: Mapping[str, Any], place: Place, computed: Mapping[str, Part]
    ) -> Callable[[str], Part]:
        """The inputs of programs at a tile, by name."""

        def get(name: str) -> Part:
            if name in computed:
                return computed[name]
            if name in ("b", "h"):
                return Part("", getattr(place, name))
            if name in ("row", "col"):
                over = place.over("l" if name == "row" else "s")
                first, n = (place.q, place.lengths[0]), (place.k, place.lengths[1])
                start, length = first if name == "row" else n
                return Part(over, device.count(length, over) + start)
            x = self._load(name, refs[name], place)
            dtype = _dtype(self.operands[name].value)
            is_bool = jnp.issubdtype(dtype, jnp.bool_)
            return Part(x.over, x.value != 0 if is_bool else x.value.astype(dtype))

        return get

    def _load(self, name: str, ref: Any, place: Place) -> Part:
        axes, (queries, keys) = self.axes(name), place.lengths
        at: tuple[Any, ...] = (
            place.b if ref.shape[0] > 1 else 0,
            place.h if ref.shape[1] > 1 else 0,
        )
        if isinstance(self.operands[name], Toeplitz):
            i, j = (lax.div(x, jnp.int32(n)) for x, n in ((place.q, queries), (place.k, keys)))
            window = bands.number(i, j, self.padded, queries, keys)
            head = place.h if ref.shape[0] > 1 else 0
            return Part("rc", device.load(ref.at[head, window], "rc"))
        if not axes:
            return Part("", ref[at])
        cuts = {"l": pl.ds(place.q, queries), "s": pl.ds(place.k, keys)}
        order = axes[::-1] if place.flipped else axes
        over = place.over(axes)
        return Part(over, device.load(ref.at[(*at, *(cuts[a] for a in order))], over))


def _is_operand(x: Any) -> bool:
    return isinstance(x, Operand)


def _dtype(x: jax.Array) -> Any:
    """In which programs compute with an operand: floats are float32."""
    return jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


def _tabulated(mask: Mask, request: Request) -> Mask:
    """The mask without block tables: an element cannot be looked up by index inside a kernel."""
    if isinstance(mask, (And, Or)):
        return type(mask)(_tabulated(mask.a, request), _tabulated(mask.b, request))
    if isinstance(mask, BlockSparse):
        return DenseMask(dense(mask, *request.sizes, request.q_pos, request.k_pos))
    return mask


def band_tiles(x: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """A prepared band (H, L + S - 1) as (queries, keys) tiles, (H, windows, queries, keys)."""
    windows = bands.windows(x, *shape)
    h, n, _ = windows.shape
    at = Block(0, 0, *shape, shape[1])
    return Toeplitz(x).spread(windows.reshape(h * n, -1), at).reshape(h, n, *shape)
