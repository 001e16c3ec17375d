"""The angles of rotary positions, and how they are stretched for longer sequences than trained."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Frequencies:
    """base^(-2i/K) for the pair i of K components (Su et al. 2021, arXiv 2104.09864)."""

    base: float = 10000.0

    def of(self, size: int) -> np.ndarray:
        """(K / 2,) radians per position."""
        return self.base ** (-np.arange(0, size, 2) / size)

    def angles(self, positions: jax.Array, size: int) -> jax.Array:
        """(..., K / 2) float32 of `positions` (...)."""
        return positions[..., None].astype(jnp.float32) * jnp.asarray(self.of(size), jnp.float32)

    @property
    def gain(self) -> float:
        """What queries and keys are multiplied by."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class LinearScaling(Frequencies):
    """Positions divided by `factor` (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float = 1.0

    def of(self, size: int) -> np.ndarray:
        return super().of(size) / self.factor


@dataclasses.dataclass(frozen=True)
class BaseScaling(Frequencies):
    """A larger base, so that the slowest component is divided by `factor`, the fastest kept.

    base factor^(K / (K - 2)), known as NTK-aware scaling (bloc97, 2023).
    """

    factor: float = 1.0

    def of(self, size: int) -> np.ndarray:
        base = self.base * self.factor ** (size / (size - 2))
        return base ** (-np.arange(0, size, 2) / size)


@dataclasses.dataclass(frozen=True)
class RIFLEx(Frequencies):
    """One component is slowed down (Zhao et al. 2025, arXiv 2502.15894).

    It is the one whose period is nearest to the `length` trained on, in whose repetition contents
    repeat; of sequences `factor` times as long, one period then covers all.
    """

    factor: float = 1.0
    length: int = 1

    def of(self, size: int) -> np.ndarray:
        plain = super().of(size).copy()
        slowest = 2 * math.pi / (self.factor * self.length)
        at = np.argmin(np.abs(2 * math.pi / plain - self.length))
        plain[at] = min(plain[at], slowest)
        return plain


@dataclasses.dataclass(frozen=True)
class DynamicScaling(Frequencies):
    """The base grows once a sequence is longer than the `length` trained on ("dynamic NTK").

    Frequencies depend on the longest position of a call, so that keys read earlier, by a cache,
    keep those of their own time.
    """

    factor: float = 1.0
    length: int = 2048

    def angles(self, positions: jax.Array, size: int) -> jax.Array:
        longest = jnp.maximum(positions.max() + 1, self.length).astype(jnp.float32)
        stretch = self.factor * longest / self.length - (self.factor - 1)
        base = self.base * stretch ** (size / (size - 2))
        exponent = jnp.asarray(-np.arange(0, size, 2) / size, jnp.float32)
        return positions[..., None].astype(jnp.float32) * base**exponent


@dataclasses.dataclass(frozen=True)
class BandScaling(Frequencies):
    """Llama 3's: waves longer than length / low are stretched by `factor`, short ones are not.

    Those in between, from length / high to length / low, are interpolated (Grattafiori et al.
    2024, arXiv 2407.21783; the constants are in the model's release).
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    length: int = 8192

    def of(self, size: int) -> np.ndarray:
        plain = super().of(size)
        turns = self.length * plain / (2 * math.pi)  # within the length trained on
        keep = np.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return keep * plain + (1 - keep) * plain / self.factor


@dataclasses.dataclass(frozen=True)
class YaRN(Frequencies):
    """Frequencies interpolated by part, attention sharpened (Peng et al. 2023, arXiv 2309.00071).

    Components that turn more than `fast` times over `length` positions keep their frequency, those
    that turn less than `slow` times are divided by `factor`. `whole` rounds the two borders
    outwards to whole components.
    """

    factor: float = 1.0
    length: int = 4096
    fast: float = 32.0
    slow: float = 1.0
    attention: float | None = None  # the gain; None: 1 + 0.1 ln factor
    whole: bool = True

    def of(self, size: int) -> np.ndarray:
        def component(turns: float) -> float:
            return size * math.log(self.length / (2 * math.pi * turns)) / (2 * math.log(self.base))

        first, last = component(self.fast), component(self.slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        plain = super().of(size)
        width = last - first or 0.001
        slowed = np.clip((np.arange(size // 2) - first) / width, 0.0, 1.0)
        return plain * (1 - slowed) + plain / self.factor * slowed

    @property
    def gain(self) -> float:
        if self.attention is not None:
            return self.attention
        return 1.0 if self.factor <= 1 else 0.1 * math.log(self.factor) + 1.0
