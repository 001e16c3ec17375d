"""Flow attention: attention as a flow network with conserved capacity, in linear time.

Values are sources j, outputs are sinks i, and q_i . k_j of non-negative features is the capacity
of the edge between them. Axes: B batch, L sinks, S sources, H heads, K head size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.kernels.linear_attention import causal_sum, key_value_state, linear_attention
from jaxformer.models.transformer import Transformer
from jaxformer.models.variant import Variant
from jaxformer.nn.cache import require_cache
from jaxformer.nn.linear_attention import LinearMixer
from jaxformer.nn.make import Make

EPSILON = 1e-6


class Flow(NamedTuple):
    """The conserved quantities, float32."""

    incoming_BxLxH: jax.Array  # I: what each sink takes in
    sink_BxLxH: jax.Array  # I-hat: the same when every source gives 1
    source_BxSxH: jax.Array  # O-hat: what each source gives when every sink takes 1


def _dot(a: jax.Array, b: jax.Array, epsilon: float) -> jax.Array:
    """(a + e) . (b + e) over features."""
    return ((a + epsilon) * (b + epsilon)).sum(-1)


def conserve(q_BxLxHxK: jax.Array, k_BxSxHxK: jax.Array, epsilon: float = EPSILON) -> Flow:
    """The flow of non-negative float32 features; padded sources and sinks have features 0."""
    q, k = q_BxLxHxK, k_BxSxHxK
    incoming = _dot(q, k.sum(1, keepdims=True), epsilon)
    outgoing = _dot(k, q.sum(1, keepdims=True), epsilon)
    sink = _dot(q, (k / outgoing[..., None]).sum(1, keepdims=True), epsilon)
    source = _dot(k, (q / incoming[..., None]).sum(1, keepdims=True), epsilon)
    return Flow(incoming, sink, source)


class State(NamedTuple):
    """All that the causal form remembers of a sequence: constant in its length."""

    count: jax.Array  # (B,) int32, positions read
    k: jax.Array  # (B, 1, H, K), sum of k
    q: jax.Array  # (B, 1, H, K), sum of q
    k_out: jax.Array  # (B, 1, H, K), sum of k N / O
    q_in: jax.Array  # (B, 1, H, K), sum of q N / I
    competition: jax.Array  # (B, 1, H), log of the sum of exp(O-hat)
    kv: jax.Array  # (B, H, K, K), sum of k (c v)^T

    @classmethod
    def empty(cls, batch: int, heads: int, head_size: int) -> State:
        vector = jnp.zeros((batch, 1, heads, head_size))
        none = jnp.full((batch, 1, heads), -jnp.inf)
        square = jnp.zeros((batch, heads, head_size, head_size))
        return cls(jnp.zeros(batch, jnp.int32), vector, vector, vector, vector, none, square)


def attend(
    q_BxLxHxK: jax.Array,
    k_BxSxHxK: jax.Array,
    v_BxSxHxK: jax.Array,
    *,
    valid_BxL: jax.Array | None = None,
    valid_BxS: jax.Array | None = None,
    clamp: float | None = 1.0,
    compete: bool = True,
    allocate: bool = True,
    epsilon: float = EPSILON,
) -> jax.Array:
    """Bidirectional or cross flow attention (section 3.2): (B, L, H, K) float32.

    `q`, `k` are features, already non-negative. Padded sinks and sources carry nothing: sums run
    over the valid ones, whose numbers n and m are counted. A row without valid sources gives 0.
    """
    dtype = v_BxSxHxK.dtype  # of the products of the sum itself; all else is float32
    q, k, v = (x.astype(jnp.float32) for x in (q_BxLxHxK, k_BxSxHxK, v_BxSxHxK))
    valid_BxL = jnp.ones(q.shape[:2], bool) if valid_BxL is None else valid_BxL
    valid_BxS = jnp.ones(k.shape[:2], bool) if valid_BxS is None else valid_BxS
    q, k = q * valid_BxL[..., None, None], k * valid_BxS[..., None, None]
    n, m = (valid.sum(1)[:, None, None].astype(jnp.float32) for valid in (valid_BxL, valid_BxS))
    flow = conserve(q, k, epsilon)
    if compete:
        source = flow.source_BxSxH if clamp is None else flow.source_BxSxH.clip(-clamp, clamp)
        share = jax.nn.softmax(source, 1, where=valid_BxS[..., None])
        v = v * (m * share)[..., None]
    products = (x.astype(dtype) for x in (q / flow.incoming_BxLxH[..., None], k, v))
    r = linear_attention(*products, causal=False)
    if allocate:
        r = r * jax.nn.sigmoid(flow.sink_BxLxH * n / jnp.maximum(m, 1))[..., None]
    return r


def attend_causally(
    q_BxLxHxK: jax.Array,
    k_BxLxHxK: jax.Array,
    v_BxLxHxK: jax.Array,
    state: State | None = None,
    *,
    clamp: float | None = 1.0,
    compete: bool = True,
    allocate: bool = True,
    epsilon: float = EPSILON,
) -> tuple[jax.Array, State]:
    """Causal flow attention: (B, L, H, K) float32 and the state after these positions.

    Every sum is a prefix sum that starts from `state`, so the same lines train, read a prompt and
    decode one token. Source t is scored by the prefix up to t and keeps that score.
    """
    dtype = v_BxLxHxK.dtype  # of the products of the sum itself; all else is float32
    q, k, v = (x.astype(jnp.float32) for x in (q_BxLxHxK, k_BxLxHxK, v_BxLxHxK))
    batch, length, heads, head_size = q.shape
    if k.shape[1] != length:
        raise ValueError(
            f"causal flow attention: {length} sinks and {k.shape[1]} sources; it needs as many of "
            "one as of the other"
        )
    before = State.empty(batch, heads, head_size) if state is None else state
    count_BxLx1 = (before.count[:, None] + jnp.arange(1, length + 1))[..., None].astype(q.dtype)

    sum_k, sum_q = before.k + causal_sum(k), before.q + causal_sum(q)
    incoming, outgoing = _dot(q, sum_k, epsilon), _dot(k, sum_q, epsilon)
    k_out = before.k_out + causal_sum(k * (count_BxLx1 / outgoing)[..., None])
    q_in = before.q_in + causal_sum(q * (count_BxLx1 / incoming)[..., None])
    sink = _dot(q, k_out, epsilon) / count_BxLx1
    source = _dot(k, q_in, epsilon) / count_BxLx1

    source = source if clamp is None else source.clip(-clamp, clamp)
    total = jnp.logaddexp(before.competition, jax.lax.cumlogsumexp(source, axis=1))
    if compete:
        v = v * (count_BxLx1 * jnp.exp(source - total))[..., None]
    scaled = q / incoming[..., None]
    r = linear_attention(*(x.astype(dtype) for x in (scaled, k, v)), causal=True)
    if state is not None:
        r = r + jnp.einsum("BLHK,BHKN->BLHN", scaled, before.kv)
    if allocate:
        r = r * jax.nn.sigmoid(sink)[..., None]
    last = [x[:, -1:] for x in (sum_k, sum_q, k_out, q_in, total)]
    return r, State(before.count + length, *last, before.kv + key_value_state(k, v))


class FlowAttention(LinearMixer):
    """Multi-head flow attention, a `jaxformer.nn.block.Mixer`; features are sigmoids.

    `clamp` bounds the conserved outgoing flow before competition: 1 in the authors' core file, 5 in
    their language model, None not at all. `compete` and `allocate` are the paper's ablations;
    leave both on.
    """

    clamp: float | None = 1.0
    compete: bool = True
    allocate: bool = True

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, *, decode: bool) -> jax.Array:
        if not decode:
            return attend_causally(_feature(q), _feature(k), v, **self._parts())[0]
        require_cache(self, "flow")
        batch, _, heads, head_size = q.shape
        state = self.variable("cache", "flow", State.empty, batch, heads, head_size)
        r, after = attend_causally(_feature(q), _feature(k), v, state.value, **self._parts())
        if not self.is_initializing():
            state.value = after
        return r

    def bidirectional(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        valid_BxL: jax.Array | None,
        valid_BxS: jax.Array | None,
    ) -> jax.Array:
        valid = {"valid_BxL": valid_BxL, "valid_BxS": valid_BxS}
        return attend(_feature(q), _feature(k), v, **valid, **self._parts())

    def _parts(self) -> dict[str, Any]:
        return {"clamp": self.clamp, "compete": self.compete, "allocate": self.allocate}


def _feature(x: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(x.astype(jnp.float32))


def variant(trunk: Transformer, length: int) -> Variant:
    """Flow attention without a clamp in any plain model, as the equations of the paper have it."""
    del length
    return Variant(Make(FlowAttention, heads=trunk.heads, clamp=None))
