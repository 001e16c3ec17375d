"""Tile sizes, and the order in which tiles are taken: everything about a launch but arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.kernels.attention.blocks import BlockList
from jaxformer.kernels.attention.masks import Causal
from jaxformer.kernels.attention.mosaic_gpu import device
from jaxformer.kernels.attention.operands import Sizes
from jaxformer.kernels.attention.request import Request
from jaxformer.kernels.tuned import tuned

ROWS = 64  # of a warpgroup: the height of a tensor core product
COMPUTE = 2  # warpgroups that compute; another one fetches
BLOCK = ROWS * COMPUTE  # queries (forward, dQ) or keys (dK, dV) of a thread block


class Config(NamedTuple):
    """Columns of the tiles, and how many of them are in flight."""

    keys: int  # forward
    stages: int
    dq_keys: int
    dkv_queries: int
    back_stages: int
    split_dkv: bool  # dK and dV in a launch each: together their sums need 4 K registers / thread

    def padded(self, sizes: Sizes) -> Sizes:
        """Lengths of what is read by tiles without bounds checks."""
        l = math.lcm(BLOCK, self.dkv_queries)
        s = math.lcm(BLOCK, self.keys, self.dq_keys)
        return Sizes(sizes.b, sizes.h, -(-sizes.l // l) * l, -(-sizes.s // s) * s)


# By head size. Registers decide the columns, shared memory (227 KiB) the stages.
CONFIGS = {
    64: Config(128, 4, 128, 64, 2, False),
    128: Config(128, 2, 64, 64, 2, False),
    192: Config(64, 2, 64, 64, 2, True),
    256: Config(64, 2, 64, 64, 1, True),
}


def head_size(request: Request) -> int:
    """The larger of the head sizes of keys and values, padded to whole swizzled rows."""
    return max(padded_size(x.shape[-1]) for x in (request.k, request.v))


def swizzle_of(columns: int) -> int:
    """Bytes of a swizzled row, of products that sum over so many columns of a tile."""
    return min(128, 2 * columns)


def padded_size(n: int) -> int:
    """A head size as the tensor cores read it."""
    return -(-n // ROWS) * ROWS


def config_of(request: Request) -> Config:
    """The tile sizes of a call: by head size, the forward keys from `tiles` where given."""
    rules, size = request.rules, head_size(request)
    config = CONFIGS[size]
    if rules.score_mod or rules.prob_mod or rules.dropout_rate:  # mods need registers, too
        config = config._replace(dq_keys=64, split_dkv=size > 64)
        if size > 128:  # a sum of 128 registers and two tiles of 32 leave none for a bias
            config = config._replace(dq_keys=32, dkv_queries=32, back_stages=2)
    tiles = rules.tiles or tuned(
        "attention",
        "mosaic_gpu",
        request.sizes.l,
        head_size=size,
        causal=isinstance(request.mask, Causal),
        **{"pass": "forward"},
    )
    if tiles is not None:
        keys = tiles[1]
        config = config._replace(keys=keys, stages=config.stages * config.keys // keys)
    return config


def tiles(request: Request) -> tuple[int, int]:
    """(queries, keys) of a tile of the forward pass."""
    return BLOCK, config_of(request).keys


def allowed_tiles(request: Request) -> tuple[tuple[int, int], ...]:
    """What `tiles` may be: wider ones than the default need more registers than there are."""
    return tuple((BLOCK, keys) for keys in (64, 128) if keys <= CONFIGS[head_size(request)].keys)


# ------------------------------------------------------------------------------- visits


class Visits(NamedTuple):
    """The work of one thread block: its tile, and the tiles of the other axis that it visits."""

    tile: Any
    full: Any  # of them without mask arithmetic, the first ones
    count: Any
    index: Callable[[Any], Any]

    @classmethod
    def of(cls, table: Any, b: Any, turn: Any) -> Visits:
        """Row `turn` of a table made by `visit_table`."""
        b = b if table.shape[0] > 1 else 0
        tile, full, count = (table[b, turn, i] for i in range(3))
        return cls(tile, full, count, lambda t: table[b, turn, t + 3])

    def walk(self, kinds: tuple[bool, ...], visit: Callable[..., Any], carry: Any) -> Any:
        """Fold `carry = visit(t, partial, carry)`, FULL tiles first; `kinds` as in `BlockList`."""
        for partial in kinds:

            def body(t: Any, carry: Any, partial: bool = partial) -> Any:
                return visit(t, partial, carry)

            ends = (self.full, self.count) if partial else (0, self.full)
            carry = device.loop(*ends, body, carry)
        return carry


def visit_table(visits: BlockList) -> jax.Array:
    """(1 or B, n, 3 + longest) int32: tile, FULL and all visits, then which; longest work first.

    Thread blocks start in the order of the rows. Tiles of a causal mask differ in work by up to n,
    and a long one that starts last leaves the other multiprocessors idle.
    """
    xp: Any = np if visits.static else jnp
    order = xp.argsort(-visits.count, axis=1, stable=True).astype(np.int32)
    heads = xp.stack([order, *(xp.take_along_axis(x, order, 1) for x in visits[1:])], -1)
    index = xp.take_along_axis(visits.index, order[:, :, None], 1)
    return jnp.asarray(xp.concatenate([heads, index], -1), jnp.int32)


# --------------------------------------------------------------------------- key heads


class HeadTables(NamedTuple):
    """Which key head a query head reads, and which query heads a key head serves."""

    key_head: np.ndarray  # (H,)
    first: np.ndarray  # (G + 1,): the heads of key head g are heads[first[g] : first[g + 1]]
    heads: np.ndarray  # (H,)

    @classmethod
    def of(cls, request: Request) -> HeadTables:
        h, g = request.sizes.h, request.k.shape[2]
        key_head = np.array(request.rules.head_map or [i * g // h for i in range(h)], np.int32)
        first = np.searchsorted(np.sort(key_head), np.arange(g + 1)).astype(np.int32)
        return cls(key_head, first, np.argsort(key_head, kind="stable").astype(np.int32))


# ------------------------------------------------------------------------------ buffers


class Ring(NamedTuple):
    """A ring of buffers that one warpgroup fills and the others empty.

    `ready` and `free` are barriers per buffer: the n-th completion of `ready[i]` says that buffer
    i holds its n-th block, the n-th of `free[i]` that every reader is done with it.
    """

    buffers: Any
    ready: Any
    free: Any

    @classmethod
    def scratch(
        cls,
        name: str,
        shape: tuple[int, int],
        dtype: Any,
        stages: int,
        readers: int = COMPUTE,
        swizzle: int = 128,
    ) -> dict[str, Any]:
        """What `launch` has to allocate."""
        return {
            name: device.Shared((stages, *shape), dtype, swizzle),
            f"{name}_ready": device.Barriers(stages),
            f"{name}_free": device.Barriers(stages, readers),
        }

    @classmethod
    def of(cls, refs: Any, name: str) -> Ring:
        return cls(refs[name], refs[f"{name}_ready"], refs[f"{name}_free"])

    def slot(self, t: Any) -> Any:
        """The buffer of step t."""
        return device.opaque(lax.rem(t, jnp.int32(self.buffers.shape[0])))

    def fill(self, t: Any, source: Any) -> None:
        """Fetch the block of step t, once its buffer is free."""
        slot = self.slot(t)

        @device.when(t >= self.buffers.shape[0])
        def _() -> None:
            device.wait(self.free.at[slot])

        device.fetch(source, self.buffers.at[slot], self.ready.at[slot])

    def take(self, t: Any) -> Any:
        """Wait for the block of step t."""
        self.await_(t)
        return self.at(t)

    def await_(self, t: Any) -> None:
        device.wait(self.ready.at[self.slot(t)])

    def at(self, t: Any) -> Any:
        """The block of step t, which has been waited for."""
        return self.buffers.at[self.slot(t)]

    def give_back(self, t: Any) -> None:
        """This warpgroup is done with the block of step t."""
        device.arrive(self.free.at[self.slot(t)])
