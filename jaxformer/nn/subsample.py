"""Attention that trains on keys drawn anew, and the ways to draw them.

Hussain, Zaki & Subramanian 2023, arXiv 2306.01705. Queries fall into n windows of w; each window
sees m keys. Keys that were not drawn are left out, not masked: scores are n w m instead of L S.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import (
    Causal,
    Diagonal,
    Full,
    KeyPadding,
    Mask,
    Window,
    attention,
    merge,
)
from jaxformer.kernels.attention.masks import And, Or
from jaxformer.nn.attention import Attention
from jaxformer.nn.position import At, Scheme

OTHERS = Window(None, -1) | Window(-1, None)  # all positions but the own


class Windows(NamedTuple):
    """Indices of queries (1 or B, n, w) and of the keys that they see (1 or B, n, m).

    Every query stands in one window. An index beyond the last means that nothing stands there.
    """

    queries: jax.Array
    keys: jax.Array


class Draw(Protocol):
    """A random choice of keys for `length` queries and as many keys, or `size` of them."""

    def __call__(
        self, key: jax.Array, length: int, size: int, valid_BxS: jax.Array | None
    ) -> Windows: ...


@dataclasses.dataclass(frozen=True)
class Unbiased:
    """The same share `keep` of all keys for every query, rounded up; the first `always` always.

    Of a padded row the share of its valid keys.

    Raises:
        ConfigError: a share outside (0, 1].
    """

    keep: float
    always: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.keep <= 1.0:
            raise ConfigError(f"Unbiased.keep={self.keep}: must be in (0, 1]")

    def __call__(
        self, key: jax.Array, length: int, size: int, valid_BxS: jax.Array | None
    ) -> Windows:
        rows = 1 if valid_BxS is None else valid_BxS.shape[0]
        rank = jax.random.uniform(key, (rows, size)).at[:, : self.always].set(-1.0)
        count = max(math.ceil(self.keep * size), self.always)
        if valid_BxS is None:
            kept = jnp.argsort(rank)[:, :count]
        else:
            kept = jnp.argsort(jnp.where(valid_BxS, rank, 2.0))[:, :count]
            share = jnp.ceil(self.keep * valid_BxS.sum(-1, keepdims=True))
            kept = jnp.where(jnp.arange(count) < jnp.maximum(share, self.always), kept, size)
        return Windows(jnp.arange(length)[None, None], jnp.sort(kept)[:, None])


@dataclasses.dataclass(frozen=True)
class Local:
    """Windows of `window` queries in order, and keys in the order of j + spread * normal noise.

    `spread`, in positions, is the window by default; at 0 a query sees its own window, and the
    further it grows the further away keys come from. The first `always` keys are seen by all.

    Raises:
        ConfigError: an empty window, or a negative spread.
    """

    window: int
    spread: float | None = None
    always: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ConfigError(f"Local.window={self.window}: must be at least 1")
        if self.spread is not None and self.spread < 0:
            raise ConfigError(f"Local.spread={self.spread}: must not be negative")

    def __call__(
        self, key: jax.Array, length: int, size: int, valid_BxS: jax.Array | None
    ) -> Windows:
        _one_sequence(self, length, size)
        window = min(self.window, length)
        spread = window if self.spread is None else self.spread
        at = jnp.arange(length)
        keys = jnp.argsort(at + spread * jax.random.normal(key, (length,)))
        keys, queries = (_cut(x, window, length) for x in (keys, at))
        if self.always:
            first = jnp.broadcast_to(jnp.arange(self.always), (1, keys.shape[1], self.always))
            keys = jnp.concatenate([first, jnp.where(keys < self.always, length, keys)], -1)
        return Windows(queries, keys)


@dataclasses.dataclass(frozen=True)
class LocalGrid:
    """`Local` on a grid of `height` x `width`: windows of side x side.

    Keys are sorted by row + noise into bands, and in each band by column + noise into windows.

    Raises:
        ConfigError: the side does not divide the grid, or the sequence is not the grid.
    """

    height: int
    width: int
    side: int
    spread: float | None = None

    def __post_init__(self) -> None:
        if self.side < 1 or self.height % self.side or self.width % self.side:
            raise ConfigError(
                f"LocalGrid.side={self.side}: must divide the grid {self.height} x {self.width}"
            )

    def __call__(
        self, key: jax.Array, length: int, size: int, valid_BxS: jax.Array | None
    ) -> Windows:
        _one_sequence(self, length, size)
        if length != self.height * self.width:
            raise ConfigError(
                f"LocalGrid: {self.height} x {self.width} are not the {length} positions there are"
            )
        spread = self.side if self.spread is None else self.spread
        noise = spread * jax.random.normal(key, (2, length))
        return Windows(self._windows(jnp.zeros((2, length))), self._windows(noise))

    def _windows(self, noise: jax.Array) -> jax.Array:
        at = jnp.arange(self.height * self.width)
        row, column = at // self.width + noise[0], at % self.width + noise[1]
        bands = jnp.argsort(row).reshape(-1, self.side * self.width)
        order = jnp.take_along_axis(bands, jnp.argsort(column[bands], axis=-1), axis=-1)
        return order.reshape(1, -1, self.side**2)


@dataclasses.dataclass(frozen=True)
class SourceDropout:
    """Each key is left out with probability `rate`, by itself in every example; no windows.

    Of the same authors' graph Transformers (`tgt`), for few or ragged positions: it regularises as
    the draws above, and saves nothing.

    Raises:
        ConfigError: a rate outside [0, 1).
    """

    rate: float = 0.3
    always: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate < 1.0:
            raise ConfigError(f"SourceDropout.rate={self.rate}: must be in [0, 1)")

    def __call__(
        self, key: jax.Array, length: int, size: int, valid_BxS: jax.Array | None
    ) -> Windows:
        rows = 1 if valid_BxS is None else valid_BxS.shape[0]
        at = jnp.arange(size)
        kept = jax.random.bernoulli(key, 1 - self.rate, (rows, size)) | (at < self.always)
        return Windows(jnp.arange(length)[None, None], jnp.where(kept, at, size)[:, None])


def _one_sequence(draw: Any, length: int, size: int) -> None:
    if length != size:
        raise ConfigError(
            f"{type(draw).__name__}: {length} queries and {size} keys are not one sequence; "
            "Unbiased takes any"
        )


def _cut(order: jax.Array, window: int, length: int) -> jax.Array:
    """(1, n, window); what is missing in the last window has the index `length`."""
    order = jnp.pad(order, (0, -length % window), constant_values=length)
    return order.reshape(1, -1, window)


class SubsampledAttention(Attention):
    """Softmax attention over the keys that `draw` chooses, anew in every call that trains.

    Otherwise it is dense, with the same parameters. All heads share a draw, and all examples, but
    where keys are padding. Positions, masks and biases go by where the keys came from. A query's
    own key is always there if `include_self`; by default under a causal mask, where the draw may
    hold no other that may be seen.

    Raises:
        ConfigError: decoding while training, cross-attention without `cross`, a mask of pairs.
    """

    draw: Any = Unbiased(0.25)  # a Draw
    include_self: bool | None = None
    cross: bool = False

    def __call__(  # type: ignore[override]
        self, x_BxLxD: jax.Array, kv_BxSxD: jax.Array | None = None, **options: Any
    ) -> jax.Array:
        if kv_BxSxD is not None and not self.cross:
            raise ConfigError("SubsampledAttention.cross=False: set it to draw keys of a memory")
        return super().__call__(x_BxLxD, kv_BxSxD, **options)

    def attend(
        self,
        q_BxLxHxK: jax.Array,
        k_BxSxGxK: jax.Array,
        v_BxSxGxK: jax.Array,
        *,
        mask: Mask,
        scheme: Scheme,
        at: At,
        q_pos: jax.Array | None = None,
        k_pos: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        arrays, parts = (q_BxLxHxK, k_BxSxGxK, v_BxSxGxK), {"scheme": scheme, "at": at}
        if not train or self.is_initializing():
            return super().attend(
                *arrays, mask=mask, **parts, q_pos=q_pos, k_pos=k_pos, train=train
            )
        if q_pos is not None:
            raise ConfigError("SubsampledAttention: reads no cache while training; train=False")
        pairs, valid_BxS = split_mask(mask)
        own = _causal(pairs) if self.include_self is None else self.include_self
        length, size = q_BxLxHxK.shape[1], k_BxSxGxK.shape[1]
        windows = self.draw(self.make_rng("dropout"), length, size, valid_BxS)
        pairs_drawn = pairs & OTHERS if own else pairs
        drawn = self._drawn(arrays, windows, pairs_drawn, valid_BxS, scheme, at)
        if not own:
            return drawn[0]
        alone = self._alone(arrays, mask & Diagonal(), scheme, at)
        return merge([drawn, alone])[0]

    def _drawn(
        self,
        arrays: tuple[jax.Array, ...],
        windows: Windows,
        mask: Mask,
        valid_BxS: jax.Array | None,
        scheme: Scheme,
        at: At,
    ) -> tuple[jax.Array, jax.Array]:
        """Output and LSE of the queries over the keys of their windows."""
        q_BxLxHxK, k_BxSxGxK, v_BxSxGxK = arrays
        batch, length, heads, _ = q_BxLxHxK.shape
        size = k_BxSxGxK.shape[1]
        _, n, w = windows.queries.shape
        m = windows.keys.shape[-1]
        there = windows.keys < size
        if valid_BxS is not None:
            there = there & _take(valid_BxS, windows.keys, batch).reshape(batch, n, m)
        there = jnp.broadcast_to(there, (batch, n, m)).reshape(batch * n, m)
        q_at = _take(_positions(at.q_pos, length), windows.queries, batch)
        k_at = _take(_positions(at.k_pos, size), windows.keys, batch)
        o, lse = attention(
            _take(q_BxLxHxK, windows.queries, batch),
            *(_take(x, windows.keys, batch) for x in (k_BxSxGxK, v_BxSxGxK)),
            mask=mask & KeyPadding(there),
            q_pos=_take(jnp.arange(length)[None], windows.queries, batch),
            k_pos=_take(jnp.arange(size)[None], windows.keys, batch),
            **self._how(scheme, At(w, m, q_at, k_at)),
        )
        back = jnp.argsort(windows.queries.reshape(-1))[:length]  # without what stands for nothing
        o = o.reshape(batch, n * w, heads, -1)[:, back]
        lse = lse.reshape(batch, n, heads, w).swapaxes(1, 2).reshape(batch, heads, n * w)
        return o, lse[:, :, back]

    def _alone(
        self, arrays: tuple[jax.Array, ...], mask: Mask, scheme: Scheme, at: At
    ) -> tuple[jax.Array, jax.Array]:
        """Output and LSE of every query over its own key, where it may see it."""
        return attention(*arrays, mask=mask, **self._how(scheme, at))

    def _how(self, scheme: Scheme, at: At) -> dict[str, Any]:
        mods = scheme.mods(self.heads, at)
        dropout = (self.dropout, self.make_rng("dropout")) if self.dropout else None
        changes = {"score_mod": mods.score_mod, "prob_mod": mods.prob_mod, "aux": mods.aux}
        return {"scale": self.scale, "dropout": dropout, "return_lse": True, **changes}


def split_mask(mask: Mask) -> tuple[Mask, jax.Array | None]:
    """A mask of positions, and the keys that are valid (B, S) or None, of which both hold.

    Raises:
        ConfigError: a mask that carries other arrays, whose keys cannot be drawn.
    """
    if isinstance(mask, And):
        (a, b), (c, d) = split_mask(mask.a), split_mask(mask.b)
        valid = [x for x in (b, d) if x is not None]
        return a & c, valid[0] & valid[-1] if valid else None
    if isinstance(mask, KeyPadding) and mask.valid.ndim == 2:
        return Full(), mask.valid
    if mask.leaf_axes():
        raise ConfigError(
            f"mask: SubsampledAttention cannot draw the keys of {type(mask).__name__}; allowed: "
            "masks of positions, and KeyPadding of booleans (B, S) with `&`"
        )
    return mask, None


def _causal(mask: Mask) -> bool:
    if isinstance(mask, And | Or):
        return _causal(mask.a) or _causal(mask.b)
    return isinstance(mask, Causal)


def _positions(given: jax.Array | None, length: int) -> jax.Array:
    """(1 or B, length)."""
    return jnp.atleast_2d(jnp.arange(length) if given is None else given)


def _take(x: jax.Array, index: jax.Array, batch: int) -> jax.Array:
    """Entries of axis 1 of x (1 or B, N, ...) at (1 or B, n, w): (B * n, w, ...).

    What stands for nothing repeats the last entry.
    """
    index = jnp.minimum(index, x.shape[1] - 1)
    if index.shape[0] == 1:
        found = x[:, index[0]]
    else:
        rows = jnp.arange(index.shape[0])[:, None, None]
        found = jnp.broadcast_to(x, (batch, *x.shape[1:]))[rows, index]
    found = jnp.broadcast_to(found, (batch, *found.shape[1:]))
    return found.reshape(batch * found.shape[1], *found.shape[2:])
