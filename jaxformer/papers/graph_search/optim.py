"""SophiaG, the authors' optimiser (Liu et al. 2023, arXiv 2305.14342).

Their training never asks for its estimate of the Hessian, which leaves steps along the signs of the
momentum: `jaxformer.train.optim.signum`. Here is the whole, for comparison.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SophiaState(NamedTuple):
    """Running means of gradients and, where it is asked for, of their squares."""

    mean: Any
    hessian: Any


def sophia_g(
    rate: float,
    betas: tuple[float, float] = (0.965, 0.99),
    rho: float = 0.04,
    weight_decay: float = 0.1,
    batch_size: int | None = None,
) -> optax.GradientTransformation:
    """W (1 - rate decay) - rate sign(m) min(1, |m| / (rho batch h)).

    Without a `batch_size` h stays 0 and the minimum is 1; with one every gradient counts as one of
    sampled labels too, and h is a running mean of its squares.
    """
    b1, b2 = betas

    def init(params: Any) -> SophiaState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SophiaState(zeros, zeros)

    def update(grads: Any, state: SophiaState, params: Any) -> tuple[Any, SophiaState]:
        hessian = state.hessian
        if batch_size is not None:
            hessian = jax.tree.map(lambda h, g: b2 * h + (1 - b2) * g * g, hessian, grads)
        mean = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mean, grads)

        def step(m: jax.Array, h: jax.Array, w: jax.Array) -> jax.Array:
            ratio = jnp.minimum(1.0, jnp.abs(m) / (rho * (batch_size or 1) * h + 1e-15))
            return -rate * (jnp.sign(m) * ratio + weight_decay * w)

        return jax.tree.map(step, mean, hessian, params), SophiaState(mean, hessian)

    return optax.GradientTransformation(init, update)
