"""The encoder g of SeqPE: positions as strings of digits, and the Transformer that reads them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Causal, Full, KeyPadding, Mask
from jaxformer.nn.activation import GELU_TANH
from jaxformer.nn.attention import Attention, Unfused
from jaxformer.nn.block import Block, PreNorm, Stack
from jaxformer.nn.einsum import Einsum
from jaxformer.nn.embed import Embed
from jaxformer.nn.make import Make
from jaxformer.nn.mlp import MLP
from jaxformer.nn.norm import LayerNorm

BASE = 10


@dataclasses.dataclass(frozen=True)
class Strings:
    """Positions below `limit` as strings of digits, one number per axis, rows before columns.

    With two axes `limit` counts a square of positions, and each axis ends at its root.

    Raises:
        ConfigError: `limit` leaves no positions.
    """

    limit: int
    axes: int = 1

    def __post_init__(self) -> None:
        if self.axes < 1:
            raise ConfigError(f"model.axes={self.axes}: must be at least 1")
        if self.side < 2:
            raise ConfigError(
                f"model.positions={self.limit}: must be at least 2 along each of {self.axes} axes"
            )

    @property
    def side(self) -> int:
        """How many positions an axis has."""
        return self.limit if self.axes == 1 else round_root(self.limit, self.axes)

    @property
    def digits(self) -> int:
        """m, the digits of an axis."""
        return len(str(self.side - 1))

    @property
    def length(self) -> int:
        """Digits of a string, of all axes."""
        return self.axes * self.digits

    def __call__(self, positions: jax.Array) -> jax.Array:
        """Digits (..., axes m) int32 of positions (...), or (..., axes) where there are more axes.

        They are padded with zeros in front. Values that only the device knows cannot be checked
        here: of those out of range the first digit is 10, which has no embedding and gives NaN.

        Raises:
            ConfigError: a position is not an integer of 0 .. 10^m - 1, or has other axes.
        """
        if not isinstance(positions, jax.core.Tracer):
            self._check(np.asarray(positions))
        at = jnp.asarray(positions)
        at = at[..., None] if self.axes == 1 else at
        most = BASE**self.digits
        powers = BASE ** np.arange(self.digits)[::-1]
        digits = at[..., None] // powers % BASE
        outside = (at < 0) | (at >= most)
        digits = digits.at[..., 0].set(jnp.where(outside, BASE, digits[..., 0]))
        return digits.reshape(*at.shape[:-1], self.length).astype(jnp.int32)

    def _check(self, positions: np.ndarray) -> None:
        if not np.issubdtype(positions.dtype, np.integer):
            raise ConfigError(f"positions: are {positions.dtype}; give integers")
        if self.axes > 1 and positions.shape[-1:] != (self.axes,):
            raise ConfigError(
                f"positions: of shape {positions.shape}, need a last axis of model.axes={self.axes}"
            )
        most = BASE**self.digits
        wrong = positions[(positions < 0) | (positions >= most)]
        if wrong.size:
            raise ConfigError(
                f"positions: {wrong.flat[0]} has no string of {self.digits} digits; allowed: 0 to "
                f"{most - 1}, or a larger model.positions"
            )


def round_root(n: int, degree: int) -> int:
    """The largest integer whose `degree`-th power is at most n."""
    root = math.isqrt(n) if degree == 2 else int(n ** (1 / degree))
    return root + 1 if (root + 1) ** degree <= n else root


class SequentialPE(nn.Module):
    """g: strings of digits (N, axes m) to vectors (N, out), by a decoder of a few blocks.

    e = E_digit + E_place (+ E_axis); a learned vector comes last, where causal attention has seen
    every digit, and its output is projected. Leading zeros are digits like others;
    with `valid` (N, axes m) they may be hidden from the others.
    """

    strings: Strings
    width: int
    heads: int
    out: int
    depth: int = 2
    causal: bool = True
    norm: Make = Make(LayerNorm)
    last_norm: bool = True
    temperature: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, digits: jax.Array, valid: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        length, axes = self.strings.length, self.strings.axes
        if digits.shape[-1] != length:
            raise ConfigError(
                f"digits: {digits.shape[-1]} per position; model.positions={self.strings.limit} "
                f"has {length}"
            )
        normal = jax.nn.initializers.normal(0.02)
        x_NxMxD = Embed(BASE, self.width, self.dtype, name="digits")(digits)
        places = self.param("places", normal, (length, self.width), jnp.float32)
        x_NxMxD = x_NxMxD + places.astype(self.dtype)
        if axes > 1:
            of_axis = self.param("axes", normal, (axes, self.width), jnp.float32)
            of_axis = jnp.repeat(of_axis, self.strings.digits, axis=0)
            x_NxMxD = x_NxMxD + of_axis.astype(self.dtype)
        last = self.param("last", normal, (self.width,), jnp.float32)
        last = jnp.broadcast_to(last.astype(self.dtype), (len(digits), 1, self.width))
        x_NxMxD = jnp.concatenate([x_NxMxD, last], axis=1)

        # Strings are so short that tiles of a fused kernel would be all but empty.
        block = Make(
            Block,
            mixer=Make(Attention, heads=self.heads, core=Make(Unfused)),
            mlp=Make(MLP, hidden=4 * self.width, activation=GELU_TANH),
            residual=Make(PreNorm, norm=self.norm, dropout=self.dropout),
        )
        stack = Stack((block,) * self.depth, name="stack")
        mask: Mask = Causal() if self.causal else Full()
        if valid is not None:
            seen = jnp.concatenate([valid > 0, jnp.ones((len(valid), 1), bool)], axis=1)
            mask = mask & KeyPadding(seen)
        s_NxD = stack(x_NxMxD, mask=mask, train=train)[:, -1]
        if self.last_norm:
            s_NxD = self.norm(name="norm")(s_NxD)
        s_NxD = Einsum("...D,DE->...E", (self.out,), name="project")(s_NxD)
        return s_NxD / self.temperature


def encode(encoder: Any, positions: jax.Array, **options: Any) -> jax.Array:
    """S (b, L, D) of positions (b, L), or (b, L, axes)."""
    digits = encoder.strings(positions)
    s = encoder(digits.reshape(-1, digits.shape[-1]), **options)
    return s.reshape(*digits.shape[:-1], -1)
