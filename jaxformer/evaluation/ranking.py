"""Ranks of right answers among wrong ones, as in link prediction: filtered, with ties expected."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def expected_ranks(scores_QxN: jax.Array, wrong_QxN: jax.Array) -> jax.Array:
    """(Q, N): the rank of each candidate among itself and those that are `wrong`.

    1 + how many of those score higher + half of how many score the same: the mean over all ways to
    break ties. Other right answers do not count (Bordes et al. 2013's "filtered" setting). Of
    candidates that are `wrong` themselves it is their rank among the wrong ones, with themselves
    as a tie.
    """
    scores_QxN = scores_QxN.astype(jnp.float32)
    low = jnp.where(wrong_QxN, scores_QxN, -jnp.inf)
    wrong = wrong_QxN.sum(-1, keepdims=True)
    count = scores_QxN.shape[-1]

    def one(sorted_N: jax.Array, scores_N: jax.Array) -> tuple[jax.Array, jax.Array]:
        at_most = jnp.searchsorted(sorted_N, scores_N, side="right")
        below = jnp.searchsorted(sorted_N, scores_N, side="left")
        return below, at_most

    below, at_most = jax.vmap(one)(jnp.sort(low, axis=-1), scores_QxN)
    below, at_most = below - (count - wrong), at_most - (count - wrong)  # without the filling
    return 1 + (wrong - at_most) + (at_most - below) / 2


def reciprocal_rank(
    scores_QxN: jax.Array, targets_QxN: jax.Array, wrong_QxN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(Q,) mean of 1 / expected rank over the targets of each query, and whether it has any."""
    inverse = 1 / jnp.maximum(expected_ranks(scores_QxN, wrong_QxN), 1)
    count = targets_QxN.sum(-1)
    total = jnp.where(targets_QxN, inverse, 0).sum(-1)
    return total / jnp.maximum(count, 1), count > 0
