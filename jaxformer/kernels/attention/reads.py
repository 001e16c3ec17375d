"""What a Pallas kernel reads beside q, k and v, and the surroundings of one two-dimensional tile.

A kernel works on the tile of one batch row and one head: (tq, tk), with positions (tq, 1) and
(1, tk). Its operands are a flat list, for a kernel receives references and no trees; each back end
says how it loads the part of an operand that a tile reads.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxformer.kernels.attention.array_masks import DenseMask
from jaxformer.kernels.attention.layout import Inputs
from jaxformer.kernels.attention.masks import And, BlockSparse, Full, Mask, Or, dense
from jaxformer.kernels.attention.operands import Idx, Operand, Sizes
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.attention.tile import Constants, View


@dataclasses.dataclass(frozen=True)
class Reads:
    """The operands of a call in kernel layout, and how a tile's view is made of their parts."""

    mask: Mask
    operands: tuple[Operand, ...]
    scalars: tuple[jax.Array, ...]  # the seed of dropout (1,), the origin of a part (2,): int32
    tree: Any  # of (mask operands, constants, differentiated, query positions, key positions)
    sizes: Sizes
    padded: Sizes

    @classmethod
    def of(cls, request: Request, x: Inputs, padded: Sizes, *, masked: bool) -> Reads:
        """`masked`: whether any tile is PARTIAL; else the arrays of the mask are left out."""
        mask = _lowered(request.mask, request) if masked else Full()
        constants = Constants.of(dataclasses.replace(request, mask=mask), padded)
        tree = (constants.mask_operands, constants.aux, x.aux, constants.q_pos, constants.k_pos)
        operands, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, Operand))
        seed, origin = request.seed, request.origin
        scalars = [] if seed is None else [lax.bitcast_convert_type(seed, jnp.int32).reshape(1)]
        scalars += [] if origin is None else [jnp.asarray(origin, jnp.int32)]
        return cls(mask, tuple(operands), tuple(scalars), structure, request.sizes, padded)

    @property
    def learned(self) -> tuple[int, ...]:
        """Which operands are differentiated, in the order of their names."""
        numbered = jax.tree.unflatten(self.tree, range(len(self.operands)))
        return tuple(jax.tree.leaves(numbered[2]))

    def view(
        self,
        parts: list[jax.Array],
        scalars: list[Any],
        place: tuple[Any, Any, Any, Any],
        tiles: tuple[int, int],
        partial: bool,
    ) -> tuple[View, dict[str, jax.Array]]:
        """The view of the tile at `place` (b, h, row, column), and its differentiated parts.

        `scalars` are references to what `self.scalars` holds.
        """
        seen, constants, learned, q_pos, k_pos = jax.tree.unflatten(self.tree, parts)
        b, h, row, col = place
        seed = None
        for ref in scalars:
            if ref.shape == (1,):
                seed = ref[0].astype(jnp.uint32)
            else:
                b, h = b + ref[0], h + ref[1]
        rows = lax.broadcasted_iota(jnp.int32, (tiles[0], 1), 0) + row
        cols = lax.broadcasted_iota(jnp.int32, (1, tiles[1]), 1) + col
        idx = Idx(b, h, rows if q_pos is None else q_pos, cols if k_pos is None else k_pos)
        keep = None
        if partial:
            keep = self.mask.elem(idx, seen)
            if self.padded.l > self.sizes.l:
                keep = keep & (rows < self.sizes.l)
            if self.padded.s > self.sizes.s:
                keep = keep & (cols < self.sizes.s)
        return View(idx, keep, constants, seed), learned


def take(refs: Any, *counts: int) -> list[Any]:
    """References in groups of these sizes, and the rest."""
    ends = itertools.accumulate(counts)
    return [
        *(refs[end - n : end] for n, end in zip(counts, ends, strict=True)),
        refs[sum(counts) :],
    ]


def _lowered(mask: Mask, request: Request) -> Mask:
    """The mask without look-ups by index, which kernels cannot do.

    A BlockSparse whose blocks are no multiples of the tiles becomes one byte per score; where they
    are, no tile is PARTIAL, and none of this is read.
    """
    if isinstance(mask, And | Or):
        return type(mask)(_lowered(mask.a, request), _lowered(mask.b, request))
    if isinstance(mask, BlockSparse):
        return DenseMask(dense(mask, *request.sizes, request.q_pos, request.k_pos))
    return mask
