"""Which tiles of the score matrix are visited, computed from the mask while tracing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from jaxformer.kernels.attention.blocks import BlockList, block_list, static_states
from jaxformer.kernels.attention.masks import FULL, PARTIAL
from jaxformer.kernels.attention.operands import Block, Sizes
from jaxformer.kernels.attention.request import Request

# 2^20 scores in flight fit the caches of a few cores: at B * H = 64, 128 x 128 tiles run the
# forward pass in 12 ms where 256 x 256 need 41 ms (L = 512, K = 32, two cores).
TILE_SCORES = 2**20


class Tiling(NamedTuple):
    """Tile sizes and, per chunk of queries, the key tiles to visit."""

    padded: Sizes
    tq: int
    tk: int
    visits: BlockList  # static, one for the whole batch

    @property
    def tables(self) -> tuple[np.ndarray, ...]:
        """What the loop over chunks reads: tiles to visit, how many are FULL, how many in all."""
        return self.visits.index[0], self.visits.full[0], self.visits.count[0]

    @property
    def scores(self) -> int:
        """Scores computed per batch row and head."""
        return int(self.visits.count.sum()) * self.tq * self.tk

    def block(self, i: Any, j: Any) -> Block:
        """Tile j of chunk i."""
        return Block(i * self.tq, j * self.tk, self.tq, self.tk, self.padded.s)


def tiling(request: Request) -> Tiling:
    """Classify every tile of the call."""
    sizes = request.sizes
    tq, tk = request.rules.tiles or _tile_sizes(sizes)
    tq, tk = _even(sizes.l, tq), _even(sizes.s, tk)
    states = static_states(request, tq, tk)
    padded = Sizes(sizes.b, sizes.h, states.shape[0] * tq, states.shape[1] * tk)
    return Tiling(padded, tq, tk, block_list(states[None]))


def _tile_sizes(sizes: Sizes) -> tuple[int, int]:
    """(queries, keys) of a tile: large, but few enough scores in flight."""
    tq, tk = 256, 512
    while sizes.b * sizes.h * tq * tk > TILE_SCORES and tk > 64:
        tq, tk = (tq, tk // 2) if tk > tq else (tq // 2, tk)
    return tq, tk


def _even(length: int, tile: int) -> int:
    """Close to `tile`, in equal parts of `length`: 384 in tiles of 256 is 2 of 192, not 512."""
    if length <= tile:
        return length
    part = -(-length // -(-length // tile))
    return min(tile, -(-part // 16) * 16)


def _halves(x: range, smallest: int) -> tuple[range, ...]:
    return (x[: len(x) // 2], x[len(x) // 2 :]) if len(x) > smallest else (x,)


def visible_scores(request: Request) -> float:
    """Scores per batch row and head that the mask leaves, for counting operations.

    Tiles are halved until they are decided; what is undecided in the end counts half, or whole
    where the mask carries arrays and nothing is known.
    """
    smallest = max(16, *(x // 256 for x in request.sizes[2:]))
    known = request.static_positions and not jax.tree.leaves(request.mask)

    def count(q: range, k: range) -> float:
        state = request.tile_state(q, k)
        if state is not PARTIAL:
            return len(q) * len(k) if state is FULL else 0
        if max(len(q), len(k)) <= smallest:
            return len(q) * len(k) * (0.5 if known else 1.0)
        return sum(count(a, b) for a in _halves(q, smallest) for b in _halves(k, smallest))

    return count(range(request.sizes.l), range(request.sizes.s))
