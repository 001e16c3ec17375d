"""A layer of linear self-attention that is one step of gradient descent, by construction.

Tokens are columns e_j = (x_j ; y_j), the last one the query (x_q ; -W_0 x_q). With

    W_K = W_Q = diag(I, 0),   W_V = [[0, 0], [W_0, -I]],   P = (eta / N) I

the layer e_j <- e_j + P sum_{i <= N} (W_V e_i) (W_K e_i)^T (W_Q e_j) takes y_j to y_j - dW x_j,
where dW is the step of rate eta on 1/(2N) sum_i |W x_i - y_i|^2 from W_0. So the query holds minus
the answer of W_0 + dW, and K such layers take K steps (von Oswald et al., arXiv 2212.07677).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxformer.errors import ConfigError
from jaxformer.nn.linear_self_attention import linear_self_attention

__all__ = ["descent_answer", "descent_layer", "descent_tokens", "descent_weights"]


def descent_weights(W_0: jax.Array, eta: float, N: int) -> dict[str, jax.Array]:
    """{"W_K", "W_Q", "W_V", "P"}, each (dx + dy, dx + dy), of W_0 (dy, dx) for N demonstrations.

    Raises:
        ConfigError: no demonstrations, for which P would be infinite.
    """
    if N < 1:
        raise ConfigError(f"N: {N} demonstrations; give at least 1")
    dy, dx = W_0.shape
    keys = jnp.diag(jnp.concatenate([jnp.ones(dx), jnp.zeros(dy)]).astype(W_0.dtype))
    values = jnp.zeros_like(keys).at[dx:, :dx].set(W_0).at[dx:, dx:].set(-jnp.eye(dy))
    return {"W_K": keys, "W_Q": keys, "W_V": values, "P": eta / N * jnp.eye(dx + dy)}


def descent_tokens(x: jax.Array, y: jax.Array, x_q: jax.Array, W_0: jax.Array) -> jax.Array:
    """E (..., dx + dy, N + 1) of x (..., N, dx), y (..., N, dy) and the query x_q (..., dx)."""
    demonstrations = jnp.concatenate([x, y], axis=-1)
    query = jnp.concatenate([x_q, -x_q @ W_0.T], axis=-1)
    return jnp.concatenate([demonstrations, query[..., None, :]], axis=-2).mT


def descent_layer(weights: dict[str, jax.Array], E: jax.Array) -> jax.Array:
    """One step: every token reads the demonstrations, which are all but the last."""
    w_pv, w_kq = weights["P"] @ weights["W_V"], weights["W_K"].T @ weights["W_Q"]
    return E + linear_self_attention(E, w_pv, w_kq, 1.0, E[..., :-1])


def descent_answer(E: jax.Array, dy: int) -> jax.Array:
    """The prediction (..., dy) that the query holds."""
    return -E[..., -dy:, -1]
