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
from jaxformer.kernels.target import target


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

    Rows beyond the index hold nothing: the caller masks them. They are kept as the products of
    attention read them, heads before lengths: (B, G, S, K), and (G, S, K) of a single sequence.
    To turn them at every token moved more memory than the weights of a GPT-2 are (8 sequences of
    639 keys); under an axis of one, XLA for CPUs makes each write a copy of the whole cache.
    """

    @nn.compact
    def __call__(
        self, k_BxLxGxK: jax.Array, v_BxLxGxK: jax.Array, positions_BxL: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Write at `positions_BxL`, which are consecutive; return all of (B, S, G, K), twice."""
        at_B = positions_BxL[:, 0]
        return self._keep("key", k_BxLxGxK, at_B), self._keep("value", v_BxLxGxK, at_B)

    def _keep(self, name: str, new_BxLxGxK: jax.Array, at_B: jax.Array) -> jax.Array:
        single = len(at_B) == 1
        new = new_BxLxGxK.swapaxes(1, 2)
        new = new[0] if single else new
        held = self.variable("cache", name, jnp.zeros_like, new)
        if not self.is_initializing():
            write = _write if single else _write_rows
            held.value = write(held.value, new, at_B[0] if single else at_B)
        all_BxGxSxK = held.value[None] if single else held.value
        return all_BxGxSxK.swapaxes(1, 2)


def _write(old_GxSxK: jax.Array, new_GxLxK: jax.Array, at: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(old_GxSxK, new_GxLxK, (0, at, 0))


def _write_rows(old_BxGxSxK: jax.Array, new_BxGxLxK: jax.Array, at_B: jax.Array) -> jax.Array:
    """Each row at its own place: one scatter.

    XLA for CPUs converts all of a bfloat16 array to scatter into it, so there it is a loop.
    """
    if target().platform != "cpu":
        return jax.vmap(_write)(old_BxGxSxK, new_BxGxLxK, at_B)

    def row(i: jax.Array, held: jax.Array) -> jax.Array:
        new = jax.lax.dynamic_slice_in_dim(new_BxGxLxK, i, 1)
        return jax.lax.dynamic_update_slice(held, new, (i, 0, at_B[i], 0))

    return jax.lax.fori_loop(0, len(at_B), row, old_BxGxSxK)
