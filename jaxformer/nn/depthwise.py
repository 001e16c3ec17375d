"""Convolutions of every channel by itself, on sequences that are grids."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.target import target
from jaxformer.nn.patch import to_map


class DepthwiseConv(nn.Module):
    """Each channel of maps (B, H, W, C) with a kernel of its own (size, size, C), zeros outside.

    Raises:
        ConfigError: an even kernel, which has no centre.
    """

    size: int = 3
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        if self.size % 2 == 0:
            raise ConfigError(f"DepthwiseConv.size={self.size}: must be odd")
        channels = x_BxHxWxC.shape[-1]
        init = jax.nn.initializers.truncated_normal(1 / self.size)  # variance 1 / fan-in
        shape = (self.size, self.size, channels)
        kernel = self.param("kernel", init, shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", jax.nn.initializers.zeros, (channels,), jnp.float32)
        return self.contract(x_BxHxWxC, kernel, bias)

    @property
    def contracted(self) -> tuple[int, ...]:
        """Which axes of the kernel are summed over."""
        return (0, 1)

    def contract(
        self, x_BxHxWxC: jax.Array, kernel: jax.Array, bias: jax.Array | None
    ) -> jax.Array:
        """The map with its operands in view, as that of an `Einsum`."""
        dtype = x_BxHxWxC.dtype
        kernel = kernel.astype(dtype)
        y = (_looped if target().platform == "cpu" else _convolved)(x_BxHxWxC, kernel)
        return y if bias is None else y + bias.astype(dtype)


def _convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (1, 1),
        [_around(n) for n in kernel.shape[:2]],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.custom_vjp
def _looped(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same as a loop over the kernel; one derivative, in reverse mode.

    XLA's own for CPUs is slower: 89 ms for 14, forwards and backwards, with 7x7 on
    (64, 12, 12, 16); 133 for 70 on (32, 24, 24, 32).
    """
    moved = _moved(x, kernel)

    def add(i: jax.Array, y: jax.Array) -> jax.Array:
        return y + moved(i) * kernel.reshape(-1, x.shape[-1])[i]

    zeros = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, kernel.shape[0] * kernel.shape[1], add, zeros).astype(x.dtype)


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _looped(x, kernel), (x, kernel)


def _backward(saved: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    moved = _moved(x, kernel)

    def weigh(i: jax.Array) -> jax.Array:
        return (moved(i) * dy).sum((0, 1, 2), dtype=jnp.float32)

    dk = jax.lax.map(weigh, jnp.arange(kernel.shape[0] * kernel.shape[1]))
    return _looped(dy, kernel[::-1, ::-1]), dk.reshape(kernel.shape).astype(kernel.dtype)


_looped.defvjp(_forward, _backward)


def _moved(x: jax.Array, kernel: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """What weight number i of the kernel meets, as a map like x."""
    rows, columns = kernel.shape[:2]
    padded = jnp.pad(x, ((0, 0), _around(rows), _around(columns), (0, 0)))

    def at(i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(padded, (0, i // columns, i % columns, 0), x.shape)

    return at


def _around(size: int) -> tuple[int, int]:
    return size // 2, size // 2


class ConvPosition(nn.Module):
    """x + convolution(x) on a grid: positions from neighbours and the zeros beyond the border.

    Chu et al. 2021, arXiv 2102.10882 (conditional positional encodings).
    """

    grid: tuple[int, int]
    size: int = 3

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x = to_map(x_BxLxD, self.grid, "ConvPosition")
        y = DepthwiseConv(self.size, name="conv")(x)
        return x_BxLxD + y.reshape(x_BxLxD.shape)
