"""Linear attention (Katharopoulos et al. 2020, arXiv 2006.16236) as a mixer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention.masks import Mask
from jaxformer.kernels.linear_attention import causal_sum, key_value_state, linear_attention
from jaxformer.nn.attention import head_sizes
from jaxformer.nn.cache import DecodeUnsupported, require_cache
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.mask import causal_and_valid


class LinearAttention(nn.Module):
    """phi(q) sum_j phi(k_j) v_j / phi(q) sum_j phi(k_j) with phi = elu + 1 (equations 4 to 7).

    Raises:
        ConfigError: heads do not divide the width, or a mask without a linear form.
    """

    heads: int
    use_bias: bool = True

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
        causal, valid_BxS = causal_and_valid(mask, "linear attention")
        if decode and (not causal or kv_BxSxD is not None):
            raise DecodeUnsupported(self)

        def project(x: jax.Array, name: str) -> jax.Array:
            return Einsum("...D,DHK->...HK", (self.heads, head_size), self.use_bias, name=name)(x)

        source_BxSxD = x_BxLxD if kv_BxSxD is None else kv_BxSxD
        q = jax.nn.elu(project(x_BxLxD, "query").astype(jnp.float32)) + 1
        k = jax.nn.elu(project(source_BxSxD, "key").astype(jnp.float32)) + 1
        v = project(source_BxSxD, "value").astype(jnp.float32)
        if valid_BxS is not None:
            k = k * valid_BxS[..., None, None]
        if causal:
            total = causal_sum(k)
            y = linear_attention(q, k, v, causal=True)
        else:
            total = k.sum(1, keepdims=True)
            y = linear_attention(q, k, v, causal=False)
        if decode:
            before_k, before_kv = self._read_on(k, v)
            total = total + before_k
            y = y + jnp.einsum("BLHK,BHKN->BLHN", q, before_kv)
        y = y / ((q * total).sum(-1, keepdims=True) + 1e-6)
        out = Einsum("...HK,HKD->...D", (width,), self.use_bias, name="out")
        return out(y.astype(x_BxLxD.dtype))

    def _read_on(self, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The sums over all positions before these, which are added to them."""
        require_cache(self, "k")
        batch, _, heads, head_size = k.shape
        total = self.variable("cache", "k", jnp.zeros, (batch, 1, heads, head_size))
        state = self.variable("cache", "kv", jnp.zeros, (batch, heads, head_size, v.shape[-1]))
        before = total.value, state.value
        if not self.is_initializing():
            total.value = before[0] + k.sum(1, keepdims=True)
            state.value = before[1] + key_value_state(k, v)
        return before
