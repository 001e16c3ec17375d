"""Tasks that only a model which knows positions can do (Luo et al. 2022, arXiv 2205.13401)."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from jaxformer.recipe import Batch, ConfigError

RESERVED = 11  # first token that is drawn; those below are special
TASKS = ("even", "position")


@dataclasses.dataclass(frozen=True)
class PositionTask:
    """Rows for `DeviceData`: `length` random tokens of `vocabulary` words, a label for each.

    Token ids go from 0 to vocabulary + 10; drawn are 11 .. vocabulary - 10. "even": position t of
    the first half is labelled with the token at 2 t + 1, the second half with vocabulary - 2.
    "position": position t is labelled t. `identical` draws one token for the whole row;
    `ignore_first` weighs position 0 with 0, as the authors' code does by accident.

    Raises:
        ConfigError: no such task, or sizes that leave nothing to draw.
    """

    task: Literal["even", "position"]
    length: int
    vocabulary: int
    identical: bool = False
    ignore_first: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"data.task={self.task!r}: must be one of {', '.join(TASKS)}")
        if self.length < 2 or self.length % 2:
            raise ConfigError(f"data.length={self.length}: must be even and at least 2")
        if self.vocabulary < 22:
            raise ConfigError(f"data.vocabulary={self.vocabulary}: must be at least 22")

    @property
    def tokens(self) -> int:
        """How many token ids there are."""
        return self.vocabulary + RESERVED

    @property
    def classes(self) -> int:
        return self.tokens if self.task == "even" else self.length

    def __call__(self, step_key: jax.Array, row_keys: jax.Array) -> Batch:
        del step_key
        size = 1 if self.identical else self.length

        def draw(key: jax.Array) -> jax.Array:
            drawn = jax.random.randint(key, (size,), RESERVED, self.vocabulary - 9)
            return jnp.broadcast_to(drawn, (self.length,))

        inputs = jax.vmap(draw)(row_keys)
        if self.task == "even":
            filler = jnp.full_like(inputs[:, : self.length // 2], self.vocabulary - 2)
            label = jnp.concatenate([inputs[:, 1::2], filler], axis=1)
        else:
            label = jnp.broadcast_to(jnp.arange(self.length), inputs.shape)
        weight = jnp.ones(inputs.shape).at[:, 0].set(0.0 if self.ignore_first else 1.0)
        return {"inputs": inputs, "label": label, "weight": weight}
