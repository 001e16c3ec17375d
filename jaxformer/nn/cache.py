"""Decode state: what a module keeps, in the collection "cache", between calls with decode=True.

Every module that needs to know where it is counts for itself, so a part is complete by itself.
A cache is made by initialising the model with decode=True on as many tokens as it is to hold
(`jaxformer.tasks.linen.start_cache`); modules then only declare their variables.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen as nn

from jaxformer.errors import ConfigError


class DecodeUnsupported(ConfigError):
    """The module has no state in which it could read a sequence one part at a time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(
            f"{type(module).__name__} cannot decode step by step: decode=True needs a causal mixer "
            "that keeps a state; call it on whole sequences with decode=False"
        )


def require_cache(module: nn.Module, name: str) -> None:
    """Raise `ConfigError` where decoding goes on from a variable that nobody started."""
    if not (module.is_initializing() or module.has_variable("cache", name)):
        raise ConfigError(
            f"{'/'.join(module.path)}: decode=True without a cache; start one with "
            "jaxformer.tasks.linen.start_cache"
        )


def count_positions(module: nn.Module, batch: int, length: int) -> jax.Array:
    """Absolute positions (B, L) of the next `length` tokens, which are thereby counted as read."""
    require_cache(module, "index")
    index = module.variable("cache", "index", jnp.zeros, (batch,), jnp.int32)
    start = index.value
    if not module.is_initializing():
        index.value = start + length
    return start[:, None] + jnp.arange(length, dtype=jnp.int32)


class KVCache(nn.Module):
    """Keys and values read so far; each sequence has a write index of its own.

    Rows beyond the index hold nothing: the caller masks them.
    """

    @nn.compact
    def __call__(
        self, k_BxLxGxK: jax.Array, v_BxLxGxK: jax.Array, positions_BxL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Write at `positions_BxL`, which are consecutive; return all of (B, S, G, K), twice."""
        key = self.variable("cache", "key", jnp.zeros_like, k_BxLxGxK)
        value = self.variable("cache", "value", jnp.zeros_like, v_BxLxGxK)
        if not self.is_initializing():
            write = jax.vmap(
                lambda old, new, at: jax.lax.dynamic_update_slice(old, new, (at, 0, 0))
            )
            key.value = write(key.value, k_BxLxGxK, positions_BxL[:, 0])
            value.value = write(value.value, v_BxLxGxK, positions_BxL[:, 0])
        return key.value, value.value
