"""Weights as they lie on disk: codes of few bits without gaps, and what they stand for.

`Codes` and `Packed` are leaves of parameters, pytrees of arrays like any other: they are saved,
placed and restored as these. A model of packed parameters unpacks them when it is applied; products
are then of floats.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer import paths
from jaxformer.compress.quantized import COLLECTION, Quantized
from jaxformer.compress.quantizers import Symmetric, Uniform
from jaxformer.errors import ConfigError

KERNELS = r"/kernel$"
MOST_BITS = 8


def static() -> Any:
    """A field that is part of a leaf's type and not of its arrays."""
    return dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes:
    """Unsigned integers of an array of `shape`, `bits` bits each: two of 4 bits in a byte.

    Code i is bits i b to (i + 1) b of `data`, the lowest first, so that eight codes are b bytes,
    whatever b is.
    """

    data: jax.Array  # uint8, (ceil(size b / 8),)
    bits: int = static()
    shape: tuple[int, ...] = static()

    @classmethod
    def of(cls, u: jax.Array, bits: int) -> Codes:
        """Codes of integers from 0 to 2^bits - 1, whatever their type."""
        if not 1 <= bits <= MOST_BITS:
            raise ConfigError(f"Codes.bits={bits}: must be from 1 to {MOST_BITS}")
        places = jnp.arange(bits, dtype=jnp.uint8)
        each = (u.reshape(-1, 1).astype(jnp.uint8) >> places) & 1
        return cls(jnp.packbits(each.reshape(-1), bitorder="little"), bits, tuple(u.shape))

    def unpack(self) -> jax.Array:
        """uint8, in the array's own shape."""
        if self.bits == MOST_BITS:
            return self.data.reshape(self.shape)
        count = math.prod(self.shape)
        each = jnp.unpackbits(self.data, count=count * self.bits, bitorder="little")
        places = jnp.arange(self.bits, dtype=jnp.uint8)
        u = (each.reshape(count, self.bits) << places).sum(-1, dtype=jnp.uint8)
        return u.reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """The array (u - zero) scale of its codes u; `scale` and `zero` broadcast to it."""

    codes: Codes
    scale: jax.Array
    zero: jax.Array

    @classmethod
    def of(cls, x: jax.Array, quantizer: Uniform | Symmetric, **state: jax.Array) -> Packed:
        """X as the quantiser has it with that state; `unpack` gives `quantizer(x, **state)`.

        Zero points must be whole numbers, as all observers of kernels make them.
        """
        least = -quantizer.most - 1 if isinstance(quantizer, Symmetric) else 0
        codes = Codes.of(quantizer.encode(x, **state) - least, quantizer.bits)
        zero = state.get("zero", jnp.zeros_like(state["scale"])) - least
        return cls(codes, state["scale"], zero)

    def unpack(self) -> jax.Array:
        return (self.codes.unpack().astype(jnp.float32) - self.zero) * self.scale


def is_packed(leaf: Any) -> bool:
    return isinstance(leaf, Codes | Packed)


def unpacked(tree: Any) -> Any:
    """A tree with arrays in the place of packed leaves."""
    return jax.tree.map(lambda x: x.unpack() if is_packed(x) else x, tree, is_leaf=is_packed)


def widened(tree: Any) -> Any:
    """A tree whose codes have a byte each: nothing is left to unpack, and all means the same."""

    def one(x: Any) -> Any:
        if isinstance(x, Packed):
            return dataclasses.replace(x, codes=one(x.codes))
        return Codes.of(x.unpack(), MOST_BITS) if isinstance(x, Codes) else x

    return jax.tree.map(one, tree, is_leaf=is_packed)


def has_packed(tree: Any) -> bool:
    return any(is_packed(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_packed))


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------ quantised kernels


def pack_kernels(variables: Mapping[str, Any], rules: Quantized) -> dict[str, Any]:
    """Variables whose calibrated kernels are `Packed`, their states moved into the leaves."""
    named = paths.leaves(variables["params"])
    states = paths.leaves(variables.get(COLLECTION, {}))
    for name in [name for name in named if f"{name}/scale" in states]:
        rule = rules.named(name)
        assert rule is not None
        fields = rule.quantizer.state  # type: ignore[union-attr]
        state = {field: states.pop(f"{name}/{field}") for field in fields}
        named[name] = Packed.of(named[name], rule.quantizer, **state)
    return {**variables, "params": paths.nest(named), COLLECTION: paths.nest(states)}
