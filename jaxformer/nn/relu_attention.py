"""ReLU attention, over the length of the prefix: that of the theory of in-context learning."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.kernels.attention.masks import Mask
from jaxformer.nn.activation import RELU
from jaxformer.nn.cache import DecodeUnsupported
from jaxformer.nn.einsum import Einsum, KernelInit, fan_in_normal
from jaxformer.nn.order import order_and_padding


class ReLUAttention(nn.Module):
    """sum_m 1/i sum_{j <= i} ReLU(<Q_m h_i, K_m h_j>) V_m h_j, a `jaxformer.nn.block.Mixer`.

    Every head is as wide as the stream, D, and has no output projection; scores are not scaled
    (Bai et al. 2023, arXiv 2306.04637, definition 1; Lin et al. 2023, arXiv 2310.08566). Without
    an order the sum is over all positions, divided by their number. Holds all pairwise scores.

    Raises:
        ConfigError: a mask other than `Causal` or `Full`; DecodeUnsupported: a decode state.
    """

    heads: int = 1
    kernel_init: KernelInit = fan_in_normal

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
        if decode:
            raise DecodeUnsupported(self)
        causal, valid_BxS = order_and_padding(self, mask)
        kv_BxSxD = x_BxLxD if kv_BxSxD is None else kv_BxSxD
        equation, features = "...D,DHK->...HK", (self.heads, x_BxLxD.shape[-1])

        def project(name: str, inputs: jax.Array) -> jax.Array:
            init = self.kernel_init(equation)
            layer = Einsum(equation, features, use_bias=False, kernel_init=init, name=name)
            return layer(inputs)

        q, k, v = project("query", x_BxLxD), project("key", kv_BxSxD), project("value", kv_BxSxD)
        scores_BxHxLxS = jnp.einsum("blhk,bshk->bhls", q, k, preferred_element_type=jnp.float32)
        weights = RELU(name="activation")(scores_BxHxLxS)
        length, sources = weights.shape[-2:]
        if causal:
            seen_LxS = jnp.tri(length, sources, dtype=weights.dtype)
        else:
            seen_LxS = jnp.ones((length, sources), weights.dtype)
        if valid_BxS is not None:
            seen_LxS = seen_LxS * valid_BxS[:, None, None]
        weights = weights * (seen_LxS / jnp.maximum(seen_LxS.sum(-1, keepdims=True), 1.0))
        return jnp.einsum("bhls,bshk->blk", weights.astype(v.dtype), v)
