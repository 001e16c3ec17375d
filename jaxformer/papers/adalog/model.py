"""AdaLog: a logarithmic quantiser whose base is found for every tensor.

Symbols of the paper: k bits, L = 2^k levels, base b = 2^(q / r) with r = 37, scale s.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxformer.compress.quantized import Quantized, Rule
from jaxformer.compress.quantizers import GELU_SHIFT, TINY, Shifted, Uniform, check_bits
from jaxformer.compress.straight_through import clip_ste, round_ste, straight_through

R = 37  # steps of the exponent's fraction: the base is 2^(q / R), q an integer


@dataclasses.dataclass(frozen=True)
class AdaLog:
    """s b^-u, u = round(-log_b(x / s)); 0 where u > 2^bits - 1. Values above s become s.

    The power is a shift by floor(u q / R) times an entry of a table of `bits` + 1 bits
    (section 3.2). q = R is log2, half of it log sqrt(2). The gradient is that of `SmoothAdaLog`,
    which has no table.
    """

    bits: int

    def __post_init__(self) -> None:
        check_bits(self.bits, 2, 8)

    @property
    def state(self) -> dict[str, float]:
        return {"scale": 1.0, "q": float(R)}

    @property
    def smooth(self) -> SmoothAdaLog:
        return SmoothAdaLog(self.bits)

    def __call__(self, x: jax.Array, scale: jax.Array, q: jax.Array) -> jax.Array:
        u = self.encode(x, scale, q)
        shift, mantissa = self.table(jnp.clip(u, 0, 2**self.bits - 1), q)
        value = jnp.where(u < 2**self.bits, scale * jnp.exp2(-shift) * mantissa, 0.0)
        return straight_through(value, self.smooth(x, scale, q))

    def encode(self, x: jax.Array, scale: jax.Array, q: jax.Array) -> jax.Array:
        """Codes from 0 on; 2^bits and more stand for 0."""
        t = clip_ste(x / scale, TINY, 1.0)
        return round_ste(-jnp.log2(t) * R / q)

    def table(self, u: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(floor, T) of a code: b^-u is about 2^-floor T, T a multiple of 1 / (2^(bits+1) - 2)."""
        most = 2 ** (self.bits + 1) - 2
        shift = jnp.floor(u * q / R)
        rest = u * q - shift * R
        return shift, jnp.round(jnp.exp2(-rest / R) * most) / most


@dataclasses.dataclass(frozen=True)
class SmoothAdaLog(AdaLog):
    """The same without its table, for training."""

    def __call__(self, x: jax.Array, scale: jax.Array, q: jax.Array) -> jax.Array:
        u = self.encode(x, scale, q)
        value = scale * jnp.exp2(-clip_ste(u, 0, 2**self.bits - 1) * q / R)
        return jnp.where(u < 2**self.bits, value, 0.0)


def folded_bias(bias: jax.Array, kernel: jax.Array, shift: float = GELU_SHIFT) -> jax.Array:
    """B - shift sum_i W_io: the bias with which fc2 takes shifted inputs as they are.

    `kernel` (I, O) is the quantised one. Equation 10: the quantiser then need not subtract.
    """
    return bias - shift * kernel.sum(0)


def rules(weights: int, activations: int, patches: int = 8) -> Quantized:
    """What is quantised to how many bits, and how: all linear maps and both products of attention.

    The input of the patch embedding has `patches` bits.

    Raises:
        ConfigError: bits outside 2 to 8.
    """
    check_bits(weights, 2, 8)
    log = AdaLog(activations)
    uniform = Uniform(activations)
    return Quantized(
        (
            Rule(r"embed/projection/input$", Uniform(patches)),
            Rule(r"/kernel$", Uniform(weights), per="channel"),
            Rule(r"mlp/down/input$", Shifted(log, GELU_SHIFT)),
            Rule(r"/input$", uniform),
            Rule(r"/(query|key|value)$", uniform, per="head"),
            Rule(r"/probabilities$", log),
        )
    )
