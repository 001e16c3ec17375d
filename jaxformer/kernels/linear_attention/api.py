"""Linear attention: unnormalised sums, one chunked form for training, one step for decoding.

Axes: B batch, L length of the queries, S of the keys, H heads, K feature size, N value size. What
normalises the sums (Katharopoulos et al., arXiv:2006.16236) or scales q, k and v (flow attention)
is the caller's: a denominator is `q . causal_sum(k)`, or the output for a column of ones in v.
Padding is k = 0. Sums are float32 (float64 for float64 inputs) and are returned as such.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax


def linear_attention(
    q_BxLxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxN: jax.Array,
    *,
    causal: bool,
    chunk: int = 128,
) -> jax.Array:
    """sum_j (q_i . k_j) v_j over all j, or over j <= i when `causal`: (B, L, H, N).

    chunk: positions that one step of the causal scan takes; memory is linear in L for any.
    """
    q, k, v = q_BxLxHxK, k_BxSxHxK, v_BxSxHxN
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if not (q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]):
        raise ValueError(f"linear_attention: needs (batch, length, heads, size) arrays: {shapes}")
    if q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"linear_attention: batch, heads or feature size differ: {shapes}")
    if not causal:
        return jnp.einsum("blhk,bhkn->blhn", _sums(q), key_value_state(k, v))
    if q.shape[1] != k.shape[1] or chunk < 1:
        raise ValueError(f"linear_attention: causal needs L = S and chunk >= 1: {shapes}, {chunk}")
    return _causal(_sums(q), _sums(k), _sums(v), min(chunk, q.shape[1]))


def key_value_state(k_BxSxHxK: jax.Array, v_BxSxHxN: jax.Array) -> jax.Array:
    """sum_j k_j v_j^T, (B, H, K, N): what the keys leave behind, and the state of decoding."""
    return jnp.einsum("bshk,bshn->bhkn", _sums(k_BxSxHxK), _sums(v_BxSxHxN))


def linear_attention_step(
    state_BxHxKxN: jax.Array, q_BxHxK: jax.Array, k_BxHxK: jax.Array, v_BxHxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Causal linear attention of the next position: (new state, output (B, H, N))."""
    state = state_BxHxKxN + jnp.einsum("bhk,bhn->bhkn", _sums(k_BxHxK), _sums(v_BxHxN))
    return state, jnp.einsum("bhk,bhkn->bhn", _sums(q_BxHxK), state)


def causal_sum(x: jax.Array, axis: int = 1) -> jax.Array:
    """Sums of all entries up to and including each, along `axis`."""
    return jnp.cumsum(_sums(x), axis)


def _sums(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def chunk_step(
    state: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A chunk (..., C, K), (..., C, N) after the `state` (..., K, N): (new state, output)."""
    c = q.shape[-2]
    seen = lax.broadcasted_iota(jnp.int32, (c, c), 0) >= lax.broadcasted_iota(jnp.int32, (c, c), 1)
    scores = jnp.where(seen, q @ k.swapaxes(-1, -2), 0.0)
    return state + k.swapaxes(-1, -2) @ v, scores @ v + q @ state


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _causal(q: jax.Array, k: jax.Array, v: jax.Array, chunk: int) -> jax.Array:
    b, l, h, _ = q.shape
    n = -(-l // chunk)

    def chunks(x: jax.Array) -> jax.Array:  # (B, L, H, K) -> (chunks, B, H, C, K)
        x = jnp.pad(x, ((0, 0), (0, n * chunk - l), (0, 0), (0, 0)))
        return x.reshape(b, n, chunk, h, -1).transpose(1, 0, 3, 2, 4)

    state = jnp.zeros((b, h, k.shape[-1], v.shape[-1]), v.dtype)
    _, o = lax.scan(lambda s, x: chunk_step(s, *x), state, tuple(map(chunks, (q, k, v))))
    return o.transpose(1, 0, 3, 2, 4).reshape(b, n * chunk, h, -1)[:, :l]


def _causal_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _causal(q, k, v, chunk), (q, k, v)


def _causal_backward(
    chunk: int, saved: tuple[jax.Array, ...], do: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients are the same sums with the parts exchanged, from the end for k and v.

    dq_i = sum_{j<=i} (do_i . v_j) k_j, dk_j = sum_{i>=j} (v_j . do_i) q_i, dv_j = sum_{i>=j}
    (k_j . q_i) do_i. Saving q, k, v alone keeps memory linear: no state of any chunk is stored.
    """
    q, k, v = saved
    dq = _causal(do, v, k, chunk)
    q, k, v, do = (x[:, ::-1] for x in (q, k, v, do))
    return dq, _causal(v, do, q, chunk)[:, ::-1], _causal(k, q, do, chunk)[:, ::-1]


_causal.defvjp(_causal_forward, _causal_backward)
