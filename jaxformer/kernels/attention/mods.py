"""Modifications of scores and probabilities, and the two the library needs itself.

A `ScoreMod` maps a float32 tile of scaled scores, `Idx` and the operands of the tile to new scores,
before the mask; a `ProbMod` maps normalised probabilities to the weights that multiply the values.
Both are elementwise `jnp` code: every array they read is an `aux` operand (`operands.py`) and is
differentiated; closed-over arrays are refused by JAX when differentiated. A mod must be finite on
masked positions too, since a gradient of 0 times infinity is NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.kernels.attention.operands import Aux, Idx

ScoreMod = Callable[[jax.Array, Idx, Aux], jax.Array]


@dataclasses.dataclass(frozen=True)
class ProbMod:
    """`fn(p, idx, aux)`, weights from probabilities.

    linear: `fn(p) = c(idx, aux) * p`. It commutes with the normaliser, so one pass over the keys is
    enough. Otherwise (quantisers) the normaliser must be known first: two passes.
    """

    fn: Callable[[jax.Array, Idx, Aux], jax.Array]
    linear: bool


def ste_round(x: jax.Array) -> jax.Array:
    """Round half to even; the gradient is that of the identity (straight-through).

    Plain arithmetic instead of a custom rule, because kernel back ends evaluate the traced mod and
    know no custom rules. `round(x) - x` is exact in binary floating point, and so is the sum.
    """
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def seed_of(key: jax.Array) -> jax.Array:
    """A typed PRNG key as one uint32."""
    words = jnp.ravel(jax.random.key_data(key)).astype(jnp.uint32)
    seed = jnp.uint32(0)
    for word in words:
        seed = _mix(seed ^ word)
    return seed


def _mix(x: jax.Array) -> jax.Array:
    """The 32-bit finaliser of MurmurHash3: every input bit reaches every output bit."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def drop(w: jax.Array, rate: float, seed: jax.Array, idx: Idx) -> jax.Array:
    """Dropout of weights by a hash of (seed, b, h, q, k).

    The draw belongs to the position, not to the tile: every implementation and every chunking
    drops the same weights, and the backward pass draws them again instead of storing them.
    """
    row = seed
    for index in (idx.b, idx.h, idx.q):
        row = _mix(row ^ index.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    bits = _mix(row ^ idx.k.astype(jnp.uint32) * np.uint32(0x9E3779B9))
    kept = bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))
    return jnp.where(kept, w * (1.0 / (1.0 - rate)), 0.0)
