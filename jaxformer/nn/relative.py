"""Biases by relative position that the layers of a stack share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxformer.kernels.attention import Tile, Toeplitz
from jaxformer.nn.position import At, Mods


class BucketBias(nn.Module):
    """The table of T5's biases, one per head and bucket of distances; called, it is a `Scheme`.

    Raffel et al. 2019, arXiv 1910.10683, section 2.1: half of the buckets hold one distance each,
    the others grow logarithmically up to `longest`, beyond which all share the last.
    """

    heads: int
    buckets: int = 32
    longest: int = 128
    both_ways: bool = True

    @nn.compact
    def __call__(self) -> BucketScheme:
        init = jax.nn.initializers.normal(1.0)
        table = self.param("table", init, (self.buckets, self.heads), jnp.float32)
        return BucketScheme(table, self.longest, self.both_ways)


@dataclasses.dataclass(frozen=True, eq=False)
class BucketScheme:
    """A table (buckets, H), and which bucket a distance falls into."""

    table: jax.Array
    longest: int
    both_ways: bool

    def mods(self, heads: int, at: At) -> Mods:
        """A band over all scores, or, at given positions, one number for each of them."""
        if self.table.shape[1] != heads:
            raise ValueError(f"BucketBias.heads={self.table.shape[1]}: the scores have {heads}")
        if at.q_pos is None or at.k_pos is None:
            ahead = np.arange(
                at.keys - 1, -at.queries, -1
            )  # key minus query, as a Toeplitz band lies
            return Mods(_add_bias, aux={"bias": Toeplitz(self.table[self.bucket(ahead)].T)})
        # Distances beyond `longest` share a bucket, so that a short list of them is enough.
        known = np.arange(-self.longest, self.longest + 1)
        ahead = at.k_pos[..., None, :] - at.q_pos[..., :, None]
        index = jnp.clip(ahead, -self.longest, self.longest) + self.longest
        bias = jnp.take(self.table, jnp.take(jnp.asarray(self.bucket(known)), index), axis=0)
        return Mods(_add_bias, aux={"bias": Tile(jnp.moveaxis(bias, -1, -3))})

    def bucket(self, ahead: np.ndarray) -> np.ndarray:
        """The bucket of keys so far ahead of the query."""
        buckets = self.table.shape[0]
        first = np.zeros_like(ahead)
        if self.both_ways:
            buckets //= 2
            first = np.where(ahead > 0, buckets, 0)
            away = np.abs(ahead)
        else:
            away = np.maximum(-ahead, 0)
        exact = buckets // 2
        ratio = np.float32(np.maximum(away, 1)) / np.float32(exact)
        grown = np.log(ratio) / np.float32(math.log(self.longest / exact)) * (buckets - exact)
        large = np.minimum(exact + grown.astype(np.int32), buckets - 1)
        return (first + np.where(away < exact, away, large)).astype(np.int32)


def _add_bias(score: jax.Array, at: Any, aux: Mapping[str, jax.Array]) -> jax.Array:
    del at
    return score + aux["bias"]
