"""Scales and zero points read off the values themselves.

`axes` are those over which one scale is shared; the others have scales of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxformer.compress.quantizers import Log, Quantizer, Uniform

State = dict[str, jax.Array]
PERCENTILES = (99.9, 99.99, 99.999)


def squared_error(
    quantizer: Quantizer, x: jax.Array, state: State, axes: Sequence[int] | None
) -> jax.Array:
    """The mean of (q(x) - x)^2 over `axes`, which are kept with size 1."""
    return jnp.square(quantizer(x, **state) - x).mean(axes, keepdims=True)


def symmetric_max(bits: int, x: jax.Array, axes: Sequence[int] | None) -> State:
    """The scale at which the largest absolute value has the largest code."""
    return {"scale": jnp.abs(x).max(axes, keepdims=True) / (2 ** (bits - 1) - 1)}


def asymmetric(bits: int, low: jax.Array, high: jax.Array) -> State:
    """The state of `Uniform` whose codes span `low` to `high`."""
    scale = (high - low) / (2**bits - 1)
    scale = jnp.where(scale > 0, scale, 1.0)
    return {"scale": scale, "zero": jnp.round(-low / scale)}


def min_max(bits: int, x: jax.Array, axes: Sequence[int] | None) -> State:
    """The state of `Uniform` that clips nothing."""
    return asymmetric(bits, x.min(axes, keepdims=True), x.max(axes, keepdims=True))


def percentile(bits: int, x: jax.Array, axes: Sequence[int] | None) -> State:
    """The state of `Uniform` that clips at the best of three percentiles (arXiv 2212.08254).

    They are tried from the lowest on, by linear interpolation, and a later one must be better in
    mean squared error to be taken.
    """

    def state(percent: float) -> State:
        low, high = (
            jnp.quantile(x, q, axis=axes, keepdims=True) for q in (1 - percent / 100, percent / 100)
        )
        return asymmetric(bits, low, high)

    return best(Uniform(bits), x, [state(percent) for percent in PERCENTILES], axes)


def best(
    quantizer: Quantizer, x: jax.Array, states: Sequence[State], axes: Sequence[int] | None
) -> State:
    """The first of `states` with the least squared error, chosen for each scale by itself."""
    errors = jnp.stack([squared_error(quantizer, x, state, axes) for state in states])
    chosen = errors.argmin(0)

    def choose(*values: jax.Array) -> jax.Array:
        stacked = jnp.stack([jnp.broadcast_to(value, chosen.shape) for value in values])
        return jnp.take_along_axis(stacked, chosen[None], 0)[0]

    return jax.tree.map(choose, *states)


def percentile_log(quantizer: Log, x: jax.Array) -> State:
    """The scale of `Log`, the best of three percentiles, as in `percentile`."""
    states = [{"scale": jnp.quantile(x, percent / 100)} for percent in PERCENTILES]
    return best(quantizer, x, states, None)
