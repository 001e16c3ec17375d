"""Conditions of a network: how they are embedded, and how they shift, scale and gate its stream."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.kernels.attention import Mask
from jaxformer.nn.activation import SILU
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm
from jaxformer.parallel.sharding import constrain

PLAIN_NORM = Make(LayerNorm, epsilon=1e-6, use_scale=False, use_bias=False)


def sinusoid(t_B: jax.Array, size: int, longest: float = 10000.0) -> jax.Array:
    """(B, size) float32: cosines, then sines, of t times longest^(-2k / size), k < size / 2."""
    half = size // 2
    rates = np.exp(-math.log(longest) * np.arange(half) / half)
    angles = t_B.astype(jnp.float32)[:, None] * jnp.asarray(rates, jnp.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbed(nn.Module):
    """Times (B,) to (B, width): an MLP on `frequencies` sinusoids (arXiv 2212.09748, section 3.2).

    `dtype` is that of the result.
    """

    width: int
    frequencies: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, t_B: jax.Array) -> jax.Array:
        h = sinusoid(t_B, self.frequencies).astype(self.dtype)
        init = jax.nn.initializers.normal(0.02)
        h = Einsum("...D,DF->...F", (self.width,), kernel_init=init, name="up")(h)
        h = SILU(name="activation")(h)
        return Einsum("...F,FD->...D", (self.width,), kernel_init=init, name="down")(h)


class Modulation(nn.Module):
    """`parts` vectors (B, 1, D) from a condition (B, D): Linear(SiLU(c)), 0 at the start."""

    parts: int

    @nn.compact
    def __call__(self, c_BxD: jax.Array) -> tuple[jax.Array, ...]:
        zeros = jax.nn.initializers.zeros
        features = (self.parts, c_BxD.shape[-1])
        project = Einsum("...D,DNE->...NE", features, kernel_init=zeros, name="projection")
        found = project(SILU(name="activation")(c_BxD))
        return tuple(found[:, None, i] for i in range(self.parts))


def modulate(x_BxLxD: jax.Array, shift_Bx1xD: jax.Array, scale_Bx1xD: jax.Array) -> jax.Array:
    """A stream scaled by 1 + scale, then shifted."""
    return x_BxLxD * (1 + scale_Bx1xD) + shift_Bx1xD


class AdaLNZero(nn.Module):
    """A block on which a condition c acts (Peebles & Xie 2022, DiT, arXiv 2212.09748, figure 3).

    x += gate * mixer(modulate(norm(x))), then the same with the MLP. The six vectors of
    `modulation` are shift, scale and gate of the mixer, then of the MLP; at the start they are 0
    and the block is the identity. What a call has beyond mask and `train` goes to the mixer.
    """

    mixer: Make
    mlp: Make
    norm: Make = PLAIN_NORM
    modulation: Make = Make(Modulation, parts=6)

    @nn.compact
    def __call__(
        self, x_BxLxD: jax.Array, c_BxD: jax.Array, *, mask: Mask, train: bool = False, **more: Any
    ) -> jax.Array:
        vectors = self.modulation(name="modulation")(c_BxD)
        shift, scale, gate = vectors[:3]
        y_BxLxD = modulate(self.norm(name="mixer_norm")(x_BxLxD), shift, scale)
        y_BxLxD = self.mixer(name="mixer")(y_BxLxD, mask=mask, train=train, **more)
        x_BxLxD = x_BxLxD + (gate * y_BxLxD).astype(x_BxLxD.dtype)
        shift, scale, gate = vectors[3:]
        y_BxLxD = modulate(self.norm(name="mlp_norm")(x_BxLxD), shift, scale)
        y_BxLxD = self.mlp(name="mlp")(y_BxLxD, train=train)
        x_BxLxD = x_BxLxD + (gate * y_BxLxD).astype(x_BxLxD.dtype)
        return constrain(x_BxLxD, ("batch", "length", "embed"))
