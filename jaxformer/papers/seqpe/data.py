"""Looking back, and images on larger canvases: what short inputs teach must hold on long ones."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.data.base import Example
from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch


@dataclasses.dataclass(frozen=True)
class LookBack:
    """Rows for `DeviceData`: `length` random tokens, each labelled with the one `back` before it.

    {"inputs", "label", "weight"}, each (length,); the first `back` have no label and weigh 0. Only
    relative positions tell the answer.

    Raises:
        ConfigError: sequences too short, or fewer than two tokens.
    """

    length: int
    vocabulary: int
    back: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.back < self.length:
            raise ConfigError(f"data.length={self.length}: must be at least {self.back + 1}")
        if self.vocabulary < 2:
            raise ConfigError(f"data.vocabulary={self.vocabulary}: must be at least 2")

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key

        def draw(key: jax.Array) -> jax.Array:
            return jax.random.randint(key, (self.length,), 0, self.vocabulary)

        inputs = jax.vmap(draw)(row_keys)
        weight = (jnp.arange(self.length) >= self.back).astype(jnp.float32)
        return {
            "inputs": inputs,
            "label": jnp.roll(inputs, self.back, axis=1),
            "weight": jnp.broadcast_to(weight, inputs.shape),
        }


@dataclasses.dataclass(frozen=True)
class Canvas:
    """A transform that puts an image anywhere on a square of zeros, (size, size, C)."""

    size: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        height, width, channels = example["image"].shape
        top, left = (int(rng.integers(self.size - n + 1)) for n in (height, width))
        image = np.zeros((self.size, self.size, channels), np.float32)
        image[top : top + height, left : left + width] = example["image"]
        return {**example, "image": image}
