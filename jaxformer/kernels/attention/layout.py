"""Kernel layout, and the three matrix products of attention in it.

Heads come before lengths: (B, H, L, K) for queries, (B, G, S, K) for keys and values, of which
each of the G heads serves H / G consecutive query heads.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxformer.kernels.attention.operands import Operand, Sizes
from jaxformer.kernels.attention.request import Request


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What has gradients, as the caller gave it or in kernel layout."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sink: jax.Array | None
    aux: dict[str, Operand]

    @classmethod
    def of(cls, request: Request) -> Inputs:
        aux = {name: x for name, x in request.aux.items() if x.differentiable}
        return cls(request.q, request.k, request.v, request.sink, aux)

    def layout(self, request: Request, padded: Sizes, dtype: Any) -> Inputs:
        """In kernel layout: lengths zero-padded, the heads of `head_map` picked.

        `dtype` is that of the matrix products; operands and sinks have that of scores.
        """
        k, v = self.k, self.v
        if request.rules.head_map is not None:
            heads = np.array(request.rules.head_map)
            k, v = k[:, :, heads], v[:, :, heads]
        sums = request.score_dtype
        aux = {
            name: dataclasses.replace(x, value=jnp.asarray(x.value, sums))
            for name, x in self.aux.items()
        }
        return Inputs(
            rows(self.q, padded.l, dtype),
            rows(k, padded.s, dtype),
            rows(v, padded.s, dtype),
            None if self.sink is None else self.sink.astype(sums),
            {name: x.prepare(request.sizes, padded) for name, x in aux.items()},
        )


def product_dtype(request: Request) -> Any:
    """Of the matrix products that XLA makes."""
    # CPUs have no bfloat16 products: XLA would convert each tile anew, L / tq times.
    return request.score_dtype if jax.default_backend() == "cpu" else request.q.dtype


def rows(x_BxLxHxK: jax.Array, length: int, dtype: Any) -> jax.Array:
    """(B, L, H, K) -> (B, H, length, K)."""
    x = x_BxLxHxK.astype(dtype).swapaxes(1, 2)
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))


def compare(q_BxHxLxK: jax.Array, k_BxGxSxK: jax.Array, sums: Any) -> jax.Array:
    """Products of rows, (B, H, L, S): q k^T, and dO v^T."""
    b, h, l, _ = q_BxHxLxK.shape
    out = _dot(_group(q_BxHxLxK, k_BxGxSxK.shape[1]), k_BxGxSxK, (3, 3), sums)
    return out.reshape(b, h, l, -1)


def mix(w_BxHxLxS: jax.Array, v_BxGxSxK: jax.Array, sums: Any) -> jax.Array:
    """Weighted sums over keys, (B, H, L, K): w v, and dS k."""
    b, h, l, _ = w_BxHxLxS.shape
    w = _group(w_BxHxLxS.astype(v_BxGxSxK.dtype), v_BxGxSxK.shape[1])
    return _dot(w, v_BxGxSxK, (3, 2), sums).reshape(b, h, l, -1)


def collect(w_BxHxLxS: jax.Array, x_BxHxLxK: jax.Array, groups: int, sums: Any) -> jax.Array:
    """Weighted sums over queries and the query heads of a group, (B, G, S, K): w^T dO, dS^T q."""
    w = _group(w_BxHxLxS.astype(x_BxHxLxK.dtype), groups)
    return _dot(w, _group(x_BxHxLxK, groups), (2, 2), sums)


def _group(x_BxHxLxN: jax.Array, groups: int) -> jax.Array:
    """(B, H, L, n) -> (B, G, H / G * L, n): query heads of a key head, one under another."""
    b, _, _, n = x_BxHxLxN.shape
    return x_BxHxLxN.reshape(b, groups, -1, n)


def _dot(a: jax.Array, b: jax.Array, over: tuple[int, int], sums: Any) -> jax.Array:
    dims = (((over[0],), (over[1],)), ((0, 1), (0, 1)))
    return lax.dot_general(a, b, dims, preferred_element_type=sums)
