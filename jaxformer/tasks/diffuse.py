"""Diffusion: tell the noise that was mixed into an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.recipe import Batch, Extra, LossOutput, Mean, Params
from jaxformer.tasks import linen
from jaxformer.tasks.noising import Process


class Codec(Protocol):
    """Between images (B, H, W, C) in [0, 1] and what is diffused, their latents.

    A learned one finds its frozen weights in `extra`.
    """

    def encode(self, extra: Extra, image: jax.Array, keys_B: jax.Array) -> jax.Array: ...

    def decode(self, extra: Extra, latent: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The image itself, in [-1, 1]."""

    def encode(self, extra: Extra, image: jax.Array, keys_B: jax.Array) -> jax.Array:
        del extra, keys_B
        return 2 * image - 1

    def decode(self, extra: Extra, latent: jax.Array) -> jax.Array:
        del extra
        return (latent + 1) / 2


@dataclasses.dataclass(frozen=True)
class Latents:
    """Latents that were computed before, times `factor`: 0.18215 for Stable Diffusion's encoder."""

    factor: float = 0.18215

    def encode(self, extra: Extra, image: jax.Array, keys_B: jax.Array) -> jax.Array:
        del extra, keys_B
        return image * self.factor

    def decode(self, extra: Extra, latent: jax.Array) -> jax.Array:
        del extra
        return latent / self.factor


class Condition(Protocol):
    """An array of the batch that the model is given by the name `name`."""

    @property
    def name(self) -> str: ...

    def absent(self, given: jax.Array) -> jax.Array:
        """What stands for nothing, like `given`.

        Raises:
            ConfigError: the model was not made for that.
        """
        ...

    def check(self, given: np.ndarray) -> None:
        """Raise a `ConfigError` for values that the model does not know."""
        ...

    def examples(self, count: int) -> np.ndarray:
        """Values to show, `count` rows of them."""
        ...


@dataclasses.dataclass(frozen=True)
class ClassLabel:
    """One of `classes` labels (B,); the `null` one, where there is one, is number `classes`."""

    classes: int
    null: bool = True
    name: str = "label"

    @property
    def labels(self) -> int:
        """How many rows an embedding has."""
        return self.classes + self.null

    def absent(self, given: jax.Array) -> jax.Array:
        if not self.null:
            raise ConfigError(
                f"{self.name}: the model has no null class, so it cannot be guided; train with "
                "diffusion.drop > 0"
            )
        return jnp.full_like(given, self.classes)

    def examples(self, count: int) -> np.ndarray:
        return np.arange(count, dtype=np.int32) % self.classes

    def check(self, given: np.ndarray) -> None:
        given = np.asarray(given)
        if given.size and not 0 <= given.min() <= given.max() < self.labels:
            wrong = given.max() if given.max() >= self.labels else given.min()
            raise ConfigError(f"{self.name}={wrong}: must be from 0 to {self.labels - 1}")


@dataclasses.dataclass(frozen=True)
class DiffusionTask:
    """What `process` asks of `model`(x_t, time, **conditions); it also `Denoises`.

    Batches are {"image" (B, H, W, C)}, the array of each condition and optionally "weight" (B,)
    and "seed" (B,) uint32. Time, noise and dropped conditions of a row come from its seed where
    there are seeds, so that they do not depend on the rows beside it, and else from the key and
    the number of the row. While training the conditions of a row are absent with probability
    `drop`.
    """

    model: nn.Module
    process: Process
    conditions: tuple[Condition, ...] = ()
    drop: float = 0.0
    codec: Codec = Pixels()

    def __post_init__(self) -> None:
        if not 0.0 <= self.drop < 1.0:
            raise ConfigError(f"diffusion.drop={self.drop}: must be in [0, 1)")

    def init(self, key: jax.Array, batch: Batch) -> tuple[Params, Extra]:
        keys = jax.random.split(key, 1)
        x = self.codec.encode({}, jnp.asarray(batch["image"])[:1], keys)
        given = {name: value[:1] for name, value in self.given(batch).items()}
        return linen.init(self.model, key, x, jnp.zeros(1), **given)

    def loss(
        self, params: Params, extra: Extra, batch: Batch, *, key: jax.Array, train: bool
    ) -> LossOutput:
        image = jnp.asarray(batch["image"])
        keys = jax.vmap(lambda k: jax.random.split(k, 4))(_row_keys(batch, key, len(image)))
        x = self.codec.encode(extra, image, keys[:, 0])
        t = jax.vmap(self.process.draw)(keys[:, 1])
        noise = jax.vmap(lambda k: jax.random.normal(k, x.shape[1:]))(keys[:, 2])
        given = self.given(batch)
        if train and self.drop:
            dropped = jax.vmap(lambda k: jax.random.bernoulli(k, self.drop))(keys[:, 3])
            given = self._drop(given, dropped)
        x_t, time = self.process.mix(x, noise, t), self.process.network_time(t)
        output, extra = linen.apply(
            self.model, params, extra, x_t, time, key=key, train=train, **given
        )
        losses = self.process.losses(output, x, noise, t)
        weight = batch.get("weight")
        found = {name: Mean.of(value, weight) for name, value in losses.items()}
        objective = Mean.of(sum(losses.values()), weight)
        return LossOutput(objective.value(), objective.weight, {"loss": objective, **found}, extra)

    def given(self, batch: Batch) -> dict[str, jax.Array]:
        """The conditions of a batch, by name."""
        missing = [c.name for c in self.conditions if c.name not in batch]
        if missing:
            raise ConfigError(f"batch: has no {missing[0]!r}, which the model is told")
        return {c.name: jnp.asarray(batch[c.name]) for c in self.conditions}

    def absent(self, given: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Conditions that say nothing, for as many rows as `given`."""
        if not self.conditions:
            raise ConfigError("guidance: the model has no condition to be guided by")
        return {c.name: c.absent(given[c.name]) for c in self.conditions}

    def _drop(self, given: dict[str, jax.Array], dropped: jax.Array) -> dict[str, jax.Array]:
        def choose(absent: jax.Array, value: jax.Array) -> jax.Array:
            return jnp.where(dropped.reshape((-1,) + (1,) * (value.ndim - 1)), absent, value)

        return jax.tree.map(choose, self.absent(given), given)

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise a `ConfigError` for conditions that the model does not know."""
        for condition in self.conditions:
            condition.check(given[condition.name])

    def examples(self, count: int) -> dict[str, np.ndarray]:
        """Conditions to show, `count` rows of them."""
        return {c.name: c.examples(count) for c in self.conditions}

    def denoise(
        self, params: Params, extra: Extra, x: jax.Array, time: jax.Array, given: Batch
    ) -> jax.Array:
        """The answer of the model, (B, H, W, outputs)."""
        key = jax.random.key(0)  # not used: nothing is drawn outside of training
        return linen.apply(self.model, params, extra, x, time, key=key, train=False, **given)[0]

    def decode(self, extra: Extra, latent: jax.Array) -> jax.Array:
        return self.codec.decode(extra, latent)


def _row_keys(batch: Batch, key: jax.Array, rows: int) -> jax.Array:
    if "seed" in batch:
        return jax.vmap(jax.random.key)(jnp.asarray(batch["seed"]))
    return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
