"""What a change of one operand does to a product: the error that searches make small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Errors = Callable[[jax.Array], jax.Array]


def row_errors(left: jax.Array, right: jax.Array, float_right: jax.Array) -> Errors:
    """Of A in place of the float A0, (..., N, K), in a product with B, (..., K, M).

    The errors are |A B - A0 B0|^2 by row, (..., N), B0 being the float right operand. Where B has
    more columns than rows only its Gram matrix is used. They are formed from A - A0 and B - B0, so
    that no large numbers cancel.
    """
    moved = left @ (right - float_right)
    if right.shape[-1] <= right.shape[-2]:
        return lambda a: jnp.square((a - left) @ right + moved).sum(-1)
    across = right.swapaxes(-1, -2)
    gram, pull, rest = right @ across, moved @ across, jnp.square(moved).sum(-1)
    return lambda a: ((a - left) * ((a - left) @ gram + 2 * pull)).sum(-1) + rest


def each(errors: Callable[[Any], jax.Array], candidates: Mapping[str, jax.Array]) -> jax.Array:
    """`errors` of every candidate along the first axis of its arrays, one at a time in memory."""
    return jax.lax.map(errors, dict(candidates))


def least(candidates: Mapping[str, jax.Array], errors: jax.Array, count: int) -> Any:
    """The `count` best of candidates, (n, ...) as their errors are, for each column by itself."""
    _, best = jax.lax.top_k(-jnp.moveaxis(errors, 0, -1), count)
    best = jnp.moveaxis(best, -1, 0)
    return {name: jnp.take_along_axis(value, best, 0) for name, value in candidates.items()}
