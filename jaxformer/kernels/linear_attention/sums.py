"""Linear attention from three primitives, and its gradients from the same three.

    states    sum_j k_j v_j^T over each segment of the keys
    read      q_i . state
    scan      q_i . (state + sum_j k_j v_j^T over j up to i), or over j from i on

An implementation is these three (`Primitives`). The gradients of linear attention are linear
attentions with the parts exchanged, so they need nothing else. A causal scan is sequential;
segments cut it into pieces that run side by side, each from the sum of the states before it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp


class Tiles(NamedTuple):
    """How an implementation walks over the positions.

    chunk: positions of one step; scores exist within a chunk only.
    columns: value features whose state one program keeps; None for all of them.
    segments: pieces of the length that run side by side.
    """

    chunk: int
    columns: int | None = None
    segments: int = 1


class Primitives(Protocol):
    """The three sums over whole chunks: lengths are multiples of chunk * segments, P segments.

    q, k (B, L, H, K) and v (B, L, H, N) of one type; states in `sum_type` of it, outputs in
    `dtype`: rounding gradients in the kernel saves writing and reading them twice as wide.
    """

    def states(self, k: jax.Array, v: jax.Array, tiles: Tiles) -> jax.Array:
        """The state that each segment leaves, (B, P, H, K, N)."""

    def read(self, q: jax.Array, state: jax.Array, tiles: Tiles, *, dtype: Any) -> jax.Array:
        """What each query takes from one state (B, H, K, N): (B, L, H, N)."""

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
        """Causal sums (B, L, H, N), from the end if `reverse`.

        `before` (B, P, H, K, N): the state on entering each segment; None is zero, of one segment.
        """


def sum_type(x: jax.Array) -> jnp.dtype:
    """The type of sums: float32, or float64 for float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


# --------------------------------------------------------------------------------- causal


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def causal(
    kernels: Primitives, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """sum_{j <= i} (q_i . k_j) v_j, (B, L, H, N)."""
    return _causal_forward(kernels, tiles, q, k, v)[0]


def _causal_forward(
    kernels: Primitives, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array | None, ...]]:
    before = _entering(kernels, tiles, k, v)
    return _scan(kernels, tiles, q, k, v, before, sum_type(v)), (q, k, v, before)


def _causal_backward(
    kernels: Primitives, tiles: Tiles, saved: tuple[jax.Array, ...], do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same sums with the parts exchanged, from the end for k and v.

    dq_i = sum_{j<=i} (do_i . v_j) k_j, dk_j = sum_{i>=j} (v_j . do_i) q_i, dv_j = sum_{i>=j}
    (k_j . q_i) do_i. Memory is linear in L: the states of chunks are not stored, only those of the
    few segments.
    """
    q, k, v, before = saved
    do = do.astype(v.dtype)
    after = _entering(kernels, tiles, q, do, reverse=True)
    dq = _scan(kernels, tiles, do, v, k, _turned(before), q.dtype)
    dk = _scan(kernels, tiles, v, do, q, _turned(after), k.dtype, reverse=True)
    dv = _scan(kernels, tiles, k, q, do, after, v.dtype, reverse=True)
    return dq, dk, dv


causal.defvjp(_causal_forward, _causal_backward)


def _entering(
    kernels: Primitives, tiles: Tiles, k: jax.Array, v: jax.Array, *, reverse: bool = False
) -> jax.Array | None:
    """The sum of the states of the segments before each, or after each if `reverse`."""
    if tiles.segments == 1:
        return None
    k, v = (_whole(x, tiles.chunk * tiles.segments) for x in (k, v))
    states = kernels.states(k, v, tiles)
    states = states[:, ::-1] if reverse else states
    total = jnp.pad(jnp.cumsum(states[:, :-1], 1), ((0, 0), (1, 0), *[(0, 0)] * 3))
    return total[:, ::-1] if reverse else total


def _scan(
    kernels: Primitives,
    tiles: Tiles,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    before: jax.Array | None,
    dtype: Any,
    *,
    reverse: bool = False,
) -> jax.Array:
    length = q.shape[1]
    q, k, v = (_whole(x, tiles.chunk * tiles.segments) for x in (q, k, v))
    return kernels.scan(q, k, v, before, tiles, reverse=reverse, dtype=dtype)[:, :length]


# --------------------------------------------------------------------------- bidirectional


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def bidirectional(
    kernels: Primitives, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array
) -> jax.Array:
    """sum_j (q_i . k_j) v_j, (B, L, H, N)."""
    return _bidirectional_forward(kernels, tiles, q, k, v)[0]


def _bidirectional_forward(
    kernels: Primitives, tiles: Tiles, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    state = _total(kernels, tiles, k, v)
    return _read(kernels, tiles, q, state, sum_type(v)), (q, k, v, state)


def _bidirectional_backward(
    kernels: Primitives, tiles: Tiles, saved: tuple[jax.Array, ...], do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq_i = do_i state^T, dk_j = v_j dstate^T, dv_j = k_j dstate, dstate = sum_i q_i do_i^T."""
    q, k, v, state = saved
    do = do.astype(v.dtype)
    dstate = _total(kernels, tiles, q, do)
    dq = _read(kernels, tiles, do, _turned(state), q.dtype)
    dk = _read(kernels, tiles, v, _turned(dstate), k.dtype)
    dv = _read(kernels, tiles, k, dstate, v.dtype)
    return dq, dk, dv


bidirectional.defvjp(_bidirectional_forward, _bidirectional_backward)


def _total(kernels: Primitives, tiles: Tiles, k: jax.Array, v: jax.Array) -> jax.Array:
    k, v = (_whole(x, tiles.chunk * tiles.segments) for x in (k, v))
    return kernels.states(k, v, tiles).sum(1)


def _read(
    kernels: Primitives, tiles: Tiles, q: jax.Array, state: jax.Array, dtype: Any
) -> jax.Array:
    return kernels.read(_whole(q, tiles.chunk), state, tiles, dtype=dtype)[:, : q.shape[1]]


def _turned(state: jax.Array | None) -> jax.Array | None:
    """States of exchanged parts: sum_j v_j k_j^T."""
    return None if state is None else state.mT


def _whole(x: jax.Array, step: int) -> jax.Array:
    """Zeros after the end, up to a multiple of `step`: keys of zero add nothing."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % step), (0, 0), (0, 0)))
