"""Steps with a gradient: rounding, signs and thresholds that training can pass through."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def straight_through(value: jax.Array, gradient: jax.Array) -> jax.Array:
    """`value`, exactly, with the derivative of `gradient` (Bengio et al. 2013, arXiv 1308.3432).

    The sum is not formed as (value - g) + g, whose rounding errors a further sign would amplify.
    """
    return _replaced(gradient, jax.lax.stop_gradient(value))


@jax.custom_jvp
def _replaced(gradient: jax.Array, value: jax.Array) -> jax.Array:
    del gradient
    return value


@_replaced.defjvp
def _replaced_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _replaced(*primals), tangents[0].astype(primals[1].dtype)


def round_ste(x: jax.Array) -> jax.Array:
    """Round half to even; the derivative is 1."""
    return straight_through(jnp.round(x), x)


def sign_ste(x: jax.Array) -> jax.Array:
    """-1, 0 or 1; the derivative is 1 where -1 < x < 1 and 0 elsewhere, the ends included."""
    inside = jnp.abs(x) < 1
    return straight_through(jnp.sign(x), jnp.where(inside, x, jax.lax.stop_gradient(x)))


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """X, with its derivative times `factor`."""
    return straight_through(x, x * factor)


def clip_ste(x: jax.Array, low: float, high: float) -> jax.Array:
    """X between `low` and `high`; the derivative is 1 there, both ends included, and 0 outside.

    Codes lie on the ends as often as not, where `jnp.clip` would halve it.
    """
    inside = (x >= low) & (x <= high)
    return straight_through(jnp.clip(x, low, high), jnp.where(inside, x, jax.lax.stop_gradient(x)))
