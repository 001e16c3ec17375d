"""Cameras and turns: from the cells of a picture to points in space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def cell_centres(height: int, width: int) -> np.ndarray:
    """(height * width, 2) float32: u to the right and v downwards from the middle, in cells."""
    v, u = np.mgrid[:height, :width].astype(np.float32)
    return np.stack([u - (width - 1) / 2, v - (height - 1) / 2], -1).reshape(-1, 2)


def lift(uv_Nx2: jax.typing.ArrayLike, depth: jax.Array) -> jax.Array:
    """Points (u z, v z, z), (..., N, 3), at `depth` z (..., N): a pinhole of focal length 1."""
    return jnp.concatenate([uv_Nx2 * depth[..., None], depth[..., None]], -1)


def euler_rotation(angles: jax.Array) -> jax.Array:
    """Z Y X of angles (..., 3) in radians, as (..., 3, 3).

    Z turns against the usual sense, as in Shang et al. 2022 (arXiv 2206.11895).
    """
    (a, b, c), zero = jnp.moveaxis(angles, -1, 0), jnp.zeros(angles.shape[:-1], angles.dtype)
    one = zero + 1

    def matrix(*entries: jax.Array) -> jax.Array:
        return jnp.stack(entries, -1).reshape(*angles.shape[:-1], 3, 3)

    x = matrix(one, zero, zero, zero, jnp.cos(a), -jnp.sin(a), zero, jnp.sin(a), jnp.cos(a))
    y = matrix(jnp.cos(b), zero, jnp.sin(b), zero, one, zero, -jnp.sin(b), zero, jnp.cos(b))
    z = matrix(jnp.cos(c), jnp.sin(c), zero, -jnp.sin(c), jnp.cos(c), zero, zero, zero, one)
    return z @ y @ x
