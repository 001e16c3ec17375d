"""Losses per element, in float32; tasks weigh and sum them."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """-log softmax(logits)[label], (...) from logits (..., C) and integer labels (...).

    `smoothing` moves that much of the target's mass evenly to all C classes (Szegedy et al. 2015,
    arXiv 1512.00567, section 7).
    """
    logits = logits.astype(jnp.float32)
    # A comparison and a sum instead of a gather: it shards over classes and its gradient is
    # elementwise, where that of a gather is a scatter.
    is_label = jnp.arange(logits.shape[-1]) == labels[..., None]
    target = jnp.where(is_label, logits, 0.0).sum(-1)
    if smoothing:
        target = (1.0 - smoothing) * target + smoothing * logits.mean(-1)
    return jax.nn.logsumexp(logits, axis=-1) - target


def soft_cross_entropy(logits: jax.Array, target_logits: jax.Array) -> jax.Array:
    """-sum_c softmax(target)_c log softmax(logits)_c, (...) from logits (..., C)."""
    target = jax.nn.softmax(target_logits.astype(jnp.float32))
    return -(target * jax.nn.log_softmax(logits.astype(jnp.float32))).sum(-1)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """1.0 where the label has the largest logit, (...) float32."""
    return (logits.argmax(-1) == labels).astype(jnp.float32)
