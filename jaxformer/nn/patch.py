"""Images as sequences of patches."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.nn.einsum import Einsum


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

    @nn.compact
    def __call__(self, image: jax.Array) -> jax.Array:
        patches = split_patches(image, self.patch)
        project = Einsum("...PQC,PQCD->...D", (self.width,), dtype=self.dtype, name="projection")
        return project(patches)


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
