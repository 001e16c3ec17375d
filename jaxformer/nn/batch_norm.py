"""Normalisation over a batch, and what is built on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.nn.activation import RELU
from jaxformer.nn.einsum import fan_in_normal
from jaxformer.nn.norm import Norm


class BatchNorm(Norm):
    """scale * (x - mean) / sqrt(var + epsilon) + bias, over all axes but the last, in float32.

    While training the statistics are those of the batch, across all devices, and `momentum` of
    them goes into the running ones, the collection "batch_stats", which are used otherwise
    (Ioffe & Szegedy 2015, arXiv 1502.03167). Running variances are unbiased.
    """

    epsilon: float = 1e-5
    momentum: float = 0.1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        width = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, width)
        running_var = self.variable("batch_stats", "var", jnp.ones, width)
        y = x.astype(jnp.float32)
        if train:
            over = tuple(range(x.ndim - 1))
            mean = y.mean(over)
            var = jnp.square(y - mean).mean(over)
            if not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * count / max(count - 1, 1)
                for running, new in ((running_mean, mean), (running_var, unbiased)):
                    running.value = (1 - self.momentum) * running.value + self.momentum * new
        else:
            mean, var = running_mean.value, running_var.value
        y = (y - mean) * jax.lax.rsqrt(var + self.epsilon)
        y = y * self.param("scale", jax.nn.initializers.ones, width, jnp.float32)
        y = y + self.param("bias", jax.nn.initializers.zeros, width, jnp.float32)
        return y.astype(x.dtype)


class PaddedBatchNorm(nn.Module):
    """`BatchNorm` of maps (B, H, W, C), then a border of one position: what it makes of zeros.

    So a map without bias in front of it sees zeros outside, and the two can be folded into one
    convolution (RepVGG-like; Ding et al. 2021, arXiv 2101.03697). The border goes by the running
    statistics, those that this call has updated if it trains, and is a constant to gradients.
    """

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        norm = BatchNorm(name="norm")
        y = norm(x, train=train)
        of = norm.variables
        gain = of["params"]["scale"] * jax.lax.rsqrt(of["batch_stats"]["var"] + norm.epsilon)
        border = of["params"]["bias"] - of["batch_stats"]["mean"] * gain
        border = jax.lax.stop_gradient(border).astype(y.dtype)
        around = ((0, 0), (1, 1), (1, 1), (0, 0))
        inside = jnp.pad(jnp.ones(y.shape[:-1], bool), around[:-1])
        return jnp.where(inside[..., None], jnp.pad(y, around), border)


class NormedConv(nn.Module):
    """A 3x3 convolution of stride 2 with bias, then `BatchNorm`: (B, H, W, C) to half the sides.

    The norm takes the bias away again while it trains, so that its gradient there is 0 and not
    the rounding errors of which Adam makes steps.
    """

    features: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, *, train: bool = False) -> jax.Array:
        dtype = x_BxHxWxC.dtype
        shape = (3, 3, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_normal("PQC,PQCD->D"), shape, jnp.float32)
        bias = self.param("bias", jax.nn.initializers.zeros, (self.features,), jnp.float32)
        y = jax.lax.conv_general_dilated(
            x_BxHxWxC,
            kernel.astype(dtype),
            (2, 2),
            [(1, 1), (1, 1)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        y = y + (jax.lax.stop_gradient(bias) if train else bias).astype(dtype)
        return BatchNorm(name="norm")(y, train=train)


class ConvStem(nn.Module):
    """Images (B, height, width, channels) to (B, N, D), a position for each 4x4 pixels.

    Two `NormedConv`s with a ReLU between; sides are filled up to multiples of 4 with zeros at the
    end. `dtype` becomes the dtype of the residual stream.
    """

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        batch, height, width, _ = image.shape
        x = jnp.pad(image, ((0, 0), (0, -height % 4), (0, -width % 4), (0, 0)))
        x = NormedConv(self.width // 2, name="conv_1")(x.astype(self.dtype), train=train)
        x = RELU(name="activation")(x)
        x = NormedConv(self.width, name="conv_2")(x, train=train)
        return x.reshape(batch, -1, self.width)
