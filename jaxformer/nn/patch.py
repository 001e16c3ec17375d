"""Images as sequences of patches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum, KernelInit, fan_in_normal
from jaxformer.nn.make import Make
from jaxformer.nn.norm import LayerNorm


class PatchEmbed(nn.Module):
    """Images (B, height, width, channels) to patch embeddings (B, N, D), rows of patches first.

    The kernel (P, P, channels, D) is that of a convolution with stride P. `dtype` becomes the
    dtype of the residual stream.

    Raises:
        ConfigError: the patch does not divide the image.
    """

    patch: int
    width: int
    dtype: Any = jnp.float32
    kernel_init: KernelInit = fan_in_normal

    @nn.compact
    def __call__(self, image: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        patches = split_patches(image, self.patch)
        equation = "...PQC,PQCD->...D"
        options = {"dtype": self.dtype, "kernel_init": self.kernel_init(equation)}
        return Einsum(equation, (self.width,), name="projection", **options)(patches)


def split_patches(image: jax.Array, patch: int) -> jax.Array:
    """(B, height, width, C) to (B, N, P, P, C), rows of patches first."""
    batch, height, width, channels = image.shape
    if height % patch or width % patch:
        raise ConfigError(
            f"model.patch={patch}: must divide the image, which is {height} x {width}"
        )
    rows, columns = height // patch, width // patch
    grid = image.reshape(batch, rows, patch, columns, patch, channels)
    return grid.swapaxes(2, 3).reshape(batch, rows * columns, patch, patch, channels)


def join_patches(patches: jax.Array, rows: int) -> jax.Array:
    """The inverse of `split_patches` for a grid of `rows` rows."""
    batch, count, patch, _, channels = patches.shape
    columns = count // rows
    grid = patches.reshape(batch, rows, columns, patch, patch, channels).swapaxes(2, 3)
    return grid.reshape(batch, rows * patch, columns * patch, channels)


def to_map(x_BxLxD: jax.Array, grid: tuple[int, int], reader: str) -> jax.Array:
    """A sequence that is a grid, row after row, as a map (B, rows, columns, D).

    Raises:
        ConfigError: the sequence is not the grid.
    """
    rows, columns = grid
    if x_BxLxD.shape[1] != rows * columns:
        raise ConfigError(
            f"{reader}.grid={grid}: the sequence has {x_BxLxD.shape[1]} positions; must be "
            f"{rows * columns}"
        )
    return x_BxLxD.reshape(-1, rows, columns, x_BxLxD.shape[-1])


class PatchMerge(nn.Module):
    """Four neighbours of a grid become one position: (B, height width, D) to (B, ., features).

    Their channels are joined, (0, 0), (1, 0), (0, 1), (1, 1) in (row, column), normalised and
    projected (Liu et al. 2021, arXiv 2103.14030, section 3.1); an odd grid is padded with zeros.
    There is no bias in the paper; surgery of the norm needs one.
    """

    grid: tuple[int, int]
    features: int
    norm: Make = Make(LayerNorm)
    use_bias: bool = False

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x = _even(to_map(x_BxLxD, self.grid, "PatchMerge"))
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = jnp.concatenate(corners, -1).reshape(x.shape[0], -1, 4 * x.shape[-1])
        x = self.norm(name="norm")(x)
        return Einsum("...D,DE->...E", (self.features,), self.use_bias, name="reduction")(x)


class ConvMerge(nn.Module):
    """Four neighbours of a grid become one position: a norm of each, then a 2x2 convolution.

    The norm comes before an odd grid is padded with zeros (ConvNeXt's downsampling, Liu et al.
    2022, arXiv 2201.03545, section 2.6).
    """

    grid: tuple[int, int]
    features: int
    norm: Make = Make(LayerNorm)

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array) -> jax.Array:
        x = _even(to_map(self.norm(name="norm")(x_BxLxD), self.grid, "ConvMerge"))
        return PatchEmbed(2, self.features, x.dtype, name="reduction")(x)


def _even(x: jax.Array) -> jax.Array:
    """A map with zeros at the end of odd sides."""
    rows, columns = x.shape[1:3]
    return jnp.pad(x, ((0, 0), (0, rows % 2), (0, columns % 2), (0, 0)))
