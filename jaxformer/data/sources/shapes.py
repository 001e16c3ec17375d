"""Shapes on textures, drawn on the device, with the pixels that are of the shape.

A background is much the same everywhere: most of such an image says nothing about its class, which
is what methods that drop or merge tokens live on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, ConfigError

SHAPES = ("disc", "square", "triangle", "cross", "ring", "star", "bar", "L")
TEXTURES = ("sinusoid", "clouds", "constant")
GRID = 5  # random values along each side of an image of clouds
NOISE = 0.05


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Rows for `DeviceData`: {"image": (S, S, 3) in [0, 1], "label": int32, "mask": (S, S) bool}.

    One of `SHAPES`, which is the label, of a side between `least` and `most` pixels, lies anywhere
    on one of `TEXTURES`; every channel of its colour is at least 0.3 from the background's (in a
    circle of colours of circumference 1). `NOISE` is the deviation of noise on all pixels.

    Raises:
        ConfigError: sides that do not fit into the image.
    """

    side: int = 32
    least: int = 10
    most: int = 16

    def __post_init__(self) -> None:
        if not 4 <= self.least <= self.most <= self.side:
            raise ConfigError(
                f"Shapes.least={self.least}, most={self.most}: must be in order and between 4 and "
                f"the image's side {self.side}"
            )

    @property
    def classes(self) -> int:
        return len(SHAPES)

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        return jax.vmap(self.draw)(row_keys)

    def draw(self, key: jax.Array) -> dict[str, jax.Array]:
        """One image."""
        keys = iter(jax.random.split(key, 8))
        label = jax.random.randint(next(keys), (), 0, len(SHAPES))
        size = jax.random.randint(next(keys), (), self.least, self.most + 1)
        corner = jnp.floor(jax.random.uniform(next(keys), (2,)) * (self.side - size + 1))
        colour = jax.random.uniform(next(keys), (3,))
        other = (colour + jax.random.uniform(next(keys), (3,), minval=0.3, maxval=0.7)) % 1

        pixel = jnp.arange(self.side) + 0.5
        v, u = (2 * (pixel - at) / size - 1 for at in corner)  # -1 to 1 within the shape's square
        mask = inside(u[None, :], v[:, None])[label]
        ground = texture(next(keys), self.side)[jax.random.randint(next(keys), (), 0, 3)]
        image = jnp.where(mask[..., None], other, colour + ground[..., None])
        image = image + NOISE * jax.random.normal(next(keys), image.shape)
        return {"image": jnp.clip(image, 0, 1), "label": label, "mask": mask}


@dataclasses.dataclass(frozen=True)
class Standardized:
    """Rows of `draw_rows`, each "image" with channels of mean 0 and, of all, a deviation of 1."""

    draw_rows: Callable[[jax.Array, jax.Array], Batch]

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        rows = self.draw_rows(step_key, row_keys)
        image = rows["image"]
        axes = tuple(range(1, image.ndim))
        image = image - image.mean((1, 2), keepdims=True)
        image = image / jnp.sqrt(jnp.square(image).mean(axes, keepdims=True) + 1e-6)
        return {**rows, "image": image}


def inside(u: jax.Array, v: jax.Array) -> jax.Array:
    """Which points (u, v), right and down from the centre, are of each of `SHAPES`: (8, ...)."""
    square = (jnp.abs(u) <= 1) & (jnp.abs(v) <= 1)
    radius = jnp.hypot(u, v)
    # Of a star's five tips: the angle from the next one, and the line from there to the notch.
    fifth = math.pi / 5
    angle = jnp.abs((jnp.arctan2(u, -v) + fifth) % (2 * fifth) - fifth)
    along, across = radius * jnp.cos(angle), radius * jnp.sin(angle)
    notch = 0.45
    to_notch = notch * math.cos(fifth) - 1, notch * math.sin(fifth)
    star = to_notch[0] * across - to_notch[1] * (along - 1) >= 0
    return jnp.stack(
        [
            radius <= 1,
            square,
            square & (jnp.abs(u) <= (v + 1) / 2),
            square & ((jnp.abs(u) <= 0.33) | (jnp.abs(v) <= 0.33)),
            (radius <= 1) & (radius >= 0.55),
            star,
            square & (jnp.abs(v) <= 0.33),
            square & ((u <= -0.4) | (v >= 0.4)),
        ]
    )


def texture(key: jax.Array, side: int) -> jax.Array:
    """The deviations from one colour of each of `TEXTURES`: (3, side, side)."""
    keys = jax.random.split(key, 3)
    x = jnp.arange(side) / side
    rows, columns = jax.random.uniform(keys[0], (2,), minval=-3, maxval=3)  # waves in the image
    phase = rows * x[:, None] + columns * x + jax.random.uniform(keys[1])
    clouds = jax.random.uniform(keys[2], (GRID, GRID), minval=-1, maxval=1)
    clouds = jax.image.resize(clouds, (side, side), "linear")
    sinusoid = jnp.sin(2 * math.pi * phase)
    return 0.15 * jnp.stack([sinusoid, clouds, jnp.zeros((side, side))])
