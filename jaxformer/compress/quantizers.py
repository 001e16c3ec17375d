"""Quantisers: what becomes of a value when few bits are left for it.

A quantiser is a frozen dataclass; `quantizer(x, **state)` gives the values that codes of `bits`
bits stand for ("fake quantisation"), `encode` the codes. The arrays of `state`, such as a scale,
broadcast to x: their shapes say what has parameters of its own. Rounding is half to even and passes
gradients straight through; codes that are clipped pass none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jaxformer.compress.straight_through import clip_ste, round_ste
from jaxformer.errors import ConfigError


class Quantizer(Protocol):
    """`state` names the arrays that a call wants, with the values of one that does nothing yet."""

    bits: int

    @property
    def state(self) -> dict[str, float]: ...

    def __call__(self, x: jax.Array, **state: Any) -> jax.Array: ...


@runtime_checkable
class TrainsSmooth(Protocol):
    """A quantiser that is trained in another form, of the same state."""

    @property
    def smooth(self) -> Quantizer: ...


def smooth(quantizer: Quantizer) -> Quantizer:
    """The form in which a quantiser is trained: itself, unless it says otherwise."""
    return quantizer.smooth if isinstance(quantizer, TrainsSmooth) else quantizer


def check_bits(bits: int, low: int = 1, high: int = 16) -> None:
    """Refuse numbers of bits outside `low` to `high`.

    Raises:
        ConfigError: naming them.
    """
    if not low <= bits <= high:
        raise ConfigError(f"bits={bits}: must be from {low} to {high}")


@dataclasses.dataclass(frozen=True)
class Uniform:
    """(u - z) s with u = clip(round(x / s) + z, 0, 2^bits - 1).

    The zero point z is used as it is given: where it is no integer, neither are the codes.
    """

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0, "zero": 0.0}

    def __call__(self, x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        return self.decode(self.encode(x, scale, zero), scale, zero)

    def encode(self, x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        return clip_ste(round_ste(x / scale) + zero, 0, 2**self.bits - 1)

    def decode(self, u: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        return (u - zero) * scale


@dataclasses.dataclass(frozen=True)
class Symmetric:
    """u s with u = clip(round(x / s), -2^(bits-1), 2^(bits-1) - 1)."""

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits, 2)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0}

    @property
    def most(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return self.encode(x, scale) * scale

    def encode(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        return clip_ste(round_ste(x / scale), -self.most - 1, self.most)


@dataclasses.dataclass(frozen=True)
class TwinUniform:
    """Scales of their own for positive and for negative values (PTQ4ViT, arXiv 2111.12293)."""

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits, 2)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0, "negative_scale": 1.0}

    def __call__(self, x: jax.Array, scale: jax.Array, negative_scale: jax.Array) -> jax.Array:
        most = 2 ** (self.bits - 1)
        positive = clip_ste(round_ste(x / scale), 0, most - 1) * scale
        negative = clip_ste(round_ste(x / negative_scale), -most, 0) * negative_scale
        return positive + negative


@dataclasses.dataclass(frozen=True)
class Log:
    """s b^-u with u = round(-log_b(x / s)), b = 2^(1 / steps); 0 where u > 2^bits - 1.

    For values from 0 on, such as probabilities: steps=1 is log2, steps=2 log sqrt(2) of RepQ-ViT
    (arXiv 2212.08254). Values above s become s.
    """

    bits: int
    steps: int = 1

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0}

    def __call__(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        u = self.encode(x, scale)
        value = scale * jnp.exp2(-u / self.steps)
        return jnp.where(u < 2**self.bits, value, 0.0)

    def encode(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """Codes from 0 on; 2^bits and more stand for 0."""
        return round_ste(-self.steps * jnp.log2(clip_ste(x / scale, TINY, 1.0)))


TINY = 1e-15  # takes the place of 0 in logarithms


@dataclasses.dataclass(frozen=True)
class Shifted:
    """`inner` of x + shift, less the shift: for values that begin below 0, such as GELU's."""

    inner: Quantizer
    shift: float

    @property
    def bits(self) -> int:
        return self.inner.bits

    @property
    def state(self) -> dict[str, float]:
        return self.inner.state

    @property
    def smooth(self) -> Shifted:
        return dataclasses.replace(self, inner=smooth(self.inner))

    def __call__(self, x: jax.Array, **state: Any) -> jax.Array:
        return self.inner(x + self.shift, **state) - self.shift


GELU_SHIFT = 0.16997124254703522  # less the least value of GELU
