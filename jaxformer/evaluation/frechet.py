"""The Fréchet distance of drawn examples to real ones, on any features of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.errors import ConfigError
from jaxformer.recipe import Data, EvalContext, TrainState
from jaxformer.sampling.diffusion import Sampler, sample
from jaxformer.train.states import on_device

Features = Callable[[jax.Array], jax.Array]  # images (B, H, W, C) in [0, 1] to (B, F)


@dataclasses.dataclass(frozen=True)
class RandomFeatures:
    """Features of a convolutional network with random weights, the same for the same seed.

    A stand-in where no trained network is at hand: it needs no download and takes any size, and
    its distances are no FID. Three 3 x 3 layers of stride 2 with ReLU; of each, the mean and the
    deviation over the image.
    """

    width: int = 16
    seed: int = 0

    def __call__(self, image: jax.Array) -> jax.Array:
        x, found = 2 * image - 1, []
        for i in range(3):
            key = jax.random.fold_in(jax.random.key(self.seed), i)
            shape = (3, 3, x.shape[-1], self.width)
            kernel = jax.random.normal(key, shape) * (2 / (9 * x.shape[-1])) ** 0.5
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x, kernel, (2, 2), "SAME", dimension_numbers=dimensions
                )
            )
            found += [x.mean((1, 2)), x.std((1, 2))]
        return jnp.concatenate(found, axis=-1)


class Moments:
    """Mean and covariance of features that come in batches, in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, np.zeros(()), np.zeros(())

    def add(self, features: Any) -> None:
        """Rows (B, F)."""
        x = np.asarray(features, np.float64)
        self.count += len(x)
        self.total = self.total + x.sum(0)
        self.products = self.products + x.T @ x

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        spread = self.products - self.count * np.outer(self.mean, self.mean)
        return spread / max(self.count - 1, 1)


def frechet_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), of two normal distributions.

    Heusel et al. 2017, arXiv 1706.08500, eq. 6; the trace of the root is that of the symmetric
    (C1^(1/2) C2 C1^(1/2))^(1/2), which needs no complex numbers.
    """
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    both = np.linalg.eigvalsh(root @ other_covariance @ root)
    trace = np.trace(covariance) + np.trace(other_covariance)
    distance = np.square(mean - other_mean).sum() + trace - 2 * np.sqrt(np.maximum(both, 0)).sum()
    return float(max(distance, 0.0))


@dataclasses.dataclass(frozen=True)
class FrechetDistance:
    """`features` of `examples` drawn examples against those of as many of `data`.

    Every row of the data gives its image to one side and its conditions and its size to the other.

    Raises:
        ConfigError: fewer examples than two.
    """

    task: Any  # a task that `Denoises`, on images
    data: Data
    features: Features
    sampler: Sampler
    examples: int
    guidance: float = 1.0
    guided_channels: int | None = None
    name: str = "frechet"
    every: int | Literal["phase_end", "end"] = "end"

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise ConfigError(f"evaluate.frechet={self.examples}: must be at least 2 examples")

    @functools.cached_property
    def _features(self) -> Features:
        return jax.jit(self.features)

    def __call__(self, state: TrainState, context: EvalContext) -> dict[str, float]:
        real, drawn = Moments(), Moments()
        for index, batch in self._batches():
            context.alive()
            keys = jax.random.split(jax.random.key(index), 2)
            rows = jax.random.split(keys[0], len(batch["image"]))
            latent = self.task.codec.encode(state.extra, jnp.asarray(batch["image"]), rows)
            found = sample(
                self.task,
                state.params,
                state.extra,
                self.task.given(batch),
                shape=latent.shape[1:],
                sampler=self.sampler,
                key=keys[1],
                guidance=self.guidance,
                guided_channels=self.guided_channels,
            )
            for side, image in ((real, self.task.decode(state.extra, latent)), (drawn, found)):
                side.add(self._features(jnp.clip(image, 0, 1)))
        distance = frechet_distance(real.mean, real.covariance, drawn.mean, drawn.covariance)
        return {"distance": distance}

    def _batches(self) -> Iterator[tuple[int, Any]]:
        """Batches of the data with `examples` rows in all."""
        left = self.examples
        for index in range(-(-left // self.data.batch_size)):
            batch = on_device(self.data, self.data.batch(index))
            rows = min(left, self.data.batch_size)
            left -= rows
            yield index, {name: value[:rows] for name, value in batch.items()}
