"""Procedural scenes: pictures with a continuous description, rendered at any size."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch

CLASSES = 4  # which is left, the disc (0, 1) or the square (2, 3); which colours (even, odd)
DISCS = np.array([[0.9, 0.2, 0.2], [0.2, 0.3, 0.9]], np.float32)
SQUARES = np.array([[0.2, 0.8, 0.3], [0.95, 0.85, 0.2]], np.float32)
SKY = np.array([[0.05, 0.1, 0.35], [0.85, 0.7, 0.5]], np.float32)  # at the top, at the bottom


class Scene(NamedTuple):
    """A picture in units of its height and width: (x, y), x to the right and y downwards."""

    label: jax.Array
    disc: jax.Array  # (2,) its centre
    square: jax.Array
    radius: jax.Array  # of the disc, and half a side of the square
    tint: jax.Array  # (3,) added to the sky


def draw_scene(key: jax.Array) -> Scene:
    """A disc and a square, one in the left half and one in the right, before a sky."""
    keys = jax.random.split(key, 5)
    label = jax.random.randint(keys[0], (), 0, CLASSES)
    left, right = (
        jax.random.uniform(k, (2,), minval=jnp.array([x, 0.25]), maxval=jnp.array([x + 0.2, 0.75]))
        for k, x in zip(keys[1:3], (0.2, 0.6), strict=True)
    )
    first = label < 2
    return Scene(
        label,
        jnp.where(first, left, right),
        jnp.where(first, right, left),
        jax.random.uniform(keys[3], (2,), minval=0.12, maxval=0.18),
        0.1 * jax.random.normal(keys[4], (3,)),
    )


def render(scene: Scene, height: int, width: int, checker: int = 2) -> jax.Array:
    """(height, width, 3) in [0, 1]; edges are smoothed over one pixel.

    The disc bears a checker of `checker` pixels a field, at any size: what is fine in a picture
    is fine at every resolution.
    """
    y, x = ((jnp.arange(n) + 0.5) / n for n in (height, width))
    sky = SKY[0] + y[:, None] * (SKY[1] - SKY[0]) + scene.tint
    image = jnp.broadcast_to(sky[:, None], (height, width, 3))

    def cover(image: jax.Array, outside: jax.Array, colour: jax.Array) -> jax.Array:
        share = jnp.clip(0.5 - outside * min(height, width), 0, 1)[..., None]
        return image * (1 - share) + colour * share

    dx, dy = jnp.abs(x - scene.square[0]), jnp.abs(y - scene.square[1])
    pair = scene.label % 2
    outside = jnp.maximum(dx[None], dy[:, None]) - scene.radius[1]
    image = cover(image, outside, jnp.asarray(SQUARES)[pair])
    outside = jnp.hypot(x[None] - scene.disc[0], y[:, None] - scene.disc[1]) - scene.radius[0]
    field = (np.arange(height)[:, None] // checker + np.arange(width) // checker) % 2
    colour = jnp.asarray(DISCS)[pair] * jnp.where(jnp.asarray(field)[..., None] == 1, 1.0, 0.35)
    return jnp.clip(cover(image, outside, colour), 0, 1)


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Rows for `DeviceData`: {"image" (B, height, width, 3), "label" (B,), "seed" (B,)}.

    A row's scene does not depend on the size it is rendered at. "seed" is what else is random of
    the row (`jaxformer.tasks.diffuse`).

    Raises:
        ConfigError: a picture of less than 8 pixels a side, or a checker without fields.
    """

    height: int
    width: int
    checker: int = 2

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 8:
            raise ConfigError(f"data.size={self.height, self.width}: must be at least 8 pixels")
        if self.checker < 1:
            raise ConfigError(f"data.checker={self.checker}: must be at least 1 pixel")

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key

        def one(key: jax.Array) -> Batch:
            about, rest = jax.random.split(key)
            scene = draw_scene(about)
            image = render(scene, self.height, self.width, self.checker)
            return {"image": image, "label": scene.label, "seed": jax.random.bits(rest)}

        return jax.vmap(one)(row_keys)
