"""Mixers without pairwise scores, and linear attention, the plainest of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention.masks import Mask
from jaxformer.kernels.linear_attention import causal_sum, key_value_state, linear_attention
from jaxformer.nn.attention import head_sizes
from jaxformer.nn.cache import DecodeUnsupported, require_cache
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.order import order_and_padding


class LinearMixer(nn.Module):
    """A multi-head `jaxformer.nn.block.Mixer` whose sums over sources are linear; abstract.

    It projects, reads the mask and puts heads together again; a subclass gives `causal` and
    `bidirectional`, from projections (B, L, H, K) to outputs (B, L, H, K) in float32.

    Raises:
        ConfigError: heads do not divide the width, or a mask that a sum cannot follow.
    """

    heads: int
    use_bias: bool = True

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, *, decode: bool) -> jax.Array:
        """Position t from positions up to t; with `decode`, from those in the cache too."""
        raise NotImplementedError

    def bidirectional(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        valid_BxL: jax.Array | None,
        valid_BxS: jax.Array | None,
    ) -> jax.Array:
        """Every sink from every source; None: all are valid."""
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x_BxLxD: jax.Array,
        kv_BxSxD: jax.Array | None = None,
        *,
        mask: Mask,
        positions: jax.Array | None = None,
        train: bool = False,
        decode: bool = False,
    ) -> jax.Array:
        del positions, train
        width = x_BxLxD.shape[-1]
        _, head_size = head_sizes(width, self.heads)
        causal, valid_BxS = order_and_padding(self, mask)
        if decode and (not causal or kv_BxSxD is not None):
            raise DecodeUnsupported(self)

        def project(x: jax.Array, name: str) -> jax.Array:
            return Einsum("...D,DHK->...HK", (self.heads, head_size), self.use_bias, name=name)(x)

        source_BxSxD = x_BxLxD if kv_BxSxD is None else kv_BxSxD
        q, k = project(x_BxLxD, "query"), project(source_BxSxD, "key")
        v = project(source_BxSxD, "value")
        if causal:
            y = self.causal(q, k, v, decode=decode)
        else:
            valid_BxL = valid_BxS if kv_BxSxD is None else None
            y = self.bidirectional(q, k, v, valid_BxL=valid_BxL, valid_BxS=valid_BxS)
        out = Einsum("...HK,HKD->...D", (width,), self.use_bias, name="out")
        return out(y.astype(x_BxLxD.dtype))


class LinearAttention(LinearMixer):
    """phi(q) . sum_j phi(k_j) v_j / phi(q) . sum_j phi(k_j), phi = elu + 1.

    Katharopoulos et al. 2020, arXiv 2006.16236, equations 4 to 7 and 16 to 20. A subclass may have
    other features and another denominator.
    """

    def feature(self, x: jax.Array) -> jax.Array:
        """In the type of x, which is that of the products; sums are float32."""
        return (jax.nn.elu(x.astype(jnp.float32)) + 1).astype(x.dtype)

    def normalised(self, y: jax.Array, raw_BxLxHx1: jax.Array) -> jax.Array:
        """Outputs from the sums y and raw, phi(q) . sum_j phi(k_j), both float32."""
        return y / (raw_BxLxHx1 + 1e-6)

    def causal(self, q: jax.Array, k: jax.Array, v: jax.Array, *, decode: bool) -> jax.Array:
        q, k = self.feature(q), self.feature(k)
        y, total = linear_attention(q, k, v, causal=True), causal_sum(k)
        if decode:
            before_k, before_kv = self._read_on(k, v)
            y, total = y + jnp.einsum("BLHK,BHKN->BLHN", q, before_kv), total + before_k
        return self.normalised(y, _dot(q, total))

    def bidirectional(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *,
        valid_BxL: jax.Array | None,
        valid_BxS: jax.Array | None,
    ) -> jax.Array:
        q, k = self.feature(q), self.feature(k)
        k = k if valid_BxS is None else k * valid_BxS[..., None, None]
        return self.normalised(linear_attention(q, k, v, causal=False), _dot(q, _sum(k)))

    def _read_on(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sums over all positions before these, which are added to them."""
        require_cache(self, "k")
        batch, _, heads, head_size = k.shape
        total = self.variable("cache", "k", jnp.zeros, (batch, 1, heads, head_size))
        state = self.variable("cache", "kv", jnp.zeros, (batch, heads, head_size, v.shape[-1]))
        before = total.value, state.value
        if not self.is_initializing():
            total.value = before[0] + _sum(k)
            state.value = before[1] + key_value_state(k, v)
        return before


def _sum(k_BxSxHxK: jax.Array) -> jax.Array:
    return k_BxSxHxK.sum(1, keepdims=True, dtype=jnp.float32)


def _dot(q: jax.Array, total: jax.Array) -> jax.Array:
    return (q * total).sum(-1, keepdims=True)
