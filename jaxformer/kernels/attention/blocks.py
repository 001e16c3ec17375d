"""Which tiles of the score matrix a kernel visits: lists by tile of queries and by tile of keys.

Lists of a mask without arrays are NumPy and fixed while tracing; those of a mask with arrays, or
under traced positions, are computed by the program before the kernel starts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention.masks import FULL, PARTIAL, SKIP, Grid
from jaxformer.kernels.attention.request import Request


class BlockList(NamedTuple):
    """For each of n tiles of one axis, the tiles of the other axis to visit.

    The first `full[b, i]` of `index[b, i]` are FULL, those up to `count[b, i]` PARTIAL, each in
    ascending order; behind them the last one is repeated, so that a pipeline that runs over the
    end loads nothing new. The batch axis is 1 where every row of the batch has the same list.
    """

    index: Any  # int32 (1 or B, n, longest), longest >= 1
    full: Any  # int32 (1 or B, n)
    count: Any  # int32 (1 or B, n)

    @property
    def static(self) -> bool:
        """Whether the lists are NumPy arrays, fixed while tracing."""
        return isinstance(self.index, np.ndarray)

    @property
    def kinds(self) -> tuple[bool, ...]:
        """The values of `partial` among the visits, so that a kernel holds no code for the rest."""
        if not self.static:
            return False, True
        found = (False, self.full.any()), (True, (self.count > self.full).any())
        return tuple(partial for partial, present in found if present)

    @property
    def partial(self) -> Any:
        """Whether a visit needs mask arithmetic, booleans in the shape of `index`."""
        return np.arange(self.index.shape[2]) >= self.full[:, :, None]


class Blocks(NamedTuple):
    """The lists of a call: key tiles by tile of queries, and query tiles by tile of keys."""

    states: Any  # (1 or B, nq, nk), where tiles that reach into padding are not FULL
    by_q: BlockList
    by_k: BlockList


def blocks(request: Request, tq: int, tk: int) -> Blocks:
    """The tiles that the mask leaves; those that reach beyond either length are PARTIAL."""
    grid = Grid.of(request.sizes, tq, tk, request.q_pos, request.k_pos)
    states = inner(request.mask.tile_states(grid), request.sizes.l % tq, request.sizes.s % tk)
    return Blocks(states, block_list(states), block_list(states.swapaxes(1, 2)))


def inner(states: Any, rest_q: int, rest_k: int) -> Any:
    """States in which the tiles that reach into padding are not FULL, for they need a mask."""
    most = np.full(states.shape[1:], FULL, np.int32)
    if rest_q:
        most[-1] = PARTIAL
    if rest_k:
        most[:, -1] = PARTIAL
    return np.minimum(states, most) if isinstance(states, np.ndarray) else jnp.minimum(states, most)


def block_list(states: Any) -> BlockList:
    """Lists along the last axis of states (1 or B, n, m)."""
    xp: Any = np if isinstance(states, np.ndarray) else jnp
    full = (states == FULL).sum(-1).astype(np.int32)
    count = (states != SKIP).sum(-1).astype(np.int32)
    order = xp.argsort(FULL - states, axis=-1, stable=True).astype(np.int32)
    longest = max(int(count.max(initial=0)), 1) if xp is np else states.shape[2]
    last = xp.maximum(count - 1, 0)[:, :, None]
    visits = xp.minimum(np.arange(longest, dtype=np.int32), last)
    return BlockList(xp.take_along_axis(order, visits, -1), full, count)


def static_states(request: Request, tq: int, tk: int) -> np.ndarray:
    """States (nq, nk) from what is known while tracing, also for masks that carry arrays."""
    rows, cols = Grid.of(request.sizes, tq, tk).spans
    states = np.array([[request.tile_state(q, k) for k in cols] for q in rows], np.int32)
    return inner(states[None], request.sizes.l % tq, request.sizes.s % tk)[0]
