"""Convolutions of grids, as weighted sums of neighbours: their weights are an `Einsum`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum, Initializer, fan_in_normal


def neighbours(
    x_BxHxWxC: jax.Array, size: int, dilation: int | jax.Array = 1, most: int | None = None
) -> jax.Array:
    """(B, H, W, size^2, C): what a kernel of that (odd) size sees, zeros beyond the border.

    Neighbours lie `dilation` apart; where that is traced, `most` is the largest it can be.
    """
    half = size // 2
    reach = half * (int(dilation) if most is None else most)
    padded = jnp.pad(x_BxHxWxC, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    height, width = x_BxHxWxC.shape[1:3]
    starts = [reach + dilation * (i - half) for i in range(size)]

    def moved(down: int | jax.Array, right: int | jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(padded, down, height, axis=1)
        return jax.lax.dynamic_slice_in_dim(rows, right, width, axis=2)

    return jnp.stack([moved(i, j) for i in starts for j in starts], axis=-2)


def dirac(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """An initialiser of kernels (size^2, C, C): the convolution is the identity."""
    del key
    return jnp.zeros(shape, dtype).at[shape[0] // 2].set(jnp.eye(*shape[1:], dtype=dtype))


class GridConv(nn.Module):
    """A convolution with zero padding, (B, H, W, C) to (B, H, W, features), C if None.

    Each call says how far apart neighbours lie, up to `most`; the kernel is the same.

    Raises:
        ConfigError: an even kernel, which has no centre.
    """

    features: int | None = None
    size: int = 3
    most: int = 1
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, dilation: int | jax.Array = 1) -> jax.Array:
        if self.size % 2 == 0:
            raise ConfigError(f"GridConv.size={self.size}: must be odd")
        width = self.features or x_BxHxWxC.shape[-1]
        weigh = Einsum("...NC,NCD->...D", (width,), kernel_init=self.kernel_init, name="weigh")
        return weigh(neighbours(x_BxHxWxC, self.size, dilation, self.most))


class Conv(nn.Module):
    """A convolution with zeros outside: (B, H, W, C) to (B, H / stride, W / stride, features).

    Sides are rounded up. The kernel is (size, size, C, features).

    Raises:
        ConfigError: an even kernel, which has no centre.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        if self.size % 2 == 0:
            raise ConfigError(f"Conv.size={self.size}: must be odd")
        shape = (self.size, self.size, x_BxHxWxC.shape[-1], self.features)
        kernel = self.param("kernel", fan_in_normal("PQC,PQCD->D"), shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", jax.nn.initializers.zeros, (self.features,), jnp.float32)
        return self.contract(x_BxHxWxC, kernel, bias)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Which axes of the kernel are summed over."""
        return (0, 1, 2)

    def contract(
        self, x_BxHxWxC: jax.Array, kernel: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        """The map with its operands in view, as that of an `Einsum`."""
        dtype, around = x_BxHxWxC.dtype, (self.size // 2, self.size // 2)
        y = jax.lax.conv_general_dilated(
            x_BxHxWxC,
            kernel.astype(dtype),
            (self.stride, self.stride),
            [around, around],
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y if bias is None else y + bias.astype(dtype)
