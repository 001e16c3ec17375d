"""Tables by relative position: biases of scores and weights of probabilities, per head and offset.

Called, a module of this file gives a `TableScheme`, which the layers of a stack share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.errors import ConfigError
from jaxformer.kernels.attention import Operand, ProbMod, Tile, Toeplitz
from jaxformer.nn.position import At, Mods

Entries = Callable[[np.ndarray], np.ndarray]  # the row of a table for keys so far ahead


@dataclasses.dataclass(frozen=True, eq=False)
class TableScheme:
    """`bias` is added to the scores, `weight` multiplies the probabilities; each (entries, H).

    `entry` says which row belongs to a key so far ahead of the query (its position minus that of
    the query); distances beyond `longest` have that of `longest`, or, where `strict`, are refused.
    """

    entry: Entries
    longest: int
    bias: jax.Array | None = None
    weight: jax.Array | None = None
    strict: bool = False

    def mods(self, heads: int, at: At) -> Mods:
        """A band over all scores; at given positions, one number for each score."""
        tables = {"bias": self.bias, "weight": self.weight}
        tables = {name: table for name, table in tables.items() if table is not None}
        for table in tables.values():
            if table.shape[1] != heads:
                raise ConfigError(f"model.heads={heads}: the table has {table.shape[1]}")
        if self.strict and max(at.queries, at.keys) > self.longest + 1:
            raise ConfigError(
                f"model.length={self.longest + 1}: a sequence has {max(at.queries, at.keys)} "
                "positions; the tables have no entry for its distances"
            )
        aux = {name: self._lay(table, at) for name, table in tables.items()}
        weigh = ProbMod(_weigh, linear=True) if self.weight is not None else None
        return Mods(_add if self.bias is not None else None, weigh, aux)

    def _lay(self, table: jax.Array, at: At) -> Operand:
        if at.q_pos is None or at.k_pos is None:
            ahead = np.arange(at.keys - 1, -at.queries, -1)  # as a Toeplitz band lies
            ahead = np.clip(ahead, -self.longest, self.longest)
            return Toeplitz(table[self.entry(ahead)].T)
        known = np.arange(-self.longest, self.longest + 1)
        ahead = at.k_pos[..., None, :] - at.q_pos[..., :, None]
        index = jnp.clip(ahead, -self.longest, self.longest) + self.longest
        rows = jnp.take(jnp.asarray(self.entry(known)), index)
        return Tile(jnp.moveaxis(jnp.take(table, rows, axis=0), -1, -3))


def _add(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score + aux["bias"]


def _weigh(p: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return p * aux["weight"]


class BucketBias(nn.Module):
    """The biases of T5, one per head and bucket of distances.

    Raffel et al. 2019, arXiv 1910.10683, section 2.1: half of the buckets hold one distance each,
    the others grow logarithmically up to `longest`, beyond which all share the last.
    """

    heads: int
    buckets: int = 32
    longest: int = 128
    both_ways: bool = True

    @nn.compact
    def __call__(self) -> TableScheme:
        init = jax.nn.initializers.normal(1.0)
        table = self.param("table", init, (self.buckets, self.heads), jnp.float32)
        return TableScheme(self.bucket, self.longest, table)

    def bucket(self, ahead: np.ndarray) -> np.ndarray:
        """The bucket of keys so far ahead of the query."""
        if not self.both_ways:
            return log_buckets(np.maximum(-ahead, 0), self.buckets, self.longest)
        half = self.buckets // 2
        near = log_buckets(np.abs(ahead), half, self.longest)
        return near + np.where(ahead > 0, half, 0).astype(np.int32)


def log_buckets(distance: np.ndarray, buckets: int, longest: int) -> np.ndarray:
    """0, 1, 2, ... for the first half of the buckets, then logarithmic up to `longest`."""
    exact = buckets // 2
    ratio = np.float32(np.maximum(distance, 1)) / np.float32(exact)
    grown = np.log(ratio) / np.log(np.float32(longest / exact)) * (buckets - exact)
    large = np.minimum(exact + grown.astype(np.int32), buckets - 1)
    return np.where(distance < exact, distance, large).astype(np.int32)
